//! What the device, its worker and the monitor's handles have in common.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::connection::Patience;
use super::fabric::Fabric;
use super::far::Far;
use super::host::HostSockets;
use super::packet::Kind;
use super::right::Right;
use super::slots::{Greeting, Tag};
use super::{HOST_CID, RX};
use crate::channel::{Gatekeeper, Party};
use crate::clock::Clock;
use crate::closer::Closer;
use crate::interrupt::lock;
use crate::virtio::doorbell::Doorbells;
use crate::virtio::metrics::{Activity, Ended, Metrics};
use crate::virtio::rate::RateLimiter;

/// Connections that may wait for the worker.
const MAX_ARRIVALS: usize = 256;

/// Ports of this side begin here, as those of Firecracker do: no service is likely to be there.
const FIRST_PORT: u32 = 1 << 30;

/// What the device was built with.
pub(super) struct Setup {
    pub(super) cid: u32,
    pub(super) party: Party,
    pub(super) gatekeeper: Gatekeeper,
    pub(super) clock: Box<dyn Clock>,
    pub(super) connections: usize,
    pub(super) buffer: u32,
    pub(super) patience: Patience,
    pub(super) host: Option<HostSockets>,
    pub(super) fabric: Option<Box<dyn Fabric>>,
    pub(super) rate: Option<RateLimiter>,
    pub(super) metrics: Option<Arc<dyn Metrics>>,
}

impl Setup {
    pub(super) fn now(&self) -> u64 {
        self.clock.now_ns()
    }

    /// A packet has ended.
    pub(super) fn ended(&self, activity: Activity, bytes: u32, succeeded: bool, begun_ns: u64) {
        if let Some(metrics) = &self.metrics {
            let latency_ns = self.now().saturating_sub(begun_ns);
            metrics.ended(Ended { activity, bytes: bytes.into(), succeeded, latency_ns });
        }
    }
}

/// A connection that somebody wants to the guest.
#[derive(Debug)]
pub(super) struct Arrival {
    pub(super) far: Far,
    pub(super) kind: Kind,
    /// Who asks: its identifier, and its port, or 0 for the next that is free.
    pub(super) cid: u32,
    pub(super) port: u32,
    pub(super) guest_port: u32,
    pub(super) greeting: Greeting,
    pub(super) right: Right,
}

/// What was counted.
#[derive(Default)]
pub(super) struct Counts {
    pub(super) open: AtomicU32,
    pub(super) opened: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) resets: AtomicU64,
    pub(super) breaches: AtomicU64,
    pub(super) revoked: AtomicU64,
    pub(super) timeouts: AtomicU64,
    pub(super) ignored: AtomicU64,
    pub(super) discarded: AtomicU64,
    pub(super) undeliverable: AtomicU64,
}

/// Adds one.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// See the module. No lock is held where a doorbell rings: a worker may serve on the spot.
pub(super) struct Shared {
    /// Where sockets to the monitor itself are closed.
    pub(super) closer: Arc<Closer>,
    doorbells: Mutex<Option<Arc<Doorbells>>>,
    revoked: Mutex<Vec<Tag>>,
    arrivals: Mutex<VecDeque<Arrival>>,
    pub(super) reset_due: AtomicBool,
    next_port: AtomicU32,
    pub(super) counts: Counts,
}

impl Shared {
    pub(super) fn new(closer: Arc<Closer>) -> Self {
        Self {
            closer,
            doorbells: Mutex::default(),
            revoked: Mutex::default(),
            arrivals: Mutex::default(),
            reset_due: AtomicBool::new(false),
            next_port: AtomicU32::new(0),
            counts: Counts::default(),
        }
    }

    /// Has the worker look.
    pub(super) fn ring(&self) {
        let doorbells = lock(&self.doorbells).clone();
        if let Some(doorbells) = doorbells {
            doorbells.ring(RX);
        }
    }

    /// There is a driver, or none any more.
    pub(super) fn connect(&self, doorbells: Option<Arc<Doorbells>>) {
        let gone = doorbells.is_none();
        *lock(&self.doorbells) = doorbells;
        if gone {
            lock(&self.revoked).clear();
            // Whoever waits hears that nobody is there; grants go with no lock held.
            drop(std::mem::take(&mut *lock(&self.arrivals)));
        }
    }

    pub(super) fn is_connected(&self) -> bool {
        lock(&self.doorbells).is_some()
    }

    pub(super) fn revoke(&self, tag: Tag) {
        lock(&self.revoked).push(tag);
        self.ring();
    }

    pub(super) fn take_revoked(&self) -> Vec<Tag> {
        std::mem::take(&mut *lock(&self.revoked))
    }

    /// `false` if too many wait.
    pub(super) fn arrive(&self, arrival: Arrival) -> bool {
        let mut arrivals = lock(&self.arrivals);
        if arrivals.len() >= MAX_ARRIVALS {
            drop(arrivals);
            return false;
        }
        arrivals.push_back(arrival);
        drop(arrivals);
        self.ring();
        true
    }

    pub(super) fn next_arrival(&self) -> Option<Arrival> {
        lock(&self.arrivals).pop_front()
    }

    /// A port of this side for a connection that begins here.
    pub(super) fn next_port(&self) -> u32 {
        FIRST_PORT | self.next_port.fetch_add(1, Ordering::Relaxed) & (FIRST_PORT - 1)
    }
}

/// Nanoseconds of a time, as many as there can be.
pub(super) fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Whether a number can be a guest's context identifier: 0 to 2 and all ones have a meaning of their own.
pub(super) fn is_guest_cid(cid: u32) -> bool {
    cid > HOST_CID && cid != u32::MAX
}
