//! Sockets that take no descriptors, as far as the kernel has such: SO_PASSRIGHTS, since Linux 6.16.

#![allow(unsafe_code, reason = "no safe wrapper has this option")]

use std::os::fd::{AsFd, AsRawFd as _};

/// As most architectures number it. On others it is no option, or that of newer ones, and refused.
const SO_PASSRIGHTS: libc::c_int = 83;

/// Bytes of its value.
const SIZE: libc::socklen_t = 4;

/// Who sends a descriptor to it, or to what is accepted from it, fails from now on (EPERM). `false` if the kernel does not know that. What
/// is there already stays.
pub(super) fn take_no_descriptors(socket: impl AsFd) -> bool {
    pass_descriptors(socket, false)
}

/// The same, or the contrary.
pub(super) fn pass_descriptors(socket: impl AsFd, pass: bool) -> bool {
    let pass = libc::c_int::from(pass);
    let socket = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel reads as many bytes as `pass` has, which outlives the call.
    let set =
        unsafe { libc::setsockopt(socket, libc::SOL_SOCKET, SO_PASSRIGHTS, (&raw const pass).cast(), SIZE) };
    set == 0
}
