//! What a network is to a device, and a device to its network.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vmm_memory::vm_memory::VolatileSlice;

use super::error::NetError;
use super::filter::RxFilter;
use super::packet::{Offloads, PacketInfo};

/// How a device is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Whether frames get through.
    pub up: bool,
    /// Megabits a second, where that means something.
    pub speed: Option<u32>,
}

impl Link {
    /// Connected, at no speed in particular.
    pub const UP: Self = Self { up: true, speed: None };
    /// Not connected.
    pub const DOWN: Self = Self { up: false, speed: None };
}

/// What device and driver have agreed upon when a backend is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Agreed {
    /// Pairs of queues: so many ports are wanted. At first the driver uses one of them.
    pub pairs: u16,
    /// What frames that come from the driver may leave to the backend; a part of [`NetBackend::transmit_offloads`].
    pub transmit: Offloads,
    /// What frames that go to the driver may leave to it; a part of [`NetBackend::receive_offloads`].
    pub receive: Offloads,
}

impl Agreed {
    /// For `pairs` pairs of queues, with nothing left to the other side.
    pub fn new(pairs: u16) -> Self {
        Self { pairs, transmit: Offloads::NONE, receive: Offloads::NONE }
    }
}

/// A network, as one device sees it. A device calls it from vCPU threads and its workers', one at a time or several.
///
/// [`NetBackend::attach`] is called when a driver is ready, and the ports it gave are dropped when the driver resets the device. What
/// is said by the other methods holds whether or not there is a driver.
pub trait NetBackend: Send + Sync {
    /// How many pairs of queues it carries at most.
    fn max_pairs(&self) -> u16 {
        1
    }

    /// What frames may leave to it that a driver sends. It does not change.
    fn transmit_offloads(&self) -> Offloads {
        Offloads::NONE
    }

    /// What it may leave to a driver that can. It does not change.
    fn receive_offloads(&self) -> Offloads {
        Offloads::NONE
    }

    /// The largest packet without its Ethernet header, in bytes, where that is known: 68 to 65535. Asked for once.
    fn mtu(&self) -> Option<u16> {
        None
    }

    /// Whether it is connected now. Whenever that changes it tells [`NetEvents::link_changed`].
    fn link(&self) -> Link {
        Link::UP
    }

    /// Says whom to tell that the link is another one, driver or not. Called once, when the device is built.
    fn listen(&self, events: Arc<dyn NetEvents>) {
        let _ = events;
    }

    /// A driver is there: one port for each pair of queues. Frames that came before are forgotten. `events` hears of ports until they
    /// are dropped.
    ///
    /// # Errors
    /// The driver is told that the device needs a reset.
    fn attach(&self, agreed: &Agreed, events: Arc<dyn NetEvents>) -> Result<Vec<Box<dyn NetPort>>, NetError>;

    /// The driver takes so many pairs into use, the first ones: frames for it come by these. It may go on sending by others.
    ///
    /// # Errors
    /// The driver is told that it cannot have them.
    fn set_pairs(&self, pairs: u16) -> Result<(), NetError> {
        let _ = pairs;
        Ok(())
    }

    /// The driver has changed its mind about what it takes over (VIRTIO_NET_CTRL_GUEST_OFFLOADS).
    ///
    /// # Errors
    /// The driver is told that this cannot be had.
    fn set_receive_offloads(&self, offloads: Offloads) -> Result<(), NetError>;

    /// Which frames the driver wants. The device looks at what it gets by itself; a backend for which each frame costs leaves out what
    /// does not pass.
    fn set_filter(&self, filter: &RxFilter) {
        let _ = filter;
    }
}

/// What a device is to its backend. Called from any thread, with no lock held that a port or the backend takes when it is called.
pub trait NetEvents: Send + Sync {
    /// Pair `pair` is to be looked at: frames came for it, or there is room to send again. For ports whose [`NetPort::source`] does not
    /// say so.
    fn ready(&self, pair: u16);

    /// [`NetBackend::link`] says something else than before.
    fn link_changed(&self);
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Sent {
    /// It is on its way, or lost as frames are.
    Done,
    /// There is no room. The device keeps it and comes again, when the port is ready.
    Full,
}

/// A frame that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// What it leaves to the driver.
    pub info: PacketInfo,
    /// Its bytes, from the Ethernet header on: so many were written.
    pub len: usize,
}

/// What carries the frames of one pair of queues. It belongs to the worker that serves them, and is called by one thread at a time.
pub trait NetPort: Send + fmt::Debug {
    /// Sends a frame, from the Ethernet header on: `frame`, one slice after the other, 14 to [`MAX_FRAME`](super::MAX_FRAME) bytes. `info`
    /// fits it and what was agreed upon, as [`PacketInfo::check`] says; with a check that is made before, of bytes that may change.
    /// Nothing of `frame` is touched any more when it returns.
    ///
    /// # Errors
    /// The frame is lost; others may do better.
    fn transmit(&mut self, info: &PacketInfo, frame: &[VolatileSlice<'_>]) -> Result<Sent, NetError>;

    /// The device is about to look: it sends what it keeps, and receives while it has buffers. What [`NetPort::source`] has said so far is
    /// heard by that; what it says from now on wakes the device again, so nothing else here takes it back.
    fn hush(&mut self) {}

    /// No more frames are sent for now: those held back, or whose receivers were not told, are to go.
    fn flush(&mut self) {}

    /// Takes the next frame into `buffers`, one after the other, which have room for [`MAX_FRAME`](super::MAX_FRAME) bytes at least;
    /// `None` if there is none now, after which the port says when there is. A frame that is longer is lost, and not given in part.
    ///
    /// # Errors
    /// As a rule nothing was received; the device comes again when the port is ready.
    fn receive(&mut self, buffers: &[VolatileSlice<'_>]) -> Result<Option<Received>, NetError>;

    /// Becomes readable (edge-triggered) when frames have come, or when there is room to send again. `None` where it tells
    /// [`NetEvents::ready`] instead.
    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
