//! Which address is at which port.
//!
//! # Threat model
//! Guests choose what is learned. There are so many entries at most, and so many of one port's, so that a guest that sends from
//! ever new addresses uses up its own and nobody else's; where there is no room nothing is forgotten for it. The hash has a key.

use std::collections::HashMap;

use super::vlan::VlanId;
use crate::net::MacAddr;

/// Which port of a switch; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PortId(pub(super) u32);

impl PortId {
    /// As a number, for logs.
    pub fn get(self) -> u32 {
        self.0
    }
}

/// How often a full table is looked through for what is too old.
const SWEEP_NS: u64 = 1_000_000_000;

/// Address and VLAN in one number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key(u64);

impl Key {
    pub(super) fn new(vlan: VlanId, mac: MacAddr) -> Self {
        let [a, b, c, d, e, f] = mac.0;
        let [high, low] = vlan.get().to_be_bytes();
        Self(u64::from_be_bytes([high, low, a, b, c, d, e, f]))
    }
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    port: PortId,
    /// When it was last heard of; `None` for one that was not learned, and stays.
    seen_ns: Option<u64>,
}

/// What became of an address that was heard of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Learned {
    /// It was known.
    Known,
    /// It is new.
    New,
    /// It was elsewhere.
    Moved,
    /// There is no room for it.
    Full,
    /// It is another port's for good.
    Taken,
}

#[derive(Debug)]
pub(super) struct MacTable {
    entries: HashMap<Key, Entry>,
    learned: HashMap<PortId, usize>,
    most: usize,
    aging_ns: u64,
    swept_ns: Option<u64>,
}

impl MacTable {
    pub(super) fn new(most: usize, aging_ns: u64) -> Self {
        Self {
            entries: HashMap::with_capacity(most),
            learned: HashMap::new(),
            most,
            aging_ns,
            swept_ns: None,
        }
    }

    fn is_old(entry: &Entry, aging_ns: u64, now_ns: u64) -> bool {
        entry.seen_ns.is_some_and(|seen| now_ns.saturating_sub(seen) >= aging_ns)
    }

    fn uncount(&mut self, port: PortId) {
        if let Some(count) = self.learned.get_mut(&port) {
            *count = count.saturating_sub(1);
        }
    }

    /// Whether the port may have one more of at most `limit`, after what is too old has gone.
    fn has_room(&mut self, port: PortId, limit: usize, now_ns: u64) -> bool {
        let has = |table: &Self| {
            table.entries.len() < table.most && table.learned.get(&port).is_none_or(|count| *count < limit)
        };
        if has(self) {
            return true;
        }
        if self.swept_ns.is_some_and(|swept| now_ns.saturating_sub(swept) < SWEEP_NS) {
            return false;
        }
        self.swept_ns = Some(now_ns);
        self.sweep(now_ns);
        has(self)
    }

    /// Forgets what is too old.
    pub(super) fn sweep(&mut self, now_ns: u64) {
        let (aging_ns, learned) = (self.aging_ns, &mut self.learned);
        self.entries.retain(|_, entry| {
            let old = Self::is_old(entry, aging_ns, now_ns);
            if old && let Some(count) = learned.get_mut(&entry.port) {
                *count = count.saturating_sub(1);
            }
            !old
        });
    }

    /// An address was heard of at a port, which may have `limit` learned ones.
    pub(super) fn learn(&mut self, key: Key, port: PortId, limit: usize, now_ns: u64) -> Learned {
        let aging_ns = self.aging_ns;
        let known = match self.entries.get_mut(&key) {
            Some(Entry { port: owner, seen_ns: None }) => {
                return if *owner == port { Learned::Known } else { Learned::Taken };
            }
            Some(entry) if entry.port == port => {
                entry.seen_ns = Some(now_ns);
                return Learned::Known;
            }
            Some(entry) => Some((entry.port, Self::is_old(entry, aging_ns, now_ns))),
            None => None,
        };
        if let Some((elsewhere, _)) = known {
            // It is heard of here, so it is there no more, whether or not there is room for it here.
            self.entries.remove(&key);
            self.uncount(elsewhere);
        }
        if !self.has_room(port, limit, now_ns) {
            return Learned::Full;
        }
        self.entries.insert(key, Entry { port, seen_ns: Some(now_ns) });
        *self.learned.entry(port).or_default() += 1;
        if known.is_some_and(|(_, old)| !old) { Learned::Moved } else { Learned::New }
    }

    /// Where it is.
    pub(super) fn find(&self, key: Key, now_ns: u64) -> Option<PortId> {
        let entry = self.entries.get(&key)?;
        (!Self::is_old(entry, self.aging_ns, now_ns)).then_some(entry.port)
    }

    /// Whose it is for good.
    pub(super) fn owner(&self, key: Key) -> Option<PortId> {
        self.entries.get(&key).filter(|entry| entry.seen_ns.is_none()).map(|entry| entry.port)
    }

    /// It is at that port for good. Such entries count for nobody's limit.
    pub(super) fn pin(&mut self, key: Key, port: PortId) {
        if let Some(Entry { port: elsewhere, seen_ns: Some(_) }) =
            self.entries.insert(key, Entry { port, seen_ns: None })
        {
            self.uncount(elsewhere);
        }
    }

    /// Forgets all of a port's.
    pub(super) fn forget(&mut self, port: PortId) {
        self.entries.retain(|_, entry| entry.port != port);
        self.learned.remove(&port);
    }

    /// What it knows now: address, port, and whether that stays.
    pub(super) fn entries(&self, now_ns: u64) -> impl Iterator<Item = (Key, PortId, bool)> + '_ {
        let fresh = move |(_, entry): &(&Key, &Entry)| !Self::is_old(entry, self.aging_ns, now_ns);
        self.entries.iter().filter(fresh).map(|(key, entry)| (*key, entry.port, entry.seen_ns.is_none()))
    }
}

impl Key {
    /// A number that depends on all of it.
    pub(super) fn mix(self, seed: u64) -> u64 {
        (self.0 ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    }

    /// What it was made of.
    pub(super) fn parts(self) -> (u16, MacAddr) {
        let [high, low, a, b, c, d, e, f] = self.0.to_be_bytes();
        (u16::from_be_bytes([high, low]), MacAddr([a, b, c, d, e, f]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: PortId = PortId(1);
    const B: PortId = PortId(2);

    fn key(number: u32) -> Key {
        Key::new(VlanId::DEFAULT, MacAddr::local(number))
    }

    #[test]
    fn what_is_old_is_not_found_and_makes_room() {
        let mut table = MacTable::new(2, 100);
        assert_eq!(table.learn(key(1), A, 8, 0), Learned::New);
        assert_eq!(table.learn(key(2), A, 8, 50), Learned::New);
        assert_eq!(table.learn(key(3), A, 8, 99), Learned::Full);
        assert_eq!((table.find(key(1), 99), table.find(key(1), 100)), (Some(A), None));
        // Looked through a moment ago.
        assert_eq!(table.learn(key(3), A, 8, 100), Learned::Full);
        assert_eq!(table.learn(key(3), A, 8, 99 + SWEEP_NS), Learned::New);
        assert_eq!(table.entries(99 + SWEEP_NS).count(), 1);
    }

    #[test]
    fn cve_2020_27174_a_port_has_as_many_as_it_may_and_takes_nobody_s() {
        let mut table = MacTable::new(1000, 100);
        for number in 0..1000 {
            let learned = table.learn(key(number), A, 10, 1);
            assert_eq!(learned, if number < 10 { Learned::New } else { Learned::Full });
        }
        assert_eq!(table.learn(key(5), B, 1, 2), Learned::Moved);
        assert_eq!(table.learn(key(6), B, 1, 2), Learned::Full);
        assert_eq!(table.find(key(6), 2), None, "it is at B, which has no room for it");
        assert_eq!(table.learn(key(7), A, 10, 2), Learned::Known);
        assert_eq!(table.learn(key(2000), A, 10, 2), Learned::New, "two are gone");
        table.forget(A);
        assert_eq!(table.entries(2).collect::<Vec<_>>(), [(key(5), B, false)]);
        assert_eq!(key(5).parts(), (1, MacAddr::local(5)));
    }

    #[test]
    fn what_stays_is_never_old_and_never_elsewhere() {
        let mut table = MacTable::new(2, 100);
        table.learn(key(1), B, 1, 0);
        table.pin(key(1), A);
        assert_eq!(table.learn(key(1), B, 8, 0), Learned::Taken);
        assert_eq!(table.learn(key(1), A, 8, 0), Learned::Known);
        assert_eq!((table.find(key(1), u64::MAX), table.owner(key(1))), (Some(A), Some(A)));
        assert_eq!(table.learn(key(2), B, 1, 0), Learned::New, "what was taken from it counts no more");
    }
}
