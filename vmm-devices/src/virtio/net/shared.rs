//! What device, workers and handles share.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, Weak};

use super::config::{ANNOUNCE, LINK_UP};
use super::state::NetFrameState;
use crate::clock::Clock;
use crate::interrupt::lock;
use crate::net::{Link, MacAddr, NetBackend, NetEvents, Offloads, RxFilter};
use crate::virtio::device::DriverLink;
use crate::virtio::doorbell::Doorbells;
use crate::virtio::metrics::{Activity, Ended, Metrics};
use crate::virtio::rate::RateLimiter;

/// Where figures go, and what time it is.
pub(super) struct Measured {
    pub(super) sink: Arc<dyn Metrics>,
    pub(super) clock: Box<dyn Clock>,
}

/// The driver that is there.
pub(super) struct Active {
    pub(super) link: Arc<dyn DriverLink>,
    pub(super) doorbells: Arc<Doorbells>,
    /// It answers announcements.
    pub(super) announces: bool,
}

/// What has become of frames since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct NetCounters {
    /// Frames that the driver got.
    pub received: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames that came and were not for it: another's address or VLAN.
    pub filtered: u64,
    /// Frames that came and found no room, that left to the driver what it does not take, that were none, or that came while the link
    /// was down.
    pub receive_dropped: u64,
    /// Frames that went out.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
    /// Frames that the backend lost, or that were sent while the link was down.
    pub send_dropped: u64,
    /// Frames of the driver's that were none: too short or too long, in no RAM, or with a header that does not fit.
    pub refused: u64,
    /// Buffers for frames that were too short for a header, or in no RAM.
    pub bad_buffers: u64,
    /// Commands that the driver was told it cannot have.
    pub commands_refused: u64,
}

macro_rules! counters {
    ($($name:ident),*) => {
        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $(pub(super) $name: AtomicU64,)*
        }

        impl Counters {
            pub(super) fn get(&self) -> NetCounters {
                NetCounters { $($name: self.$name.load(Ordering::Relaxed),)* }
            }
        }
    };
}

counters!(
    received,
    received_bytes,
    filtered,
    receive_dropped,
    sent,
    sent_bytes,
    send_dropped,
    refused,
    bad_buffers,
    commands_refused
);

pub(super) fn read<T>(lock: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// What the driver wants of received frames, as workers look at it.
pub(super) struct Wishes {
    pub(super) filter: Arc<RxFilter>,
    pub(super) offloads: Offloads,
}

pub(super) struct Shared {
    pub(super) backend: Arc<dyn NetBackend>,
    /// As long as the driver says nothing else.
    pub(super) mac: MacAddr,
    pub(super) wishes: Mutex<Wishes>,
    /// How often the wishes have changed.
    pub(super) wished: AtomicU32,
    /// Pairs of queues that the driver uses, the first ones. Who gives it a frame by one reads this meanwhile, and calls nobody but
    /// the sink of figures.
    pub(super) in_use: RwLock<u16>,
    /// What the monitor says of the link.
    pub(super) plugged: AtomicBool,
    pub(super) announce: AtomicBool,
    /// While the device is paused: frames that have come and wait, by their pairs.
    pub(super) waiting: Mutex<Vec<NetFrameState>>,
    generation: AtomicU32,
    /// Limits of frames to the driver, and from it.
    pub(super) receive_rate: Option<RateLimiter>,
    pub(super) send_rate: Option<RateLimiter>,
    pub(super) metrics: Option<Measured>,
    pub(super) counters: Counters,
    pub(super) active: Mutex<Option<Active>>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("mac", &self.mac).field("link", &self.link()).finish_non_exhaustive()
    }
}

impl Shared {
    pub(super) fn new(backend: Arc<dyn NetBackend>, mac: MacAddr) -> Self {
        let wishes = Wishes { filter: Arc::new(RxFilter::everything(mac)), offloads: Offloads::NONE };
        Self {
            backend,
            mac,
            wishes: Mutex::new(wishes),
            wished: AtomicU32::new(0),
            in_use: RwLock::new(1),
            plugged: AtomicBool::new(true),
            announce: AtomicBool::new(false),
            waiting: Mutex::default(),
            generation: AtomicU32::new(0),
            receive_rate: None,
            send_rate: None,
            metrics: None,
            counters: Counters::default(),
            active: Mutex::new(None),
        }
    }

    /// What the driver is told.
    pub(super) fn link(&self) -> Link {
        if self.plugged.load(Ordering::SeqCst) { self.backend.link() } else { Link::DOWN }
    }

    /// `status` of the configuration.
    pub(super) fn status(&self) -> u16 {
        let up = if self.link().up { LINK_UP } else { 0 };
        up | if self.announce.load(Ordering::SeqCst) { ANNOUNCE } else { 0 }
    }

    pub(super) fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// The configuration is another one.
    pub(super) fn changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        let active = lock(&self.active).as_ref().map(|a| (Arc::clone(&a.link), Arc::clone(&a.doorbells)));
        if let Some((link, doorbells)) = active {
            link.config_changed();
            // What waits, on either side, is looked at again.
            doorbells.ring_all();
        }
    }

    /// The driver uses so many pairs: when this returns, no frame comes by another.
    pub(super) fn use_pairs(&self, pairs: u16) {
        *self.in_use.write().unwrap_or_else(PoisonError::into_inner) = pairs;
        // What waits for one that was taken into use comes now, and what waits for another goes.
        let doorbells = lock(&self.active).as_ref().map(|active| Arc::clone(&active.doorbells));
        if let Some(doorbells) = doorbells {
            doorbells.ring_all();
        }
    }

    /// Keeps a frame of a device that is paused.
    pub(super) fn keep(&self, frame: NetFrameState) {
        let mut waiting = lock(&self.waiting);
        let at = waiting.partition_point(|other| other.pair < frame.pair);
        waiting.insert(at, frame);
    }

    /// The frame of that pair, for a device that goes on.
    pub(super) fn kept(&self, pair: u16) -> Option<NetFrameState> {
        let mut waiting = lock(&self.waiting);
        let at = waiting.iter().position(|frame| frame.pair == pair)?;
        Some(waiting.remove(at))
    }

    /// Asks the driver to announce itself; whether there is one that does.
    pub(super) fn announce(&self) -> bool {
        let announces = lock(&self.active).as_ref().is_some_and(|active| active.announces);
        if announces {
            self.announce.store(true, Ordering::SeqCst);
            self.changed();
        }
        announces
    }

    /// The driver has done so, or is gone.
    pub(super) fn announced(&self) {
        if self.announce.swap(false, Ordering::SeqCst) {
            self.generation.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Changes what the driver wants of frames. The driver's commands, and its coming and going, are one after the other, so the backend
    /// hears of them in their order; it is called without a lock, as it may look at the device.
    pub(super) fn wish(&self, change: impl FnOnce(&mut Wishes)) {
        let filter = {
            let mut wishes = lock(&self.wishes);
            let mac = wishes.filter.mac;
            change(&mut wishes);
            if wishes.filter.mac != mac {
                // The configuration tells it.
                self.generation.fetch_add(1, Ordering::SeqCst);
            }
            self.wished.fetch_add(1, Ordering::SeqCst);
            Arc::clone(&wishes.filter)
        };
        self.backend.set_filter(&filter);
    }

    /// The address as the driver has it now.
    pub(super) fn mac(&self) -> MacAddr {
        lock(&self.wishes).filter.mac
    }

    /// As it is before a driver says anything.
    pub(super) fn reset(&self) {
        self.announced();
        lock(&self.waiting).clear();
        self.use_pairs(1);
        let filter = Arc::new(RxFilter::everything(self.mac));
        self.wish(|wishes| (wishes.filter, wishes.offloads) = (filter, Offloads::NONE));
    }

    /// When something begins, if anybody wants to know.
    pub(super) fn now_ns(&self) -> u64 {
        self.metrics.as_ref().map_or(0, |metrics| metrics.clock.now_ns())
    }

    pub(super) fn ended(&self, activity: Activity, bytes: u64, succeeded: bool, begun_ns: u64) {
        if let Some(metrics) = &self.metrics {
            let latency_ns = metrics.clock.now_ns().saturating_sub(begun_ns);
            metrics.sink.ended(Ended { activity, bytes, succeeded, latency_ns });
        }
    }

    pub(super) fn throttled(&self) {
        if let Some(metrics) = &self.metrics {
            metrics.sink.throttled();
        }
    }
}

/// What the backend has of the device. It does not keep it alive, as the device keeps the backend.
pub(super) struct Events {
    pub(super) shared: Weak<Shared>,
    /// Of the driver that is there.
    pub(super) doorbells: Option<Arc<Doorbells>>,
}

impl NetEvents for Events {
    fn ready(&self, pair: u16) {
        if let Some(doorbells) = &self.doorbells {
            doorbells.ring(pair.saturating_mul(2));
        }
    }

    fn link_changed(&self) {
        if let Some(shared) = self.shared.upgrade() {
            shared.changed();
        }
    }
}
