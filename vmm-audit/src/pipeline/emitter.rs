//! Emitting.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::counters::{Cells, cell};
use crate::event::{Event, EventBytes, EventError, Verdict};
use crate::log::{monotonic_clock, wall_clock};

/// What became of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emitted {
    /// It is on its way into the log.
    Queued,
    /// There was no room; it is counted.
    Counted,
}

/// Why something must not happen now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refused {
    /// The reserved ring has been full for longer than the deadline.
    #[error("the audit log has taken no critical event for {0:?}")]
    Full(Duration),
    /// The disk has not answered for longer than the deadline.
    #[error("the audit log has written nothing for {0:?}")]
    Stalled(Duration),
    /// The log is closed.
    #[error("the audit log is closed: {0}")]
    Closed(String),
    /// The event cannot be written.
    #[error(transparent)]
    Event(#[from] EventError),
}

/// Why an event is not known to be on the disk.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotDurable {
    /// It may get there yet.
    #[error("the audit log has not acknowledged it within {0:?}")]
    Timeout(Duration),
    /// It will not.
    #[error("the audit log failed before it was acknowledged: {0}")]
    Failed(String),
}

/// No room in a ring.
pub(crate) struct Full;

/// What an emitter hands events to.
pub(crate) trait Transport: Send + Sync {
    /// Puts an event, the `seq`th of its source, into a ring. What is returned, if it was asked for, is told when the event is on
    /// the disk.
    fn push(&self, critical: bool, seq: u64, event: EventBytes, wait: bool) -> Result<Option<Wait>, Full>;

    /// Why nothing may be admitted, if so.
    fn refuses(&self, deadline: Duration) -> Option<Refused>;

    /// Says that the reserved ring had room, or had none; for how long it has had none.
    fn was_full(&self, full: bool) -> Duration;
}

/// What [`Transport::was_full`] answers, where `since` is when a ring was first found full; 0 if it had room the last time.
pub(crate) fn full_for(since: &AtomicU64, full: bool) -> Duration {
    if !full {
        if since.load(Ordering::Relaxed) != 0 {
            since.store(0, Ordering::Relaxed);
        }
        return Duration::ZERO;
    }
    let now = monotonic_clock();
    let began = since.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed);
    Duration::from_nanos(now.saturating_sub(began.err().unwrap_or(now)))
}

/// Waits for one event to be on the disk.
pub(crate) enum Wait {
    Local(Arc<Waiter>),
    #[cfg(feature = "collector")]
    Polled(Box<dyn Fn() -> Option<Result<(), String>> + Send + Sync>),
}

#[derive(Debug, Default)]
pub(crate) struct Waiter {
    done: Mutex<Option<Result<u64, String>>>,
    changed: Condvar,
}

impl Waiter {
    pub(super) fn tell(&self, result: Result<u64, String>) {
        *self.done.lock().unwrap_or_else(PoisonError::into_inner) = Some(result);
        self.changed.notify_all();
    }

    pub(super) fn wait(&self, timeout: Duration) -> Result<Option<u64>, NotDurable> {
        let done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(done, timeout, |done| done.is_none());
        match &*waited.unwrap_or_else(PoisonError::into_inner).0 {
            Some(Ok(seq)) => Ok(Some(*seq)),
            Some(Err(why)) => Err(NotDurable::Failed(why.clone())),
            None => Err(NotDurable::Timeout(timeout)),
        }
    }
}

/// For an event that has been admitted: it will be in the log, unless the log fails.
#[must_use = "whoever does not wait may drop it"]
pub struct Receipt(pub(super) Wait);

impl Receipt {
    /// Waits until the event is on the disk. Its sequence number, where it is known: in another process it is not.
    ///
    /// # Errors
    /// If the log fails before that, or `timeout` passes.
    pub fn wait(&self, timeout: Duration) -> Result<Option<u64>, NotDurable> {
        match &self.0 {
            Wait::Local(waiter) => waiter.wait(timeout),
            #[cfg(feature = "collector")]
            Wait::Polled(done) => {
                let begun = Instant::now();
                loop {
                    match done() {
                        Some(Ok(())) => return Ok(None),
                        Some(Err(why)) => return Err(NotDurable::Failed(why)),
                        None if begun.elapsed() >= timeout => return Err(NotDurable::Timeout(timeout)),
                        None => std::thread::sleep(Duration::from_micros(200)),
                    }
                }
            }
        }
    }
}

impl std::fmt::Debug for Receipt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Receipt").finish_non_exhaustive()
    }
}

/// Emits the events of one source. Its clones are the same source, and may be used from any thread.
#[derive(Clone)]
pub struct Emitter {
    transport: Arc<dyn Transport>,
    cells: Arc<dyn Cells>,
    source: u32,
    deadline: Duration,
}

impl std::fmt::Debug for Emitter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Emitter")
            .field("source", &self.source)
            .field("emitted", &self.emitted())
            .finish_non_exhaustive()
    }
}

impl Emitter {
    pub(crate) fn new(
        transport: Arc<dyn Transport>,
        cells: Arc<dyn Cells>,
        source: u32,
        deadline: Duration,
    ) -> Self {
        Self { transport, cells, source, deadline }
    }

    /// The number of its source in the log; 0 if another process gives it.
    pub fn source(&self) -> u32 {
        self.source
    }

    /// Events that have been emitted, those that were counted or refused among them.
    pub fn emitted(&self) -> u64 {
        self.cells.issued()
    }

    /// Events that were counted and not written one by one.
    pub fn counted(&self) -> u64 {
        self.cells.total()
    }

    fn encode(&self, event: &Event) -> Result<(u64, EventBytes), EventError> {
        let seq = self.cells.number();
        let mut bytes = EventBytes::new();
        let times = (monotonic_clock(), wall_clock());
        let encoded = event.encode_into(&mut bytes, seq, self.cells.total(), times);
        if let Err(error) = encoded {
            // It has a number, so it must be accounted for.
            self.cells.add(cell(event), event.bytes);
            return Err(error);
        }
        Ok((seq, bytes))
    }

    /// Writes down what has happened. It never waits: without room, the event is counted.
    ///
    /// # Errors
    /// If the event has more attributes than allowed, or is too long. It is counted then.
    pub fn emit(&self, event: &Event) -> Result<Emitted, EventError> {
        let (seq, bytes) = self.encode(event)?;
        let critical = event.is_critical();
        let pushed = self.transport.push(critical, seq, bytes, false);
        if critical {
            self.transport.was_full(pushed.is_err());
        }
        if pushed.is_ok() {
            return Ok(Emitted::Queued);
        }
        self.cells.add(cell(event), event.bytes);
        Ok(Emitted::Counted)
    }

    /// Writes down what is about to happen and must not happen otherwise: a channel that opens, a management verb. It waits for
    /// room in the reserved ring, until the deadline at most. The event takes a place there whatever its kind.
    ///
    /// # Errors
    /// If the log cannot be relied on. The caller refuses then what it was asked for; that is counted, as a `deny`.
    pub fn admit(&self, event: &Event) -> Result<Receipt, Refused> {
        let (seq, bytes) = self.encode(event)?;
        match self.queue(seq, &bytes) {
            Ok(receipt) => Ok(receipt),
            Err(refused) => {
                self.cells.add(cell(&event.clone().verdict(Verdict::Deny)), event.bytes);
                Err(refused)
            }
        }
    }

    fn queue(&self, seq: u64, bytes: &EventBytes) -> Result<Receipt, Refused> {
        let mut pause = Duration::from_micros(20);
        let begun = Instant::now();
        loop {
            if let Some(refused) = self.transport.refuses(self.deadline) {
                return Err(refused);
            }
            if let Ok(wait) = self.transport.push(true, seq, bytes.clone(), true) {
                self.transport.was_full(false);
                return wait.map(Receipt).ok_or_else(|| Refused::Closed("no acknowledgement".to_owned()));
            }
            let full = self.transport.was_full(true).max(begun.elapsed());
            if full >= self.deadline {
                return Err(Refused::Full(full));
            }
            std::thread::sleep(pause.min(self.deadline - full));
            pause = (pause * 2).min(Duration::from_millis(2));
        }
    }
}
