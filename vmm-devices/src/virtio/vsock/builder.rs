//! What a socket device is made of.

use std::fmt;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

#[cfg(doc)]
use super::VsockHandle;
use super::connection::Patience;
use super::fabric::Fabric;
use super::shared::{Setup, Shared, is_guest_cid, nanoseconds};
use super::{HostSockets, Member, Seat, Vsock, VsockError};
use crate::channel::{Gatekeeper, Party, VmIdentity};
use crate::clock::Clock;
use crate::closer::Closer;
use crate::virtio::metrics::Metrics;
use crate::virtio::rate::RateLimiter;

/// Connections of one device at most.
pub(super) const MAX_CONNECTIONS: usize = 1 << 16;

/// Bytes that the buffer of a connection can have. A packet has to fit.
pub(super) const BUFFERS: RangeInclusive<u32> = 4 << 10..=16 << 20;

/// A [`Vsock`] before it is one.
#[must_use]
pub struct VsockBuilder {
    cid: u32,
    clock: Box<dyn Clock>,
    party: Party,
    gatekeeper: Gatekeeper,
    connections: usize,
    buffer: u32,
    patience: Patience,
    host: Option<HostSockets>,
    fabric: Option<Box<dyn Fabric>>,
    rate: Option<RateLimiter>,
    metrics: Option<Arc<dyn Metrics>>,
}

impl fmt::Debug for VsockBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VsockBuilder").field("cid", &self.cid).finish_non_exhaustive()
    }
}

impl VsockBuilder {
    pub(super) fn new(cid: u32, clock: Box<dyn Clock>) -> Self {
        Self {
            cid,
            clock,
            party: Party::Vm(VmIdentity::new(cid.into(), 0)),
            gatekeeper: Gatekeeper::default(),
            connections: 1024,
            buffer: 256 << 10,
            patience: Patience { connect_ns: 2_000_000_000, close_ns: 10_000_000_000 },
            host: None,
            fabric: None,
            rate: None,
            metrics: None,
        }
    }

    /// Who the guest is to the gate, and who asks that. Unless told, all is refused.
    pub fn gatekeeper(mut self, party: impl Into<Party>, gatekeeper: Gatekeeper) -> Self {
        (self.party, self.gatekeeper) = (party.into(), gatekeeper);
        self
    }

    /// Joins the guest to Unix sockets of the host.
    pub fn host(mut self, host: HostSockets) -> Self {
        self.host = Some(host);
        self
    }

    /// Joins it to the guests of a switch of this process, instead of others.
    pub fn switch(mut self, seat: Seat) -> Self {
        self.fabric = Some(Box::new(seat));
        self
    }

    /// Joins it to the guests of a broker's, instead of others.
    pub fn broker(mut self, member: Member) -> Self {
        self.fabric = Some(Box::new(member));
        self
    }

    /// How many connections there can be at once: 1024 unless told, 65536 at most. Another guest can have begun a quarter of them, all
    /// others together a half, and those and the host three quarters; the rest is for what the guest itself begins.
    pub fn connections(mut self, connections: usize) -> Self {
        self.connections = connections;
        self
    }

    /// How many bytes each of them keeps that the guest has sent and nobody has read: 256 KiB unless told, as Linux has it; 4 KiB to
    /// 16 MiB. A message of a SOCK_SEQPACKET connection is no longer.
    pub fn buffer(mut self, bytes: u32) -> Self {
        self.buffer = bytes;
        self
    }

    /// How long a connection that is asked for waits for the answer: 2 seconds unless told, as Linux has it.
    pub fn connect_timeout(mut self, time: Duration) -> Self {
        self.patience.connect_ns = nanoseconds(time);
        self
    }

    /// How long one that is closed on both sides waits for the guest to confirm that, and what the guest has left behind for somebody to
    /// read it: 10 seconds unless told.
    pub fn close_timeout(mut self, time: Duration) -> Self {
        self.patience.close_ns = nanoseconds(time);
        self
    }

    /// Limits data, in both directions together: an operation is a packet of the guest's, or a turn of up to 64 KiB for it.
    pub fn rate(mut self, rate: RateLimiter) -> Self {
        self.rate = Some(rate);
        self
    }

    /// Tells `metrics` of each packet: data of the guest is an [`Activity::Write`](crate::virtio::metrics::Activity::Write), data for it an
    /// [`Activity::Read`](crate::virtio::metrics::Activity::Read), an error if it was refused or not delivered; all else is an
    /// [`Activity::Other`](crate::virtio::metrics::Activity::Other).
    pub fn metrics(mut self, metrics: Arc<dyn Metrics>) -> Self {
        self.metrics = Some(metrics);
        self
    }

    /// Makes it. If it has no [`HostSockets`], the thread that closes what the monitor connects ([`VsockHandle::connect`]) is started here.
    ///
    /// # Errors
    /// If the identifier, or a bound, cannot be, or the host has no thread.
    pub fn build(self) -> Result<Vsock, VsockError> {
        let Self {
            cid,
            clock,
            party,
            gatekeeper,
            connections,
            buffer,
            patience,
            host,
            fabric,
            rate,
            metrics,
        } = self;
        if !is_guest_cid(cid) {
            return Err(VsockError::Cid { cid });
        }
        if let Some(seat) = fabric.as_ref().map(|fabric| fabric.cid()).filter(|seat| *seat != cid) {
            return Err(VsockError::Seat { cid, seat });
        }
        if !(1..=MAX_CONNECTIONS).contains(&connections) {
            return Err(VsockError::Connections { connections });
        }
        if !BUFFERS.contains(&buffer) {
            return Err(VsockError::Buffer { bytes: buffer });
        }
        let closer = match &host {
            Some(host) => Arc::clone(host.closer()),
            None => Arc::new(Closer::new("vsock-close", 1, None)?),
        };
        let setup = Setup {
            cid,
            party,
            gatekeeper,
            clock,
            connections,
            buffer,
            patience,
            host,
            fabric,
            rate,
            metrics,
        };
        Ok(Vsock { setup: Arc::new(setup), shared: Arc::new(Shared::new(closer)), restored: false })
    }
}
