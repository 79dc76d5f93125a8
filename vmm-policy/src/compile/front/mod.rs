//! The table's front: what most decisions read of it, two or three lines of the processor's cache.
//!
//! A [line](line) has four lanes; a lane is a rule, the objects that it is about, and who asks whom for what. All lanes of a line are compared
//! without a branch, as nobody can foresee which of them it is. Those of one asker and peer lie in two lines, the strongest first, so that
//! two loads, none of which waits for the other, answer where a [cell](super::cells) has several ranges and rules with conditions, too. What is
//! said of whomever, or of those who have the same label of a family, lies in a line for each action and for what the two have to do with each
//! other: no key is looked up for that.
//!
//! The rest is left to the [table](super::lookup), and lanes say so: more rules for one pair than a block has lanes, numbers that do not
//! fit, conditions behind the first [`TERMS`](super::conditions::TERMS) ways to hold. Declared objects are not asked for here, and a policy whose
//! actions and classes together have no number of 32 bits has no front.

mod build;
mod line;
mod sum;
#[cfg(test)]
mod tests;

pub(super) use build::Origin;
use line::{Line, Word};

use super::classes::{Brief, NOBODY};
use super::lookup::Ruling;
use super::said::Said;
use super::table::Table;
use crate::model::{Action, Flow, Kind, Layer, Op};

/// Lines for a key that has no room among the others.
const BLOCK: usize = 3;

/// What the front knows of an action.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    /// From 1 on, among the actions that rules are about; 0 if none is.
    number: u16,
    /// What there is to look at beside the lines of asker and peer.
    more: u8,
    pub(crate) flow: Flow,
}

impl Row {
    /// Rules of whomever.
    const WIDE: u8 = 1;
    /// Rules of an asker, whoever the peer is.
    const ANY_PEER: u8 = 2;
    /// Rules of a peer, whoever asks.
    const ANY_ASKER: u8 = 4;
    /// The table.
    const TABLE: u8 = 8;
    /// There is no such action.
    const NONE: u8 = 16;
}

/// What asker and peer have to do with each other: there is no peer, they have no labels of the first family that rules name so, the same one,
/// different ones.
const RELATIONS: usize = 4;

#[inline(always)]
fn relation(asker: &Brief, peer: &Brief) -> usize {
    let both = (asker.family != 0) & (peer.family != 0);
    let differ = asker.family != peer.family;
    usize::from(peer.id() != NOBODY) + usize::from(both) + usize::from(both & differ)
}

/// Asker, peer and object of a request, and what holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked<'s> {
    /// Of the action.
    pub(crate) row: Row,
    pub(crate) asker: &'s Brief,
    /// A subject's, or nobody's.
    pub(crate) peer: &'s Brief,
    pub(crate) value: u64,
    /// Of [`Conditions`](super::Conditions).
    pub(crate) terms: u64,
    /// A wall is between the two.
    pub(crate) walled: bool,
}

/// What rules say.
#[derive(Clone, Copy, Debug)]
struct Found {
    said: Said,
    /// A condition has a say in it.
    conditional: bool,
    /// There may be limits.
    limited: bool,
}

impl Found {
    #[inline(always)]
    fn by(word: Word, limited: bool) -> Self {
        Self { said: word.said(), conditional: word.is_conditional(), limited }
    }
}

/// The lines of an asker and a peer. They are read before it is known which object is asked for: telling whether that is a name, and which one,
/// goes on while they come from the cache.
#[derive(Clone, Copy)]
pub(crate) struct Near<'t> {
    key: u32,
    one: &'t Line,
    other: &'t Line,
    spilled: bool,
}

impl Near<'_> {
    /// An object of theirs, as lanes have it.
    #[inline(always)]
    fn asked(&self, value: u64) -> u64 {
        u64::from(self.key) << 32 | value
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct Front {
    /// By action.
    rows: Box<[Row; Op::COUNT]>,
    /// By two hashes of who asks whom for what.
    lines: Vec<Line>,
    /// What does not fit there, [`BLOCK`] of them for a key.
    blocks: Vec<Line>,
    /// By an action's number and a relation.
    wide: Vec<Line>,
    /// Odd.
    factor: u64,
    /// How many classes a key can tell apart: a power of two.
    classes: u32,
    /// Lanes that are not free.
    used: usize,
}

impl Front {
    #[inline(always)]
    fn key(&self, number: u16, asker: u32, peer: u32) -> u32 {
        u32::from(number)
            .wrapping_mul(self.classes)
            .wrapping_add(asker)
            .wrapping_mul(self.classes)
            .wrapping_add(peer)
    }

    /// A class that is none, and stands for whomever.
    fn any(&self) -> u32 {
        self.classes - 1
    }

    /// The two lines in which the lanes of a key can be. With a choice of two, hardly one has no room where three of eight lanes are free
    /// (Azar, Broder, Karlin and Upfal, Balanced Allocations, 1994).
    #[inline(always)]
    fn places(&self, key: u32) -> [usize; 2] {
        // Both halves of the product, scaled to the number of lines: as for the table's cells, no two keys are likely to lie together.
        let hash = u64::from(key).wrapping_mul(self.factor);
        let scaled = |half: u64| (half.wrapping_mul(self.lines.len() as u64) >> 32) as usize;
        [scaled(hash >> 32), scaled(hash & u64::from(u32::MAX))]
    }

    #[inline(always)]
    fn wide_at(&self, row: Row, asker: &Brief, peer: &Brief) -> usize {
        usize::from(row.number) * RELATIONS + relation(asker, peer)
    }

    #[inline(always)]
    fn wide(&self, row: Row, asker: &Brief, peer: &Brief) -> Option<&Line> {
        self.wide.get(self.wide_at(row, asker, peer))
    }

    #[inline(always)]
    fn near(&self, key: u32) -> Option<Near<'_>> {
        let [one, other] = self.places(key);
        let (one, other) = (self.lines.get(one)?, self.lines.get(other)?);
        Some(Near { key, one, other, spilled: one.is_spilled() & other.is_spilled() })
    }

    /// What rules say, in most cases.
    #[inline(always)]
    fn glance(&self, near: Near<'_>, whole: Asked<'_>) -> Option<Found> {
        let Asked { row, asker, peer, value, terms, .. } = whole;
        if row.more & !Row::WIDE != 0 {
            return None;
        }
        let Near { one, other, spilled, .. } = near;
        let value = clamped(value);
        let asked = near.asked(value);
        let (one, other) = (one.first(asked), other.first(asked));
        let mut wide = Word::NOTHING;
        // This can be foreseen as well as the action can.
        if row.more != 0 {
            wide = self.wide(row, asker, peer)?.first(value);
        }
        let all = one | other | wide;
        if all.is_far() | spilled {
            return None;
        }
        let mut word = one.stronger(other).stronger(wide);
        if !word.holds(terms) {
            word = self.weigh(near.key, self.wide_at(row, asker, peer), value, terms)?;
        }
        Some(Found::by(word, all.is_limited()))
    }
}

/// A value as lanes have it: what is above is in lanes without an end.
#[inline(always)]
fn clamped(value: u64) -> u64 {
    value.min(u32::MAX.into())
}

impl Table {
    /// What the front knows of an action, whether there is such or not.
    #[inline(always)]
    pub(crate) fn row(&self, kind: Kind, action: Action) -> Option<Row> {
        self.front.rows.get(Op::index_of(kind, action)).copied()
    }

    /// Where there is to be [glanced](Self::glance).
    #[inline(always)]
    pub(crate) fn near(&self, row: Row, asker: &Brief, peer: &Brief) -> Option<Near<'_>> {
        self.front.near(self.front.key(row.number, asker.id(), peer.id()))
    }

    /// What is said between two subjects, or an asker and nobody, in most cases; otherwise nothing, and it is to be
    /// [looked](Self::look) closer. The condition of what is said is another one than the rule's.
    #[inline(always)]
    pub(crate) fn glance(&self, near: Near<'_>, asked: Asked<'_>) -> Option<Ruling> {
        let found = self.front.glance(near, asked)?;
        self.ruling(&asked, found)
    }

    /// What all layers say, if levels need not be compared.
    #[inline(always)]
    fn ruling(&self, asked: &Asked<'_>, found: Found) -> Option<Ruling> {
        let flow = asked.row.flow;
        let permits = self.ways.known(asked.asker.level, asked.peer.level, flow)?;
        let walled = asked.walled & (flow != Flow::None);
        // Which layer it is nobody can foresee: no branch.
        const LAYERS: [Layer; 8] = [
            Layer::Type,
            Layer::Attribute,
            Layer::Wall,
            Layer::Wall,
            Layer::Lattice,
            Layer::Lattice,
            Layer::Lattice,
            Layer::Lattice,
        ];
        let at = usize::from(found.conditional) | usize::from(walled) << 1 | usize::from(!permits) << 2;
        let layer = LAYERS.get(at).copied().unwrap_or(Layer::Lattice);
        Some(Ruling::new(found.said.only_if(permits & !walled), layer, found.limited))
    }
}
