//! Where entries go besides the log: files, the journal, syslog.
//!
//! A [`Forwarder`] reads the log like anyone else and hands to a [`Sink`] what a checkpoint has acknowledged. So a sink that is slow or gone
//! holds up nobody, and loses nothing: the forwarder goes on where it was. A sink may get an entry twice, if it or the forwarder ended in
//! between; the sequence number tells.

mod journald;
mod lines;
mod syslog;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use serde_json::{Value, json};

pub use journald::Journald;
pub use lines::{Form, Lines};
pub use syslog::{Framing, Syslog, SyslogTarget};

use crate::event::Event;
use crate::read::{Entries, Item};
use crate::storage::Storage;

/// An entry that goes to a sink.
#[derive(Clone, Debug)]
pub struct Delivery {
    /// Its sequence number.
    pub seq: u64,
    /// Its source.
    pub source: u32,
    /// The event.
    pub event: Event,
}

impl Delivery {
    /// As JSON: the event's fields, with `seq` and `source` before them.
    pub fn to_json(&self) -> Value {
        let mut value = json!({ "seq": self.seq, "source": self.source });
        if let (Some(map), Ok(Value::Object(event))) =
            (value.as_object_mut(), serde_json::to_value(&self.event))
        {
            map.extend(event);
        }
        value
    }
}

/// What goes wrong with a sink.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SinkError {
    /// It cannot be reached or does not take it; later it may.
    #[error("{sink}: {source}")]
    Io {
        /// Which.
        sink: String,
        /// Why.
        source: io::Error,
    },
    /// The log cannot be read.
    #[error("the log cannot be read: {0}")]
    Log(io::Error),
    /// How far the sink is cannot be kept.
    #[error("cursor {path}: {source}")]
    Cursor {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Takes entries.
pub trait Sink {
    /// Takes an entry.
    ///
    /// # Errors
    /// If it does not; it will be offered again.
    fn send(&mut self, delivery: &Delivery) -> Result<(), SinkError>;

    /// Passes on what it may still have.
    ///
    /// # Errors
    /// If that does not work: all since the last time will be offered again.
    fn flush(&mut self) -> Result<(), SinkError> {
        Ok(())
    }
}

impl<S: Sink + ?Sized> Sink for Box<S> {
    fn send(&mut self, delivery: &Delivery) -> Result<(), SinkError> {
        (**self).send(delivery)
    }

    fn flush(&mut self) -> Result<(), SinkError> {
        (**self).flush()
    }
}

/// RFC 5424, table 2: how bad it is. 3 error, 4 warning, 5 notice, 6 informational.
pub(crate) fn severity(event: &Event) -> u8 {
    use crate::event::{Kind, Verdict};
    match (event.kind, event.verdict) {
        (Kind::StorageFault | Kind::Malformed, _) => 3,
        (Kind::Misbehaviour | Kind::EmulationFailure | Kind::Recovery | Kind::Coalesced, _)
        | (_, Some(Verdict::Deny | Verdict::Quarantine)) => 4,
        (Kind::Traffic | Kind::Heartbeat, _) => 6,
        _ => 5,
    }
}

/// What happened, in a line for people.
pub fn describe(event: &Event) -> String {
    let mut line = event.kind.to_string();
    let mut word = |before: &str, word: Option<String>| {
        if let Some(word) = word {
            line += before;
            line += &word;
        }
    };
    word(" ", event.verdict.map(|verdict| verdict.to_string()));
    word(" ", event.action.map(|action| action.to_string()));
    word(" ", event.object.as_ref().map(ToString::to_string));
    word(" by ", event.subject.as_ref().map(ToString::to_string));
    word(" of ", event.peer.as_ref().map(ToString::to_string));
    word(" -> ", event.outcome.map(|outcome| outcome.to_string()));
    let line_number =
        if event.rule_line == 0 { String::new() } else { format!(" (line {})", event.rule_line) };
    word(", rule ", event.rule.as_ref().map(|rule| format!("{rule}{line_number}")));
    word(", ", (event.count != 0).then(|| format!("{} of them", event.count)));
    word(": ", event.reason.as_ref().map(ToString::to_string));
    for (name, value) in &event.attributes {
        word(" ", Some(format!("{name}={value}")));
    }
    line
}

/// Entries that a checkpoint has not acknowledged yet, at most: the bound of what a broken log makes a reader hold.
const HELD: usize = 1 << 17;
/// How long a forwarder waits before it looks or tries again.
const PAUSE: Duration = Duration::from_millis(20);

/// Reads a log and hands its entries to a sink.
pub struct Forwarder<S> {
    entries: Entries,
    sink: S,
    /// The first entry that the sink does not have.
    next: u64,
    cursor: Option<PathBuf>,
    held: VecDeque<Delivery>,
    ready: VecDeque<Delivery>,
}

impl<S: Sink> Forwarder<S> {
    /// From entry `from` on.
    ///
    /// # Errors
    /// If the storage cannot be read.
    pub fn new(storage: Arc<dyn Storage>, sink: S, from: u64) -> Result<Self, SinkError> {
        let entries = Entries::near(storage, from).map_err(SinkError::Log)?.live();
        Ok(Self { entries, sink, next: from, cursor: None, held: VecDeque::new(), ready: VecDeque::new() })
    }

    /// From where the file `cursor` says that it was, and keeps it up to date. Without such a file, from the beginning.
    ///
    /// # Errors
    /// If the storage or the file cannot be read, or the file has no number in it.
    pub fn with_cursor(storage: Arc<dyn Storage>, sink: S, cursor: PathBuf) -> Result<Self, SinkError> {
        let error = |source| SinkError::Cursor { path: cursor.clone(), source };
        let from = match std::fs::read_to_string(&cursor) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => 0,
            text => {
                let invalid = |_| io::Error::new(io::ErrorKind::InvalidData, "not a number");
                text.and_then(|text| text.trim().parse().map_err(invalid)).map_err(error)?
            }
        };
        Ok(Self { cursor: Some(cursor), ..Self::new(storage, sink, from)? })
    }

    /// The first entry that the sink does not have.
    pub fn position(&self) -> u64 {
        self.next
    }

    /// The sink.
    pub fn sink(&mut self) -> &mut S {
        &mut self.sink
    }

    /// Hands over what there is. How many entries that were.
    ///
    /// # Errors
    /// If the log cannot be read or the sink takes nothing. Nothing is lost: the next call goes on.
    pub fn forward(&mut self) -> Result<u64, SinkError> {
        let mut sent = 0;
        loop {
            while let Some(delivery) = self.ready.front() {
                if delivery.seq >= self.next {
                    self.sink.send(delivery)?;
                    self.next = delivery.seq + 1;
                    sent += 1;
                }
                self.ready.pop_front();
            }
            match self.entries.next().map_err(SinkError::Log)? {
                None => break,
                Some(Item::Entry(found)) => match found.event {
                    Ok(event) if self.held.len() < HELD => {
                        self.held.push_back(Delivery { seq: found.seq, source: found.source, event });
                    }
                    Ok(_) => {
                        let source = io::Error::other("too many entries without a checkpoint");
                        return Err(SinkError::Log(source));
                    }
                    Err(e) => tracing::error!(place = %found.place, error = %e, "an entry is no event"),
                },
                Some(Item::Checkpoint { .. }) => self.ready.append(&mut self.held),
                Some(Item::Damage { place, bytes, why }) => {
                    tracing::error!(%place, bytes, why, "the audit log is damaged");
                    self.held.clear();
                }
            }
        }
        if sent > 0 {
            self.sink.flush()?;
            self.keep()?;
        }
        Ok(sent)
    }

    fn keep(&self) -> Result<(), SinkError> {
        let Some(path) = &self.cursor else { return Ok(()) };
        let mut beside = path.clone().into_os_string();
        beside.push(".tmp");
        let written = std::fs::write(&beside, format!("{}\n", self.next));
        let kept = written.and_then(|()| std::fs::rename(&beside, path));
        kept.map_err(|source| SinkError::Cursor { path: path.clone(), source })
    }

    /// Forwards until `stop` is set, and tries again when the sink fails.
    pub fn run(&mut self, stop: &AtomicBool) {
        let mut pause = PAUSE;
        while !stop.load(Ordering::Acquire) {
            match self.forward() {
                Ok(0) => pause = PAUSE,
                Ok(_) => {
                    pause = PAUSE;
                    continue;
                }
                Err(error) => {
                    tracing::warn!(error = %error, "a sink of the audit log");
                    pause = (pause * 2).min(Duration::from_secs(5));
                }
            }
            std::thread::sleep(pause);
        }
    }
}
