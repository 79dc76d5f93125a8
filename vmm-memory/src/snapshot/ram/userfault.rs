//! The host's user faults (userfaultfd(2)): whoever touches a page that is missing waits until somebody here gives it.

#![allow(unsafe_code, reason = "userfaultfd(2) and its requests take addresses")]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::UserfaultfdFlags;
use vm_memory::{MmapRegion, VolatileMemory};

use crate::region::GuestRegion;

/// Linux `include/uapi/linux/userfaultfd.h`.
const UFFD_API: u64 = 0xaa;
const UFFDIO_REGISTER_MODE_MISSING: u64 = 1;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
/// Bytes of an event, and where its address is.
const EVENT: usize = 32;
const ADDRESS: usize = 16;

#[repr(C)]
#[derive(Default)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Default)]
struct Copy {
    to: u64,
    from: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
#[derive(Default)]
struct Zero {
    start: u64,
    len: u64,
    mode: u64,
    zeroed: i64,
}

const API: Opcode = opcode::read_write::<Api>(0xaa, 0x3f);
const REGISTER: Opcode = opcode::read_write::<Register>(0xaa, 0x00);
const COPY: Opcode = opcode::read_write::<Copy>(0xaa, 0x03);
const ZEROPAGE: Opcode = opcode::read_write::<Zero>(0xaa, 0x04);

/// The requests by which a thread gives pages, for filters of system calls; it also calls `read` and `ppoll`.
pub(crate) const REQUESTS: [u32; 2] = [COPY, ZEROPAGE];

/// Faults of regions that were [added](Self::add).
#[derive(Debug)]
pub(crate) struct UserFaults {
    fd: OwnedFd,
    /// Kept mapped, and where.
    regions: Vec<(u64, Arc<GuestRegion>)>,
}

impl UserFaults {
    pub(crate) fn new() -> io::Result<Self> {
        // SAFETY: no memory is registered with it yet.
        let fd = unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) }?;
        let this = Self { fd, regions: Vec::new() };
        let mut api = Api { api: UFFD_API, ..Api::default() };
        // SAFETY: the structure is the request's.
        let request = unsafe { Updater::<API, Api>::new(&mut api) };
        // SAFETY: the kernel fills in what it offers, and does nothing else.
        unsafe { ioctl(&this.fd, request) }?;
        Ok(this)
    }

    /// From now on, who touches a page of the region that is missing waits. Whether the host can do that: the region has to be private
    /// anonymous memory of small pages.
    pub(crate) fn add(&mut self, region: &Arc<GuestRegion>) -> io::Result<()> {
        let slice = MmapRegion::get_slice(&**region, 0, region.size()).map_err(io::Error::other)?;
        let start = slice.ptr_guard().as_ptr().expose_provenance() as u64;
        let mut register = Register {
            start,
            len: region.size() as u64,
            mode: UFFDIO_REGISTER_MODE_MISSING,
            ..Register::default()
        };
        // SAFETY: the structure is the request's.
        let request = unsafe { Updater::<REGISTER, Register>::new(&mut register) };
        // SAFETY: the range is a mapping that `region`, which is kept here, keeps alive. What is missing in it is given as contents that a guest could
        // have put there, which are accessed as volatile memory alone.
        unsafe { ioctl(&self.fd, request) }?;
        self.regions.push((start, Arc::clone(region)));
        Ok(())
    }

    /// Where somebody waits, if anybody does: the region by its number, and the offset in it.
    pub(crate) fn next(&self) -> io::Result<Option<(usize, u64)>> {
        let mut event = [0_u8; EVENT];
        match rustix::io::read(&self.fd, &mut event) {
            Ok(EVENT) if event.first() == Some(&UFFD_EVENT_PAGEFAULT) => {}
            // None other was asked for.
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        let mut address = [0; 8];
        address.copy_from_slice(event.get(ADDRESS..ADDRESS + 8).unwrap_or(&[0; 8]));
        let address = u64::from_ne_bytes(address);
        let place = |(number, (start, region)): (usize, &(u64, Arc<GuestRegion>))| {
            let offset = address.checked_sub(*start).filter(|offset| *offset < region.size() as u64)?;
            Some((number, offset))
        };
        Ok(self.regions.iter().enumerate().find_map(place))
    }

    /// Gives pages, of which all are missing or the first is there (`EEXIST`); how many bytes were given.
    pub(crate) fn give(&self, region: usize, offset: u64, bytes: &[u8]) -> io::Result<u64> {
        let to = self.place(region, offset, bytes.len() as u64)?;
        let mut copy = Copy {
            to,
            from: bytes.as_ptr().expose_provenance() as u64,
            len: bytes.len() as u64,
            ..Copy::default()
        };
        // SAFETY: the structure is the request's.
        let request = unsafe { Updater::<COPY, Copy>::new(&mut copy) };
        // SAFETY: the kernel reads `bytes`, and writes within a registered region (`place`), where nothing was.
        let done = unsafe { ioctl(&self.fd, request) };
        given(done, copy.copied)
    }

    /// Gives pages that are zero, as [`give`](Self::give).
    pub(crate) fn give_zero(&self, region: usize, offset: u64, len: u64) -> io::Result<u64> {
        let start = self.place(region, offset, len)?;
        let mut zero = Zero { start, len, ..Zero::default() };
        // SAFETY: the structure is the request's.
        let request = unsafe { Updater::<ZEROPAGE, Zero>::new(&mut zero) };
        // SAFETY: within a registered region (`place`), where nothing was.
        let done = unsafe { ioctl(&self.fd, request) };
        given(done, zero.zeroed)
    }

    /// The address of a range, which lies within the region.
    fn place(&self, region: usize, offset: u64, len: u64) -> io::Result<u64> {
        let found = self
            .regions
            .get(region)
            .filter(|(_, region)| offset.checked_add(len).is_some_and(|end| end <= region.size() as u64));
        found.map(|(start, _)| start + offset).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))
    }
}

/// What a request has done: all, or some of it and then met what is there already.
fn given(done: rustix::io::Result<()>, bytes: i64) -> io::Result<u64> {
    match (done, u64::try_from(bytes)) {
        (Ok(()) | Err(Errno::AGAIN), Ok(bytes)) => Ok(bytes),
        // The address space was changing.
        (Err(Errno::AGAIN), Err(_)) => Ok(0),
        (Ok(()), Err(_)) => Err(io::Error::from_raw_os_error(i32::try_from(-bytes).unwrap_or(libc::EIO))),
        (Err(error), _) => Err(error.into()),
    }
}
