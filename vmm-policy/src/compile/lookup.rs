//! Decisions. As much work for ten rules as for a hundred thousand, and no allocation.

use super::build::{ANY, Cell, Entry, Segment, Table, WIDE_FAMILIES, cell_key, related, slot};
use super::classes::{Class, NOBODY};
use super::conditions::Facts;
use super::model::{Model, Strength};
use crate::model::{Layer, Object, Op, RuleId, Value, Verdict};

/// How many cells there can be for one request: asker or any, by peer, any and nobody, and one for each family.
pub(crate) const CELLS: usize = 6 + WIDE_FAMILIES;

/// What the table says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ruling {
    pub(crate) verdict: Verdict,
    pub(crate) layer: Layer,
    pub(crate) rule: Option<RuleId>,
    /// The lists of limits that it falls under; 0 for none.
    pub(crate) limits: [u32; CELLS],
}

impl Ruling {
    pub(crate) fn denied(layer: Layer) -> Self {
        Self { verdict: Verdict::Deny, layer, rule: None, limits: [0; CELLS] }
    }
}

impl Table {
    /// The number that stands for an object, and the class that it has if it was declared.
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
    pub(crate) fn object_class(&self, kind: crate::Kind, atom: u64) -> u32 {
        let of_kind = self.object_classes.get(kind as usize);
        of_kind.and_then(|of_kind| of_kind.get(usize::try_from(atom).ok()?)).copied().unwrap_or(NOBODY)
    }

    pub(crate) fn class(&self, class: u32) -> Option<&Class> {
        self.classes.get(class as usize)
    }

    /// The keys of the cells that there may be for asker and peer.
    #[inline]
    pub(super) fn cell_keys_of(&self, op: Op, asker: u32, peer: u32, mut each: impl FnMut(u64)) {
        // `Op::COUNT` of them; keys count from 1, indices from 0.
        let shapes = self.shapes.get(op.index()).copied().unwrap_or(0);
        if shapes & 1 != 0 && peer != NOBODY {
            each(cell_key(op, asker, peer));
        }
        if shapes & 2 != 0 && peer != NOBODY {
            each(cell_key(op, asker, ANY));
        }
        let about_nobody = shapes & 0b10_0100 != 0;
        let unnamed =
            about_nobody && (peer == NOBODY || self.class(peer).is_some_and(|class| class.is_object));
        if shapes & 4 != 0 && unnamed {
            each(cell_key(op, asker, NOBODY));
        }
        if shapes & 8 != 0 && peer != NOBODY {
            each(cell_key(op, ANY, peer));
        }
        if shapes & 16 != 0 && peer != NOBODY {
            each(cell_key(op, ANY, ANY));
        }
        if shapes & 32 != 0 && unnamed {
            each(cell_key(op, ANY, NOBODY));
        }
        if shapes >> 6 == 0 {
            return;
        }
        let (Some(one), Some(other)) = (self.class(asker), self.class(peer)) else { return };
        for (slot, (one, other)) in one.families.iter().zip(&other.families).enumerate() {
            let same = one == other;
            if *one != 0 && *other != 0 && shapes >> (6 + slot * 2 + usize::from(same)) & 1 == 1 {
                each(cell_key(op, related(slot, same), ANY));
            }
        }
    }

    #[inline]
    pub(super) fn cell(&self, key: u64) -> Option<&Cell> {
        let places = self.cells.len();
        let mut at = slot(key, places);
        loop {
            let cell = self.cells.get(at)?;
            if cell.key == key {
                return Some(cell);
            }
            if cell.key == 0 {
                return None;
            }
            at = (at + 1) & (places - 1);
        }
    }

    pub(super) fn segments_of_cell(&self, cell: &Cell) -> &[Segment] {
        let first = cell.segments as usize;
        self.segments.get(first..first + cell.segment_count as usize).unwrap_or(&[])
    }

    pub(super) fn entries_of_segment(&self, segment: &Segment) -> &[Entry] {
        let first = segment.entries as usize;
        self.entries.get(first..first + segment.entry_count as usize).unwrap_or(&[])
    }

    #[inline]
    fn segment(&self, cell: &Cell, value: u64) -> Option<&Segment> {
        let segments = self.segments_of_cell(cell);
        let at =
            if let [_] = segments { 1 } else { segments.partition_point(|segment| segment.first <= value) };
        let segment = segments.get(at.checked_sub(1)?)?;
        (segment.first <= value && value <= segment.last).then_some(segment)
    }

    /// Limits of a list.
    pub(crate) fn limits(&self, list: u32) -> &[u32] {
        self.limit_lists.get(list as usize).map_or(&[], |list| list)
    }

    /// Lattice and own walls of the two, and of a declared object that is asked for beside its peer.
    #[inline]
    pub(crate) fn barrier(&self, op: Op, asker: &Class, peer: &Class) -> Option<Layer> {
        let flow = op.flow();
        if !asker.permits(peer, flow) {
            return Some(Layer::Lattice);
        }
        let both = asker.wall | peer.wall;
        let meets = asker.wall != 0 && peer.wall != 0 && (flow.reads() || flow.writes());
        (meets && self.wall_is_hit(both)).then_some(Layer::Wall)
    }

    /// Whether a history has had to do with two of the labels of one wall.
    #[inline]
    pub(crate) fn wall_is_hit(&self, history: u64) -> bool {
        self.walls.iter().any(|wall| (history & wall).count_ones() > 1)
    }

    /// What the policy says, walls' histories and limits apart.
    #[inline]
    pub(crate) fn decide(
        &self,
        model: &Model,
        op: Op,
        asker: u32,
        peer: u32,
        value: u64,
        facts: &Facts,
    ) -> Ruling {
        let (Some(asker_class), Some(peer_class)) = (self.class(asker), self.class(peer)) else {
            return Ruling::denied(Layer::Identity);
        };
        if let Some(layer) = self.barrier(op, asker_class, peer_class) {
            return Ruling::denied(layer);
        }
        let mut ruling = Ruling::denied(Layer::Type);
        let mut best: Option<Entry> = None;
        // What would have been allowed at another time.
        let mut missed: Option<Entry> = None;
        let mut lists = ruling.limits.iter_mut();
        self.cell_keys_of(op, asker, peer, |key| {
            let Some(segment) = self.cell(key).and_then(|cell| self.segment(cell, value)) else { return };
            if segment.limits != 0
                && let Some(place) = lists.next()
            {
                *place = segment.limits;
            }
            for entry in self.entries_of_segment(segment) {
                if best.is_some_and(|best| best.rank <= entry.rank) {
                    break;
                }
                if entry.condition == 0 || model.conditions.holds(entry.condition, facts) {
                    best = Some(*entry);
                    break;
                }
                if entry.strength().opens() && missed.is_none_or(|missed| entry.rank < missed.rank) {
                    missed = Some(*entry);
                }
            }
        });
        let Some(entry) = best else {
            if let Some(missed) = missed {
                (ruling.layer, ruling.rule) = (Layer::Attribute, Some(RuleId(missed.rule())));
            }
            return ruling;
        };
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
