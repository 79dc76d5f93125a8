//! The monitor's side of a device.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::far::{Far, Framing, pair};
use super::packet::Kind;
use super::right::Right;
use super::shared::{Arrival, Shared};
use super::slots::Greeting;
use super::socket::Socket;
use super::sys::take_no_descriptors;
use super::{HOST_CID, VsockError};
use crate::channel::{Grant, VsockConnect};

/// What a device has done since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VsockCounters {
    /// Connections that there are now, those that begin and end among them.
    pub connections: u32,
    /// Connections that both sides have accepted.
    pub opened: u64,
    /// Connections that the gate, a bound, or who was called refused, before the guest was asked.
    pub refused: u64,
    /// Connections that the guest has reset or refused.
    pub resets: u64,
    /// Connections that ended because the guest broke the rules.
    pub breaches: u64,
    /// Connections whose grant was revoked.
    pub revoked: u64,
    /// Connections that waited too long for an answer, or for their end.
    pub timeouts: u64,
    /// Packets without a header, or from another identifier than the guest's.
    pub ignored: u64,
    /// Bytes that found nobody who took them.
    pub discarded: u64,
    /// Packets to the guest that its buffers did not lie in RAM for, or were too small for.
    pub undeliverable: u64,
}

/// The monitor's side. Clones are the same; any thread may use them.
#[derive(Clone)]
pub struct VsockHandle {
    pub(super) shared: Arc<Shared>,
    pub(super) cid: u32,
}

impl fmt::Debug for VsockHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VsockHandle").field("cid", &self.cid).finish_non_exhaustive()
    }
}

impl VsockHandle {
    /// The guest's context identifier.
    pub fn cid(&self) -> u32 {
        self.cid
    }

    /// Connects the monitor itself to the granted port of the guest, with no socket in the file system. What it gives is the monitor's end,
    /// which blocks: SOCK_STREAM or SOCK_SEQPACKET. It ends at once if the guest refuses. Without the grant it does not compile:
    ///
    /// ```compile_fail
    /// use vmm_devices::channel::VsockConnect;
    /// use vmm_devices::virtio::vsock::{Kind, VsockHandle};
    ///
    /// fn connect(handle: &VsockHandle) {
    ///     handle.connect(VsockConnect { port: 1024 }, Kind::Stream);
    /// }
    /// ```
    ///
    /// # Errors
    /// If no driver is there, too many connections wait already, or are still to be closed, or the host refuses the sockets.
    pub fn connect(&self, grant: Grant<VsockConnect>, kind: Kind) -> Result<OwnedFd, VsockError> {
        if !self.shared.is_connected() {
            return Err(VsockError::NoDriver { cid: self.cid });
        }
        if self.shared.closer.is_full() {
            return Err(VsockError::Busy { cid: self.cid });
        }
        let framing = if kind == Kind::Stream { Framing::Bytes } else { Framing::Messages };
        let (ours, theirs) = pair(framing)?;
        let has_none = take_no_descriptors(&theirs);
        let theirs = Socket::of(theirs, &self.shared.closer, HOST_CID).has_none(has_none);
        let arrival = Arrival {
            far: Far::new(theirs, framing),
            kind,
            cid: HOST_CID,
            port: 0,
            guest_port: grant.channel().port,
            greeting: Greeting::Nothing,
            right: Right::Connect(grant),
        };
        if self.shared.arrive(arrival) { Ok(ours) } else { Err(VsockError::Busy { cid: self.cid }) }
    }

    /// The guest goes on somewhere else, restored or moved: all connections end, and the driver is told to forget them and to read its
    /// identifier again (VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, 5.10.6.7).
    pub fn transport_reset(&self) {
        self.shared.reset_due.store(true, Ordering::SeqCst);
        self.shared.ring();
    }

    /// What was counted so far.
    pub fn counters(&self) -> VsockCounters {
        let c = &self.shared.counts;
        VsockCounters {
            connections: c.open.load(Ordering::Relaxed),
            opened: c.opened.load(Ordering::Relaxed),
            refused: c.refused.load(Ordering::Relaxed),
            resets: c.resets.load(Ordering::Relaxed),
            breaches: c.breaches.load(Ordering::Relaxed),
            revoked: c.revoked.load(Ordering::Relaxed),
            timeouts: c.timeouts.load(Ordering::Relaxed),
            ignored: c.ignored.load(Ordering::Relaxed),
            discarded: c.discarded.load(Ordering::Relaxed),
            undeliverable: c.undeliverable.load(Ordering::Relaxed),
        }
    }
}
