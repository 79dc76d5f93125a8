//! The rings of this process: two for each source, so that no source waits for another or takes its place.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread::Thread;
use std::time::Duration;

use crossbeam_queue::ArrayQueue;

use super::counters::{Cells, LocalCells};
use super::emitter::{Full, NotDurable, Refused, Transport, Wait, Waiter, full_for};
use super::{PipelineOptions, Status};
use crate::event::EventBytes;
use crate::log::monotonic_clock;

/// How often an emitter looks whether its ring of bulk events is half full: once in so many, a power of two. That takes a cache line
/// which the writing thread has.
const LOOK_EVERY: u64 = 64;

/// An event on its way.
pub(super) struct Record {
    pub(super) event: EventBytes,
    pub(super) waiter: Option<Arc<Waiter>>,
}

/// The rings of a source.
pub(super) struct Rings {
    pub(super) critical: ArrayQueue<Record>,
    pub(super) bulk: ArrayQueue<Record>,
}

impl Rings {
    pub(super) fn is_empty(&self) -> bool {
        self.critical.is_empty() && self.bulk.is_empty()
    }
}

/// A source, as the writing thread sees it.
pub(super) struct Source {
    pub(super) number: u32,
    pub(super) rings: Arc<Rings>,
    pub(super) cells: Arc<LocalCells>,
    /// Gone when the emitter and its clones are.
    pub(super) alive: Weak<dyn Transport>,
    /// What has been written of the counters.
    pub(super) written: Vec<(u64, u64)>,
    pub(super) written_total: u64,
    /// Whether the log says that it is gone.
    pub(super) gone: bool,
}

pub(super) struct Local {
    pub(super) options: PipelineOptions,
    pub(super) sources: Mutex<Vec<Source>>,
    next_source: AtomicU32,
    thread: OnceLock<Thread>,
    pub(super) sleeping: AtomicBool,
    pub(super) closing: AtomicBool,
    pub(super) rotate: AtomicBool,
    pub(super) failed: OnceLock<String>,
    pub(super) stuck: Mutex<Option<String>>,
    pub(super) checkpoint: Mutex<String>,
    pub(super) acknowledged: AtomicU64,
    /// When the oldest batch that is not on the disk was begun, monotonic; 0 if there is none.
    pub(super) writing_since: AtomicU64,
    /// Those who wait for all that is in the rings.
    pub(super) flushes: Mutex<Vec<Arc<Waiter>>>,
}

impl fmt::Debug for Local {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Local").field("status", &self.status()).finish_non_exhaustive()
    }
}

impl Local {
    pub(super) fn new(options: PipelineOptions, acknowledged: u64, checkpoint: String) -> Self {
        Self {
            options,
            sources: Mutex::default(),
            next_source: AtomicU32::new(1),
            thread: OnceLock::new(),
            sleeping: AtomicBool::new(false),
            closing: AtomicBool::new(false),
            rotate: AtomicBool::new(false),
            failed: OnceLock::new(),
            stuck: Mutex::default(),
            checkpoint: Mutex::new(checkpoint),
            acknowledged: AtomicU64::new(acknowledged),
            writing_since: AtomicU64::new(0),
            flushes: Mutex::default(),
        }
    }

    pub(super) fn set_thread(&self, thread: Thread) {
        // It is set once, before anyone else has this.
        if self.thread.set(thread).is_err() {
            tracing::error!("the audit log has two threads");
        }
        self.wake();
    }

    /// Makes a source: its number, and what its emitter needs.
    pub(super) fn register(self: &Arc<Self>) -> (u32, Arc<dyn Transport>, Arc<dyn Cells>) {
        let number = self.next_source.fetch_add(1, Ordering::Relaxed);
        let rings = Arc::new(Rings {
            critical: ArrayQueue::new(self.options.critical_events),
            bulk: ArrayQueue::new(self.options.bulk_events),
        });
        let cells = Arc::new(LocalCells::new());
        let (local, full_since) = (Arc::clone(self), AtomicU64::new(0));
        let channel: Arc<dyn Transport> = Arc::new(Channel { local, rings: Arc::clone(&rings), full_since });
        let source = Source {
            number,
            rings,
            cells: Arc::clone(&cells),
            alive: Arc::downgrade(&channel),
            written: Vec::new(),
            written_total: 0,
            gone: false,
        };
        self.sources.lock().unwrap_or_else(PoisonError::into_inner).push(source);
        (number, channel, cells)
    }

    /// The rings of all sources, with their numbers.
    pub(super) fn rings(&self) -> Vec<(u32, Arc<Rings>)> {
        let sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        sources.iter().map(|source| (source.number, Arc::clone(&source.rings))).collect()
    }

    /// Has the writing thread look at once.
    pub(super) fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::Relaxed)
            && self.sleeping.swap(false, Ordering::Relaxed)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }

    pub(super) fn status(&self) -> Status {
        let sources = self.sources.lock().unwrap_or_else(PoisonError::into_inner);
        Status {
            acknowledged: self.acknowledged.load(Ordering::Acquire),
            waiting: sources.iter().fold((0, 0), |(critical, bulk), source| {
                (critical + source.rings.critical.len(), bulk + source.rings.bulk.len())
            }),
            counted: sources.iter().map(|source| source.cells.total()).sum(),
            stuck: self.stuck.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            failed: self.failed.get().cloned(),
        }
    }

    pub(super) fn flush(&self, timeout: Duration) -> Result<(), NotDurable> {
        let waiter = Arc::new(Waiter::default());
        self.flushes.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&waiter));
        // After the push: a thread that fails tells all that are there then.
        if let Some(why) = self.failed.get() {
            return Err(NotDurable::Failed(why.clone()));
        }
        self.wake();
        waiter.wait(timeout).map(drop)
    }
}

/// The way from an emitter to the log.
struct Channel {
    local: Arc<Local>,
    rings: Arc<Rings>,
    /// Since when the reserved ring has been full; 0 if it is not.
    full_since: AtomicU64,
}

impl Transport for Channel {
    fn push(&self, critical: bool, seq: u64, event: EventBytes, wait: bool) -> Result<Option<Wait>, Full> {
        let local = &*self.local;
        let waiter = wait.then(Arc::<Waiter>::default);
        let record = Record { event, waiter: waiter.clone() };
        let ring = if critical { &self.rings.critical } else { &self.rings.bulk };
        if local.failed.get().is_some() {
            return Err(Full);
        }
        if ring.push(record).is_err() {
            local.wake();
            return Err(Full);
        }
        // Bulk events wait for the thread to look of itself, which is soon, unless the ring fills before that.
        if critical || (seq.is_multiple_of(LOOK_EVERY) && ring.len() * 2 > ring.capacity()) {
            local.wake();
        }
        if let Some(why) = local.failed.get()
            && let Some(waiter) = &waiter
        {
            // The thread may have ended before it saw this.
            waiter.tell(Err(why.clone()));
        }
        Ok(waiter.map(Wait::Local))
    }

    fn refuses(&self, deadline: Duration) -> Option<Refused> {
        if let Some(why) = self.local.failed.get() {
            return Some(Refused::Closed(why.clone()));
        }
        match self.local.writing_since.load(Ordering::Acquire) {
            0 => None,
            since => {
                let stalled = Duration::from_nanos(monotonic_clock().saturating_sub(since));
                (stalled >= deadline).then_some(Refused::Stalled(stalled))
            }
        }
    }

    fn was_full(&self, full: bool) -> Duration {
        full_for(&self.full_since, full)
    }
}
