//! What is asked of the kernel's tap devices (linux/if_tun.h).

#![allow(unsafe_code, reason = "no safe wrapper of these ioctls is there")]

use std::ffi::{CStr, c_int, c_uint};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::net::packet::{HEADER, Offloads};

/// Frames without a protocol before them, and with a header of virtio's.
pub(super) const FLAGS: c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
pub(super) const MULTI_QUEUE: c_int = libc::IFF_MULTI_QUEUE;

/// Bits of TUNSETOFFLOAD.
const OFFLOADS: [(Offloads, c_uint); 6] = [
    (Offloads::CSUM, libc::TUN_F_CSUM),
    (Offloads::TSO4, libc::TUN_F_TSO4),
    (Offloads::TSO6, libc::TUN_F_TSO6),
    (Offloads::ECN, libc::TUN_F_TSO_ECN),
    (Offloads::USO4, libc::TUN_F_USO4),
    (Offloads::USO6, libc::TUN_F_USO6),
];

fn request(name: &CStr) -> io::Result<libc::ifreq> {
    // SAFETY: names, integers and pointers, all of which may be zero.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let bytes = name.to_bytes_with_nul();
    let place = request.ifr_name.get_mut(..bytes.len());
    let place = place.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    place.iter_mut().zip(bytes).for_each(|(place, byte)| *place = byte.cast_signed());
    Ok(request)
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether there is a network device of that name, where this thread is.
pub(super) fn exists(name: &CStr) -> bool {
    // SAFETY: a string that ends with zero, which is read only.
    unsafe { libc::if_nametoindex(name.as_ptr()) != 0 }
}

/// TUNSETIFF: makes the descriptor a queue of that device.
pub(super) fn set_interface(fd: BorrowedFd<'_>, name: &CStr, flags: c_int) -> io::Result<()> {
    let mut request = request(name)?;
    // Flags of this kind are 16 bits, the highest of which is none of these.
    request.ifr_ifru.ifru_flags = flags.try_into().unwrap_or(0);
    // SAFETY: the request is as this call has it, and lives longer than it.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) })
}

/// TUNGETIFF: name and flags of the device whose queue it is.
pub(super) fn interface(fd: BorrowedFd<'_>) -> io::Result<(String, c_int)> {
    let mut found = request(c"")?;
    // SAFETY: as above.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNGETIFF, &raw mut found) })?;
    let name = found.ifr_name.iter().take_while(|byte| **byte != 0).map(|byte| byte.cast_unsigned());
    let name = String::from_utf8_lossy(&name.collect::<Vec<_>>()).into_owned();
    // SAFETY: the kernel has written this member.
    let flags = unsafe { found.ifr_ifru.ifru_flags };
    Ok((name, c_int::from(flags.cast_unsigned())))
}

/// TUNSETVNETHDRSZ: the header is one with a number of buffers.
pub(super) fn set_header_size(fd: BorrowedFd<'_>) -> io::Result<()> {
    let size = c_int::try_from(HEADER).unwrap_or(c_int::MAX);
    // SAFETY: an int that is read.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) })
}

/// TUNSETOFFLOAD: what whoever reads frames takes over.
pub(super) fn set_offloads(fd: BorrowedFd<'_>, offloads: Offloads) -> io::Result<()> {
    let bits = OFFLOADS.iter().filter(|(offload, _)| offloads.contains(*offload));
    let bits = bits.fold(0, |bits, (_, bit)| bits | bit);
    // SAFETY: the argument is a number.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(bits)) })
}

/// TUNSETQUEUE: whether frames come by this queue, of several.
pub(super) fn set_queue(fd: BorrowedFd<'_>, attached: bool) -> io::Result<()> {
    let mut request = request(c"")?;
    let flags = if attached { libc::IFF_ATTACH_QUEUE } else { libc::IFF_DETACH_QUEUE };
    request.ifr_ifru.ifru_flags = flags.try_into().unwrap_or(0);
    // SAFETY: the request is as this call has it, and lives longer than it.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETQUEUE, &raw mut request) })
}

/// SIOCGIFMTU: of a device where this thread is.
pub(super) fn mtu(name: &CStr) -> io::Result<u16> {
    let kind = SocketType::DGRAM;
    let socket = socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None)?;
    let fd: RawFd = socket.as_fd().as_raw_fd();
    let mut request = request(name)?;
    // SAFETY: the request is as this call has it, and lives longer than it.
    check(unsafe { libc::ioctl(fd, libc::SIOCGIFMTU, &raw mut request) })?;
    // SAFETY: the kernel has written this member.
    let mtu = unsafe { request.ifr_ifru.ifru_mtu };
    Ok(u16::try_from(mtu).unwrap_or(u16::MAX))
}
