//! The table's cells: for an action, who asks and who is asked, where it stands what is said.
//!
//! It is a hash table of which each place has what a decision needs in most cases, in 16 bytes, and of which four lie together in a line of the
//! processor's cache: a decision reads one line for each way in which rules may be about asker and peer, whether there is a cell or not.

use std::hash::{BuildHasher, RandomState};

use super::lookup::WIDE_FAMILIES;
use crate::limits;
use crate::model::Op;

/// Whoever, in a cell's key.
pub(super) const ANY: u32 = (1 << CLASS_BITS) - 1;

const CLASS_BITS: u32 = 17;
const KEY_BITS: u32 = 43;
const KEY: u64 = (1 << KEY_BITS) - 1;

const _: () = assert!(Op::COUNT + 1 < 1 << (KEY_BITS - 2 * CLASS_BITS), "an action has nine bits");
const _: () = assert!(limits::CLASSES + 1 + 2 * WIDE_FAMILIES < 1 << CLASS_BITS, "a class has 17 bits");

/// `op`, who asks and who is asked in a number that is not 0.
pub(super) fn cell_key(op: Op, asker: u32, peer: u32) -> u64 {
    (op.index() as u64 + 1) << (2 * CLASS_BITS) | u64::from(asker) << CLASS_BITS | u64::from(peer)
}

pub(super) fn split_key(key: u64) -> (usize, u32, u32) {
    ((key >> (2 * CLASS_BITS)) as usize - 1, (key >> CLASS_BITS) as u32 & ANY, key as u32 & ANY)
}

/// Who asks, in the key of a cell for all that have the same label of a family, or different ones.
pub(super) fn related(slot: usize, same: bool) -> u32 {
    ANY - 1 - (slot as u32 * 2 + u32::from(same))
}

/// The number of such a cell's family, and whether the labels are the same.
pub(super) fn split_related(asker: u32) -> Option<(usize, bool)> {
    let at = (ANY - 1).checked_sub(asker)? as usize;
    (at < WIDE_FAMILIES * 2).then_some((at / 2, at % 2 == 1))
}

/// Where it stands what is said of the objects of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Body {
    /// Of one range of objects, and of no others: its first, how many there are ([`ENDLESS`](Self::ENDLESS): all that follow), and what is
    /// said, of [`Said`](super::said::Said).
    Range { first: u32, length: u32, said: u32 },
    /// So many edges from this one on, of 32 bits or of 64.
    Edges { from: u32, count: u32, wide: bool },
}

impl Body {
    /// The length of a range that has no end; one that has is shorter.
    pub(super) const ENDLESS: u32 = (u64::MAX >> KEY_BITS) as u32;
}

/// A key in the lower 43 bits of a word, 0 for no cell. Above it the length of the range, 0 where there are edges.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cell {
    word: u64,
    first: u32,
    said: u32,
}

const WIDE: u32 = 1 << 31;

impl Cell {
    pub(super) fn new(key: u64, body: Body) -> Self {
        let (length, first, said) = match body {
            Body::Range { first, length, said } => (u64::from(length), first, said),
            Body::Edges { from, count, wide } => (0, from, count | if wide { WIDE } else { 0 }),
        };
        Self { word: key | length << KEY_BITS, first, said }
    }

    #[inline(always)]
    pub(super) fn key(&self) -> u64 {
        self.word & KEY
    }

    /// Whether it is that of a key, and is about more than one range.
    #[inline(always)]
    pub(super) fn has_edges(&self, key: u64) -> bool {
        // The length is 0, and nothing is left of the key.
        self.word == key
    }

    /// The first, the length and what is said, if it has one range.
    #[inline(always)]
    pub(super) fn range(&self) -> (u64, u32, u32) {
        (self.first.into(), (self.word >> KEY_BITS) as u32, self.said)
    }

    /// Where its edges are, and whether they have 64 bits, if it has some.
    #[inline(always)]
    pub(super) fn edges(&self) -> (std::ops::Range<usize>, bool) {
        let from = self.first as usize;
        (from..from + (self.said & !WIDE) as usize, self.said & WIDE != 0)
    }

    pub(super) fn body(&self) -> Body {
        match self.word >> KEY_BITS {
            0 => Body::Edges { from: self.first, count: self.said & !WIDE, wide: self.said & WIDE != 0 },
            length => Body::Range { first: self.first, length: length as u32, said: self.said },
        }
    }
}

const PLACES: usize = 4;

/// Filled from its first place on.
#[derive(Clone, Copy, Debug, Default)]
#[repr(align(64))]
struct Line([Cell; PLACES]);

impl Line {
    /// The cell of a key, or another one.
    #[inline(always)]
    fn find(&self, key: u64) -> Cell {
        let Self(cells) = self;
        let [_, two, three, four] = cells;
        // Which of the four it is nobody can foresee, so that this is no branch.
        let place = usize::from(two.key() == key)
            + 2 * usize::from(three.key() == key)
            + 3 * usize::from(four.key() == key);
        cells.get(place % PLACES).copied().unwrap_or_default()
    }

    #[inline(always)]
    fn is_full(&self) -> bool {
        let Self([.., last]) = self;
        last.word != 0
    }
}

/// All of them. Cells are added and not removed.
#[derive(Clone, Debug)]
pub(super) struct Cells {
    lines: Vec<Line>,
    /// Odd.
    factor: u64,
    /// In ascending order.
    keys: Vec<u64>,
}

impl Default for Cells {
    fn default() -> Self {
        Self { lines: Vec::new(), factor: RandomState::new().hash_one(0) | 1, keys: Vec::new() }
    }
}

impl Cells {
    /// The keys, in ascending order.
    pub(super) fn keys(&self) -> &[u64] {
        &self.keys
    }

    /// All of them, in no order.
    pub(super) fn all(&self) -> impl Iterator<Item = Cell> + '_ {
        self.lines.iter().flat_map(|Line(cells)| cells).copied().filter(|cell| cell.word != 0)
    }

    #[inline(always)]
    fn line_of(&self, key: u64) -> usize {
        // The upper half of the product, scaled to the number of lines, which is below 2^32: multiply-shift hashing (Dietzfelbinger),
        // by whose random factor no two keys are likely to lie together, whoever has chosen them.
        (((key.wrapping_mul(self.factor) >> 32) * self.lines.len() as u64) >> 32) as usize
    }

    /// The cell of a key; where there is none, some cell, whose key is another one.
    #[inline(always)]
    pub(super) fn get(&self, key: u64) -> Cell {
        let at = self.line_of(key);
        let Some(line) = self.lines.get(at) else { return Cell::default() };
        let found = line.find(key);
        // Most lines have an empty place.
        if line.is_full() { self.get_further(key, at, found) } else { found }
    }

    fn get_further(&self, key: u64, mut at: usize, mut found: Cell) -> Cell {
        // There are more places than cells, so that some line has an empty place.
        while found.key() != key {
            at = if at + 1 == self.lines.len() { 0 } else { at + 1 };
            let Some(line) = self.lines.get(at) else { break };
            found = line.find(key);
            if !line.is_full() {
                break;
            }
        }
        found
    }

    /// Adds cells that are not in it.
    pub(super) fn extend(&mut self, mut fresh: Vec<Cell>) {
        if fresh.is_empty() {
            return;
        }
        self.keys.extend(fresh.iter().map(Cell::key));
        self.keys.sort_unstable();
        // Two cells a line: one in twenty lines is full then.
        let wanted = self.keys.len() / 2 + 1;
        if wanted > self.lines.len() {
            let before = std::mem::take(&mut self.lines);
            fresh.extend(before.iter().flat_map(|Line(cells)| cells).filter(|cell| cell.word != 0));
            // With room for a class or two more where there is one already.
            let room = if before.is_empty() { 0 } else { wanted / 8 };
            self.lines = vec![Line::default(); wanted + room];
        }
        for cell in fresh {
            self.insert(cell);
        }
    }

    fn insert(&mut self, cell: Cell) {
        let mut at = self.line_of(cell.key());
        while let Some(Line(cells)) = self.lines.get_mut(at) {
            if let Some(free) = cells.iter_mut().find(|cell| cell.word == 0) {
                *free = cell;
                return;
            }
            at = if at + 1 == self.lines.len() { 0 } else { at + 1 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_put_in_is_found_and_nothing_else() {
        let mut rng = fastrand::Rng::with_seed(1);
        let mut cells = Cells::default();
        let mut known = std::collections::BTreeMap::new();
        let ops: Vec<Op> = Op::all().collect();
        assert_ne!(cells.get(cell_key(ops[0], 1, 2)).key(), cell_key(ops[0], 1, 2));
        for _ in 0..40 {
            let mut fresh = Vec::new();
            for _ in 0..rng.usize(..200) {
                let key = cell_key(ops[rng.usize(..ops.len())], rng.u32(..300), rng.u32(..300));
                let body = match rng.u8(..3) {
                    0 => Body::Range { first: rng.u32(..), length: Body::ENDLESS, said: rng.u32(..) },
                    1 => Body::Range {
                        first: rng.u32(..),
                        length: rng.u32(1..Body::ENDLESS),
                        said: rng.u32(..),
                    },
                    _ => Body::Edges { from: rng.u32(..), count: rng.u32(..1 << 31), wide: rng.bool() },
                };
                if known.insert(key, body).is_none() {
                    fresh.push(Cell::new(key, body));
                } else {
                    known.insert(key, fresh_body(&fresh, key).unwrap_or_else(|| cells.get(key).body()));
                }
            }
            cells.extend(fresh);
            assert_eq!(cells.keys(), known.keys().copied().collect::<Vec<_>>());
            for (key, body) in &known {
                let cell = cells.get(*key);
                assert_eq!((cell.key(), cell.body()), (*key, *body));
            }
            for _ in 0..1000 {
                let key = cell_key(ops[rng.usize(..ops.len())], rng.u32(..300), rng.u32(..300));
                assert_eq!(cells.get(key).key() == key, known.contains_key(&key));
            }
        }
        assert!(known.len() > 3000);
    }

    fn fresh_body(fresh: &[Cell], key: u64) -> Option<Body> {
        fresh.iter().find(|cell| cell.key() == key).map(Cell::body)
    }

    #[test]
    fn keys_come_apart_as_they_were_put_together() {
        for op in Op::all() {
            for asker in [0, 1, limits::CLASSES as u32, related(3, true), related(0, false), ANY] {
                for peer in [0, 1, limits::CLASSES as u32, ANY] {
                    assert_eq!(split_key(cell_key(op, asker, peer)), (op.index(), asker, peer));
                }
            }
        }
        assert_eq!(split_related(related(2, true)), Some((2, true)));
        assert_eq!((split_related(ANY), split_related(limits::CLASSES as u32)), (None, None));
    }
}
