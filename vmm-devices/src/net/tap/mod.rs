//! Tap devices of the host: frames go to its network stack, and come from there.

mod sys;
#[cfg(test)]
mod tests;

use std::ffi::CString;
use std::fmt;
use std::io;
use std::num::NonZeroU16;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use vmm_memory::vm_memory::VolatileSlice;

use super::backend::{Agreed, Link, NetBackend, NetEvents, NetPort, Received, Sent};
use super::error::NetError;
use super::membership::Membership;
use super::packet::{HEADER, Offloads, PacketInfo};
use crate::channel::{Grant, NetworkAttach};
use crate::vectored;

/// Where queues of tap devices come from.
const CONTROL: &str = "/dev/net/tun";

/// Frames of an earlier driver's that are thrown away at most: as many as a tap device holds, unless its queue was made longer.
const STALE: usize = 1000;

/// What to do, where that is known.
mod advice {
    pub(super) const ABSENT: &str = "there is none where this program is; `ip tuntap add dev NAME mode tap` makes it, with `multi_queue` for several queues";
    pub(super) const CONTROL: &str = "opening /dev/net/tun (modprobe tun, or a container that has it)";
    pub(super) const ATTACH: &str = "attaching to it";
    pub(super) const BUSY: &str = "somebody is attached to it already";
    pub(super) const NOT_MINE: &str =
        "it is another's; `ip tuntap add dev NAME mode tap user USER` makes one that USER may open";
    pub(super) const QUEUES: &str = "it was made for another number of queues; `ip tuntap add dev NAME mode tap` makes it for one, with `multi_queue` for several";
    pub(super) const HEADERS: &str = "setting the size of its headers";
    pub(super) const OFFLOADS: &str = "setting what is left to the guest";
    pub(super) const KIND: &str = "asking what it is";
    pub(super) const NOT_TAP: &str = "the descriptor is none of a tap device with headers of virtio's and without others (IFF_TAP, IFF_VNET_HDR, IFF_NO_PI)";
}

/// A tap device, or several queues of one.
///
/// The kernel checks what a guest leaves to it, completes checksums and cuts frames, and hands frames on that a guest can cut itself.
pub struct Tap {
    device: Arc<Device>,
}

struct Device {
    name: String,
    queues: Vec<OwnedFd>,
    /// Made for several.
    multi_queue: bool,
    mtu: Option<u16>,
    /// What the kernel knows of.
    offloads: Offloads,
    membership: Arc<Membership>,
}

impl fmt::Debug for Tap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Device { name, queues, .. } = &*self.device;
        f.debug_struct("Tap").field("name", name).field("queues", &queues.len()).finish_non_exhaustive()
    }
}

fn wrong(name: &str, what: &'static str, source: impl Into<io::Error>) -> NetError {
    NetError::Tap { name: name.to_owned(), what, source: source.into() }
}

/// A name that network devices can have.
fn checked(name: &str) -> Result<CString, NetError> {
    let odd = |c: char| matches!(c, '/' | ':' | '%') || c.is_whitespace();
    let sound =
        (1..libc::IFNAMSIZ).contains(&name.len()) && !name.contains(odd) && name != "." && name != "..";
    let wrong = || NetError::Name { name: name.to_owned() };
    if !sound {
        return Err(wrong());
    }
    CString::new(name).map_err(|_| wrong())
}

impl Tap {
    /// Opens the tap device called `name`, which there has to be, with so many queues. One that is made for several
    /// (`multi_queue`) takes one as well.
    ///
    /// # Errors
    /// If there is none, or it is not to be had; with what to do where that is known.
    pub fn open(grant: Grant<NetworkAttach>, name: &str, queues: NonZeroU16) -> Result<Self, NetError> {
        let c_name = checked(name)?;
        if !sys::exists(&c_name) {
            return Err(wrong(name, advice::ABSENT, rustix::io::Errno::NODEV));
        }
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let open = || rustix::fs::open(CONTROL, flags, Mode::empty());
        let mut fds = Vec::new();
        let mut multi_queue = queues.get() > 1;
        for _ in 0..queues.get() {
            let fd = open().map_err(|errno| wrong(name, advice::CONTROL, errno))?;
            let attach = |multi_queue| {
                let several = if multi_queue { sys::MULTI_QUEUE } else { 0 };
                sys::set_interface(fd.as_fd(), &c_name, sys::FLAGS | several)
            };
            let mut attached = attach(multi_queue);
            if !multi_queue
                && attached.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::InvalidInput)
            {
                multi_queue = true;
                attached = attach(true);
            }
            attached.map_err(|error| {
                let what = match error.raw_os_error() {
                    Some(libc::EBUSY) => advice::BUSY,
                    Some(libc::EPERM) => advice::NOT_MINE,
                    Some(libc::EINVAL) => advice::QUEUES,
                    _ => advice::ATTACH,
                };
                wrong(name, what, error)
            })?;
            fds.push(fd);
        }
        // What it is for a guest that asks for none; the device then offers none.
        let mtu = sys::mtu(&c_name).ok().filter(|mtu| *mtu >= 68);
        Self::with(grant, name.to_owned(), fds, multi_queue, mtu)
    }

    /// Takes descriptors of one tap device, which somebody else has opened and attached, without the right to more. They are made
    /// non-blocking.
    ///
    /// # Errors
    /// If they are none, or not of a tap device with headers of virtio's.
    pub fn from_descriptors(grant: Grant<NetworkAttach>, queues: Vec<OwnedFd>) -> Result<Self, NetError> {
        let mut found: Option<(String, i32)> = None;
        for fd in &queues {
            let this = sys::interface(fd.as_fd()).map_err(|error| wrong("", advice::KIND, error))?;
            let same = found.as_ref().is_none_or(|(name, _)| *name == this.0);
            if !same || this.1 & sys::FLAGS != sys::FLAGS {
                return Err(wrong(&this.0, advice::NOT_TAP, io::ErrorKind::InvalidInput));
            }
            let flags = rustix::fs::fcntl_getfl(fd).map_err(io::Error::from)?;
            rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK).map_err(io::Error::from)?;
            found = Some(this);
        }
        let Some((name, flags)) = found else { return Err(NetError::Pairs { pairs: 0, most: u16::MAX }) };
        let multi_queue = flags & sys::MULTI_QUEUE != 0;
        Self::with(grant, name, queues, multi_queue, None)
    }

    fn with(
        grant: Grant<NetworkAttach>,
        name: String,
        queues: Vec<OwnedFd>,
        multi_queue: bool,
        mtu: Option<u16>,
    ) -> Result<Self, NetError> {
        let most = queues.first().map(AsFd::as_fd);
        for fd in &queues {
            sys::set_header_size(fd.as_fd()).map_err(|error| wrong(&name, advice::HEADERS, error))?;
        }
        let tcp = Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN;
        let knows = |offloads| most.is_some_and(|fd| sys::set_offloads(fd, offloads).is_ok());
        // Kernels before 6.2 know nothing of UDP's.
        let offloads = [Offloads::ALL, tcp].into_iter().find(|offloads| knows(*offloads));
        let offloads = offloads.unwrap_or(Offloads::NONE);
        // Until a driver says otherwise.
        knows(Offloads::NONE);
        let membership = Membership::new(grant)?;
        Ok(Self { device: Arc::new(Device { name, queues, multi_queue, mtu, offloads, membership }) })
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.device.name
    }
}

impl Device {
    /// Frames come by the first `pairs` queues.
    fn steer(&self, pairs: u16) -> Result<(), NetError> {
        let most = u16::try_from(self.queues.len()).unwrap_or(u16::MAX);
        if pairs == 0 || pairs > most {
            return Err(NetError::Pairs { pairs, most });
        }
        if !self.multi_queue {
            return Ok(());
        }
        for (index, fd) in self.queues.iter().enumerate() {
            match sys::set_queue(fd.as_fd(), index < usize::from(pairs)) {
                // It was so before.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                result => result?,
            }
        }
        Ok(())
    }

    fn set_offloads(&self, offloads: Offloads) -> Result<(), NetError> {
        for fd in &self.queues {
            match sys::set_offloads(fd.as_fd(), offloads) {
                // A queue that is detached belongs to no device.
                Err(error) if error.raw_os_error() == Some(libc::EBADFD) => {}
                result => result.map_err(|error| wrong(&self.name, advice::OFFLOADS, error))?,
            }
        }
        Ok(())
    }
}

impl NetBackend for Tap {
    fn max_pairs(&self) -> u16 {
        u16::try_from(self.device.queues.len()).unwrap_or(u16::MAX)
    }

    fn transmit_offloads(&self) -> Offloads {
        self.device.offloads
    }

    fn receive_offloads(&self) -> Offloads {
        self.device.offloads
    }

    fn mtu(&self) -> Option<u16> {
        self.device.mtu
    }

    fn link(&self) -> Link {
        self.device.membership.link(Link::UP)
    }

    fn listen(&self, events: Arc<dyn NetEvents>) {
        self.device.membership.listen(events);
    }

    fn attach(&self, agreed: &Agreed, _: Arc<dyn NetEvents>) -> Result<Vec<Box<dyn NetPort>>, NetError> {
        let device = &self.device;
        if agreed.pairs == 0 || agreed.pairs > self.max_pairs() {
            return Err(NetError::Pairs { pairs: agreed.pairs, most: self.max_pairs() });
        }
        device.set_offloads(agreed.receive)?;
        let mut ports: Vec<Box<dyn NetPort>> = Vec::new();
        for index in 0..usize::from(agreed.pairs) {
            let mut port = TapPort { device: Arc::clone(device), index };
            port.forget();
            ports.push(Box::new(port));
        }
        device.steer(1)?;
        Ok(ports)
    }

    fn set_pairs(&self, pairs: u16) -> Result<(), NetError> {
        self.device.steer(pairs)
    }

    fn set_receive_offloads(&self, offloads: Offloads) -> Result<(), NetError> {
        self.device.set_offloads(offloads)
    }
}

/// A queue of a tap device.
struct TapPort {
    device: Arc<Device>,
    index: usize,
}

impl fmt::Debug for TapPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TapPort").field("name", &self.device.name).field("index", &self.index).finish()
    }
}

impl TapPort {
    fn fd(&self) -> Result<BorrowedFd<'_>, NetError> {
        let fd = self.device.queues.get(self.index);
        fd.map(AsFd::as_fd).ok_or(NetError::Host(io::ErrorKind::NotFound.into()))
    }

    /// Throws away what waits.
    fn forget(&mut self) {
        let mut scrap = [0; HEADER + 14];
        for _ in 0..STALE {
            // What is longer is cut off, which is what is wanted here.
            let read = self.fd().and_then(|fd| Ok(vectored::read_message(fd, &mut scrap, &[])?));
            if read.is_err() {
                break;
            }
        }
    }
}

impl NetPort for TapPort {
    fn transmit(&mut self, info: &PacketInfo, frame: &[VolatileSlice<'_>]) -> Result<Sent, NetError> {
        self.device.membership.frame(|| {
            let header = info.to_bytes(0);
            // Either all of it is taken or none; one that finds no memory, or a device that is down, is lost, as on a wire.
            vectored::write_message(self.fd()?, &header, frame)?;
            Ok(Sent::Done)
        })
    }

    fn receive(&mut self, buffers: &[VolatileSlice<'_>]) -> Result<Option<Received>, NetError> {
        let read = self.device.membership.frame(|| {
            let mut header = [0; HEADER];
            let len = vectored::read_message(self.fd()?, &mut header, buffers)?;
            let room: usize = buffers.iter().map(VolatileSlice::len).sum();
            // A frame that fills everything may have been cut off.
            let len = len.checked_sub(HEADER).filter(|len| *len < room);
            let len = len.ok_or(NetError::Frame { len: room })?;
            Ok(Some(Received { info: PacketInfo::from_bytes(&header)?, len }))
        });
        match read {
            Err(NetError::Revoked) => Ok(None),
            Err(NetError::Host(error)) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            read => read,
        }
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        self.fd().ok()
    }
}
