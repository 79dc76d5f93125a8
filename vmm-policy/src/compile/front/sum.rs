//! What is said where a glance does not tell: all lanes that are about a request, and their limits.

use std::hint::select_unpredictable;

use super::line::{Line, Weighed, Word};
use super::{Asked, BLOCK, Found, Front, Near, Row, clamped};
use crate::compile::classes::NOBODY;
use crate::compile::lookup::{Limits, Ruling};
use crate::compile::table::Table;

/// What lanes say together, with their limits.
pub(super) struct Sum {
    /// What holds.
    terms: u64,
    weighed: Weighed,
    limits: Limits,
    /// The last one that says that it stands elsewhere.
    far: Word,
}

impl Sum {
    /// Adds what a line says. Which of its lanes are about a request nobody can foresee: no branch.
    #[inline(always)]
    fn add(&mut self, line: &Line, asked: u64) {
        for word in line.all(asked) {
            self.weighed.add(word, self.terms);
            self.limits.add(word.limits());
            self.far = select_unpredictable(word.is_far(), word, self.far);
        }
    }

    pub(super) fn found(&self) -> Found {
        Found::by(self.weighed.word(), !self.limits.lists().is_empty())
    }
}

impl Front {
    /// What all lanes of a key say, and those of a line for whomever; nothing if one of them says that it stands elsewhere. It takes numbers and
    /// no more of them than there are registers, so that a glance keeps nothing for it in memory.
    #[cold]
    #[inline(never)]
    pub(super) fn weigh(&self, key: u32, wide: usize, value: u64, terms: u64) -> Option<Word> {
        let near = self.near(key)?;
        let asked = near.asked(value);
        let mut weighed = Weighed::NOTHING;
        // What a line that is there twice says twice is the same.
        for words in [near.one.all(asked), near.other.all(asked), self.wide.get(wide)?.all(value)] {
            words.into_iter().for_each(|word| weighed.add(word, terms));
        }
        (!weighed.is_far()).then(|| weighed.word())
    }

    /// Adds what is said of one key; nothing if the table is to be asked.
    #[inline(always)]
    fn add_key(&self, sum: &mut Sum, key: u32, value: u64) -> Option<()> {
        let near = self.near(key)?;
        let Near { one, other, spilled, .. } = near;
        if spilled {
            return None;
        }
        let asked = near.asked(value);
        sum.add(one, asked);
        if !std::ptr::eq(one, other) {
            sum.add(other, asked);
        }
        if sum.far.is_far() {
            let block = sum.far.block()?;
            sum.far = Word::NOTHING;
            let lines = self.blocks.iter().skip(block * BLOCK).take(BLOCK);
            lines.for_each(|line| sum.add(line, asked));
        }
        (!sum.far.is_far()).then_some(())
    }

    /// The list of limits that is all there is; nothing if there are several, or it is to be looked closer. It takes numbers for the same reason as
    /// [`weigh`](Self::weigh).
    #[inline(never)]
    pub(super) fn list(&self, key: u32, wide: usize, value: u64) -> Option<u32> {
        let near = self.near(key).filter(|near| !near.spilled)?;
        let asked = near.asked(value);
        let mut lists = near.one.limits(asked).and(self.wide.get(wide)?.limits(value));
        if !std::ptr::eq(near.one, near.other) {
            lists = lists.and(near.other.limits(asked));
        }
        lists.sole()
    }

    /// What all lanes say; nothing if the table is to be asked.
    #[inline(never)]
    pub(super) fn sum(&self, asked: Asked<'_>) -> Option<Sum> {
        let Asked { row, asker, peer, terms, .. } = asked;
        let value = clamped(asked.value);
        if row.more & (Row::TABLE | Row::NONE) != 0 {
            return None;
        }
        let limits = Limits::default();
        let mut sum = Sum { terms, weighed: Weighed::NOTHING, limits, far: Word::NOTHING };
        self.add_key(&mut sum, self.key(row.number, asker.id(), peer.id()), value)?;
        if row.more & Row::ANY_PEER != 0 && peer.id() != NOBODY {
            self.add_key(&mut sum, self.key(row.number, asker.id(), self.any()), value)?;
        }
        if row.more & Row::ANY_ASKER != 0 && peer.id() != NOBODY {
            self.add_key(&mut sum, self.key(row.number, self.any(), peer.id()), value)?;
        }
        if row.more & Row::WIDE != 0 {
            sum.add(self.wide(row, asker, peer)?, value);
        }
        (!sum.far.is_far()).then_some(sum)
    }
}

impl Table {
    /// What is said between two subjects, or an asker and nobody, and the limits that the request falls under; nothing if
    /// [`judge`](Self::judge) and [`limits_of`](Self::limits_of) are to be asked.
    #[inline(never)]
    pub(crate) fn look(&self, asked: Asked<'_>) -> Option<(Ruling, Limits)> {
        let sum = self.front.sum(asked)?;
        Some((self.ruling(&asked, sum.found())?, sum.limits))
    }

    /// The list of limits that a request falls under, if it is one that is found at a glance; otherwise it is to be [looked](Self::look) closer.
    #[inline(always)]
    pub(crate) fn list_at(&self, near: Near<'_>, asked: Asked<'_>) -> Option<u32> {
        let Asked { row, asker, peer, value, .. } = asked;
        if row.more & !Row::WIDE != 0 {
            return None;
        }
        self.front.list(near.key, self.front.wide_at(row, asker, peer), clamped(value))
    }
}
