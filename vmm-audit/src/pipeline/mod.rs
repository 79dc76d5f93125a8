//! From those who emit events to the log, without making them wait for the disk.
//!
//! An [`Emitter`] puts an event into one of two bounded rings of its source, without a lock. A thread takes what is there, appends it to
//! the log, and commits it all at once; while the disk is busy, it gathers and hashes the next batch. Events of one source and ring stay in
//! their order; among sources, times tell the order within a batch.
//!
//! # Back-pressure
//! Never losing, never waiting and bounded memory cannot all be had. This is what is given:
//!
//! | event | ring has room | ring is full | the disk has stood still, or the ring been full, for longer than the deadline |
//! |---|---|---|---|
//! | bulk ([`Emitter::emit`]) | queued | counted | counted |
//! | critical ([`Emitter::emit`]): what was refused, revoked, done | queued in the reserved ring | counted | counted |
//! | critical, before it is done ([`Emitter::admit`]): opens, management | queued in the reserved ring | waits until the deadline | refused: what cannot be written down does not happen |
//!
//! Bulk events never take the place of critical ones, and no source that of another. What is counted and not written one by one is in `coalesced` events: for each
//! source, kind, action and verdict the number so far and their bytes, exact, and signed like everything else. Every event of a
//! source has a number, those that are counted too, so that `vmm-audit gaps` sees that numbers and counters add up.
//!
//! Nothing that a guest does on an established channel waits for the log: `emit` takes well under a microsecond and no lock.
//!
//! If the disk refuses a synchronisation, nobody knows what it has. The log is closed then, what waits for it is told, and
//! everything that is to be admitted is refused, until the monitor opens the log again. A disk that is full refuses only writes: that is
//! tried again, and written down once it works.

mod counters;
mod disk;
mod emitter;
mod local;
mod run;
#[cfg(test)]
mod tests;

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

pub use emitter::{Emitted, Emitter, NotDurable, Receipt, Refused};

#[cfg(feature = "collector")]
pub(crate) use counters::{CELLS, Cells, coalesced_events};
#[cfg(feature = "collector")]
pub(crate) use emitter::{Full, Transport, Wait, full_for};

use crate::event::{Event, Party};
use crate::keys::KeyStore;
use crate::log::{LogError, LogOptions, LogWriter, Recovered};
use crate::note::Verifier;
use crate::storage::Storage;
use local::Local;

/// How events reach the log.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PipelineOptions {
    /// Events that the reserved ring of a source holds, at least 1. 1024 if nothing is said.
    pub critical_events: usize,
    /// Events that its other ring holds, at least 1. 8192 if nothing is said; both together take 3 MiB then.
    pub bulk_events: usize,
    /// How long the log may stand still before nothing is admitted any more. 2 seconds if nothing is said.
    pub deadline: Duration,
    /// Events in a batch at most. 8192 if nothing is said.
    pub batch: usize,
    /// After how long without another event one says that the log is alive. A minute if nothing is said.
    pub heartbeat: Duration,
    /// How often counters are written that have changed. 100 ms if nothing is said.
    pub coalesce_every: Duration,
}

impl Default for PipelineOptions {
    fn default() -> Self {
        Self {
            critical_events: 1024,
            bulk_events: 8192,
            deadline: Duration::from_secs(2),
            batch: 8192,
            heartbeat: Duration::from_secs(60),
            coalesce_every: Duration::from_millis(100),
        }
    }
}

impl PipelineOptions {
    /// Those that hold if nothing is said.
    pub fn new() -> Self {
        Self::default()
    }

    /// With rings of other sizes.
    #[must_use]
    pub fn rings(mut self, critical_events: usize, bulk_events: usize) -> Self {
        (self.critical_events, self.bulk_events) = (critical_events, bulk_events);
        self
    }

    /// With another [`deadline`](Self::deadline).
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// With another [`heartbeat`](Self::heartbeat).
    #[must_use]
    pub fn heartbeat(mut self, interval: Duration) -> Self {
        self.heartbeat = interval;
        self
    }

    /// With another [`batch`](Self::batch).
    #[must_use]
    pub fn batch(mut self, events: usize) -> Self {
        self.batch = events;
        self
    }
}

/// How the log is.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Status {
    /// Entries that are on the disk.
    pub acknowledged: u64,
    /// Events that wait in the rings: critical and others.
    pub waiting: (usize, usize),
    /// Events that were counted and not written one by one.
    pub counted: u64,
    /// Why the last write did not work, while it does not.
    pub stuck: Option<String>,
    /// Why the log is closed for good.
    pub failed: Option<String>,
}

/// A log and the thread that writes it.
///
/// ```
/// use std::sync::Arc;
/// use std::time::Duration;
/// use vmm_audit::event::{Action, Event, Kind, Object, ObjectClass, Party, Verdict};
/// use vmm_audit::keys::MemoryKeys;
/// use vmm_audit::log::LogOptions;
/// use vmm_audit::pipeline::{AuditLog, PipelineOptions};
/// use vmm_audit::storage::MemoryStorage;
///
/// let storage = Arc::new(MemoryStorage::new());
/// let keys = Box::new(MemoryKeys::new());
/// let (log, _) = AuditLog::open(storage, keys, "host.example/audit", LogOptions::new(), PipelineOptions::new())?;
/// let emitter = log.emitter(Party::vm(1, 1));
///
/// let open = Event::new(Kind::Opened).action(Action::Connect).object(Object::numbered(ObjectClass::Vsock, 22));
/// let receipt = emitter.admit(&open)?; // an error here means: do not open
/// receipt.wait(Duration::from_secs(5))?; // only who wants it on the disk waits for that
/// log.close()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct AuditLog {
    local: Arc<Local>,
    thread: Option<JoinHandle<Result<(), LogError>>>,
    verifier: Verifier,
}

impl AuditLog {
    /// Opens or begins the log in `storage` and starts the thread that writes it.
    ///
    /// # Errors
    /// Those of [`LogWriter::open`], an option that cannot be, or that the system gives no thread.
    pub fn open(
        storage: Arc<dyn Storage>,
        keys: Box<dyn KeyStore>,
        origin: &str,
        log: LogOptions,
        options: PipelineOptions,
    ) -> Result<(Self, Recovered), LogError> {
        for (option, value) in [
            ("critical_events", options.critical_events),
            ("bulk_events", options.bulk_events),
            ("batch", options.batch),
        ] {
            if value == 0 || value > 1 << 24 {
                return Err(LogError::Option { option, value: value.to_string(), allowed: "1 to 16777216" });
            }
        }
        let (writer, recovered) = LogWriter::open(storage, keys, origin, log)?;
        let verifier = writer.verifier().clone();
        let local = Arc::new(Local::new(options, writer.acknowledged(), writer.checkpoint().to_owned()));
        let shared = Arc::clone(&local);
        let disk = disk::Disk::start().map_err(LogError::io("a thread"))?;
        let builder = std::thread::Builder::new().name("vmm-audit".to_owned());
        let thread =
            builder.spawn(move || run::run(&shared, writer, disk)).map_err(LogError::io("a thread"))?;
        local.set_thread(thread.thread().clone());
        Ok((Self { local, thread: Some(thread), verifier }, recovered))
    }

    /// One who emits events: a virtual machine, a device, the management. It is a source of its own, which the log says, with `who`. Its
    /// clones are the same source.
    pub fn emitter(&self, who: Party) -> Emitter {
        let (source, channel, cells) = self.local.register();
        let emitter = Emitter::new(channel, cells, source, self.local.options.deadline);
        let mut event = Event::new(crate::event::Kind::EmitterAttached).subject(who);
        event.boot = crate::log::boot_id();
        // If the ring is full, it is counted like any other.
        if let Err(error) = emitter.emit(&event.attribute("source", source.to_string())) {
            tracing::error!(error = %error, "an emitter cannot introduce itself");
        }
        emitter
    }

    /// The public key that verifiers are given.
    pub fn verifier(&self) -> &Verifier {
        &self.verifier
    }

    /// The latest checkpoint, a signed note: what an auditor keeps.
    pub fn checkpoint(&self) -> String {
        self.local.checkpoint.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How the log is.
    pub fn status(&self) -> Status {
        self.local.status()
    }

    /// Has the log begin a new segment, with a new key, after what is in the rings now.
    pub fn rotate(&self) {
        self.local.rotate.store(true, Ordering::Release);
        self.local.wake();
    }

    /// Waits until everything emitted before is on the disk, or `timeout` has passed.
    ///
    /// # Errors
    /// If it is not.
    pub fn flush(&self, timeout: Duration) -> Result<(), NotDurable> {
        self.local.flush(timeout)
    }

    /// Writes what is in the rings and closes the log.
    ///
    /// # Errors
    /// If that does not work; what has been acknowledged is there all the same.
    pub fn close(mut self) -> Result<(), LogError> {
        self.end()
    }

    fn end(&mut self) -> Result<(), LogError> {
        self.local.closing.store(true, Ordering::Release);
        self.local.wake();
        match self.thread.take().map(JoinHandle::join) {
            None => Ok(()),
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(LogError::Poisoned("the thread of the log panicked".to_owned())),
        }
    }
}

impl Drop for AuditLog {
    fn drop(&mut self) {
        if self.thread.is_some()
            && let Err(error) = self.end()
        {
            tracing::error!(error = %error, "the audit log did not close in the ordinary way");
        }
    }
}
