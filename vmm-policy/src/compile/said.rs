//! What is said of a range of objects, in a word.

use std::hint::select_unpredictable;

use super::model::Strength;
use crate::limits;

/// A rule of a range: its strength in the upper three bits and its number below, so that the least is what holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Entry {
    pub(super) rank: u32,
    pub(super) condition: u32,
}

impl Entry {
    pub(super) fn strength(self) -> Strength {
        strength(self.rank >> 29)
    }

    /// Whether what is weaker never counts. Of what is `never` to be, [`check`](super::check) looks at what would open it.
    pub(super) fn is_last(self) -> bool {
        self.condition == 0 && self.strength() != Strength::Never
    }

    pub(super) fn rule(self) -> u32 {
        self.rank & 0x1fff_ffff
    }
}

fn strength(bits: u32) -> Strength {
    const ALL: [Strength; 8] = [
        Strength::Never,
        Strength::Deny,
        Strength::Quarantine,
        Strength::Ask,
        Strength::Redirect,
        Strength::Throttle,
        Strength::Allow,
        // Where nothing is said.
        Strength::Deny,
    ];
    ALL.get(bits as usize & 7).copied().unwrap_or(Strength::Deny)
}

/// One rule, with its strength, its number and its condition; nothing; or, with the upper bit set, the number of a list of rules and
/// limits. Of two rules the stronger is the less, and nothing is more than any.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Said(u32);

const LISTED: u32 = 1 << 31;
const RULE_BITS: u32 = 18;
const CONDITION_BITS: u32 = 10;
const RULES: u32 = (1 << RULE_BITS) - 1;
const CONDITIONS: u32 = (1 << CONDITION_BITS) - 1;

const _: () = assert!(limits::STATEMENTS <= RULES as usize, "a rule has 18 bits");

impl Said {
    pub(super) const NOTHING: Self = Self(7 << (RULE_BITS + CONDITION_BITS) | RULES << CONDITION_BITS);

    /// The least of what is not a rule.
    pub(super) const BESIDE_NOTHING: Self = Self(7 << (RULE_BITS + CONDITION_BITS));

    pub(super) fn from_bits(bits: u32) -> Self {
        Self(bits)
    }

    pub(super) const fn bits(self) -> u32 {
        self.0
    }

    fn new(strength: u32, rule: u32, condition: u32) -> Self {
        Self(strength << (RULE_BITS + CONDITION_BITS) | rule << CONDITION_BITS | condition)
    }

    /// One rule, if its condition is one of the first.
    pub(super) fn one(entry: Entry) -> Option<Self> {
        let fits = entry.condition <= CONDITIONS;
        fits.then(|| Self::new(entry.rank >> 29, entry.rule(), entry.condition))
    }

    /// One rule of a list, whose condition stands there: here is that it has one.
    pub(super) fn of_list(entry: Entry) -> Self {
        Self::new(entry.rank >> 29, entry.rule(), u32::from(entry.condition != 0))
    }

    /// Nothing, and a number that is not too high for it.
    pub(super) fn nothing_but(number: u32) -> Option<Self> {
        (number < RULES).then(|| Self::new(7, number, 0))
    }

    /// That number; 0 for whatever else there is.
    #[inline(always)]
    pub(super) fn beside_nothing(self) -> u32 {
        let number = self.0 >> CONDITION_BITS & RULES;
        let is_nothing = self.0 >> (RULE_BITS + CONDITION_BITS) == 7;
        select_unpredictable(is_nothing & (number != RULES), number, 0)
    }

    /// Whether it is one rule and not nothing, with a number or without one.
    #[inline(always)]
    pub(super) fn is_rule(self) -> bool {
        self.0 < 7 << (RULE_BITS + CONDITION_BITS)
    }

    /// Whether it is one rule, and opens what it is about.
    #[inline(always)]
    pub(super) fn opens(self) -> bool {
        // Strengths up to here deny.
        const LEAST: u32 = (Strength::Deny as u32 + 1) << (RULE_BITS + CONDITION_BITS);
        const NOTHING: u32 = 7 << (RULE_BITS + CONDITION_BITS);
        self.0.wrapping_sub(LEAST) < NOTHING - LEAST
    }

    pub(super) fn list(number: u32) -> Self {
        Self(LISTED | number)
    }

    /// That it is denied, and which rule would have opened it.
    pub(super) fn missed(rule: u32) -> Self {
        Self::new(Strength::Deny as u32, rule, 0)
    }

    /// Whether it is a rule without a condition, or nothing.
    #[inline(always)]
    pub(super) fn is_plain(self) -> bool {
        self.0 & (LISTED | CONDITIONS) == 0
    }

    /// The number of the list.
    #[inline(always)]
    pub(super) fn listed(self) -> Option<u32> {
        (self.0 & LISTED != 0).then_some(self.0 & !LISTED)
    }

    /// Nothing, unless that is so; without a branch, since nobody can foresee it.
    #[inline(always)]
    pub(super) fn only_if(self, so: bool) -> Self {
        let mask = u32::from(so).wrapping_neg();
        Self(self.0 & mask | Self::NOTHING.0 & !mask)
    }

    #[inline(always)]
    pub(super) fn strength(self) -> Strength {
        strength(self.0 >> (RULE_BITS + CONDITION_BITS))
    }

    #[inline(always)]
    pub(super) fn rule(self) -> Option<u32> {
        (self != Self::NOTHING).then_some(self.0 >> CONDITION_BITS & RULES)
    }

    #[inline(always)]
    pub(super) fn condition(self) -> u32 {
        self.0 & CONDITIONS
    }

    /// The rule, if it is one.
    pub(super) fn entry(self) -> Option<Entry> {
        let rule = self.rule().filter(|_| self.listed().is_none())?;
        Some(Entry { rank: self.0 >> (RULE_BITS + CONDITION_BITS) << 29 | rule, condition: self.condition() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_comes_back_and_the_stronger_is_the_less() {
        let mut all = Vec::new();
        for strength in 0..7 {
            for rule in [0, 1, limits::STATEMENTS as u32 - 1] {
                for condition in [0, 1, CONDITIONS] {
                    let entry = Entry { rank: strength << 29 | rule, condition };
                    let said = Said::one(entry).unwrap();
                    assert_eq!(
                        (said.entry(), said.rule(), said.condition()),
                        (Some(entry), Some(rule), condition)
                    );
                    assert_eq!((said.strength(), said.is_plain()), (entry.strength(), condition == 0));
                    assert_eq!(said.opens(), said.strength().opens());
                    assert_eq!((said.only_if(true), said.only_if(false)), (said, Said::NOTHING));
                    assert!(said < Said::NOTHING && said.listed().is_none());
                    all.push((entry.rank, said));
                }
            }
        }
        assert!(all.is_sorted(), "ranks and words are in the same order");
        assert_eq!(Said::one(Entry { rank: 1, condition: CONDITIONS + 1 }), None);
        assert_eq!((Said::NOTHING.rule(), Said::NOTHING.strength()), (None, Strength::Deny));
        assert!(Said::NOTHING.is_plain() && Said::NOTHING.entry().is_none());
        assert_eq!((Said::list(7).listed(), Said::list(7).entry()), (Some(7), None));
        assert_eq!(Said::list(7).only_if(false), Said::NOTHING);
        let beside = Said::nothing_but(7).unwrap();
        assert!(![beside, Said::NOTHING, Said::list(7)].iter().any(|said| said.opens()));
        assert!(!beside.is_rule() && beside < Said::NOTHING && !Said::NOTHING.is_rule());
        let numbers = [beside, Said::NOTHING, Said::list(7), all[7].1].map(Said::beside_nothing);
        assert_eq!((numbers, Said::nothing_but(RULES)), ([7, 0, 0, 0], None));
    }
}
