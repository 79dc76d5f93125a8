//! What a virtual machine was started from.

use serde::{Deserialize, Serialize};

use super::Text;
use crate::digest::Digest;

/// One thing that was measured.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Measured {
    /// What: `kernel`, `initrd`, `command-line`, `cpu-model`, `policy`, `vmm`, or a name of the monitor's own.
    pub name: Text,
    /// The digest of its bytes.
    pub digest: Digest,
}

/// The measurement of a launch: the digests of what a virtual machine is started from, in the order of measuring, and one digest of
/// them all, which a policy's conditions and a verifier compare with the one they expect.
///
/// The launch digest is SHA-256 over `vmm-audit launch v1`, a zero byte, and for each thing the length of its name (8
/// bytes, big-endian), its name and its digest.
///
/// ```
/// use vmm_audit::event::Launch;
///
/// let launch = Launch::new().kernel(b"bzImage").initrd(b"cpio").command_line("console=ttyS0");
/// assert_ne!(launch.digest(), Launch::new().kernel(b"bzImage").initrd(b"cpio").digest());
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Launch {
    measured: Vec<Measured>,
}

impl Launch {
    /// Of nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the digest of whatever `name` says. An event has room for [`MAX_ATTRIBUTES`](super::MAX_ATTRIBUTES) of them.
    #[must_use]
    pub fn measure(mut self, name: impl Into<Text>, digest: Digest) -> Self {
        self.measured.push(Measured { name: name.into(), digest });
        self
    }

    /// Adds the kernel image.
    #[must_use]
    pub fn kernel(self, image: &[u8]) -> Self {
        self.measure("kernel", Digest::of(image))
    }

    /// Adds the initial file system.
    #[must_use]
    pub fn initrd(self, image: &[u8]) -> Self {
        self.measure("initrd", Digest::of(image))
    }

    /// Adds the kernel's command line.
    #[must_use]
    pub fn command_line(self, line: &str) -> Self {
        self.measure("command-line", Digest::of(line.as_bytes()))
    }

    /// Adds the CPU model: the bytes that describe it, such as its CPUID leaves.
    #[must_use]
    pub fn cpu_model(self, model: &[u8]) -> Self {
        self.measure("cpu-model", Digest::of(model))
    }

    /// Adds the policy that is in force at the launch, by its digest. No condition of that policy can ask for the launch digest then, which
    /// has the policy's own in it; one that comes into force later can.
    #[must_use]
    pub fn policy(self, digest: Digest) -> Self {
        self.measure("policy", digest)
    }

    /// Adds the monitor's own program, which is read from `/proc/self/exe`.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn vmm(self) -> std::io::Result<Self> {
        let program = std::fs::File::open("/proc/self/exe")?;
        Ok(self.measure("vmm", Digest::of_reader(program)?))
    }

    /// What was measured, in order.
    pub fn measured(&self) -> &[Measured] {
        &self.measured
    }

    /// The digest of all of it.
    pub fn digest(&self) -> Digest {
        let mut bytes = b"vmm-audit launch v1\0".to_vec();
        for measured in &self.measured {
            bytes.extend_from_slice(&(measured.name.as_str().len() as u64).to_be_bytes());
            bytes.extend_from_slice(measured.name.as_str().as_bytes());
            bytes.extend_from_slice(measured.digest.as_bytes());
        }
        Digest::of(&bytes)
    }
}
