//! Positioned reads and writes of the guest's memory by the kernel.

#![allow(
    unsafe_code,
    reason = "a slice of guest memory is no Rust slice, so no safe wrapper of preadv takes it"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use smallvec::SmallVec;
use vmm_memory::vm_memory::VolatileSlice;

/// What the kernel takes at once (IOV_MAX).
const MOST: usize = 1024;

/// Addresses as the kernel takes them.
pub(super) type Vectors = SmallVec<[libc::iovec; 4]>;

/// Those of the first slices, as many as the kernel takes. They are good as long as the slices' memory is there.
pub(super) fn vectors(buffers: &[VolatileSlice<'_>]) -> Vectors {
    let vector = |slice: &VolatileSlice<'_>| libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    };
    buffers.iter().take(MOST).map(vector).collect()
}

/// Position and count as the system calls take them.
fn arguments(vectors: &Vectors, offset: u64) -> io::Result<(libc::c_int, libc::off_t)> {
    let invalid = |_| io::Error::from(io::ErrorKind::InvalidInput);
    Ok((vectors.len().try_into().map_err(invalid)?, offset.try_into().map_err(invalid)?))
}

/// preadv(2).
pub(super) fn read_at(file: BorrowedFd<'_>, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
    let vectors = vectors(buffers);
    let (count, offset) = arguments(&vectors, offset)?;
    // SAFETY: each vector is a slice of memory that may be written, whoever else uses it, as long as `buffers` is borrowed.
    let read = unsafe { libc::preadv(file.as_raw_fd(), vectors.as_ptr(), count, offset) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// pwritev(2); pwritev2(2) with RWF_DSYNC if `durable`.
pub(super) fn write_at(
    file: BorrowedFd<'_>,
    buffers: &[VolatileSlice<'_>],
    offset: u64,
    durable: bool,
) -> io::Result<usize> {
    let vectors = vectors(buffers);
    let (count, offset) = arguments(&vectors, offset)?;
    let written = if durable {
        // SAFETY: each vector is a slice of memory that may be read as long as `buffers` is borrowed.
        unsafe { libc::pwritev2(file.as_raw_fd(), vectors.as_ptr(), count, offset, libc::RWF_DSYNC) }
    } else {
        // SAFETY: as above.
        unsafe { libc::pwritev(file.as_raw_fd(), vectors.as_ptr(), count, offset) }
    };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}
