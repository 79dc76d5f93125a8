//! What the monitor does with a block device while the driver uses it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::Shared;
use super::config::SECTOR;
use crate::interrupt::lock;
use crate::virtio::rate::Limits;

/// Why a disk is not made that large.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResizeError {
    /// The backend does not say how large it is.
    #[error("the disk's backend does not say how large it is")]
    Backend(#[from] io::Error),
    /// It is no number of sectors.
    #[error(
        "a disk of {bytes} bytes has no whole number of sectors; make it a multiple of 512 bytes (`truncate --size=%512`)"
    )]
    Sectors {
        /// How large it was to be.
        bytes: u64,
    },
    /// The backend is smaller.
    #[error(
        "a disk of {bytes} bytes needs as large a backend, and it has {available}; make that larger first"
    )]
    Beyond {
        /// How large it was to be.
        bytes: u64,
        /// How large the backend is.
        available: u64,
    },
}

/// Reaches a [`Block`](super::Block) that a transport has taken over. Clones reach the same one.
#[derive(Clone, Debug)]
pub struct BlockHandle(pub(super) Arc<Shared>);

impl BlockHandle {
    /// How large the driver is told the disk is, in bytes.
    pub fn capacity(&self) -> u64 {
        self.0.sectors.load(Ordering::SeqCst).saturating_mul(SECTOR)
    }

    /// Makes the disk as large as its backend is now. Who makes a backend smaller calls [`BlockHandle::set_capacity`] and
    /// [`BlockHandle::settle`] first: a write that is under way would make a file larger again.
    ///
    /// # Errors
    /// If that is no whole number of sectors; nothing changes.
    pub fn resize(&self) -> Result<(), ResizeError> {
        self.set_capacity(self.0.disk.size()?)
    }

    /// Makes the disk `bytes` large, a multiple of 512, and tells the driver if that is another size. Requests that were let in
    /// before end as if nothing had happened, and it does not wait for them: that is what [`BlockHandle::settle`] is for. Later ones
    /// go to the new end.
    ///
    /// # Errors
    /// If it is no whole number of sectors, or the backend has less; nothing changes.
    pub fn set_capacity(&self, bytes: u64) -> Result<(), ResizeError> {
        let sectors = sectors(bytes)?;
        let available = self.0.disk.size()?;
        if bytes > available {
            return Err(ResizeError::Beyond { bytes, available });
        }
        let mut generation = lock(&self.0.generation);
        let before = self.0.sectors.swap(sectors, Ordering::SeqCst);
        if before == sectors {
            return Ok(());
        }
        if before > sectors {
            self.0.shrinks.add();
        }
        // A driver that reads the configuration waits for the lock: it sees both change at once.
        *generation = generation.wrapping_add(1);
        drop(generation);
        let link = lock(&self.0.active).as_ref().map(|active| Arc::clone(&active.link));
        if let Some(link) = link {
            link.config_changed();
        }
        Ok(())
    }

    /// Waits until no request is under way that was let in by a larger disk than there is now, `timeout` at most; whether none is. Then
    /// what lies beyond [`BlockHandle::capacity`] can be cut off: nothing touches it.
    ///
    /// For another thread than those that serve the device's queues or end its requests, which cannot end while they wait here:
    /// there it is `false` after that time. So it is for a device that has failed, until its driver resets it.
    #[must_use]
    pub fn settle(&self, timeout: Duration) -> bool {
        let doorbells = lock(&self.0.active).as_ref().map(|active| Arc::clone(&active.doorbells));
        if let Some(doorbells) = doorbells {
            // A worker that has nothing to do says so when it is called.
            doorbells.ring_all();
        }
        self.0.shrinks.wait(timeout)
    }

    /// Other rate limits, for all devices that share them; `false` if this one was built without a limiter. Requests that wait are
    /// looked at again.
    pub fn set_limits(&self, limits: Limits) -> bool {
        self.0.rate.as_ref().map(|rate| rate.set_limits(limits)).is_some()
    }
}

/// Sectors of so many bytes.
pub(super) fn sectors(bytes: u64) -> Result<u64, ResizeError> {
    if bytes.is_multiple_of(SECTOR) { Ok(bytes / SECTOR) } else { Err(ResizeError::Sectors { bytes }) }
}
