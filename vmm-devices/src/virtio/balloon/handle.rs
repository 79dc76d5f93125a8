//! What the device, its workers and the monitor have in common: configuration, statistics, counters.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::Callback;
use super::statistics::Statistics;
use crate::clock::Clock;
use crate::interrupt::lock;
use crate::virtio::metrics::{Activity, Ended, Metrics};
use crate::virtio::{Doorbells, DriverLink};

/// The monitor's end of a [`Balloon`](super::Balloon). Clones are the same; methods may be called from any thread, also while there is
/// no driver.
#[derive(Clone)]
pub struct BalloonHandle(pub(super) Arc<Shared>);

impl fmt::Debug for BalloonHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BalloonHandle").field(&self.0).finish()
    }
}

impl BalloonHandle {
    /// Asks the guest to have so many pages of 4 KiB in the balloon (`num_pages`). It hears of that by an interrupt, and does it in
    /// its own time, if at all. Stays through a reset.
    pub fn set_target(&self, pages: u32) {
        let mut config = lock(&self.0.config);
        if config.target == pages {
            return;
        }
        config.target = pages;
        config.generation = config.generation.wrapping_add(1);
        drop(config);
        let link = lock(&self.0.active).as_ref().map(|active| Arc::clone(&active.link));
        if let Some(link) = link {
            link.config_changed();
        }
    }

    /// The pages asked for.
    pub fn target(&self) -> u32 {
        lock(&self.0.config).target
    }

    /// The pages that the guest says are in the balloon (`actual`). What it really gave back is in
    /// [`counters`](Self::counters).
    pub fn actual(&self) -> u32 {
        lock(&self.0.config).actual
    }

    /// Whether a driver is there.
    pub fn is_active(&self) -> bool {
        lock(&self.0.active).is_some()
    }

    /// Asks the guest for statistics; they come to the callback of the device and to
    /// [`statistics`](Self::statistics), when the guest likes. Requests that come before it has answered are one request.
    /// Returns whether there is a driver that tells them; without one nothing is asked.
    pub fn request_statistics(&self) -> bool {
        let active = lock(&self.0.active);
        let bell =
            active.as_ref().and_then(|active| Some((Arc::clone(&active.doorbells), active.statistics?)));
        // Under the lock, so that a reset, which takes requests back, comes before or behind.
        self.0.requested.store(bell.is_some(), Ordering::SeqCst);
        drop(active);
        let Some((doorbells, queue)) = bell else { return false };
        doorbells.ring(queue);
        true
    }

    /// What the guest told last, and none of what it told before a reset.
    pub fn statistics(&self) -> Option<Statistics> {
        lock(&self.0.statistics).clone()
    }

    /// What was done so far.
    pub fn counters(&self) -> BalloonCounters {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let Counters { requests, inflated, deflated, reported, skipped, poisoned, failed, unreadable } =
            &self.0.counters;
        BalloonCounters {
            requests: get(requests),
            inflated: get(inflated),
            deflated: get(deflated),
            reported: get(reported),
            skipped: get(skipped),
            poisoned: get(poisoned),
            failed: get(failed),
            unreadable: get(unreadable),
        }
    }
}

/// What a balloon has done since it was made: resets do not set it back. Pages are of 4 KiB and count each time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct BalloonCounters {
    /// Chains that were dealt with, of all queues.
    pub requests: u64,
    /// Inflated pages that were released.
    pub inflated: u64,
    /// Deflated pages that were reclaimed.
    pub deflated: u64,
    /// Reported pages that were released.
    pub reported: u64,
    /// Pages that are no RAM, and reported ones that are not whole.
    pub skipped: u64,
    /// Reported pages that were kept, because the guest wants to find its poison in them.
    pub poisoned: u64,
    /// Pages that [`MemoryRelease`](super::MemoryRelease) did not take or give.
    pub failed: u64,
    /// Chains whose buffers are not in RAM.
    pub unreadable: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) requests: AtomicU64,
    pub(super) inflated: AtomicU64,
    pub(super) deflated: AtomicU64,
    pub(super) reported: AtomicU64,
    pub(super) skipped: AtomicU64,
    pub(super) poisoned: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) unreadable: AtomicU64,
}

/// Adds to a counter.
pub(super) fn count(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

/// The configuration (5.5.4), whose fields are little-endian words in this order: num_pages, actual,
/// free_page_hint_cmd_id, poison_val.
#[derive(Debug)]
pub(super) struct Config {
    pub(super) target: u32,
    pub(super) actual: u32,
    pub(super) poison: u32,
    /// Counts what the device changes.
    generation: u32,
}

/// A driver that is there.
pub(super) struct Active {
    pub(super) link: Arc<dyn DriverLink>,
    pub(super) doorbells: Arc<Doorbells>,
    /// The queue for statistics, if it has one.
    pub(super) statistics: Option<u16>,
}

/// Where figures go, and what time it is.
pub(super) struct Measured {
    pub(super) sink: Arc<dyn Metrics>,
    pub(super) clock: Box<dyn Clock>,
}

pub(super) struct Shared {
    pub(super) config: Mutex<Config>,
    active: Mutex<Option<Active>>,
    /// Statistics are wanted that nobody has asked the driver for.
    pub(super) requested: AtomicBool,
    statistics: Mutex<Option<Statistics>>,
    callback: Option<Callback>,
    pub(super) counters: Counters,
    metrics: Option<Measured>,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("config", &*lock(&self.config))
            .field("counters", &self.counters)
            .finish_non_exhaustive()
    }
}

impl Shared {
    pub(super) fn new(target: u32, callback: Option<Callback>, metrics: Option<Measured>) -> Self {
        Self {
            config: Mutex::new(Config { target, actual: 0, poison: 0, generation: 0 }),
            active: Mutex::new(None),
            requested: AtomicBool::new(false),
            statistics: Mutex::new(None),
            callback,
            counters: Counters::default(),
            metrics,
        }
    }

    /// When a request is taken, if anybody wants to know.
    pub(super) fn now_ns(&self) -> u64 {
        self.metrics.as_ref().map_or(0, |metrics| metrics.clock.now_ns())
    }

    /// A request is about to be given back.
    pub(super) fn ended(&self, activity: Activity, bytes: u64, succeeded: bool, begun_ns: u64) {
        if let Some(Measured { sink, clock }) = &self.metrics {
            let latency_ns = clock.now_ns().saturating_sub(begun_ns);
            sink.ended(Ended { activity, bytes, succeeded, latency_ns });
        }
    }

    pub(super) fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = lock(&self.config);
        let words = [config.target, config.actual, 0, config.poison].map(u32::to_le_bytes);
        let bytes = words.as_flattened();
        let Ok(offset) = usize::try_from(offset) else { return };
        for (to, from) in data.iter_mut().zip(bytes.get(offset..).unwrap_or_default()) {
            *to = *from;
        }
    }

    /// `actual` and `poison_val` are the driver's, and it may write them byte by byte.
    pub(super) fn write_config(&self, offset: u64, data: &[u8]) {
        let mut config = lock(&self.config);
        overlay(&mut config.actual, 4, offset, data);
        overlay(&mut config.poison, 12, offset, data);
    }

    pub(super) fn generation(&self) -> u32 {
        lock(&self.config).generation
    }

    /// What the driver expects to find in pages that it reported, with VIRTIO_BALLOON_F_PAGE_POISON.
    pub(super) fn poison(&self) -> u32 {
        lock(&self.config).poison
    }

    pub(super) fn activate(&self, active: Active) {
        *lock(&self.active) = Some(active);
    }

    /// The driver is gone, and what it said with it.
    pub(super) fn reset(&self) {
        let mut active = lock(&self.active);
        *active = None;
        self.requested.store(false, Ordering::SeqCst);
        drop(active);
        *lock(&self.statistics) = None;
        let mut config = lock(&self.config);
        (config.actual, config.poison) = (0, 0);
    }

    /// Whether the driver is to be asked for statistics; who calls this asks it.
    pub(super) fn take_request(&self) -> bool {
        self.requested.swap(false, Ordering::SeqCst)
    }

    pub(super) fn deliver(&self, statistics: Statistics) {
        *lock(&self.statistics) = Some(statistics.clone());
        if let Some(callback) = &self.callback {
            callback(&statistics);
        }
    }
}

/// Writes those bytes of `data`, which lies at `offset`, that belong to the little-endian `word` at `place`.
fn overlay(word: &mut u32, place: u64, offset: u64, data: &[u8]) {
    let mut bytes = word.to_le_bytes();
    for (at, byte) in (place..).zip(&mut bytes) {
        let index = at.checked_sub(offset).and_then(|index| usize::try_from(index).ok());
        if let Some(new) = index.and_then(|index| data.get(index)) {
            *byte = *new;
        }
    }
    *word = u32::from_le_bytes(bytes);
}
