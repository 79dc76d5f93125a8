//! How memory goes back to the host.

use std::io;
use std::sync::Arc;

use vmm_memory::GuestRam;
use vmm_memory::vm_memory::GuestAddress;

/// Gives guest memory back to the host, and takes it again. Called by workers, of several queues at once.
///
/// Ranges are whole [pages](super::PAGE) within one region of RAM, as it was when the request was looked at. They may be released that are
/// released already, or in use: what the guest reads there next is its own affair.
pub trait MemoryRelease: Send + Sync {
    /// The guest does not need the contents of `len` bytes at `gpa`, until it writes there again. For what was in the balloon,
    /// [`MemoryRelease::reclaim`] may come before that; for free pages that it reported, nothing does.
    ///
    /// # Errors
    /// Whatever keeps the memory; that is counted, and the guest does not hear of it.
    fn release(&self, gpa: GuestAddress, len: u64) -> io::Result<()>;

    /// The guest uses them again, or is about to: it waits for this only with VIRTIO_BALLOON_F_MUST_TELL_HOST
    /// ([`BalloonBuilder::must_tell_host`](super::BalloonBuilder::must_tell_host)). Nothing need be done where released memory comes back
    /// when it is touched.
    ///
    /// # Errors
    /// As above.
    fn reclaim(&self, gpa: GuestAddress, len: u64) -> io::Result<()> {
        let _ = (gpa, len);
        Ok(())
    }
}

/// [`GuestRam::discard`].
impl MemoryRelease for GuestRam {
    fn release(&self, gpa: GuestAddress, len: u64) -> io::Result<()> {
        self.discard(gpa, len).map_err(io::Error::other)
    }
}

impl<R: MemoryRelease + ?Sized> MemoryRelease for Arc<R> {
    fn release(&self, gpa: GuestAddress, len: u64) -> io::Result<()> {
        (**self).release(gpa, len)
    }

    fn reclaim(&self, gpa: GuestAddress, len: u64) -> io::Result<()> {
        (**self).reclaim(gpa, len)
    }
}
