//! Sockets of AF_VSOCK, which std does not have.

use std::ffi::{c_int, c_void};
use std::io;

const AF_VSOCK: u16 = 40;
/// SO_VM_SOCKETS_CONNECT_TIMEOUT, with a `struct timeval` of 64 bits.
const CONNECT_TIMEOUT: c_int = 6;
const SHUT_WR: c_int = 1;
const MSG_NOSIGNAL: c_int = 0x4000;

/// `struct sockaddr_vm` (Linux, include/uapi/linux/vm_sockets.h).
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    rest: [u8; 4],
}

unsafe extern "C" {
    fn socket(domain: c_int, of: c_int, protocol: c_int) -> c_int;
    fn connect(socket: c_int, address: *const Address, len: u32) -> c_int;
    fn bind(socket: c_int, address: *const Address, len: u32) -> c_int;
    fn listen(socket: c_int, backlog: c_int) -> c_int;
    fn accept(socket: c_int, address: *mut Address, len: *mut u32) -> c_int;
    fn send(socket: c_int, data: *const c_void, len: usize, flags: c_int) -> isize;
    fn recv(socket: c_int, data: *mut c_void, len: usize, flags: c_int) -> isize;
    fn setsockopt(socket: c_int, level: c_int, name: c_int, value: *const c_void, len: u32) -> c_int;
    fn shutdown(socket: c_int, how: c_int) -> c_int;
    fn close(socket: c_int) -> c_int;
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Stream,
    SeqPacket,
}

pub struct Socket(c_int);

impl Socket {
    fn new(kind: Kind) -> io::Result<Self> {
        let of = if kind == Kind::Stream { 1 } else { 5 };
        // SAFETY: numbers alone.
        check(unsafe { socket(AF_VSOCK.into(), of, 0) }).map(Self)
    }

    pub fn connect(kind: Kind, cid: u32, port: u32) -> io::Result<Self> {
        let socket = Self::new(kind)?;
        // Seconds and microseconds. Linux has 2 seconds, which is little for a guest that has little of the processor.
        let patience = [30_i64, 0];
        let len = size_of_val(&patience) as u32;
        // SAFETY: the value is one, and so long.
        check(unsafe {
            setsockopt(socket.0, AF_VSOCK.into(), CONNECT_TIMEOUT, patience.as_ptr().cast(), len)
        })?;
        let address = address(cid, port);
        // SAFETY: the address is one, and so long.
        check(unsafe { connect(socket.0, &address, size_of::<Address>() as u32) })?;
        Ok(socket)
    }

    pub fn listen(kind: Kind, port: u32) -> io::Result<Self> {
        let socket = Self::new(kind)?;
        let address = address(u32::MAX, port);
        // SAFETY: the address is one, and so long.
        check(unsafe { bind(socket.0, &address, size_of::<Address>() as u32) })?;
        // SAFETY: numbers alone.
        check(unsafe { listen(socket.0, 8) })?;
        Ok(socket)
    }

    pub fn accept(&self) -> io::Result<Self> {
        // SAFETY: nothing is written where there is no address.
        check(unsafe { accept(self.0, std::ptr::null_mut(), std::ptr::null_mut()) }).map(Self)
    }

    /// As one message, or all of it.
    pub fn send_all(&self, data: &[u8]) -> io::Result<()> {
        let mut at = 0;
        while let Some(rest) = data.get(at..).filter(|rest| !rest.is_empty()) {
            // SAFETY: the data is so long.
            let sent = unsafe { send(self.0, rest.as_ptr().cast(), rest.len(), MSG_NOSIGNAL) };
            at += usize::try_from(sent).map_err(|_| io::Error::last_os_error())?;
        }
        Ok(())
    }

    /// How many bytes came; none at the end.
    pub fn receive(&self, room: &mut [u8]) -> io::Result<usize> {
        // SAFETY: the room is so large.
        let came = unsafe { recv(self.0, room.as_mut_ptr().cast(), room.len(), 0) };
        usize::try_from(came).map_err(|_| io::Error::last_os_error())
    }

    pub fn shut_down_sending(&self) -> io::Result<()> {
        // SAFETY: numbers alone.
        check(unsafe { shutdown(self.0, SHUT_WR) }).map(drop)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // SAFETY: it is this one's own, and used no more.
        unsafe { close(self.0) };
    }
}

fn address(cid: u32, port: u32) -> Address {
    Address { family: AF_VSOCK, reserved: 0, port, cid, rest: [0; 4] }
}

fn check(result: c_int) -> io::Result<c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
