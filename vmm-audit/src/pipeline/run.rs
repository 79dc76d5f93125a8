//! The thread that writes.

use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::counters::{Cells as _, coalesced_events};
use super::emitter::Waiter;
use super::local::{Local, Record};
use crate::event::{Event, Kind, Outcome};
use crate::log::{LogError, LogWriter, monotonic_clock};

/// How long the thread sleeps if nobody wakes it: the longest that a bulk event waits for it.
const NAP: Duration = Duration::from_millis(5);
/// How long it waits before it tries a full disk again.
const RETRY: Duration = Duration::from_millis(50);
/// How long it tries to close a log whose disk is full.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);

struct Run<'a> {
    local: &'a Local,
    log: LogWriter,
    waiters: Vec<(Arc<Waiter>, u64)>,
    flushes: Vec<Arc<Waiter>>,
    coalesced: Instant,
    last_commit: Instant,
}

/// Whoever still waits when the thread ends is told, however it ends.
struct Ended<'a>(&'a Local, String);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let why = self.0.failed.get_or_init(|| self.1.clone()).clone();
        let tell = |record: Record| record.waiter.iter().for_each(|waiter| waiter.tell(Err(why.clone())));
        while let Some(record) = self.0.critical.pop().or_else(|| self.0.bulk.pop()) {
            tell(record);
        }
        let flushes = std::mem::take(&mut *self.0.flushes.lock().unwrap_or_else(PoisonError::into_inner));
        flushes.iter().for_each(|waiter| waiter.tell(Err(why.clone())));
    }
}

pub(super) fn run(local: &Local, log: LogWriter) -> Result<(), LogError> {
    let mut ended = Ended(local, "its thread panicked".to_owned());
    let mut run = Run {
        local,
        log,
        waiters: Vec::new(),
        flushes: Vec::new(),
        coalesced: Instant::now(),
        last_commit: Instant::now(),
    };
    let result = run.work().and_then(|()| run.log.close());
    ended.1 = result.as_ref().err().map_or_else(|| "it was closed".to_owned(), ToString::to_string);
    // Before anyone is told: who is told looks.
    local.failed.get_or_init(|| ended.1.clone());
    for (waiter, _) in run.waiters {
        waiter.tell(Err(ended.1.clone()));
    }
    for waiter in run.flushes {
        waiter.tell(Err(ended.1.clone()));
    }
    result
}

impl Run<'_> {
    fn work(&mut self) -> Result<(), LogError> {
        self.heartbeat()?;
        loop {
            // Read before the rings: what was emitted before the log was told to close is written.
            let closing = self.local.closing.load(Ordering::Acquire);
            let mut flushes = self.local.flushes.lock().unwrap_or_else(PoisonError::into_inner);
            self.flushes.append(&mut flushes);
            drop(flushes);
            self.local.writing_since.store(monotonic_clock(), Ordering::Release);
            let taken = self.take()?;
            let drained = taken < self.local.options.batch;
            self.counters(drained, closing || !self.flushes.is_empty(), closing)?;
            if self.last_commit.elapsed() >= self.local.options.heartbeat {
                self.heartbeat()?;
            }
            let idle = self.log.pending_bytes() == 0;
            if idle {
                self.local.writing_since.store(0, Ordering::Release);
            }
            self.commit(closing)?;
            if drained {
                self.flushes.drain(..).for_each(|waiter| waiter.tell(Ok(self.log.acknowledged())));
            }
            if self.local.rotate.swap(false, Ordering::AcqRel) {
                self.log.rotate()?;
            }
            self.local.writing_since.store(0, Ordering::Release);
            if closing && drained {
                return Ok(());
            }
            if idle {
                self.sleep();
            }
        }
    }

    fn sleep(&self) {
        self.local.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let flushes = || !self.local.flushes.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
        if self.local.critical.is_empty() && !self.local.closing.load(Ordering::Relaxed) && !flushes() {
            std::thread::park_timeout(NAP);
        }
        self.local.sleeping.store(false, Ordering::Relaxed);
    }

    /// Appends what is in the rings, the reserved one first. How many that were.
    fn take(&mut self) -> Result<usize, LogError> {
        let mut taken = 0;
        while taken < self.local.options.batch {
            let Some(record) = self.local.critical.pop().or_else(|| self.local.bulk.pop()) else { break };
            taken += 1;
            let seq = match self.log.append(record.source, &record.event) {
                Ok(seq) => seq,
                Err(error) => {
                    if let Some(waiter) = record.waiter {
                        waiter.tell(Err(error.to_string()));
                    }
                    return Err(error);
                }
            };
            if let Some(waiter) = record.waiter {
                self.waiters.push((waiter, seq));
            }
        }
        Ok(taken)
    }

    /// Appends counters that have changed, and says which sources are gone.
    fn counters(&mut self, drained: bool, now: bool, closing: bool) -> Result<(), LogError> {
        if !now && self.coalesced.elapsed() < self.local.options.coalesce_every {
            return Ok(());
        }
        self.coalesced = Instant::now();
        let mut sources = self.local.sources.lock().unwrap_or_else(PoisonError::into_inner);
        let mut events = Vec::new();
        for source in &mut *sources {
            let total = source.cells.total();
            if total != source.written_total {
                source.written_total = total;
                events.append(&mut coalesced_events(&*source.cells, source.number, &mut source.written));
            }
        }
        // Whoever is gone has put all of his events into the rings, and these have been emptied since.
        if drained {
            sources.retain(|source| {
                let gone = (closing || source.alive.strong_count() == 0)
                    && source.written_total == source.cells.total()
                    && self.local.critical.is_empty()
                    && self.local.bulk.is_empty();
                if gone {
                    let event = Event::new(Kind::EmitterGone).attribute("source", source.number.to_string());
                    let event = event.attribute("issued", source.cells.issued().to_string());
                    events.push(event.amount(source.cells.total(), 0));
                }
                !gone
            });
        }
        drop(sources);
        events.iter().try_for_each(|event| self.log.append_own(event).map(drop))
    }

    fn heartbeat(&mut self) -> Result<(), LogError> {
        let interval = self.local.options.heartbeat.as_millis().to_string();
        self.log.append_own(&Event::new(Kind::Heartbeat).attribute("interval-ms", interval))?;
        self.last_commit = Instant::now();
        Ok(())
    }

    /// Commits, again and again if the disk is full.
    fn commit(&mut self, closing: bool) -> Result<(), LogError> {
        let begun = Instant::now();
        let mut failures = 0u64;
        loop {
            match self.log.commit() {
                Ok(_) => break,
                Err(error) if error.is_transient() && !(closing && begun.elapsed() > CLOSE_WITHIN) => {
                    failures += 1;
                    if failures == 1 {
                        tracing::error!(error = %error, "the audit log does not get any further");
                    }
                    let mut stuck = self.local.stuck.lock().unwrap_or_else(PoisonError::into_inner);
                    *stuck = Some(error.to_string());
                    drop(stuck);
                    std::thread::sleep(RETRY);
                }
                Err(error) => return Err(error),
            }
        }
        let acknowledged = self.log.acknowledged();
        if self.local.acknowledged.swap(acknowledged, Ordering::AcqRel) != acknowledged {
            self.last_commit = Instant::now();
            let mut checkpoint = self.local.checkpoint.lock().unwrap_or_else(PoisonError::into_inner);
            self.log.checkpoint().clone_into(&mut checkpoint);
        }
        self.waiters.drain(..).for_each(|(waiter, seq)| waiter.tell(Ok(seq)));
        if failures > 0 {
            let mut stuck = self.local.stuck.lock().unwrap_or_else(PoisonError::into_inner);
            let why = stuck.take().unwrap_or_default();
            drop(stuck);
            let event = Event::new(Kind::StorageFault)
                .outcome(Outcome::Success)
                .reason(why)
                .amount(failures, 0)
                .attribute("for-ms", begun.elapsed().as_millis().to_string());
            // With the next batch, which is soon: the counters of this time are in it too.
            self.log.append_own(&event)?;
        }
        Ok(())
    }
}
