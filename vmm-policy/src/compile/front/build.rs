//! Cells to lanes.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};

use fixedbitset::FixedBitSet;

use super::line::{LANES, Lane, Line, Word};
use super::{BLOCK, Front, RELATIONS, Row};
use crate::compile::cells::{ANY, Cell, Cells, split_key, split_related};
use crate::compile::classes::NOBODY;
use crate::compile::model::Model;
use crate::compile::ranges::Ranges;
use crate::compile::said::Entry;
use crate::model::{Action, Flow, Kind, Op, ValueKind};

/// Of one asker and peer. Where there are more, it is faster to look for the range.
const LANES_OF_KEY: usize = BLOCK * LANES;
/// Factors that are tried: a multiplication scatters keys that follow each other, as those of a policy do, as well as its factor is far from a
/// fraction of small numbers, and one in forty is near to one.
const FACTORS: usize = 8;
/// One line of this many may have spilled before another factor is tried.
const SPILLED: usize = 64;

/// Odd, and nothing that whoever writes a policy can know.
fn random_factor() -> u64 {
    RandomState::new().hash_one(0) | 1
}

impl Front {
    /// For a policy's actions, with nothing said of them.
    pub(in crate::compile) fn new(model: &Model) -> Self {
        let mut rows = Box::new([Row { number: 0, more: Row::NONE, flow: Flow::None }; Op::COUNT]);
        for op in Op::all() {
            if let Some(row) = rows.get_mut(op.index()) {
                *row = Row { number: 0, more: 0, flow: op.flow() };
            }
        }
        let mut last = 0;
        let rules = model.rules.iter().map(|rule| &rule.targets);
        for targets in rules.chain(model.limits.iter().map(|limit| &limit.targets)) {
            for op in targets.ops.iter() {
                if let Some(row) = rows.get_mut(op.index()).filter(|row| row.number == 0) {
                    last += 1;
                    row.number = last;
                }
            }
        }
        Self {
            rows,
            lines: vec![Line::FREE],
            blocks: Vec::new(),
            wide: vec![Line::FREE; (usize::from(last) + 1) * RELATIONS],
            factor: random_factor(),
            classes: 1,
            used: 0,
        }
    }

    /// Whether actions and this many classes together have numbers of 32 bits.
    fn fits(&self) -> bool {
        let last = self.rows.iter().map(|row| u32::from(row.number)).max().unwrap_or(0);
        last.leading_zeros() >= 2 * self.classes.trailing_zeros()
    }

    /// Adds what cells say that are new.
    pub(in crate::compile) fn extend(&mut self, model: &Model, origin: &Origin<'_>, fresh: &[Cell]) {
        let with_lanes = |cell: &Cell| (cell.key(), origin.lanes(model, cell));
        let mut cells: Vec<(u64, Vec<Lane>)> = fresh.iter().map(with_lanes).collect();
        let count = |cells: &[(u64, Vec<Lane>)]| cells.iter().map(|(_, lanes)| lanes.len()).sum::<usize>();
        let is_room = self.used + count(&cells) <= self.lines.len() * LANES * 5 / 8;
        let fits = origin.classes < self.classes as usize;
        if fits && is_room && !cells.iter().any(|(key, _)| is_wide(*key)) {
            if self.fits() {
                cells.iter().for_each(|(key, lanes)| self.add(*key, lanes));
            }
            return;
        }
        self.classes = 1 << (usize::BITS - origin.classes.leading_zeros());
        let fits = self.fits();
        for row in self.rows.iter_mut() {
            row.more = row.more & Row::NONE | if fits { 0 } else { Row::TABLE };
        }
        cells.clear();
        if fits {
            cells.extend(origin.cells.all().map(|cell| with_lanes(&cell)));
        }
        // The longest first, as long as there is room.
        cells.sort_by_key(|(_, lanes)| Reverse(lanes.len()));
        let (wide, cells): (Vec<_>, Vec<_>) = cells.into_iter().partition(|(key, _)| is_wide(*key));
        // With room for a class or two more where there is one already.
        let lanes = count(&cells);
        let room = if self.used > 0 { lanes / 16 } else { 0 };
        self.lines = vec![Line::FREE; lanes * 2 / 5 + room + 1];
        self.lay(&cells);
        self.widen(wide);
    }

    /// Adds cells to lines in which there is nothing yet, by a factor that scatters their keys well.
    fn lay(&mut self, cells: &[(u64, Vec<Lane>)]) {
        let mut best = (usize::MAX, self.factor);
        for _ in 0..FACTORS {
            let spilled = self.lay_anew(cells);
            if spilled <= self.lines.len() / SPILLED {
                return;
            }
            best = best.min((spilled, self.factor));
            self.factor = random_factor();
        }
        self.factor = best.1;
        self.lay_anew(cells);
    }

    /// Adds cells by the factor that there is, and returns how many lines have spilled.
    fn lay_anew(&mut self, cells: &[(u64, Vec<Lane>)]) -> usize {
        self.lines.fill(Line::FREE);
        self.blocks.clear();
        self.used = 0;
        cells.iter().for_each(|(key, lanes)| self.add(*key, lanes));
        self.lines.iter().filter(|line| line.is_spilled()).count()
    }

    /// Adds what is said of whomever.
    fn widen(&mut self, cells: Vec<(u64, Vec<Lane>)>) {
        let mut all: BTreeMap<usize, Vec<Lane>> = BTreeMap::new();
        for (key, lanes) in cells {
            let (op, asker, peer) = split_key(key);
            let Some(row) = self.rows.get_mut(op) else { continue };
            row.more |= Row::WIDE;
            let relations = match (split_related(asker), peer) {
                (Some((0, same)), _) => {
                    if same {
                        2..3
                    } else {
                        3..4
                    }
                }
                (Some(_), _) => {
                    row.more |= Row::TABLE;
                    continue;
                }
                (None, NOBODY) => 0..1,
                (None, _) => 1..4,
            };
            for relation in relations {
                all.entry(usize::from(row.number) * RELATIONS + relation).or_default().extend(&lanes);
            }
        }
        self.wide.fill(Line::FREE);
        for (at, mut lanes) in all {
            // The first one that holds is the strongest of both cells, and tells of the limits of both.
            lanes.sort_by_key(|lane| lane.word);
            if lanes.iter().any(|lane| lane.word.is_limited()) {
                lanes.iter_mut().for_each(|lane| lane.word = lane.word.limited());
            }
            if lanes.len() > LANES || lanes.iter().any(|lane| lane.word.is_far()) {
                lanes = vec![Lane::whole(Word::in_table())];
            }
            if let Some(line) = self.wide.get_mut(at) {
                line.fill(&mut lanes.into_iter());
            }
        }
    }

    /// Adds the lanes of a cell with a key.
    fn add(&mut self, key: u64, lanes: &[Lane]) {
        let (op, asker, peer) = split_key(key);
        let any = self.any();
        let Some(row) = self.rows.get_mut(op) else { return };
        let any_peer = if peer == ANY { Row::ANY_PEER } else { 0 };
        row.more |= any_peer | if asker == ANY { Row::ANY_ASKER } else { 0 };
        let number = row.number;
        let class = |class: u32| if class == ANY { any } else { class };
        let key = self.key(number, class(asker), class(peer));
        let mut lanes = lanes.iter().map(|lane| lane.of(key));
        let places = self.places(key);
        if self.make_room(places, lanes.len()) {
            self.put(places, &mut lanes);
            return;
        }
        let far = Word::in_block(self.blocks.len() / BLOCK);
        let mut block = [Line::FREE; BLOCK];
        block.iter_mut().for_each(|line| line.fill(&mut lanes));
        self.blocks.extend(block);
        if self.make_room(places, 1) {
            self.put(places, &mut std::iter::once(Lane::whole(far).of(key)));
        } else {
            places.into_iter().for_each(|at| self.lines.get_mut(at).into_iter().for_each(Line::spill));
        }
    }

    fn room(&self, places: [usize; 2]) -> [usize; 2] {
        places.map(|at| self.lines.get(at).map_or(0, Line::room))
    }

    /// Whether there is room in two lines, after what is there has been moved to where it can be as well.
    fn make_room(&mut self, places: [usize; 2], wanted: usize) -> bool {
        let [one, other] = places;
        for at in [one, other] {
            for lane in 0..LANES {
                let [in_one, in_other] = self.room(places);
                if wanted <= in_one + if one == other { 0 } else { in_other } {
                    return true;
                }
                self.move_away(at, lane, places);
            }
        }
        let [in_one, in_other] = self.room(places);
        wanted <= in_one + if one == other { 0 } else { in_other }
    }

    /// Moves a lane to the other line in which it can be, if that has room, is none of `places`, and has none of its key: the
    /// stronger ones of a key come first.
    fn move_away(&mut self, at: usize, lane: usize, places: [usize; 2]) {
        let Some(key) = self.lines.get(at).and_then(|line| line.key(lane)) else { return };
        let free = self.places(key).into_iter().find(|other| !places.contains(other));
        let Some(to) = free.and_then(|to| self.lines.get_mut(to)) else { return };
        if to.room() == 0 || to.has(key) {
            return;
        }
        let Some(moved) = self.lines.get_mut(at).and_then(|line| line.take(lane)) else { return };
        if let Some(to) = free.and_then(|to| self.lines.get_mut(to)) {
            to.fill(&mut std::iter::once(moved));
        }
    }

    /// Puts lanes into two lines that have room, into the emptier one first.
    fn put(&mut self, places: [usize; 2], lanes: &mut impl ExactSizeIterator<Item = Lane>) {
        self.used += lanes.len();
        let [one, other] = places;
        let [in_one, in_other] = self.room(places);
        for at in if in_one < in_other { [other, one] } else { [one, other] } {
            if let Some(line) = self.lines.get_mut(at) {
                line.fill(lanes);
            }
        }
    }
}

/// Whether a cell is about whomever.
fn is_wide(key: u64) -> bool {
    let (_, asker, peer) = split_key(key);
    split_related(asker).is_some() || (asker == ANY && matches!(peer, ANY | NOBODY))
}

/// What lanes are made of.
pub(in crate::compile) struct Origin<'t> {
    pub(in crate::compile) cells: &'t Cells,
    pub(in crate::compile) ranges: &'t Ranges,
    pub(in crate::compile) objects: &'t FixedBitSet,
    pub(in crate::compile) classes: usize,
}

impl Origin<'_> {
    /// The lanes of a cell, without their key, strongest first; or one that sends to the table. Declared objects have none.
    fn lanes(&self, model: &Model, cell: &Cell) -> Vec<Lane> {
        let (op, _, peer) = split_key(cell.key());
        if self.objects.contains(peer as usize) {
            return Vec::new();
        }
        let most = match Kind::ALL.get(op / Action::ALL.len()).map(|kind| kind.value_kind()) {
            Some(ValueKind::Number(most)) => most,
            // Atoms of names are counted in 32 bits.
            _ => u32::MAX.into(),
        };
        let lanes = self.lanes_up_to(model, cell, most).filter(|lanes| lanes.len() <= LANES_OF_KEY);
        lanes.unwrap_or_else(|| vec![Lane::whole(Word::in_table())])
    }

    /// The same for numbers up to one; nothing if they do not fit.
    fn lanes_up_to(&self, model: &Model, cell: &Cell, most: u64) -> Option<Vec<Lane>> {
        // Each entry or list of limits with its ranges; of two that lie side by side one is made.
        let mut all: Vec<(What, u64, u64)> = Vec::new();
        for range in self.ranges.of(cell) {
            let limits = range.said.listed().map_or(0, |list| self.ranges.listed(list).1);
            let limits = (limits != 0).then_some(What::Limits(limits));
            for what in self.ranges.entries(range.said).map(What::Rule).chain(limits) {
                let goes_on = |(known, _, last): &&mut (What, u64, u64)| {
                    *known == what && last.checked_add(1) == Some(range.first)
                };
                match all.iter_mut().find(goes_on) {
                    Some((.., last)) => *last = range.last,
                    None => all.push((what, range.first, range.last)),
                }
            }
            if all.len() > LANES_OF_KEY {
                return None;
            }
        }
        let limited = all.iter().any(|(what, ..)| matches!(what, What::Limits(_)));
        let mut lanes = Vec::new();
        for (what, first, last) in all {
            let first = u32::try_from(first).ok()?;
            // Where numbers go further, a range ends below the last number that there is here, which stands for all those, or it does not end.
            let top = u64::from(u32::MAX);
            let endless = last == u64::MAX || (most <= top && last >= top);
            let last =
                if endless { None } else { Some(u32::try_from(last).ok().filter(|last| *last < u32::MAX)?) };
            match what {
                What::Rule(entry) => {
                    for term in model.conditions.terms_of(entry.condition)? {
                        lanes.push(Lane::new(first, last, Word::rule(entry, term)?));
                    }
                }
                What::Limits(list) => lanes.push(Lane::new(first, last, Word::limit(list)?)),
            }
        }
        if limited {
            lanes.iter_mut().for_each(|lane| lane.word = lane.word.limited());
        }
        lanes.sort_by_key(|lane| lane.word);
        Some(lanes)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Rule(Entry),
    /// A list of them.
    Limits(u32),
}
