//! What may happen between two classes, over all objects: for proofs, pictures and comparisons.

use super::cells::{ANY, split_key, split_related};
use super::classes::NOBODY;
use super::model::{Model, Strength};
use super::said::Entry;
use super::table::Table;
use crate::limits;
use crate::model::Op;
use crate::syntax::PolicyError;

/// What holds of a range of objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) first: u64,
    pub(crate) last: u64,
    /// The strongest rule that opens it, if nothing without a condition denies it before. Conditions are taken as fulfilled
    /// where they open.
    pub(crate) opened_by: Option<u32>,
}

/// Counts the steps of an analysis.
#[derive(Debug, Default)]
pub(crate) struct Steps(usize);

impl Steps {
    pub(crate) fn take(&mut self, steps: usize) -> Result<(), PolicyError> {
        self.0 = self.0.saturating_add(steps);
        if self.0 <= limits::ANALYSIS_STEPS {
            return Ok(());
        }
        let hint = ": ask about fewer of them".to_owned();
        Err(PolicyError::TooLarge { what: "steps of the analysis", allowed: limits::ANALYSIS_STEPS, hint })
    }
}

impl Table {
    /// The rules for `op` between two classes, range by range where some rule is about it; levels and walls are not looked at. Each
    /// range comes with its entries, strongest first, up to the first without a condition. Where an object is asked for itself, ranges
    /// without one of its class are left out.
    pub(super) fn ranges(&self, op: Op, asker: u32, peer: u32, mut each: impl FnMut(u64, u64, &[Entry])) {
        let (Some(asker_class), Some(peer_class)) = (self.class(asker), self.class(peer)) else { return };
        let mut cells = Vec::new();
        self.cell_keys_of(op, asker_class, peer_class, |key| {
            let cell = self.cells.get(key);
            if cell.key() == key {
                cells.push(self.ranges.of(&cell).peekable());
            }
        });
        let mut entries: Vec<Entry> = Vec::new();
        let mut at = 0_u64;
        loop {
            // What has ended goes; the next edge is where something begins or ends.
            let mut end = u64::MAX;
            let mut begins: Option<u64> = None;
            // Limits alone make ranges without entries.
            let mut any_here = false;
            entries.clear();
            for cell in &mut cells {
                while cell.next_if(|range| range.last < at).is_some() {}
                let Some(range) = cell.peek() else { continue };
                if range.first <= at {
                    any_here = true;
                    end = end.min(range.last);
                    entries.extend(self.ranges.entries(range.said));
                } else {
                    end = end.min(range.first - 1);
                    begins = Some(begins.map_or(range.first, |begins| begins.min(range.first)));
                }
            }
            if entries.is_empty() {
                match begins {
                    Some(begins) if !any_here => {
                        at = begins;
                        continue;
                    }
                    None if !any_here => return,
                    _ => (),
                }
            } else {
                entries.sort_unstable_by_key(|entry| entry.rank);
                let count =
                    entries.iter().position(|entry| entry.is_last()).map_or(entries.len(), |at| at + 1);
                if self.first_object(op, peer, (at, end)).is_some() {
                    each(at, end, entries.get(..count).unwrap_or(&[]));
                }
            }
            match end.checked_add(1) {
                Some(next) => at = next,
                None => return,
            }
        }
    }

    /// Whether levels or walls keep two classes apart, or there is no such class.
    pub(super) fn is_barred(&self, op: Op, asker: u32, peer: u32) -> bool {
        let both = self.class(asker).zip(self.class(peer));
        both.is_none_or(|(asker, peer)| self.barrier(op, asker, peer).is_some())
    }

    /// What may happen between two classes, levels and walls included.
    pub(crate) fn outcomes(&self, op: Op, asker: u32, peer: u32, mut each: impl FnMut(Outcome)) {
        if self.is_barred(op, asker, peer) {
            return;
        }
        self.ranges(op, asker, peer, |first, last, entries| {
            let denies = |entry: &&Entry| entry.condition == 0 && !entry.strength().opens();
            let until = entries.iter().position(|entry| denies(&entry)).unwrap_or(entries.len());
            let open = entries.get(..until).unwrap_or(&[]).iter().find(|entry| entry.strength().opens());
            each(Outcome { first, last, opened_by: open.map(|entry| entry.rule()) });
        });
    }

    /// The pairs of classes for which there is a cell of `op`, each once.
    pub(crate) fn pairs(&self, op: Op, steps: &mut Steps) -> Result<Vec<(u32, u32)>, PolicyError> {
        let keys = self.cells.keys();
        let begin = keys.partition_point(|key| split_key(*key).0 < op.index());
        let end = keys.partition_point(|key| split_key(*key).0 <= op.index());
        let subjects = || (1..self.class_count()).filter(|class| !self.objects.contains(*class as usize));
        let objects: Vec<u32> = self.object_classes_of(op.kind()).collect();
        let mut pairs = Vec::new();
        for key in keys.get(begin..end).unwrap_or(&[]) {
            let (_, asker, peer) = split_key(*key);
            let any_asker = asker == ANY || split_related(asker).is_some();
            let askers: Vec<u32> = if any_asker { subjects().collect() } else { vec![asker] };
            // A rule about nobody is about declared objects, too.
            let peers: Vec<u32> = match peer {
                ANY => subjects().chain(objects.iter().copied()).collect(),
                NOBODY => std::iter::once(NOBODY).chain(objects.iter().copied()).collect(),
                _ => vec![peer],
            };
            steps.take(askers.len() * peers.len())?;
            pairs.extend(askers.iter().flat_map(|asker| peers.iter().map(move |peer| (*asker, *peer))));
            if pairs.len() > limits::CELL_RULES * 4 {
                pairs.sort_unstable();
                pairs.dedup();
            }
        }
        pairs.sort_unstable();
        pairs.dedup();
        Ok(pairs)
    }

    /// The rules that have a say about `op` between two classes, in some range each, and whether levels and walls let them.
    pub(crate) fn winners(
        &self,
        model: &Model,
        op: Op,
        asker: u32,
        peer: u32,
        mut each: impl FnMut(u32, bool),
    ) {
        let barred = self.is_barred(op, asker, peer);
        self.ranges(op, asker, peer, |_, _, entries| {
            for entry in entries {
                let opens =
                    model.rules.get(entry.rule() as usize).is_some_and(|rule| rule.strength > Strength::Deny);
                each(entry.rule(), !(barred && opens));
                if entry.condition == 0 {
                    break;
                }
            }
        });
    }
}

impl Table {
    /// The strongest rule for one object.
    pub(crate) fn strongest(&self, op: Op, asker: u32, peer: u32, value: u64, mut each: impl FnMut(u32)) {
        self.ranges(op, asker, peer, |first, last, entries| {
            if let Some(entry) = entries.first().filter(|_| first <= value && value <= last) {
                each(entry.rule());
            }
        });
    }

    /// What the rules say of ranges of objects, as pairs of a rule and its condition, strongest first; nothing where levels or walls
    /// forbid it.
    pub(crate) fn answers(
        &self,
        op: Op,
        asker: u32,
        peer: u32,
        mut each: impl FnMut(u64, u64, &[(u32, u32)]),
    ) {
        if self.is_barred(op, asker, peer) {
            return;
        }
        let mut pairs = Vec::new();
        self.ranges(op, asker, peer, |first, last, entries| {
            pairs.clear();
            pairs.extend(entries.iter().map(|entry| (entry.rule(), entry.condition)));
            each(first, last, &pairs);
        });
    }
}
