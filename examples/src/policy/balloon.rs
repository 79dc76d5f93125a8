//! A balloon whose pages the policy counts.

use std::fmt;
use std::io;

use vmm_devices::virtio::balloon::MemoryRelease;
use vmm_memory::vm_memory::GuestAddress;
use vmm_policy::{Action, Monitor, Object, Request, SubjectId};

use super::gate::Enforcement;

/// Gives memory back as another does, as far as the policy lets the guest: `allow any vm to use balloon`, `limit any vm to use balloon at 64
/// MiB per second`. What is refused stays the guest's, is counted as failed by the device, and the guest does not hear of it.
#[derive(Clone)]
pub struct PolicedBalloon<R> {
    monitor: Monitor,
    subject: SubjectId,
    release: R,
}

impl<R> fmt::Debug for PolicedBalloon<R> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PolicedBalloon").field("subject", &self.subject).finish_non_exhaustive()
    }
}

impl<R> PolicedBalloon<R> {
    /// For the balloon of that subject.
    #[must_use]
    pub fn new(enforcement: &Enforcement, subject: SubjectId, release: R) -> Self {
        Self { monitor: enforcement.monitor().clone(), subject, release }
    }
}

impl<R: MemoryRelease> MemoryRelease for PolicedBalloon<R> {
    fn release(&self, gpa: GuestAddress, len: u64) -> io::Result<()> {
        let request = Request::new(self.subject, Action::Use, Object::balloon()).bytes(len);
        if !self.monitor.authorize(&request).permits() {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the policy does not allow it"));
        }
        self.release.release(gpa, len)
    }

    fn reclaim(&self, gpa: GuestAddress, len: u64) -> io::Result<()> {
        self.release.reclaim(gpa, len)
    }
}
