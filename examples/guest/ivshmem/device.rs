//! The function in sysfs: its BARs as files to map, its configuration space as one to write, and interrupts by `uio_pci_generic`.

use std::ffi::{c_int, c_long, c_short, c_ulong, c_void};
use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

const READ: c_int = 1;
const WRITE: c_int = 2;
const SHARED: c_int = 1;

unsafe extern "C" {
    fn mmap(
        address: *mut c_void,
        length: usize,
        prot: c_int,
        flags: c_int,
        fd: c_int,
        offset: c_long,
    ) -> *mut c_void;
    fn poll(fds: *mut PollFd, count: c_ulong, timeout: c_int) -> c_int;
}

#[repr(C)]
struct PollFd {
    fd: c_int,
    events: c_short,
    revents: c_short,
}

const POLLIN: c_short = 1;

/// Registers of BAR 0, in units of 4 bytes.
const MASK: usize = 0;
const STATUS: usize = 1;
const POSITION: usize = 2;
const DOORBELL: usize = 3;

/// A BAR, mapped for as long as the program runs.
struct Bar {
    base: *mut u8,
    size: usize,
}

impl Bar {
    fn map(directory: &Path, index: usize) -> Result<Self, String> {
        let path = directory.join(format!("resource{index}"));
        let wrong = |error: std::io::Error| format!("{}: {error}", path.display());
        let file = OpenOptions::new().read(true).write(true).open(&path).map_err(wrong)?;
        let size = file.metadata().map_err(wrong)?.len() as usize;
        // A BAR that is smaller than a page is a page to mmap.
        // SAFETY: new pages wherever the kernel likes.
        let base =
            unsafe { mmap(std::ptr::null_mut(), size.max(4096), READ | WRITE, SHARED, file.as_raw_fd(), 0) };
        if base.addr() == usize::MAX {
            return Err(wrong(std::io::Error::last_os_error()));
        }
        Ok(Self { base: base.cast(), size })
    }

    fn word(&self, index: usize) -> *mut u32 {
        assert!(index * 4 < self.size);
        self.base.cast::<u32>().wrapping_add(index)
    }
}

pub(crate) struct Device {
    directory: PathBuf,
    registers: Bar,
    memory: Bar,
}

impl Device {
    /// The first that there is.
    pub(crate) fn find() -> Result<Self, String> {
        let all = fs::read_dir("/sys/bus/pci/devices").map_err(|error| format!("PCI: {error}"))?;
        let is = |path: &Path, name: &str, value: &str| {
            fs::read_to_string(path.join(name)).is_ok_and(|text| text.trim() == value)
        };
        let directory = all
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| is(path, "vendor", "0x1af4") && is(path, "device", "0x1110"))
            .ok_or("there is no ivshmem device")?;
        // Decoding is off until somebody wants the device.
        match fs::write(directory.join("enable"), "1") {
            // A driver has it, and has done so.
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {}
            result => result.map_err(|error| format!("enable: {error}"))?,
        }
        let (registers, memory) = (Bar::map(&directory, 0)?, Bar::map(&directory, 2)?);
        Ok(Self { directory, registers, memory })
    }

    fn load_register(&self, index: usize) -> u32 {
        // SAFETY: within the BAR, aligned.
        unsafe { self.registers.word(index).read_volatile() }
    }

    fn store_register(&self, index: usize, value: u32) {
        // SAFETY: within the BAR, aligned.
        unsafe { self.registers.word(index).write_volatile(value) }
    }

    pub(crate) fn position(&self) -> u32 {
        self.load_register(POSITION)
    }

    pub(crate) fn ring(&self, peer: u64, vector: u64) {
        self.store_register(DOORBELL, (peer << 16 | vector) as u32);
    }

    /// Interrupt Status, which is cleared by that.
    pub(crate) fn take_status(&self) -> u32 {
        self.load_register(STATUS)
    }

    pub(crate) fn size(&self) -> usize {
        self.memory.size
    }

    fn place(&self, offset: u64, length: usize) -> *mut u8 {
        let offset = offset as usize;
        assert!(offset <= self.memory.size && length <= self.memory.size - offset, "beyond the memory");
        self.memory.base.wrapping_add(offset)
    }

    pub(crate) fn write(&self, offset: u64, data: &[u8]) {
        let to = self.place(offset, data.len());
        // SAFETY: that many bytes are there; nobody here has a reference to them.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) }
    }

    pub(crate) fn read_into(&self, offset: u64, data: &mut [u8]) {
        let from = self.place(offset, data.len());
        // SAFETY: as above.
        unsafe { std::ptr::copy_nonoverlapping(from, data.as_mut_ptr(), data.len()) }
    }

    pub(crate) fn read(&self, offset: u64, length: u64) -> Vec<u8> {
        let mut data = vec![0; length as usize];
        self.read_into(offset, &mut data);
        data
    }

    pub(crate) fn word(&self, offset: u64) -> u64 {
        // SAFETY: 8 bytes are there; the kernel maps pages, and offsets of words are multiples of 8.
        unsafe { self.place(offset & !7, 8).cast::<u64>().read_volatile() }
    }

    pub(crate) fn store(&self, offset: u64, value: u64) {
        // SAFETY: as above.
        unsafe { self.place(offset & !7, 8).cast::<u64>().write_volatile(value) }
    }

    fn config(&self) -> Result<File, String> {
        let path = self.directory.join("config");
        OpenOptions::new().read(true).write(true).open(path).map_err(|error| format!("config: {error}"))
    }

    /// Turns MSI-X on, with rings for `entry` as messages of that vector for processor 0.
    pub(crate) fn arm(&self, entry: u64, vector: u64) -> Result<(), String> {
        let table = Bar::map(&self.directory, 1)?;
        let config = self.config()?;
        let wrong = |error: std::io::Error| format!("config: {error}");
        // Without being root it would be 64 bytes.
        let mut space = [0; 256];
        config.read_exact_at(&mut space, 0).map_err(wrong)?;
        let mut at = usize::from(space[0x34]);
        while at != 0 && space[at] != 0x11 {
            at = usize::from(space[at + 1]);
        }
        if at == 0 {
            return Err("the device has no MSI-X".to_owned());
        }
        // Bus master, as the message is a write to memory.
        config.write_all_at(&[space[4] | 4], 4).map_err(wrong)?;
        config.write_all_at(&[0x80], at as u64 + 3).map_err(wrong)?;
        for (index, value) in [(0, 0xfee0_0000), (1, 0), (2, vector as u32), (3, 0)] {
            // SAFETY: within the BAR, aligned.
            unsafe { table.word(entry as usize * 4 + index).write_volatile(value) }
        }
        Ok(())
    }
}

/// Interrupts of the device's pin, by its driver.
pub(crate) struct Interrupts<'a> {
    device: &'a Device,
    uio: File,
    config: File,
}

impl<'a> Interrupts<'a> {
    pub(crate) fn of(device: &'a Device) -> Result<Self, String> {
        let driver = Path::new("/sys/bus/pci/drivers/uio_pci_generic");
        if !device.directory.join("uio").exists() {
            // It is there by itself if it was told of the device before.
            let (Ok(()) | Err(_)) = fs::write(driver.join("new_id"), "1af4 1110");
        }
        let name = fs::read_dir(device.directory.join("uio"))
            .map_err(|error| format!("uio_pci_generic has not taken the device: {error}"))?
            .find_map(|entry| Some(entry.ok()?.file_name()))
            .ok_or("uio_pci_generic has no device")?;
        let path = Path::new("/dev").join(name);
        let uio = OpenOptions::new().read(true).write(true).open(&path);
        let uio = uio.map_err(|error| format!("{}: {error}", path.display()))?;
        let interrupts = Self { device, uio, config: device.config()? };
        device.store_register(MASK, 1);
        interrupts.allow()?;
        Ok(interrupts)
    }

    /// The driver disables the pin at each interrupt (Linux, Documentation/driver-api/uio-howto): bit 10 of the command register.
    fn allow(&self) -> Result<(), String> {
        let wrong = |error: std::io::Error| format!("config: {error}");
        let mut high = [0];
        self.config.read_exact_at(&mut high, 5).map_err(wrong)?;
        self.config.write_all_at(&[high[0] & !4], 5).map_err(wrong)
    }

    /// For the next one.
    pub(crate) fn wait(&mut self, timeout: Duration) -> Result<(), String> {
        let mut fd = PollFd { fd: self.uio.as_raw_fd(), events: POLLIN, revents: 0 };
        let milliseconds = timeout.as_millis() as c_int;
        // SAFETY: one entry.
        if unsafe { poll(&raw mut fd, 1, milliseconds) } != 1 {
            let status = self.device.take_status();
            let mut command = [0; 4];
            let (Ok(()) | Err(_)) = self.config.read_exact_at(&mut command, 4);
            return Err(format!(
                "no interrupt within {milliseconds} ms; Interrupt Status {status}, command and status {command:x?}"
            ));
        }
        let mut count = [0; 4];
        self.uio.read_exact(&mut count).map_err(|error| format!("uio: {error}"))?;
        // The level goes first, or the pin would interrupt again at once.
        self.device.take_status();
        self.allow()?;
        std::io::stdout().flush().map_err(|error| error.to_string())
    }
}
