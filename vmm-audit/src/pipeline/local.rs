//! The rings of this process.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::thread::Thread;
use std::time::Duration;

use crossbeam_queue::ArrayQueue;

use super::counters::{Cells, LocalCells};
use super::emitter::{Full, NotDurable, Refused, Transport, Wait, Waiter};
use super::{PipelineOptions, Status};
use crate::event::EventBytes;
use crate::log::monotonic_clock;

/// An event on its way.
pub(super) struct Record {
    pub(super) source: u32,
    pub(super) event: EventBytes,
    pub(super) waiter: Option<Arc<Waiter>>,
}

/// A source, as the writing thread sees it.
pub(super) struct Source {
    pub(super) number: u32,
    pub(super) cells: Arc<LocalCells>,
    /// Gone when the emitter and its clones are.
    pub(super) alive: Weak<dyn Cells>,
    /// What has been written of the counters.
    pub(super) written: Vec<(u64, u64)>,
    pub(super) written_total: u64,
}

/// The counters as an emitter holds them: when it is gone, so is this.
struct Held(Arc<LocalCells>);

impl Cells for Held {
    fn add(&self, cell: usize, bytes: u64) {
        self.0.add(cell, bytes);
    }

    fn get(&self, cell: usize) -> (u64, u64) {
        self.0.get(cell)
    }

    fn total(&self) -> u64 {
        self.0.total()
    }

    fn number(&self) -> u64 {
        self.0.number()
    }

    fn issued(&self) -> u64 {
        self.0.issued()
    }
}

pub(super) struct Local {
    pub(super) options: PipelineOptions,
    pub(super) critical: ArrayQueue<Record>,
    pub(super) bulk: ArrayQueue<Record>,
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
    /// When the batch that is being written was begun, monotonic; 0 if there is none.
    pub(super) writing_since: AtomicU64,
    /// Since when the reserved ring has been full; 0 if it is not.
    full_since: AtomicU64,
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
            critical: ArrayQueue::new(options.critical_events),
            bulk: ArrayQueue::new(options.bulk_events),
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
            full_since: AtomicU64::new(0),
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

    pub(super) fn register(&self) -> (u32, Arc<dyn Cells>) {
        let number = self.next_source.fetch_add(1, Ordering::Relaxed);
        let cells = Arc::new(LocalCells::new());
        let held: Arc<dyn Cells> = Arc::new(Held(Arc::clone(&cells)));
        let source =
            Source { number, cells, alive: Arc::downgrade(&held), written: Vec::new(), written_total: 0 };
        self.sources.lock().unwrap_or_else(PoisonError::into_inner).push(source);
        (number, held)
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
            waiting: (self.critical.len(), self.bulk.len()),
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

impl Transport for Local {
    fn push(&self, critical: bool, source: u32, event: EventBytes, wait: bool) -> Result<Option<Wait>, Full> {
        let waiter = wait.then(Arc::<Waiter>::default);
        let record = Record { source, event, waiter: waiter.clone() };
        let ring = if critical { &self.critical } else { &self.bulk };
        if self.failed.get().is_some() {
            return Err(Full);
        }
        ring.push(record).map_err(|_| Full)?;
        // Bulk events wait for the thread to look of itself, which is soon, unless the ring fills before that.
        if critical || ring.len() * 2 > ring.capacity() {
            self.wake();
        }
        if let Some(why) = self.failed.get()
            && let Some(waiter) = &waiter
        {
            // The thread may have ended before it saw this.
            waiter.tell(Err(why.clone()));
        }
        Ok(waiter.map(Wait::Local))
    }

    fn refuses(&self, deadline: Duration) -> Option<Refused> {
        if let Some(why) = self.failed.get() {
            return Some(Refused::Closed(why.clone()));
        }
        match self.writing_since.load(Ordering::Acquire) {
            0 => None,
            since => {
                let stalled = Duration::from_nanos(monotonic_clock().saturating_sub(since));
                (stalled >= deadline).then_some(Refused::Stalled(stalled))
            }
        }
    }

    fn was_full(&self, full: bool) -> Duration {
        if !full {
            if self.full_since.load(Ordering::Relaxed) != 0 {
                self.full_since.store(0, Ordering::Relaxed);
            }
            return Duration::ZERO;
        }
        let now = monotonic_clock();
        let began = self.full_since.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
        Duration::from_nanos(now.saturating_sub(began.err().unwrap_or(now)))
    }
}
