//! Facts and quantities.

use std::fmt::{self, Display, Formatter};

use crate::syntax::ast::{Fact, Quantity, Step, Weekdays};

impl Display for Fact {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lifecycle(state) => f.write_str(state.word()),
            Self::Attested => f.write_str("attested"),
            Self::Measured(digest) => write!(f, "measured {digest}"),
            Self::Flag(name) => write!(f, "flag {name}"),
            Self::Between { from, to, days } => {
                write!(f, "between {from} and {to}")?;
                if *days != Weekdays::ALL { write!(f, " on {days}") } else { Ok(()) }
            }
        }
    }
}

impl Display for Weekdays {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let is = |day: usize| self.0 >> day & 1 == 1;
        let mut parts = Vec::new();
        let mut day = 0;
        while day < 7 {
            if !is(day) {
                day += 1;
                continue;
            }
            let begin = day;
            while day < 6 && is(day + 1) {
                day += 1;
            }
            let name = |day: usize| Self::NAMES.get(day).copied().unwrap_or_default();
            parts.push(if begin == day {
                name(day).to_owned()
            } else {
                format!("{}..{}", name(begin), name(day))
            });
            day += 1;
        }
        f.write_str(&parts.join(", "))
    }
}

impl Display for Step {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Throttle => "throttle",
            Self::Reset => "reset",
            Self::Pause => "pause",
            Self::Kill => "kill",
        })
    }
}

/// Bytes in the largest unit that they are a multiple of.
pub(crate) struct Bytes(pub(crate) u64);

impl Display for Bytes {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let units = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
        let unit = units.into_iter().find(|(shift, _)| self.0 != 0 && self.0.trailing_zeros() >= *shift);
        match unit {
            Some((shift, name)) => write!(f, "{} {name}", self.0 >> shift),
            None => write!(f, "{} bytes", self.0),
        }
    }
}

/// Seconds in the largest unit that they are a multiple of.
pub(crate) struct Time(pub(crate) u32);

impl Display for Time {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let units = [(86_400, "day"), (3600, "hour"), (60, "minute"), (1, "second")];
        let (unit, name) = units
            .into_iter()
            .find(|(unit, _)| self.0 != 0 && self.0.is_multiple_of(*unit))
            .unwrap_or((1, "second"));
        match self.0 / unit {
            1 => f.write_str(name),
            count => write!(f, "{count} {name}s"),
        }
    }
}

impl Display for Quantity {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Open(count) => write!(f, "{count} open"),
            Self::Pages(count) => write!(f, "{count} pages"),
            Self::Bytes { count, seconds, burst } => {
                write!(f, "{} per {}", Bytes(count), Time(seconds))?;
                if burst != count { write!(f, " burst {}", Bytes(burst)) } else { Ok(()) }
            }
            Self::Requests { count, seconds, burst } => {
                write!(f, "{count} per {}", Time(seconds))?;
                if burst != count { write!(f, " burst {burst}") } else { Ok(()) }
            }
        }
    }
}
