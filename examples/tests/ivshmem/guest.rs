//! Guests at a server of the test's own.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vmm_devices::channel::{AllowAll, Gatekeeper};
use vmm_devices::ivshmem::{Region, Server};
use vmm_examples::debian::{self, Series};
use vmm_memory::vm_memory::{Bytes as _, GuestAddress, MemoryRegionAddress};
use vmm_memory::{Access, SharedMapping, SharedMemory};

/// Nothing that a guest does takes so long, on a host that has much else to do.
pub(crate) const LONGEST: Duration = Duration::from_secs(200);

pub(crate) const SIZE: u64 = 4 << 20;

/// The program that uses the device, in the guest.
pub(crate) const PROGRAM: &str = env!("IVSHMEM_GUEST");

/// Whether Debian's packages are to be had.
pub(crate) fn packages(test: &str) -> bool {
    match debian::kernel(Series::V6_1).and_then(|_| debian::busybox()) {
        Ok(_) => true,
        Err(error) => {
            println!("{test}: skipped: {error:#}");
            false
        }
    }
}

/// A server, and its memory as the test sees it.
pub(crate) struct Place {
    pub(crate) server: Server,
    pub(crate) memory: SharedMapping,
    directory: tempfile::TempDir,
}

impl Place {
    /// The first `writers` clients may write.
    pub(crate) fn new(writers: usize) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let memory = SharedMemory::create("guests", SIZE).unwrap();
        let mapping = memory.map(GuestAddress(0), Access::ReadWrite).unwrap();
        let came = std::sync::atomic::AtomicUsize::new(0);
        let server = Server::builder(Region::new("guests", memory).unwrap(), 2, Gatekeeper::new(AllowAll))
            .access(move |_| {
                let number = came.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                if number < writers { Access::ReadWrite } else { Access::ReadOnly }
            })
            .bind(&directory.path().join("socket"))
            .unwrap();
        Self { server, memory: mapping, directory }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.directory.path().join("socket")
    }

    pub(crate) fn word(&self, offset: u64) -> u64 {
        self.memory.region().read_obj(MemoryRegionAddress(offset)).unwrap()
    }

    pub(crate) fn bytes(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.region().read_slice(&mut bytes, MemoryRegionAddress(offset)).unwrap();
        bytes
    }

    /// Waits for so many clients, so that positions are known.
    pub(crate) fn has(&self, clients: usize) {
        wait_for(&format!("{clients} clients"), || (self.server.peers().len() == clients).then_some(()));
    }
}

/// What `look` finds, when it finds something.
pub(crate) fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < LONGEST, "in vain: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A guest of `linux` that runs a shell line; killed when it is dropped.
pub(crate) struct Guest {
    pub(crate) child: Child,
}

impl Guest {
    /// `option` is what `--ivshmem` says beside the path.
    pub(crate) fn start(socket: &Path, option: &str, line: &str) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_linux"))
            .args(["--backend", "translate", "--memory", "128", "--seconds", "180", "--ivshmem"])
            .arg(format!("path={},vectors=2{option}", socket.display()))
            .args(["--add", &format!("{PROGRAM}:/bin/ivshmem"), "--command", line])
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self { child }
    }

    /// What it has printed, when it has ended.
    pub(crate) fn output(mut self) -> String {
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if begun.elapsed() > LONGEST {
                self.child.kill().unwrap();
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let (mut text, mut errors) = (String::new(), String::new());
        self.child.stdout.as_mut().unwrap().read_to_string(&mut text).unwrap();
        self.child.stderr.as_mut().unwrap().read_to_string(&mut errors).unwrap();
        assert!(status.success(), "{status} after {:?}\n{text}\n{errors}", begun.elapsed());
        text
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // One that has ended is none to kill.
        let (Ok(()) | Err(_)) = self.child.kill();
        let (Ok(_) | Err(_)) = self.child.wait();
    }
}

/// Its checksum, as sha256sum prints it.
pub(crate) fn sha256(data: &[u8]) -> String {
    use std::io::Write as _;
    let mut child = Command::new("sha256sum").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(data).unwrap();
    let output = child.wait_with_output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}
