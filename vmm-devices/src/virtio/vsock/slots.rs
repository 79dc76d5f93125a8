//! The connections of a device: a table with a bound, and which one a packet means.

use std::collections::{BTreeSet, HashMap, hash_map};
use std::sync::Arc;

use super::HOST_CID;
use super::backlog::Backlog;
use super::connection::Connection;
use super::far::Far;
use super::right::Right;

/// What a connection is known by: the guest's port, and the other side's identifier and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) guest_port: u32,
    pub(super) cid: u32,
    pub(super) port: u32,
}

/// What the far end is told when the guest accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    Nothing,
    /// `OK`, and the number of the port on this side.
    Line,
    /// The record of another device.
    Record,
}

/// A message or record that was read and did not find room yet.
#[derive(Debug)]
pub(super) struct Staged {
    pub(super) bytes: Vec<u8>,
    /// Bytes of it that were sent.
    pub(super) at: usize,
    /// Flags of [`super::packet::boundary`] at its end.
    pub(super) flags: u32,
}

/// A connection, and all that it has.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) key: Key,
    pub(super) connection: Connection,
    pub(super) far: Option<Far>,
    pub(super) backlog: Backlog,
    pub(super) staged: Option<Staged>,
    pub(super) greeting: Greeting,
    pub(super) right: Option<Right>,
    /// Something may be there to be read, and nothing said since that there is not.
    pub(super) readable: bool,
    pub(super) writable: bool,
    pub(super) hung_up: bool,
    /// What the far end knows of what the guest does no more.
    pub(super) told_far: u32,
    /// How long what the guest left behind may take to find a reader.
    pub(super) drain_deadline: Option<u64>,
    /// Dropped when nobody needs to look at what the guest asked for any more.
    pub(super) wanted: Option<Arc<()>>,
    /// Bytes of a message that the guest has got without its end.
    pub(super) unfinished: u32,
    /// The other side has begun it.
    pub(super) incoming: bool,
    /// It waits for its turn.
    pub(super) queued: bool,
    mapped: bool,
    timer: Option<u64>,
    generation: u32,
}

impl Entry {
    pub(super) fn new(key: Key, connection: Connection, greeting: Greeting) -> Self {
        Self {
            key,
            connection,
            far: None,
            backlog: Backlog::default(),
            staged: None,
            greeting,
            right: None,
            readable: true,
            writable: true,
            hung_up: false,
            told_far: 0,
            drain_deadline: None,
            wanted: None,
            unfinished: 0,
            incoming: false,
            queued: false,
            mapped: true,
            timer: None,
            generation: 0,
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if let Some(far) = &self.far {
            far.cut();
        }
    }
}

/// Names a connection for ever: its place, and which of those that had the place it is. What comes late for one that is gone finds
/// none.
pub(super) type Tag = u64;

/// Generations have fewer bits than there are, for tags of others.
const GENERATIONS: u32 = (1 << 30) - 1;

fn tag(place: u32, generation: u32) -> Tag {
    u64::from(generation) << 32 | u64::from(place)
}

/// The table.
#[derive(Debug)]
pub(super) struct Slots {
    entries: Vec<Option<Entry>>,
    free: Vec<u32>,
    by_key: HashMap<Key, u32>,
    timers: BTreeSet<(u64, u32)>,
    most: usize,
    generation: u32,
    /// How many of them others have begun, and each of those.
    incoming: usize,
    by_caller: HashMap<u32, usize>,
}

impl Slots {
    /// For `most` connections.
    pub(super) fn new(most: usize) -> Self {
        Self {
            entries: Vec::new(),
            free: Vec::new(),
            by_key: HashMap::new(),
            timers: BTreeSet::new(),
            most,
            generation: 0,
            incoming: 0,
            by_caller: HashMap::new(),
        }
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.entries.len() - self.free.len()
    }

    pub(super) fn is_full(&self) -> bool {
        self.len() >= self.most
    }

    pub(super) fn find(&self, key: &Key) -> Option<u32> {
        self.by_key.get(key).copied()
    }

    pub(super) fn get_mut(&mut self, place: u32) -> Option<&mut Entry> {
        self.entries.get_mut(usize::try_from(place).ok()?)?.as_mut()
    }

    pub(super) fn by_tag(&mut self, tag: Tag) -> Option<u32> {
        let place = u32::try_from(tag & u64::from(u32::MAX)).ok()?;
        self.get_mut(place).filter(|entry| u64::from(entry.generation) == tag >> 32)?;
        Some(place)
    }

    /// Whether there is a place for it. Of all places, one guest that calls this one has a quarter at most, all that do a half, and those
    /// and the host three quarters: so one leaves some to others, and all of them to what this guest begins.
    fn has_room_for(&self, entry: &Entry) -> bool {
        let of = |cid| self.by_caller.get(&cid).copied().unwrap_or(0);
        let (cid, guests) = (entry.key.cid, self.incoming - of(HOST_CID));
        let fair = cid == HOST_CID || of(cid) < self.most.div_ceil(4) && guests < self.most.div_ceil(2);
        !self.is_full() && (!entry.incoming || fair && self.incoming < self.most - self.most / 4)
    }

    /// Adds one, if there is room and its key is free.
    pub(super) fn insert(&mut self, mut entry: Entry) -> Option<(u32, Tag)> {
        if !self.has_room_for(&entry) || self.by_key.contains_key(&entry.key) {
            return None;
        }
        if entry.incoming {
            self.incoming += 1;
            *self.by_caller.entry(entry.key.cid).or_default() += 1;
        }
        self.generation = if self.generation >= GENERATIONS { 1 } else { self.generation + 1 };
        entry.generation = self.generation;
        let key = entry.key;
        let place = match self.free.pop() {
            Some(place) => {
                *self.entries.get_mut(usize::try_from(place).ok()?)? = Some(entry);
                place
            }
            None => {
                self.entries.push(Some(entry));
                u32::try_from(self.entries.len() - 1).ok()?
            }
        };
        self.by_key.insert(key, place);
        Some((place, tag(place, self.generation)))
    }

    /// Packets mean it no more; its key is free.
    pub(super) fn unmap(&mut self, place: u32) {
        let Some(entry) = self.get_mut(place) else { return };
        if std::mem::take(&mut entry.mapped) {
            let key = entry.key;
            self.by_key.remove(&key);
        }
    }

    pub(super) fn remove(&mut self, place: u32) -> Option<Entry> {
        self.unmap(place);
        self.set_timer(place, None);
        let entry = self.entries.get_mut(usize::try_from(place).ok()?)?.take()?;
        self.free.push(place);
        if entry.incoming
            && let hash_map::Entry::Occupied(mut of_caller) = self.by_caller.entry(entry.key.cid)
        {
            self.incoming -= 1;
            *of_caller.get_mut() -= 1;
            if *of_caller.get() == 0 {
                of_caller.remove();
            }
        }
        Some(entry)
    }

    /// When it is to be looked at, though nothing happened.
    pub(super) fn set_timer(&mut self, place: u32, at: Option<u64>) {
        let Some(entry) = self.get_mut(place) else { return };
        let before = std::mem::replace(&mut entry.timer, at);
        if before != at {
            before.map(|before| self.timers.remove(&(before, place)));
            at.map(|at| self.timers.insert((at, place)));
        }
    }

    pub(super) fn next_timer(&self) -> Option<u64> {
        self.timers.first().map(|(at, _)| *at)
    }

    /// One whose time has come, which has no timer any more.
    pub(super) fn take_due(&mut self, now: u64) -> Option<u32> {
        let (_, place) = self.timers.first().copied().filter(|(at, _)| *at <= now)?;
        self.set_timer(place, None);
        Some(place)
    }

    /// The places of all.
    pub(super) fn places(&self) -> Vec<u32> {
        (0..).zip(&self.entries).filter(|(_, entry)| entry.is_some()).map(|(place, _)| place).collect()
    }
}
