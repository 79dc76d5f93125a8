//! What has been allowed, for each pair of ports.

use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::kind::{Begins, FlowKind, Key, Seen, Side};
use super::{FlowPolicy, FlowVerdict, NewFlow};
use crate::channel::GrantId;
use crate::interrupt::lock;
use crate::net::switch::judge::{Flow, FlowJudge, FlowPort, Verdict};
use crate::virtio::rate::{Rate, TokenBucket};

/// Limits that the flows of one pair are under at most.
const MAX_LIMITS: usize = 64;

/// How large a table may become.
pub struct FlowTableBuilder<P> {
    policy: P,
    flows: usize,
    pairs: usize,
}

impl<P> fmt::Debug for FlowTableBuilder<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlowTableBuilder").field("flows", &self.flows).finish_non_exhaustive()
    }
}

impl<P: FlowPolicy> FlowTableBuilder<P> {
    /// How many flows it keeps for each pair of ports, from 2 on; 1024 where nothing is said. One takes some 150 bytes.
    #[must_use]
    pub fn flows(mut self, most: usize) -> Self {
        self.flows = most.max(2);
        self
    }

    /// For how many pairs of ports it keeps some, from 1 on; 1024 where nothing is said. The pair that has been silent for longest makes room.
    #[must_use]
    pub fn pairs(mut self, most: usize) -> Self {
        self.pairs = most.max(1);
        self
    }

    /// The table, with nothing in it.
    pub fn build(self) -> FlowTable<P> {
        let Self { policy, flows, pairs } = self;
        let totals = Totals::default();
        FlowTable { policy, flows, max_pairs: pairs, pairs: RwLock::default(), totals }
    }
}

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FlowTotals {
    /// Questions that the policy has answered with yes.
    pub allowed: u64,
    /// And with no.
    pub refused: u64,
    /// Frames that belong to no flow and begin none.
    pub stray: u64,
    /// Frames that nobody is asked about.
    pub unclear: u64,
    /// Frames from an address that is another's.
    pub spoofed: u64,
    /// Frames beyond a rate.
    pub throttled: u64,
}

#[derive(Default)]
struct Totals {
    allowed: AtomicU64,
    refused: AtomicU64,
    stray: AtomicU64,
    unclear: AtomicU64,
    spoofed: AtomicU64,
    throttled: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Two ports, by their grants.
type Ends = (GrantId, GrantId);

/// A judge of frames that asks once for each flow; see the [module](super).
pub struct FlowTable<P> {
    policy: P,
    flows: usize,
    max_pairs: usize,
    pairs: RwLock<HashMap<Ends, Arc<Pair>>>,
    totals: Totals,
}

struct Pair {
    last_ns: AtomicU64,
    flows: Mutex<Flows>,
}

/// Those that were used lately, and those that were used before. When the first half is full it becomes the second, whose
/// flows are forgotten: so what is forgotten has not been used for as many others as a half holds.
#[derive(Default)]
struct Flows {
    recent: HashMap<Key, Entry>,
    older: HashMap<Key, Entry>,
    /// By who began the flow, and the rule.
    limits: Vec<(Side, u32, Rate, TokenBucket)>,
}

#[derive(Clone, Copy)]
struct Entry {
    kind: FlowKind,
    begun_by: Side,
    epoch: u64,
    last_ns: u64,
    limit: Option<(Rate, u32)>,
}

impl<P> fmt::Debug for FlowTable<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FlowTable").field("totals", &self.totals()).finish_non_exhaustive()
    }
}

impl<P> FlowTable<P> {
    /// What was counted.
    pub fn totals(&self) -> FlowTotals {
        let Totals { allowed, refused, stray, unclear, spoofed, throttled } = &self.totals;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        FlowTotals {
            allowed: read(allowed),
            refused: read(refused),
            stray: read(stray),
            unclear: read(unclear),
            spoofed: read(spoofed),
            throttled: read(throttled),
        }
    }

    /// How many flows it keeps, over ones among them.
    pub fn len(&self) -> usize {
        let pairs: Vec<_> = self.read().values().map(Arc::clone).collect();
        let of_pair = |pair: &Arc<Pair>| {
            let flows = lock(&pair.flows);
            flows.recent.len() + flows.older.len()
        };
        pairs.iter().map(of_pair).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets the flows of a port that is gone. Without it they go when others need the room.
    pub fn forget(&self, port: GrantId) {
        let mut pairs = self.pairs.write().unwrap_or_else(PoisonError::into_inner);
        pairs.retain(|ends, _| ends.0 != port && ends.1 != port);
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, HashMap<Ends, Arc<Pair>>> {
        self.pairs.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<P: FlowPolicy> FlowTable<P> {
    /// One that asks `policy`. Its time is the switch's.
    pub fn builder(policy: P) -> FlowTableBuilder<P> {
        FlowTableBuilder { policy, flows: 1024, pairs: 1024 }
    }

    /// The policy.
    pub fn policy(&self) -> &P {
        &self.policy
    }

    fn pair(&self, ends: Ends, now_ns: u64) -> Arc<Pair> {
        let mut pairs = self.pairs.write().unwrap_or_else(PoisonError::into_inner);
        if pairs.len() >= self.max_pairs && !pairs.contains_key(&ends) {
            let silent = pairs.iter().min_by_key(|(_, pair)| pair.last_ns.load(Ordering::Relaxed));
            if let Some(silent) = silent.map(|(ends, _)| *ends) {
                pairs.remove(&silent);
            }
        }
        let new = || Arc::new(Pair { last_ns: AtomicU64::new(now_ns), flows: Mutex::default() });
        Arc::clone(pairs.entry(ends).or_insert_with(new))
    }

    fn ask(&self, flow: &Flow<'_>, seen: &Seen, kind: FlowKind, again: bool) -> Option<Option<(Rate, u32)>> {
        let verdict = self.policy.decide(&NewFlow {
            from: flow.from,
            to: flow.to,
            vlan: flow.vlan,
            kind,
            source: seen.source,
            destination: seen.destination,
            again,
        });
        let limit = match verdict {
            FlowVerdict::Pass => None,
            FlowVerdict::Limited { rate, rule } => Some((rate, rule)),
            FlowVerdict::Drop => {
                count(&self.totals.refused);
                return None;
            }
        };
        count(&self.totals.allowed);
        Some(limit)
    }

    /// Whether the address that it comes from is one of the port's.
    fn is_owned(&self, from: &FlowPort, seen: &Seen) -> bool {
        let owned = seen.source.is_none_or(|source| self.policy.owns(from, source));
        if !owned {
            count(&self.totals.spoofed);
        }
        owned
    }

    /// What the frame goes with now: a flow that is known and may go on, or a new one. `None` if it does not pass.
    fn decide(
        &self,
        flow: &Flow<'_>,
        seen: &Seen,
        from: Side,
        known: Option<Entry>,
        now_ns: u64,
    ) -> Option<Entry> {
        // Read before it is asked: what changes meanwhile is asked about again at the next frame.
        let epoch = self.policy.epoch();
        let known = known.filter(|entry| entry.is_fresh(now_ns));
        if let Some(entry) = known.filter(|_| seen.begins != Begins::Always) {
            // By who began it, whoever sends this.
            let turned = Flow { from: flow.to, to: flow.from, ..*flow };
            let back = seen.turned();
            let (asked, about) = if entry.begun_by == from { (flow, seen) } else { (&turned, &back) };
            if self.is_owned(asked.from, about)
                && let Some(limit) = self.ask(asked, about, entry.kind, true)
            {
                return Some(Entry { epoch, limit, last_ns: now_ns, ..entry });
            }
            if entry.begun_by == from {
                return None;
            }
        }
        if seen.begins == Begins::Never {
            count(&self.totals.stray);
            return None;
        }
        if !self.is_owned(flow.from, seen) {
            return None;
        }
        let limit = self.ask(flow, seen, seen.kind, false)?;
        Some(Entry { kind: seen.kind, begun_by: from, epoch, last_ns: now_ns, limit })
    }
}

impl Entry {
    fn is_fresh(&self, now_ns: u64) -> bool {
        now_ns.saturating_sub(self.last_ns) < self.kind.patience_ns()
    }
}

impl Flows {
    fn get(&self, key: &Key) -> Option<Entry> {
        self.recent.get(key).or_else(|| self.older.get(key)).copied()
    }

    fn remove(&mut self, key: &Key) {
        self.recent.remove(key);
        self.older.remove(key);
    }

    fn put(&mut self, key: Key, entry: Entry, most: usize) {
        if let Some(place) = self.recent.get_mut(&key) {
            *place = entry;
            return;
        }
        if self.recent.len() >= most / 2 {
            self.older = std::mem::take(&mut self.recent);
        }
        self.older.remove(&key);
        self.recent.insert(key, entry);
    }

    /// Whether there are tokens for so many bytes of it.
    fn affords(&mut self, entry: &Entry, bytes: usize) -> bool {
        let now_ns = entry.last_ns;
        let Some((rate, rule)) = entry.limit else { return true };
        let known = self.limits.iter().position(|(side, of, ..)| (*side, *of) == (entry.begun_by, rule));
        let at = known.unwrap_or_else(|| {
            if self.limits.len() >= MAX_LIMITS {
                // Mostly that of a policy which is not in force any more; a full bucket is what is lost.
                self.limits.remove(0);
            }
            self.limits.push((entry.begun_by, rule, rate, TokenBucket::new(rate, now_ns)));
            self.limits.len() - 1
        });
        let Some((_, _, of, bucket)) = self.limits.get_mut(at) else { return false };
        if *of != rate {
            (*of, *bucket) = (rate, TokenBucket::new(rate, now_ns));
        }
        let cost = bytes as u64;
        if bucket.take(now_ns, cost).is_some() {
            bucket.put_back(cost);
            return false;
        }
        true
    }
}

impl<P: FlowPolicy> FlowTable<P> {
    /// What becomes of a frame between two ports that have met.
    fn judge_in(&self, pair: &Pair, flow: &Flow<'_>, seen: &Seen, from: Side, key: Key) -> Verdict {
        let now_ns = flow.now_ns;
        let epoch = self.policy.epoch();
        pair.last_ns.store(now_ns, Ordering::Relaxed);
        let mut flows = lock(&pair.flows);
        let goes_on =
            |entry: &Entry| seen.begins != Begins::Always && entry.epoch == epoch && entry.is_fresh(now_ns);
        // The most of them: what was allowed, and goes on.
        if let Some(entry) = flows.recent.get_mut(&key)
            && goes_on(entry)
        {
            entry.last_ns = now_ns;
            let entry = *entry;
            return self.end(flows.affords(&entry, flow.len));
        }
        let known = flows.get(&key);
        let entry = match known.filter(goes_on) {
            Some(entry) => Some(Entry { last_ns: now_ns, ..entry }),
            None => self.decide(flow, seen, from, known, now_ns),
        };
        let Some(entry) = entry else {
            // One that is to begin anew and may not leaves the one that is.
            if seen.begins != Begins::Always {
                flows.remove(&key);
            }
            return Verdict::Drop;
        };
        flows.put(key, entry, self.flows);
        self.end(flows.affords(&entry, flow.len))
    }

    fn end(&self, affords: bool) -> Verdict {
        if affords {
            return Verdict::Pass;
        }
        count(&self.totals.throttled);
        Verdict::Drop
    }
}

impl<P: FlowPolicy> FlowJudge for FlowTable<P> {
    fn judge(&self, flow: &Flow<'_>) -> Verdict {
        let Some(seen) = Seen::of(flow.headers) else {
            count(&self.totals.unclear);
            return Verdict::Drop;
        };
        let (one, other) = (flow.from.grant, flow.to.grant);
        let (ends, from) =
            if one < other { ((one, other), Side::First) } else { ((other, one), Side::Second) };
        let key = seen.key(flow.vlan, from);
        if let Some(pair) = self.read().get(&ends) {
            return self.judge_in(pair, flow, &seen, from, key);
        }
        let Some(entry) = self.decide(flow, &seen, from, None, flow.now_ns) else {
            // What leads to nothing has no place.
            return Verdict::Drop;
        };
        let pair = self.pair(ends, flow.now_ns);
        let mut flows = lock(&pair.flows);
        flows.put(key, entry, self.flows);
        self.end(flows.affords(&entry, flow.len))
    }
}
