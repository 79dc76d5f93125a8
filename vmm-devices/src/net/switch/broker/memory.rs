//! The memory that client and broker have in common: two rings, one behind the other, the client's first.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vmm_memory::SharedMemory;
use vmm_memory::vm_memory::{FileOffset, MmapRegion};

use super::BrokerError;
use crate::net::switch::ring::{CONTROL, Consumer, Producer, check_size};

/// The type of memory files that are no huge pages (Linux, include/uapi/linux/magic.h).
const TMPFS: u64 = 0x0102_1994;

/// Which ring is whose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Side {
    Client,
    Broker,
}

/// Bytes of the memory for two rings of `size` bytes of frames.
fn bytes(size: usize) -> u64 {
    2 * (CONTROL + size) as u64
}

fn wrong(reason: impl ToString) -> BrokerError {
    BrokerError::Memory { reason: reason.to_string() }
}

/// Memory that this side has made.
pub(super) fn create(size: usize) -> Result<(OwnedFd, Arc<MmapRegion<()>>), BrokerError> {
    check_size(size)?;
    let memory = SharedMemory::create("net-switch", bytes(size)).map_err(wrong)?;
    // The other side cannot seal it against this one's writes.
    memory.lock_seals().map_err(wrong)?;
    let fd = memory.try_clone_fd().map_err(wrong)?;
    Ok((memory.try_clone_fd().map_err(wrong)?, map(fd, size)?))
}

/// Memory that the other side says it has made. `fd` may be of anything.
pub(super) fn take(fd: impl AsFd, size: usize) -> Result<Arc<MmapRegion<()>>, BrokerError> {
    check_size(size)?;
    // Only memory has seals. Before that is known no file system is called, which may be one that answers when it likes.
    rustix::fs::fcntl_get_seals(&fd).map_err(|_| wrong("it has no seals, as a memfd has"))?;
    // Huge pages that are not there end who touches them.
    let kind = rustix::fs::fstatfs(&fd)?.f_type;
    if u64::try_from(kind) != Ok(TMPFS) {
        return Err(wrong("it is no memfd of ordinary pages"));
    }
    let memory = SharedMemory::from_fd(fd.as_fd().try_clone_to_owned()?).map_err(wrong)?;
    if memory.size() != bytes(size) {
        let (has, wanted) = (memory.size(), bytes(size));
        return Err(wrong(format!("it has {has} bytes, and two rings of {size} take {wanted}")));
    }
    map(memory.as_fd().try_clone_to_owned()?, size)
}

fn map(fd: OwnedFd, size: usize) -> Result<Arc<MmapRegion<()>>, BrokerError> {
    let len = usize::try_from(bytes(size)).map_err(wrong)?;
    let region = MmapRegion::from_file(FileOffset::new(File::from(fd), 0), len);
    Ok(Arc::new(region.map_err(wrong)?))
}

/// The ends of the two rings, which are empty, for that side: what it sends, and what it receives.
pub(super) fn ends(
    memory: &Arc<MmapRegion<()>>,
    size: usize,
    side: Side,
) -> Result<(Producer, Consumer), BrokerError> {
    let places = [0, CONTROL + size];
    let [out, back] = if side == Side::Client { places } else { [CONTROL + size, 0] };
    Ok((Producer::new(Arc::clone(memory), out, size)?, Consumer::new(Arc::clone(memory), back, size)?))
}
