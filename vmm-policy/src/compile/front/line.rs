//! A line of the front: four lanes, with a rule each.

use std::hint::select_unpredictable;
use std::ops::BitOr;

use crate::compile::conditions::TERMS;
use crate::compile::said::{Entry, Said};

pub(super) const LANES: usize = 4;

const _: () = assert!(TERMS == 64, "a lane has six bits for a term");

/// What is said in a lane: as [`Said`], with a term of [`Conditions`](crate::compile::Conditions) where that has the condition, and two bits of its
/// own. Where [`Said`] has nothing there can be a list of limits: it is less than nothing and more than any rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Word(u32);

impl Word {
    pub(super) const NOTHING: Self = Self(Said::NOTHING.bits());
    /// It stands in a block, or in the table.
    const FAR: u32 = 1 << 31;
    /// A limit is about objects of the same asker and peer.
    const LIMITED: u32 = 1 << 6;
    /// In the first lane of a line: what was not put into it, being full, the table knows.
    const SPILLED: u32 = 1 << 7;
    /// Where the number of a block begins.
    const BLOCK: u32 = 8;
    const TERM: u32 = TERMS as u32 - 1;
    /// Below is what rules say.
    const BESIDE_NOTHING: u32 = Said::BESIDE_NOTHING.bits();

    pub(super) fn rule(entry: Entry, term: u32) -> Option<Self> {
        Said::one(Entry { condition: term, ..entry }).map(|said| Self(said.bits()))
    }

    /// A list of limits, if its number is not too high.
    pub(super) fn limit(list: u32) -> Option<Self> {
        let said = Said::nothing_but(list)?;
        Some(Self(said.bits()).limited())
    }

    /// The table is to be asked.
    pub(super) fn in_table() -> Self {
        Self(Self::FAR)
    }

    /// It stands in the block of a number.
    pub(super) fn in_block(block: usize) -> Self {
        Self(Self::FAR | (block as u32 + 1) << Self::BLOCK)
    }

    /// The number of the block; nothing if the table is to be asked.
    pub(super) fn block(self) -> Option<usize> {
        ((self.0 & !Self::FAR) >> Self::BLOCK).checked_sub(1).map(|block| block as usize)
    }

    #[inline(always)]
    pub(super) fn is_far(self) -> bool {
        self.0 & Self::FAR != 0
    }

    pub(super) fn limited(self) -> Self {
        Self(self.0 | Self::LIMITED)
    }

    #[inline(always)]
    pub(super) fn is_limited(self) -> bool {
        self.0 & Self::LIMITED != 0
    }

    /// The list of limits, if it is one; otherwise 0.
    #[inline(always)]
    pub(super) fn limits(self) -> u32 {
        Said::from_bits(self.0).beside_nothing()
    }

    /// Whether its term is among those that hold.
    #[inline(always)]
    pub(super) fn holds(self, terms: u64) -> bool {
        terms >> (self.0 & Self::TERM) & 1 != 0
    }

    #[inline(always)]
    pub(super) fn is_conditional(self) -> bool {
        self.0 & Self::TERM != 0
    }

    /// That it is denied, by the condition of a rule that would open it.
    #[inline(always)]
    fn denied(self) -> Self {
        let rule = self.bare().rule().unwrap_or(0);
        Self(Said::missed(rule).bits() | self.0 & Self::TERM)
    }

    /// Whether it is a rule that opens what it is about.
    #[inline(always)]
    fn opens(self) -> bool {
        self.bare().opens()
    }

    /// The one that says the stronger.
    #[inline(always)]
    pub(super) fn stronger(self, other: Self) -> Self {
        select_unpredictable(self.0 < other.0, self, other)
    }

    /// The rule, or nothing.
    #[inline(always)]
    pub(super) fn said(self) -> Said {
        let said = self.bare();
        select_unpredictable(said.is_rule(), said, Said::NOTHING)
    }

    #[inline(always)]
    fn bare(self) -> Said {
        Said::from_bits(self.0 & !(Self::LIMITED | Self::SPILLED))
    }
}

/// What several lanes say.
#[derive(Clone, Copy)]
pub(super) struct Weighed {
    /// The strongest whose condition holds.
    said: Word,
    /// The strongest that would open it and whose condition does not hold.
    missed: Word,
    /// What any of them has.
    all: Word,
}

impl Weighed {
    pub(super) const NOTHING: Self = Self { said: Word::NOTHING, missed: Word::NOTHING, all: Word::NOTHING };

    /// Adds what one says. Whether it holds nobody can foresee: no branch.
    #[inline(always)]
    pub(super) fn add(&mut self, word: Word, terms: u64) {
        let holds = word.holds(terms);
        let would_open = !holds & word.opens();
        self.said = self.said.stronger(select_unpredictable(holds, word, Word::NOTHING));
        self.missed = self.missed.stronger(select_unpredictable(would_open, word, Word::NOTHING));
        self.all = self.all | word;
    }

    /// What they say together, but for what stands elsewhere.
    #[inline(always)]
    pub(super) fn word(self) -> Word {
        let misses = (self.said.said() == Said::NOTHING) & (self.missed != Word::NOTHING);
        select_unpredictable(misses, self.missed.denied(), self.said)
    }

    /// Whether something stands elsewhere.
    #[inline(always)]
    pub(super) fn is_far(self) -> bool {
        self.all.is_far()
    }
}

/// The lists of limits that lanes are.
#[derive(Clone, Copy)]
pub(super) struct Lists {
    /// How many, with what stands elsewhere.
    count: u32,
    /// Lists are more than any rule, and what stands elsewhere is more than any list.
    most: u32,
}

impl Lists {
    #[inline(always)]
    pub(super) fn and(self, other: Self) -> Self {
        Self { count: self.count + other.count, most: self.most.max(other.most) }
    }

    /// The one that there is.
    #[inline(always)]
    pub(super) fn sole(self) -> Option<u32> {
        let word = Word(self.most);
        (self.count == 1 && !word.is_far()).then_some(word.limits())
    }
}

impl BitOr for Word {
    type Output = Self;

    #[inline(always)]
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

/// A rule, for objects of one asker and peer.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lane {
    /// The key in the upper half, in the lower the number of the first object.
    begin: u64,
    /// How many objects follow that.
    more: u32,
    pub(super) word: Word,
}

impl Lane {
    const FREE: Self = Self { begin: u64::MAX, more: 0, word: Word::NOTHING };

    /// For objects from one on up to another one, or for all that follow.
    pub(super) fn new(first: u32, last: Option<u32>, word: Word) -> Self {
        Self { begin: first.into(), more: last.unwrap_or(u32::MAX) - first, word }
    }

    /// For all objects.
    pub(super) fn whole(word: Word) -> Self {
        Self::new(0, None, word)
    }

    pub(super) fn of(self, key: u32) -> Self {
        Self { begin: u64::from(key) << 32 | self.begin, ..self }
    }

    fn key(&self) -> u32 {
        (self.begin >> 32) as u32
    }

    /// Whether it is about a key, in the upper half, and an object, in the lower.
    #[inline(always)]
    fn is_about(&self, asked: u64) -> bool {
        // No lane goes beyond its key's half, so that what is below its first object, or has another key, is too far above.
        asked.wrapping_sub(self.begin) <= self.more.into()
    }

    fn is_free(&self) -> bool {
        self.begin == u64::MAX
    }
}

#[derive(Clone, Copy, Debug)]
#[repr(align(64))]
pub(super) struct Line([Lane; LANES]);

const _: () = assert!(size_of::<Line>() == 64, "a line of the cache");

impl Line {
    pub(super) const FREE: Self = Self([Lane::FREE; LANES]);

    /// What the first lane says that is about what is asked.
    #[inline(always)]
    pub(super) fn first(&self, asked: u64) -> Word {
        let Self(lanes) = self;
        lanes
            .iter()
            .rev()
            .fold(Word::NOTHING, |word, lane| select_unpredictable(lane.is_about(asked), lane.word, word))
    }

    /// What all lanes say that are about it, and nothing in the place of the others.
    #[inline(always)]
    pub(super) fn all(&self, asked: u64) -> [Word; LANES] {
        let Self(lanes) = self;
        lanes.each_ref().map(|lane| select_unpredictable(lane.is_about(asked), lane.word, Word::NOTHING))
    }

    /// The lists of limits that are about it, and what stands elsewhere.
    #[inline(always)]
    pub(super) fn limits(&self, asked: u64) -> Lists {
        let Self(lanes) = self;
        let of = |lane: &Lane| select_unpredictable(lane.is_about(asked), lane.word.0, 0);
        let words = lanes.each_ref().map(of);
        let count = words.map(|word| u32::from(word >= Word::BESIDE_NOTHING)).iter().sum();
        Lists { count, most: words.into_iter().fold(0, u32::max) }
    }

    #[inline(always)]
    pub(super) fn is_spilled(&self) -> bool {
        let Self([first, ..]) = self;
        first.word.0 & Word::SPILLED != 0
    }

    pub(super) fn spill(&mut self) {
        let Self([first, ..]) = self;
        first.word.0 |= Word::SPILLED;
    }

    /// The key of a lane that is not free.
    pub(super) fn key(&self, lane: usize) -> Option<u32> {
        let Self(lanes) = self;
        lanes.get(lane).filter(|lane| !lane.is_free()).map(Lane::key)
    }

    pub(super) fn has(&self, key: u32) -> bool {
        let Self(lanes) = self;
        lanes.iter().any(|lane| !lane.is_free() && lane.key() == key)
    }

    /// Takes a lane out.
    pub(super) fn take(&mut self, lane: usize) -> Option<Lane> {
        let spilled = self.is_spilled();
        let Self(lanes) = self;
        let mut taken = std::mem::replace(lanes.get_mut(lane)?, Lane::FREE);
        taken.word.0 &= !Word::SPILLED;
        if spilled {
            self.spill();
        }
        Some(taken)
    }

    pub(super) fn room(&self) -> usize {
        let Self(lanes) = self;
        lanes.iter().filter(|lane| lane.is_free()).count()
    }

    /// Puts lanes into the free ones, as many as there are; the rest is left.
    pub(super) fn fill(&mut self, lanes: &mut impl Iterator<Item = Lane>) {
        let spilled = self.is_spilled();
        let Self(own) = self;
        own.iter_mut().filter(|lane| lane.is_free()).zip(lanes).for_each(|(free, lane)| *free = lane);
        if spilled {
            self.spill();
        }
    }
}
