//! The thread that writes, and the one that waits for the disk.
//!
//! The first takes events out of the rings, appends them and hashes them; the second writes a batch and waits until the disk has it.
//! Meanwhile the first gathers the next batch, up to the size that the options allow.

use std::sync::atomic::{Ordering, fence};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::counters::{Cells as _, coalesced_events};
use super::disk::{Disk, Gathered};
use super::emitter::Waiter;
use super::local::{Local, Record, Rings};
use crate::event::{Event, Kind, Outcome};
use crate::log::{LogError, LogWriter, monotonic_clock};

/// How long the thread sleeps if nobody wakes it: the longest that a bulk event waits for it.
const NAP: Duration = Duration::from_millis(5);
/// How long it waits before it tries a full disk again.
const RETRY: Duration = Duration::from_millis(50);
/// How long it tries to close a log whose disk is full.
const CLOSE_WITHIN: Duration = Duration::from_secs(5);
/// Bulk events that are taken of one source before the next has its turn.
const TURN: usize = 64;

/// A disk that takes nothing: since when, and how often it was tried.
struct Stuck {
    since: Instant,
    failures: u64,
}

struct Run<'a> {
    local: &'a Local,
    log: LogWriter,
    disk: Disk,
    gathered: Gathered,
    flight: Option<Gathered>,
    /// Those who wait for what is in the rings.
    asked: Vec<Arc<Waiter>>,
    stuck: Option<Stuck>,
    /// The source whose turn is first.
    turn: usize,
    coalesced: Instant,
    last_commit: Instant,
}

/// Whoever still waits when the thread ends is told, however it ends.
struct Ended<'a>(&'a Local, String);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        let why = self.0.failed.get_or_init(|| self.1.clone()).clone();
        let tell = |record: Record| record.waiter.iter().for_each(|waiter| waiter.tell(Err(why.clone())));
        for (_, rings) in self.0.rings() {
            while let Some(record) = rings.critical.pop().or_else(|| rings.bulk.pop()) {
                tell(record);
            }
        }
        let flushes = std::mem::take(&mut *self.0.flushes.lock().unwrap_or_else(PoisonError::into_inner));
        flushes.iter().for_each(|waiter| waiter.tell(Err(why.clone())));
    }
}

pub(super) fn run(local: &Local, log: LogWriter, disk: Disk) -> Result<(), LogError> {
    let mut ended = Ended(local, "its thread panicked".to_owned());
    let mut run = Run {
        local,
        log,
        disk,
        gathered: Gathered::default(),
        flight: None,
        asked: Vec::new(),
        stuck: None,
        turn: 0,
        coalesced: Instant::now(),
        last_commit: Instant::now(),
    };
    let result = run.work().and_then(|()| run.log.close());
    ended.1 = result.as_ref().err().map_or_else(|| "it was closed".to_owned(), ToString::to_string);
    // Before anyone is told: who is told looks.
    local.failed.get_or_init(|| ended.1.clone());
    run.gathered.fail(&ended.1);
    run.flight.unwrap_or_default().fail(&ended.1);
    run.asked.iter().for_each(|waiter| waiter.tell(Err(ended.1.clone())));
    run.disk.end();
    result
}

impl Run<'_> {
    fn work(&mut self) -> Result<(), LogError> {
        self.heartbeat()?;
        loop {
            // Read before the rings: what was emitted before the log was told to close is written.
            let closing = self.local.closing.load(Ordering::Acquire);
            let drained = self.gather(closing)?;
            if self.flight.is_some() {
                self.log.hash_pending();
                self.await_disk(drained)?;
                continue;
            }
            let rotate = self.local.rotate.swap(false, Ordering::AcqRel);
            if rotate || self.log.is_rotation_due() {
                self.rotate(rotate, closing)?;
            } else if self.log.is_behind() {
                // Tiles must not pile up.
                self.tidy(closing)?;
            } else if self.log.is_pending() {
                self.send()?;
                // While the disk is busy with this one, what the last one made is written.
                self.tidy(closing)?;
            } else {
                let all = std::mem::take(&mut self.gathered);
                self.acknowledge(all)?;
                self.tidy(closing)?;
                self.local.writing_since.store(0, Ordering::Release);
                if closing && drained && !self.log.is_pending() {
                    return Ok(());
                }
                self.sleep();
            }
        }
    }

    /// Appends what is in the rings, as far as the batch has room. Whether the rings were emptied.
    fn gather(&mut self, closing: bool) -> Result<bool, LogError> {
        let mut asked = self.local.flushes.lock().unwrap_or_else(PoisonError::into_inner);
        self.asked.append(&mut asked);
        drop(asked);
        if self.gathered.since == 0 {
            self.gathered.since = monotonic_clock();
        }
        if self.flight.is_none() {
            self.local.writing_since.store(self.gathered.since, Ordering::Release);
        }
        let drained = self.take()?;
        self.counters(drained, closing || !self.asked.is_empty(), closing)?;
        if self.last_commit.elapsed() >= self.local.options.heartbeat {
            self.heartbeat()?;
        }
        if drained {
            self.gathered.flushes.append(&mut self.asked);
        }
        if !self.log.is_pending() {
            self.gathered.since = 0;
        }
        Ok(drained)
    }

    fn sleep(&self) {
        self.local.sleeping.store(true, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let flushes = || !self.local.flushes.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
        let waits = || {
            let sources = self.local.sources.lock().unwrap_or_else(PoisonError::into_inner);
            sources.iter().any(|source| !source.rings.critical.is_empty())
        };
        if !self.local.closing.load(Ordering::Relaxed) && !flushes() && !waits() {
            std::thread::park_timeout(NAP);
        }
        self.local.sleeping.store(false, Ordering::Relaxed);
    }

    fn append(&mut self, source: u32, record: Record) -> Result<(), LogError> {
        self.gathered.events += 1;
        match self.log.append(source, &record.event) {
            Ok(seq) => {
                self.gathered.waiters.extend(record.waiter.map(|waiter| (waiter, seq)));
                Ok(())
            }
            Err(error) => {
                record.waiter.iter().for_each(|waiter| waiter.tell(Err(error.to_string())));
                Err(error)
            }
        }
    }

    /// Appends what is in the rings, the reserved ones first; of each source a few, so that none waits for another. Whether that
    /// was all.
    fn take(&mut self) -> Result<bool, LogError> {
        let mut rings = self.local.rings();
        let first = self.turn % rings.len().max(1);
        rings.rotate_left(first);
        self.turn = self.turn.wrapping_add(1);
        let critical = |rings: &Rings| rings.critical.pop();
        let bulk = |rings: &Rings| rings.bulk.pop();
        Ok(self.take_from(&rings, critical)? && self.take_from(&rings, bulk)?)
    }

    fn take_from(
        &mut self,
        rings: &[(u32, Arc<Rings>)],
        pop: impl Fn(&Rings) -> Option<Record>,
    ) -> Result<bool, LogError> {
        loop {
            let mut empty = true;
            for (source, rings) in rings {
                for _ in 0..TURN {
                    if self.gathered.events >= self.local.options.batch {
                        return Ok(false);
                    }
                    let Some(record) = pop(rings) else { break };
                    empty = false;
                    self.append(*source, record)?;
                }
            }
            if empty {
                return Ok(true);
            }
        }
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
            sources.retain_mut(|source| {
                let left = source.alive.strong_count() == 0;
                let gone = (closing || left)
                    && source.written_total == source.cells.total()
                    && source.rings.is_empty();
                if gone && !std::mem::replace(&mut source.gone, true) {
                    let event = Event::new(Kind::EmitterGone).attribute("source", source.number.to_string());
                    let event = event.attribute("issued", source.cells.issued().to_string());
                    events.push(event.amount(source.cells.total(), 0));
                }
                // Where the log is closed before its emitters are gone, they are still told.
                !(left && source.gone)
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

    /// Has the thread of the disk write what was gathered.
    fn send(&mut self) -> Result<(), LogError> {
        let writing = self.log.prepare(false, None)?;
        let mut flight = std::mem::take(&mut self.gathered);
        // From here on it is the disk that is waited for. One that is full has been since it was.
        if self.stuck.is_none() {
            flight.since = monotonic_clock();
        }
        self.local.writing_since.store(flight.since, Ordering::Release);
        self.flight = Some(flight);
        self.disk.to.send(writing).map_err(|_| no_disk())
    }

    /// Waits for the disk; if there is room for more, no longer than until it is time to look into the rings again.
    fn await_disk(&mut self, drained: bool) -> Result<(), LogError> {
        let written = if drained {
            match self.disk.from.recv_timeout(NAP) {
                Ok(written) => written,
                Err(RecvTimeoutError::Timeout) => return Ok(()),
                Err(RecvTimeoutError::Disconnected) => return Err(no_disk()),
            }
        } else {
            self.disk.from.recv().map_err(|_| no_disk())?
        };
        let flight = self.flight.take().unwrap_or_default();
        match self.log.settle(written) {
            Ok(_) => self.acknowledge(flight),
            Err(error) => {
                self.gathered.prepend(flight);
                self.failed(error, self.local.closing.load(Ordering::Acquire))
            }
        }
    }

    /// Goes over to the next segment, which writes what was gathered too.
    fn rotate(&mut self, asked: bool, closing: bool) -> Result<(), LogError> {
        let committed = self.log.commit();
        match committed.and_then(|_| if asked { self.log.rotate() } else { Ok(()) }) {
            Ok(()) => {
                let gathered = std::mem::take(&mut self.gathered);
                self.acknowledge(gathered)
            }
            Err(error) => {
                if asked {
                    self.local.rotate.store(true, Ordering::Release);
                }
                self.failed(error, closing)
            }
        }
    }

    /// Tells those who wait for a batch that the disk has it.
    fn acknowledge(&mut self, batch: Gathered) -> Result<(), LogError> {
        let acknowledged = self.log.acknowledged();
        if self.local.acknowledged.swap(acknowledged, Ordering::AcqRel) != acknowledged {
            self.last_commit = Instant::now();
            let mut checkpoint = self.local.checkpoint.lock().unwrap_or_else(PoisonError::into_inner);
            self.log.checkpoint().clone_into(&mut checkpoint);
        }
        self.local.writing_since.store(self.gathered.since, Ordering::Release);
        batch.waiters.iter().for_each(|(waiter, seq)| waiter.tell(Ok(*seq)));
        batch.flushes.iter().for_each(|waiter| waiter.tell(Ok(acknowledged)));
        let Some(Stuck { since, failures }) = self.stuck.take() else { return Ok(()) };
        let why = self.local.stuck.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default();
        let event = Event::new(Kind::StorageFault)
            .outcome(Outcome::Success)
            .reason(why)
            .amount(failures, 0)
            .attribute("for-ms", since.elapsed().as_millis().to_string());
        // With the next batch, which is soon: the counters of this time are in it too.
        self.log.append_own(&event).map(drop)
    }

    /// Waits before a full disk is tried again. Anything else ends the log.
    fn failed(&mut self, error: LogError, closing: bool) -> Result<(), LogError> {
        let stuck = self.stuck.get_or_insert(Stuck { since: Instant::now(), failures: 0 });
        if !error.is_transient() || (closing && stuck.since.elapsed() > CLOSE_WITHIN) {
            return Err(error);
        }
        stuck.failures += 1;
        if stuck.failures == 1 {
            tracing::error!(error = %error, "the audit log does not get any further");
        }
        *self.local.stuck.lock().unwrap_or_else(PoisonError::into_inner) = Some(error.to_string());
        std::thread::sleep(RETRY);
        Ok(())
    }

    /// Writes tiles and what else is due beside the segments. It may wait for the disk too.
    fn tidy(&mut self, closing: bool) -> Result<(), LogError> {
        if self.flight.is_none() {
            self.local.writing_since.store(monotonic_clock(), Ordering::Release);
        }
        self.log.tidy().or_else(|error| self.failed(error, closing))
    }
}

fn no_disk() -> LogError {
    LogError::Poisoned("the thread that writes to the disk is gone".to_owned())
}
