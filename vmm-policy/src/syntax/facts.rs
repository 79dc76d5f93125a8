//! Conditions as a tree: part of [`ast`](super::ast).

use std::fmt;

use super::ast::Word;
use crate::model::Lifecycle;

/// Days of the week, a bit each, Monday first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Weekdays(pub u8);

impl Weekdays {
    /// Every day.
    pub const ALL: Self = Self(0x7f);
    /// Their names.
    pub(crate) const NAMES: [&'static str; 7] = ["mon", "tue", "wed", "thu", "fri", "sat", "sun"];
}

/// A time of day in UTC: minutes since midnight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Clock(pub u16);

impl fmt::Display for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:02}:{:02}", self.0 / 60, self.0 % 60)
    }
}

/// What may hold of a request beside its labels.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Fact {
    /// Where it is in its life.
    Lifecycle(Lifecycle),
    /// Somebody has verified what it was launched from.
    Attested,
    /// It was launched from what has this digest, in hexadecimal digits.
    Measured(Word),
    /// It is so late, from the first to before the second, across midnight if that is less.
    Between {
        /// From.
        from: Clock,
        /// To.
        to: Clock,
        /// The days on which such a time begins.
        days: Weekdays,
    },
    /// The monitor has set a flag.
    Flag(Word),
}

/// When a rule holds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Condition {
    /// If it does.
    Is {
        /// What.
        fact: Fact,
        /// Of the peer, not of the asker.
        #[cfg_attr(feature = "serde", serde(default))]
        peer: bool,
    },
    /// If it does not.
    Not(Box<Condition>),
    /// If all do.
    And(Vec<Condition>),
    /// If one does.
    Or(Vec<Condition>),
}
