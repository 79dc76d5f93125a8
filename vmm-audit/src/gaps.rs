//! Whether all that was emitted is accounted for.
//!
//! Each event of a source has a number, whether it was written or only counted. So the numbers that were given are those of the events
//! that are there and those in the counters; what is left over is missing. And a log that is alive says so at least once per
//! heartbeat; a longer time without an entry is a silence.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use serde::Serialize;

use crate::event::{Event, Kind, rfc3339};
use crate::read::{Entries, Item};
use crate::storage::Storage;

/// The account of one source.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Account {
    /// Its number in the log.
    pub source: u32,
    /// Who it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub who: Option<String>,
    /// The first entry of it.
    pub first_entry: u64,
    /// Numbers that it has given to events, as far as is known.
    pub issued: u64,
    /// Events of it that are in the log.
    pub written: u64,
    /// Events that were counted.
    pub counted: u64,
    /// Events that it was just writing when it died, or that were none.
    pub torn: u64,
    /// Events that nothing accounts for.
    pub missing: u64,
    /// Whether the log says that the source is gone, so that all of this is final.
    pub ended: bool,
}

/// A time without an entry.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Silence {
    /// The entry before it.
    pub after_entry: u64,
    /// From when, RFC 3339.
    pub from: String,
    /// Until when.
    pub until: String,
    /// How long, in seconds.
    pub seconds: u64,
    /// Whether the log was closed before and opened after.
    pub closed: bool,
}

/// All that is not in the log.
#[derive(Clone, Debug, Default, Serialize)]
#[non_exhaustive]
pub struct Gaps {
    /// Accounts of all sources.
    pub accounts: Vec<Account>,
    /// Silences.
    pub silences: Vec<Silence>,
    /// Places that are damaged, and what is wrong with them.
    pub damage: Vec<String>,
    /// Events that were cut off after an interruption, before they were acknowledged.
    pub cut: u64,
    /// Times that the log was opened.
    pub opened: u64,
}

impl Gaps {
    /// Whether something is missing that should be there.
    pub fn is_complete(&self) -> bool {
        self.damage.is_empty() && self.accounts.iter().all(|account| account.missing == 0)
    }
}

/// A ring has one account, whoever collects it; a source in the log's own process has one each time that the log is open.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Key {
    Ring(String),
    Source(u64, u32),
}

#[derive(Default)]
struct Open {
    source: u32,
    who: Option<String>,
    first_entry: u64,
    highest: u64,
    lowest: Option<u64>,
    written: u64,
    counters: BTreeMap<String, u64>,
    issued: Option<u64>,
    torn: u64,
}

impl Open {
    fn account(self) -> Account {
        let counted: u64 = self.counters.values().sum();
        // A log whose beginning was removed has not seen the first.
        let unseen =
            if self.who.is_some() { 0 } else { self.lowest.map_or(0, |lowest| lowest.saturating_sub(1)) };
        let issued = self.issued.unwrap_or(self.highest.max(self.written + counted)).saturating_sub(unseen);
        Account {
            source: self.source,
            who: self.who,
            first_entry: self.first_entry,
            issued,
            written: self.written,
            counted,
            torn: self.torn,
            missing: issued.saturating_sub(self.written + counted + self.torn),
            ended: self.issued.is_some(),
        }
    }
}

#[derive(Default)]
struct Tally {
    gaps: Gaps,
    /// The key of each source at this point of the log.
    keys: BTreeMap<u32, Key>,
    open: BTreeMap<Key, Open>,
    heartbeat: Option<u64>,
    last: Option<(u64, u64)>,
    closed: bool,
}

impl Tally {
    fn source(&mut self, source: u32, entry: u64) -> &mut Open {
        let session = self.gaps.opened;
        let key = self.keys.entry(source).or_insert(Key::Source(session, source)).clone();
        self.open.entry(key).or_insert_with(|| Open { source, first_entry: entry, ..Open::default() })
    }

    fn entry(&mut self, entry: u64, source: u32, event: &Event) {
        self.silence(entry, event);
        let named: Option<u32> = event.get("source").and_then(|source| source.parse().ok());
        match (event.kind, named) {
            (Kind::LogOpened, _) if source == 0 => {
                self.gaps.opened += 1;
                self.keys.clear();
            }
            (Kind::Recovery, _) if source == 0 => self.gaps.cut += event.count,
            (Kind::Heartbeat, _) if source == 0 => {
                let interval = event.get("interval-ms").and_then(|interval| interval.parse().ok());
                self.heartbeat = interval.or(self.heartbeat);
            }
            (Kind::EmitterAttached, Some(number)) if source == 0 => {
                // In another process: its ring is what it is known by.
                if let Some(ring) = event.get("ring") {
                    self.keys.insert(number, Key::Ring(ring.to_owned()));
                }
                let who = event.subject.as_ref().map(ToString::to_string);
                let open = self.source(number, entry);
                open.source = number;
                open.who = who.or_else(|| Some("a process that gave no name".to_owned()));
            }
            (Kind::Coalesced, Some(number)) if source == 0 => {
                let counter = format!("{:?} {:?} {:?}", event.get("of"), event.action, event.verdict);
                let count = event.count;
                self.source(number, entry).counters.insert(counter, count);
            }
            (Kind::EmitterGone, Some(number)) if source == 0 => {
                let number_of = |name| event.get(name).and_then(|text| text.parse().ok());
                let (issued, torn) = (number_of("issued"), number_of("torn").unwrap_or(0));
                let open = self.source(number, entry);
                (open.issued, open.torn) = (issued, torn);
            }
            _ if source != 0 => {
                let who = event.subject.as_ref().filter(|_| event.kind == Kind::EmitterAttached);
                let who = who.map(ToString::to_string);
                let number = event.source_seq;
                let open = self.source(source, entry);
                open.who = who.or(open.who.take());
                open.written += 1;
                open.highest = open.highest.max(number);
                open.lowest = Some(open.lowest.map_or(number, |lowest| lowest.min(number)));
            }
            _ => {}
        }
        self.closed = event.kind == Kind::LogClosed && source == 0;
    }

    fn silence(&mut self, entry: u64, event: &Event) {
        let Some((before, at)) = self.last.replace((entry, event.wall)) else { return };
        let Some(heartbeat) = self.heartbeat else { return };
        let nanoseconds = event.wall.saturating_sub(at);
        // A heartbeat may come late under load.
        if nanoseconds / 1_000_000 > heartbeat.saturating_mul(2) + 1000 {
            self.gaps.silences.push(Silence {
                after_entry: before,
                from: rfc3339(at),
                until: rfc3339(event.wall),
                seconds: nanoseconds / 1_000_000_000,
                closed: self.closed,
            });
        }
    }
}

/// Accounts for all events of a log.
///
/// # Errors
/// If the storage cannot be read.
pub fn gaps(storage: Arc<dyn Storage>) -> io::Result<Gaps> {
    let mut entries = Entries::new(storage).live();
    let mut tally = Tally::default();
    while let Some(item) = entries.next()? {
        match item {
            Item::Entry(found) => match &found.event {
                Ok(event) => tally.entry(found.seq, found.source, event),
                Err(e) => tally.gaps.damage.push(format!("{}: {e}", found.place)),
            },
            Item::Damage { place, bytes, why } => {
                tally.gaps.damage.push(format!("{place}: {bytes} bytes: {why}"));
            }
            Item::Checkpoint { .. } => {}
        }
    }
    tally.gaps.accounts = std::mem::take(&mut tally.open).into_values().map(Open::account).collect();
    tally.gaps.accounts.sort_by_key(|account| account.first_entry);
    Ok(tally.gaps)
}
