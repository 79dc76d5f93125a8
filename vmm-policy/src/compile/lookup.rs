//! Decisions, where the table's [front](super::front) does not tell. As much work for ten rules as for a hundred thousand, and no allocation.

use super::cells::{ANY, cell_key, related};
use super::classes::{Class, NOBODY};
use super::conditions::Facts;
use super::model::{Model, Strength};
use super::said::Said;
use super::table::Table;
use crate::model::{Decision, Flow, Layer, Object, Op, Rate, RuleId, Value, Verdict};

/// Families of which there are cells for all that have the same label, or different ones.
pub(super) const WIDE_FAMILIES: usize = 4;

/// How many cells there can be for one request: asker or any, by peer, any and nobody, and one for each family.
pub(crate) const CELLS: usize = 6 + WIDE_FAMILIES;

/// What the table says, in the words of a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ruling {
    pub(super) said: Said,
    pub(crate) layer: Layer,
    /// There may be [limits](Table::limits_of).
    pub(crate) limited: bool,
}

impl Ruling {
    #[inline(always)]
    pub(super) fn new(said: Said, layer: Layer, limited: bool) -> Self {
        Self { said, layer, limited }
    }

    pub(crate) fn denied(layer: Layer) -> Self {
        Self::new(Said::NOTHING, layer, false)
    }

    pub(super) fn strength(self) -> Strength {
        self.said.strength()
    }

    /// Whether it is a rule whose condition holds, and not the absence of one.
    pub(super) fn is_by_rule(self, model: &Model) -> bool {
        self.rule().is_some_and(|rule| {
            self.strength().opens() || model.rule(rule).is_some_and(|rule| !rule.strength.opens())
        })
    }

    #[inline(always)]
    pub(crate) fn denies(self) -> bool {
        !self.said.strength().opens()
    }

    /// All bits if it is allowed in whatever way, and none if not.
    #[inline(always)]
    pub(crate) fn all_if_opens(self) -> u64 {
        const ALL: [u64; 7] = [0, 0, u64::MAX, u64::MAX, u64::MAX, u64::MAX, u64::MAX];
        ALL.get(self.said.strength() as usize).copied().unwrap_or(0)
    }

    /// Whether it is slowed down: the rule says to what.
    #[inline(always)]
    pub(crate) fn is_throttled(self) -> bool {
        self.said.strength() == Strength::Throttle
    }

    #[inline(always)]
    pub(crate) fn rule(self) -> Option<RuleId> {
        self.said.rule().map(RuleId)
    }

    #[inline(always)]
    pub(crate) fn verdict(self, model: &Model) -> Verdict {
        if self.is_throttled() {
            return self.rule().and_then(|rule| model.rule(rule)).map_or(Verdict::Deny, |rule| rule.verdict);
        }
        self.plain_verdict()
    }

    /// The decision, whose verdict is another one if it is throttled.
    #[inline(always)]
    pub(crate) fn decision(self, epoch: u64) -> Decision {
        Decision { verdict: self.plain_verdict(), layer: self.layer, rule: self.rule(), epoch }
    }

    #[inline(always)]
    fn plain_verdict(self) -> Verdict {
        // Whether it is allowed nobody can foresee: that is no branch. What is throttled is in the rule, with its rate.
        const NO_RATE: Rate = Rate { bytes: 0, seconds: 1 };
        const ALL: [Verdict; 7] = [
            Verdict::Deny,
            Verdict::Deny,
            Verdict::Quarantine,
            Verdict::Ask,
            Verdict::Redirect,
            Verdict::Throttle(NO_RATE),
            Verdict::Allow,
        ];
        ALL.get(self.said.strength() as usize).copied().unwrap_or(Verdict::Deny)
    }
}

/// The lists of limits that a request falls under.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Limits {
    lists: [u32; CELLS],
    count: usize,
}

impl Limits {
    pub(crate) fn lists(&self) -> &[u32] {
        self.lists.get(..self.count).unwrap_or(&[])
    }

    pub(super) fn add(&mut self, list: u32) {
        if let Some(place) = self.lists.get_mut(self.count) {
            *place = list;
            self.count += usize::from(list != 0);
        }
    }
}

/// The strongest rule whose condition holds, and the strongest that would open it and whose condition does not.
#[derive(Clone, Copy)]
struct Best {
    said: Said,
    missed: Said,
    limited: bool,
}

impl Best {
    /// Whether weaker ones of the same list count.
    fn consider(&mut self, said: Said, condition: u32, model: &Model, facts: &Facts) -> bool {
        if said >= self.said {
            return false;
        }
        if condition == 0 || model.conditions.holds(condition, facts) {
            self.said = said;
            return false;
        }
        if said.strength().opens() {
            self.missed = self.missed.min(said);
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
    #[inline(always)]
    pub(super) fn cell_keys_of(&self, op: Op, asker: &Class, peer: &Class, mut each: impl FnMut(u64)) {
        // Bit by bit: the asker and the peer, any peer, nobody; whoever asks and the same; families.
        let shapes = self.shapes.get(op.index()).copied().unwrap_or(0);
        let nobody = peer.id == NOBODY;
        let named = u16::from(nobody).wrapping_sub(1) & !0b10_0100;
        let unnamed = u16::from(nobody | peer.is_object).wrapping_neg() & 0b10_0100;
        let mut wanted = shapes & (named | unnamed);
        while wanted != 0 {
            let shape = wanted.trailing_zeros();
            wanted &= wanted - 1;
            let key = if shape < 6 {
                let who = if shape < 3 { asker.id } else { ANY };
                let of = [peer.id, ANY, NOBODY, peer.id, ANY, NOBODY];
                cell_key(op, who, of.get(shape as usize).copied().unwrap_or(NOBODY))
            } else if let Some(key) = self.family_key(op, asker, peer, shape - 6) {
                key
            } else {
                continue;
            };
            each(key);
        }
    }

    /// The key of the cell for those that have the same label of a family, or different ones, if they do.
    fn family_key(&self, op: Op, asker: &Class, peer: &Class, shape: u32) -> Option<u64> {
        let (slot, same) = (shape as usize / 2, shape % 2 == 1);
        let label =
            |class: &Class| self.families.get(class.id as usize)?.get(slot).filter(|label| **label != 0);
        let (one, other) = (label(asker)?, label(peer)?);
        ((one == other) == same).then(|| cell_key(op, related(slot, same), ANY))
    }

    /// Lattice and own walls of the two, and of a declared object that is asked for beside its peer.
    #[inline(always)]
    pub(crate) fn barrier(&self, op: Op, asker: &Class, peer: &Class) -> Option<Layer> {
        self.barrier_at(op, asker, asker.wall, peer, peer.wall)
    }

    /// The same, with histories at walls.
    #[inline(always)]
    pub(crate) fn barrier_at(
        &self,
        op: Op,
        asker: &Class,
        asker_history: u64,
        peer: &Class,
        peer_history: u64,
    ) -> Option<Layer> {
        let flow = op.flow();
        if !self.ways.permit(asker, peer, flow) {
            return Some(Layer::Lattice);
        }
        (flow != Flow::None && self.walls_meet(asker_history, peer_history)).then_some(Layer::Wall)
    }

    /// Whether two histories, neither of which has had to do with two labels of one wall, have together.
    pub(crate) fn walls_meet(&self, one: u64, other: u64) -> bool {
        let both = one | other;
        // Where one of them has the other's labels, both are that one.
        both != one && both != other && self.wall_is_hit(both)
    }

    /// Whether a history has had to do with two of the labels of one wall.
    pub(crate) fn wall_is_hit(&self, history: u64) -> bool {
        self.walls.iter().any(|wall| {
            let labels = history & wall;
            // More than the lowest bit is there.
            labels & labels.wrapping_sub(1) != 0
        })
    }

    /// The labels at walls that nobody with a history may have to do with.
    pub(crate) fn forbidden_by(&self, history: u64) -> u64 {
        let met = self.walls.iter().filter(|wall| history & *wall != 0);
        met.fold(0, |all, wall| all | wall) & !history
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
        let (Some(asker), Some(peer)) = (self.class(asker), self.class(peer)) else {
            return Ruling::denied(Layer::Identity);
        };
        match self.barrier(op, asker, peer) {
            Some(layer) => Ruling::denied(layer),
            None => self.judge(model, op, asker, peer, value, facts),
        }
    }

    /// What rules say.
    pub(crate) fn judge(
        &self,
        model: &Model,
        op: Op,
        asker: &Class,
        peer: &Class,
        value: u64,
        facts: &Facts,
    ) -> Ruling {
        let mut best = Best { said: Said::NOTHING, missed: Said::NOTHING, limited: false };
        self.cell_keys_of(op, asker, peer, |key| {
            let said = self.said(key, value);
            // In most cases there is nothing more to it, and whether a rule is there or not is no branch.
            if said.is_plain() {
                best.said = best.said.min(said);
            } else {
                best = self.consider(said, best, model, facts);
            }
        });
        let said = best.said;
        if (said == Said::NOTHING) & (best.missed != Said::NOTHING) {
            let said = Said::missed(best.missed.rule().unwrap_or(0));
            return Ruling::new(said, Layer::Attribute, best.limited);
        }
        let layer = if said.condition() == 0 { Layer::Type } else { Layer::Attribute };
        Ruling::new(said, layer, best.limited)
    }

    /// The limits that a request falls under.
    pub(crate) fn limits_of(&self, op: Op, asker: &Class, peer: &Class, value: u64) -> Limits {
        let mut limits = Limits::default();
        self.cell_keys_of(op, asker, peer, |key| {
            if let Some(list) = self.said(key, value).listed() {
                limits.add(self.ranges.listed(list).1);
            }
        });
        limits
    }

    /// A rule with a condition, or rules and limits.
    #[inline(never)]
    fn consider(&self, said: Said, mut best: Best, model: &Model, facts: &Facts) -> Best {
        let Some(list) = said.listed() else {
            best.consider(said, said.condition(), model, facts);
            return best;
        };
        let (entries, list) = self.ranges.listed(list);
        best.limited |= list != 0;
        // Up to the first that holds.
        for entry in entries {
            if !best.consider(Said::of_list(*entry), entry.condition, model, facts) {
                break;
            }
        }
        best
    }

    /// What is said of an object in the cell of a key, if there is one.
    #[inline(always)]
    fn said(&self, key: u64, value: u64) -> Said {
        let cell = self.cells.get(key);
        if cell.has_edges(key) {
            return self.ranges.of_edges(cell, value);
        }
        // Whether it is there is asked together with whether the object is in its range.
        self.ranges.of_range(cell, value).only_if(cell.key() == key)
    }
}
