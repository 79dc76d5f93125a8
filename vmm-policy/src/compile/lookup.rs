//! Decisions. As much work for ten rules as for a hundred thousand, and no allocation.

use super::cells::{ANY, cell_key, related};
use super::classes::{Class, NOBODY};
use super::conditions::Facts;
use super::model::{Model, Strength};
use super::ranges::{Entry, Parts};
use super::table::Table;
use crate::model::{Layer, Object, Op, RuleId, Value, Verdict};

/// Families of which there are cells for all that have the same label, or different ones.
pub(super) const WIDE_FAMILIES: usize = 4;

/// How many cells there can be for one request: asker or any, by peer, any and nobody, and one for each family.
pub(crate) const CELLS: usize = 6 + WIDE_FAMILIES;

/// What the table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ruling {
    pub(crate) verdict: Verdict,
    pub(crate) layer: Layer,
    pub(crate) rule: Option<RuleId>,
    /// The lists of limits that it falls under.
    limits: [u32; CELLS],
    limit_count: u8,
}

impl Ruling {
    pub(crate) fn denied(layer: Layer) -> Self {
        Self { verdict: Verdict::Deny, layer, rule: None, limits: [0; CELLS], limit_count: 0 }
    }

    /// The lists of limits that it falls under.
    pub(crate) fn limits(&self) -> &[u32] {
        self.limits.get(..usize::from(self.limit_count)).unwrap_or(&[])
    }

    fn add_limits(&mut self, list: u32) {
        if list != 0
            && let Some(place) = self.limits.get_mut(usize::from(self.limit_count))
        {
            *place = list;
            self.limit_count += 1;
        }
    }
}

/// The strongest rule whose condition holds, and the strongest that would open it and whose condition does not.
#[derive(Clone, Copy)]
struct Best {
    rule: Entry,
    missed: u32,
}

/// Weaker than any.
const NO_RANK: u32 = u32::MAX;

impl Best {
    /// Whether weaker ones of the same list count.
    #[inline]
    fn consider(&mut self, entry: Entry, model: &Model, facts: &Facts) -> bool {
        if entry.rank >= self.rule.rank {
            return false;
        }
        if entry.condition == 0 || model.conditions.holds(entry.condition, facts) {
            self.rule = entry;
            return false;
        }
        if entry.strength().opens() {
            self.missed = self.missed.min(entry.rank);
        }
        true
    }
}

impl Table {
    /// The number that stands for an object, and the class that it has if it was declared.
    #[inline]
    pub(crate) fn object(&self, model: &Model, object: &Object<'_>) -> (u64, u32) {
        match object.value() {
            Value::Number(number) => (number, NOBODY),
            Value::Name(name) => {
                let atom = model.atom(object.kind(), name);
                (atom, self.object_class(object.kind(), atom))
            }
        }
    }

    /// The class of a declared object.
    #[inline]
    pub(crate) fn object_class(&self, kind: crate::Kind, atom: u64) -> u32 {
        let of_kind = self.object_classes.get(kind as usize);
        of_kind.and_then(|of_kind| of_kind.get(usize::try_from(atom).ok()?)).copied().unwrap_or(NOBODY)
    }

    #[inline]
    pub(crate) fn class(&self, class: u32) -> Option<&Class> {
        self.classes.get(class as usize)
    }

    /// The keys of the cells that there may be for asker and peer.
    #[inline]
    pub(super) fn cell_keys_of(&self, op: Op, asker: &Class, peer: &Class, mut each: impl FnMut(u64)) {
        // Bit by bit: the asker and the peer, any peer, nobody; whoever asks and the same; families.
        let shapes = self.shapes.get(op.index()).copied().unwrap_or(0);
        let named = if peer.id == NOBODY { 0 } else { 0b01_1011 };
        let unnamed = if peer.id == NOBODY || peer.is_object { 0b10_0100 } else { 0 };
        let mut wanted = shapes & (named | unnamed);
        while wanted != 0 {
            let shape = wanted.trailing_zeros();
            wanted &= wanted - 1;
            let (who, of) = if shape < 3 { (asker.id, shape) } else { (ANY, shape - 3) };
            each(cell_key(op, who, [peer.id, ANY, NOBODY][of as usize % 3]));
        }
        if shapes >> 6 == 0 {
            return;
        }
        let families = |class: &Class| self.families.get(class.id as usize);
        let (Some(one), Some(other)) = (families(asker), families(peer)) else { return };
        for (slot, (one, other)) in one.iter().zip(other).enumerate() {
            let same = one == other;
            if *one != 0 && *other != 0 && shapes >> (6 + slot * 2 + usize::from(same)) & 1 == 1 {
                each(cell_key(op, related(slot, same), ANY));
            }
        }
    }

    /// Lattice and own walls of the two, and of a declared object that is asked for beside its peer.
    #[inline]
    pub(crate) fn barrier(&self, op: Op, asker: &Class, peer: &Class) -> Option<Layer> {
        let flow = op.flow();
        if !asker.permits(peer, flow) {
            return Some(Layer::Lattice);
        }
        let meets = asker.wall != 0 && peer.wall != 0 && (flow.reads() || flow.writes());
        (meets && self.walls_meet(asker.wall, peer.wall)).then_some(Layer::Wall)
    }

    /// Whether two histories, neither of which has had to do with two labels of one wall, have together.
    #[inline]
    pub(crate) fn walls_meet(&self, one: u64, other: u64) -> bool {
        let both = one | other;
        // Where one of them has the other's labels, both are that one.
        both != one && both != other && self.wall_is_hit(both)
    }

    /// Whether a history has had to do with two of the labels of one wall.
    #[inline]
    pub(crate) fn wall_is_hit(&self, history: u64) -> bool {
        self.walls.iter().any(|wall| {
            let labels = history & wall;
            // More than the lowest bit is there.
            labels & labels.wrapping_sub(1) != 0
        })
    }

    /// What the policy says between two classes, walls' histories and limits apart.
    pub(crate) fn decide(
        &self,
        model: &Model,
        op: Op,
        asker: u32,
        peer: u32,
        value: u64,
        facts: &Facts,
    ) -> Ruling {
        match (self.class(asker), self.class(peer)) {
            (Some(asker), Some(peer)) => self.judge(model, op, asker, peer, value, facts),
            _ => Ruling::denied(Layer::Identity),
        }
    }

    /// The same.
    #[inline]
    pub(crate) fn judge(
        &self,
        model: &Model,
        op: Op,
        asker: &Class,
        peer: &Class,
        value: u64,
        facts: &Facts,
    ) -> Ruling {
        if let Some(layer) = self.barrier(op, asker, peer) {
            return Ruling::denied(layer);
        }
        let mut ruling = Ruling::denied(Layer::Type);
        let mut best = Best { rule: Entry { rank: NO_RANK, condition: 0 }, missed: NO_RANK };
        self.cell_keys_of(op, asker, peer, |key| {
            let Some(cell) = self.cells.get(key) else { return };
            match self.ranges.said(cell, value).parts() {
                Parts::Nothing => (),
                Parts::One(entry) => {
                    best.consider(entry, model, facts);
                }
                Parts::Listed(list) => {
                    let (entries, limits) = self.ranges.listed(list);
                    ruling.add_limits(limits);
                    // Up to the first that holds.
                    let _ = entries.iter().all(|entry| best.consider(*entry, model, facts));
                }
            }
        });
        let entry = best.rule;
        if entry.rank == NO_RANK {
            if best.missed != NO_RANK {
                let missed = Entry { rank: best.missed, condition: 0 };
                (ruling.layer, ruling.rule) = (Layer::Attribute, Some(RuleId(missed.rule())));
            }
            return ruling;
        }
        ruling.rule = Some(RuleId(entry.rule()));
        ruling.layer = if entry.condition == 0 { Layer::Type } else { Layer::Attribute };
        ruling.verdict = match entry.strength() {
            Strength::Never | Strength::Deny => Verdict::Deny,
            Strength::Quarantine => Verdict::Quarantine,
            Strength::Ask => Verdict::Ask,
            Strength::Redirect => Verdict::Redirect,
            Strength::Allow => Verdict::Allow,
            Strength::Throttle => {
                model.rules.get(entry.rule() as usize).map_or(Verdict::Deny, |rule| rule.verdict)
            }
        };
        ruling
    }
}
