//! Reads and writes of the guest's memory by the kernel: of files at positions, of devices and sockets a message at a time.

#![allow(
    unsafe_code,
    reason = "a slice of guest memory is no Rust slice, so no safe wrapper of these calls takes it"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use smallvec::SmallVec;
use vmm_memory::vm_memory::VolatileSlice;

/// What the kernel takes at once (IOV_MAX).
const MOST: usize = 1024;

/// Addresses as the kernel takes them.
pub(crate) type Vectors = SmallVec<[libc::iovec; 4]>;

/// Those of the first slices, as many as the kernel takes. They are good as long as the slices' memory is there.
pub(crate) fn vectors(buffers: &[VolatileSlice<'_>]) -> Vectors {
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
pub(crate) fn read_at(file: BorrowedFd<'_>, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
    let vectors = vectors(buffers);
    let (count, offset) = arguments(&vectors, offset)?;
    // SAFETY: each vector is a slice of memory that may be written, whoever else uses it, as long as `buffers` is borrowed.
    let read = unsafe { libc::preadv(file.as_raw_fd(), vectors.as_ptr(), count, offset) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// pwritev(2); pwritev2(2) with RWF_DSYNC if `durable`.
pub(crate) fn write_at(
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

/// The first vector, for bytes of the caller's own before those of the guest.
fn before(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

/// `head`, and the slices behind it.
fn headed(head: libc::iovec, buffers: &[VolatileSlice<'_>]) -> SmallVec<[libc::iovec; 24]> {
    let vector = |slice: &VolatileSlice<'_>| libc::iovec {
        iov_base: slice.ptr_guard_mut().as_ptr().cast(),
        iov_len: slice.len(),
    };
    std::iter::once(head).chain(buffers.iter().map(vector)).collect()
}

/// Slices that a message may have at most.
pub(crate) const MOST_SLICES: usize = MOST - 1;

/// Reads a message with readv(2): the first bytes into `head`, what follows into `buffers`, [`MOST_SLICES`] at most. How many bytes.
pub(crate) fn read_message(
    file: BorrowedFd<'_>,
    head: &mut [u8],
    buffers: &[VolatileSlice<'_>],
) -> io::Result<usize> {
    let head = libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: head.len() };
    let vectors = headed(head, buffers);
    let count = count(&vectors)?;
    // SAFETY: the first vector is `head`, which nobody else uses meanwhile; the others are slices of memory that may be written, whoever
    // else uses it, as long as `buffers` is borrowed.
    let read = unsafe { libc::readv(file.as_raw_fd(), vectors.as_ptr(), count) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// Writes a message of `head` and `buffers` with writev(2). How many bytes.
pub(crate) fn write_message(
    file: BorrowedFd<'_>,
    head: &[u8],
    buffers: &[VolatileSlice<'_>],
) -> io::Result<usize> {
    let vectors = headed(before(head), buffers);
    let count = count(&vectors)?;
    // SAFETY: the kernel reads the vectors only. The first is `head`, the others are slices of memory that may be read as long as `buffers`
    // is borrowed.
    let written = unsafe { libc::writev(file.as_raw_fd(), vectors.as_ptr(), count) };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}

/// Receives a message with recvmsg(2), as [`read_message`]; how many bytes, and whether some of it found no room.
pub(crate) fn receive_message(
    socket: BorrowedFd<'_>,
    head: &mut [u8],
    buffers: &[VolatileSlice<'_>],
) -> io::Result<(usize, bool)> {
    let head = libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: head.len() };
    let mut vectors = headed(head, buffers);
    whole(&vectors)?;
    let mut message = message(&mut vectors);
    // SAFETY: as in `read_message`; the message names nothing else.
    let read = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
    Ok((read, message.msg_flags & libc::MSG_TRUNC != 0))
}

/// Sends a message of `head` and `buffers` with sendmsg(2). How many bytes.
pub(crate) fn send_message(
    socket: BorrowedFd<'_>,
    head: &[u8],
    buffers: &[VolatileSlice<'_>],
) -> io::Result<usize> {
    let mut vectors = headed(before(head), buffers);
    whole(&vectors)?;
    let message = message(&mut vectors);
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: as in `write_message`; the message names nothing else.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

fn count(vectors: &[libc::iovec]) -> io::Result<libc::c_int> {
    whole(vectors)?;
    vectors.len().try_into().map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}

/// A message is moved as a whole or not at all.
fn whole(vectors: &[libc::iovec]) -> io::Result<()> {
    if vectors.len() <= MOST { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
}

/// A message of these vectors, for nobody in particular, with nothing beside it.
fn message(vectors: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: integers and pointers may be zero. Some systems have more fields than others, so there is no other way.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = vectors.as_mut_ptr();
    // A usize on some systems, and an int on others.
    #[allow(clippy::useless_conversion, reason = "not on all systems")]
    {
        message.msg_iovlen = vectors.len().try_into().unwrap_or(0);
    }
    message
}
