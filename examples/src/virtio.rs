//! The virtio devices of the PC: which there are, where the guest finds them, and which modules of its kernel drive them.
//!
//! Over MMIO each device has registers of its own and an input of the I/O APIC, and the guest learns of both from the DSDT.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use vmm_devices::BusRange;
use vmm_devices::acpi::AcpiDevice;
use vmm_devices::virtio::block::{self, RawFile};

use vmm_devices::virtio::{
    Balloon, Block, EventLoop, Executor, Inline, LoopThread, Rng, VirtioDevice, VirtioMmio,
};
use vmm_memory::vm_memory::GuestMemoryAtomic;
use vmm_memory::{GuestMemoryMap, GuestRam};

use crate::pc::Pc;

/// How the guest finds the devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// Registers in memory, told by ACPI.
    Mmio,
}

/// Where the registers of the first device are; a page for each, in the hole below 4 GiB.
const REGISTERS: u64 = 0xd000_0000;
const PAGE: u64 = 0x1000;

/// Inputs of the I/O APIC above those of the ISA bus.
const FIRST_INPUT: u32 = 16;
const INPUTS: usize = 8;

/// The RAM of a machine as its devices have it.
type Ram = GuestMemoryAtomic<GuestMemoryMap>;

/// A device, and which module of the guest's kernel drives it.
struct Device {
    name: String,
    module: &'static str,
    device: Box<dyn VirtioDevice<Ram>>,
}

/// A disk of the guest's: a file of this machine, or a block device, taken for the disk's bytes whatever is in them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    /// Where it is here.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub read_only: bool,
}

impl FromStr for Disk {
    type Err = anyhow::Error;

    /// `FILE`, or `FILE,ro`.
    fn from_str(text: &str) -> Result<Self> {
        let (path, read_only) = text.strip_suffix(",ro").map_or((text, false), |path| (path, true));
        ensure!(!path.is_empty(), "{text:?} is not FILE[,ro]");
        Ok(Self { path: path.into(), read_only })
    }
}

/// What a machine has.
pub struct VirtioDevices {
    transport: Transport,
    devices: Vec<Device>,
    /// What serves them, unless that is the vCPU's own thread.
    served_by: Option<LoopThread>,
}

/// What goes on as long as the machine does.
#[must_use]
pub struct Served(#[expect(dead_code, reason = "its thread ends when it is dropped")] Option<LoopThread>);

impl VirtioDevices {
    /// None yet. A thread of their own serves them, or, for runs that can be had again, the vCPU's.
    ///
    /// # Errors
    /// If the host refuses the thread.
    pub fn new(transport: Transport, deterministic: bool) -> Result<Self> {
        let start = Instant::now();
        let clock = move || u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let thread = || EventLoop::new(clock)?.spawn("virtio");
        let served_by =
            if deterministic { None } else { Some(thread().context("a thread for virtio devices")?) };
        Ok(Self { transport, devices: Vec::new(), served_by })
    }

    /// A disk. Its name, as the guest finds it (`/dev/disk/by-id`, sysfs), is that of the file.
    ///
    /// # Errors
    /// If the file cannot be opened, or is no disk.
    pub fn disk(self, disk: &Disk) -> Result<Self> {
        let Disk { path, read_only } = disk;
        let shown = path.display();
        let file = RawFile::open(path, *read_only).with_context(|| format!("disk {shown}"))?;
        let name = path.file_name().map(|name| name.as_encoded_bytes().to_vec()).unwrap_or_default();
        let serial = name.get(..name.len().min(block::ID_BYTES)).unwrap_or_default();
        let device = Block::builder(Arc::new(file)).read_only(*read_only).serial(serial).build();
        let device = device.with_context(|| format!("disk {shown}"))?;
        self.add(format!("disk {shown}"), "virtio_blk", Box::new(device))
    }

    /// A balloon of so many MiB, which the guest is to give back of `ram`.
    ///
    /// # Errors
    /// If it is more than the guest can have.
    pub fn balloon(self, ram: &GuestRam, mib: u64) -> Result<Self> {
        let pages = u32::try_from(mib << 8).ok().filter(|pages| u64::from(*pages) << 12 <= ram.size());
        let pages =
            pages.with_context(|| format!("a balloon of {mib} MiB in {} MiB of RAM", ram.size() >> 20))?;
        let device = Balloon::builder(ram.clone()).target(pages).build();
        self.add("balloon".to_owned(), "virtio_balloon", Box::new(device))
    }

    /// An entropy device, with the host's random numbers. With `seed`, its numbers are the same each time.
    ///
    /// # Errors
    /// If the host has none, or no input is left.
    pub fn entropy(self, seed: Option<&[u8]>) -> Result<Self> {
        let random: Box<dyn Read + Send> = match seed {
            Some(seed) => Box::new(blake3::Hasher::new().update(seed).finalize_xof()),
            None => Box::new(File::open("/dev/urandom").context("opening /dev/urandom")?),
        };
        self.add("entropy device".to_owned(), "virtio_rng", Box::new(Rng::new(random)))
    }

    fn add(mut self, name: String, module: &'static str, device: Box<dyn VirtioDevice<Ram>>) -> Result<Self> {
        ensure!(
            self.devices.len() < INPUTS,
            "more than {INPUTS} virtio devices: no input of the I/O APIC is left"
        );
        self.devices.push(Device { name, module, device });
        Ok(self)
    }

    /// Modules of the guest's kernel that are to be loaded.
    #[must_use]
    pub fn modules(&self) -> Vec<&'static str> {
        let Transport::Mmio = self.transport;
        let mut modules = vec!["virtio_mmio"];
        for device in &self.devices {
            if !modules.contains(&device.module) {
                modules.push(device.module);
            }
        }
        modules
    }

    /// What the ACPI tables say of them.
    #[must_use]
    pub fn described(&self) -> Vec<AcpiDevice> {
        let places = places().take(self.devices.len());
        places.map(|(index, base, input)| AcpiDevice::virtio_mmio(index, base, PAGE, input)).collect()
    }

    /// Puts them on the machine's bus.
    ///
    /// # Errors
    /// If a place is taken.
    pub fn attach(self, pc: &Pc, ram: &GuestRam) -> Result<Served> {
        let executor: Arc<dyn Executor> = match &self.served_by {
            Some(thread) => thread.executor(),
            None => Arc::new(Inline),
        };
        for (Device { name, device, .. }, (_, base, input)) in self.devices.into_iter().zip(places()) {
            let failed = name.clone();
            let transport = VirtioMmio::builder(device, ram.address_space(), pc.io_apic_line(input)?)
                .executor(Arc::clone(&executor))
                .on_failure(move |error| tracing::warn!(device = failed, %error, "a virtio device gave up"))
                .build()?;
            pc.attach_mmio(&name, BusRange::new(base, PAGE), Arc::new(Mutex::new(transport)))?;
        }
        Ok(Served(self.served_by))
    }
}

/// Number, registers and input of each device.
fn places() -> impl Iterator<Item = (u32, u64, u32)> {
    (0..).map(|index| (index, REGISTERS + u64::from(index) * PAGE, FIRST_INPUT + index))
}
