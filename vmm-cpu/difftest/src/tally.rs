//! How many cases of each form there were, and what came of them.

use std::collections::BTreeMap;
use std::fmt;

use iced_x86::Code;

use crate::case::{Case, Ending, Outcome};
use crate::{forms, judge};

/// Cases of one form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Count {
    /// Both sides completed the instruction.
    pub(crate) completed: u64,
    /// It faulted or trapped.
    pub(crate) faulted: u64,
    /// Compared with what a rule asks for.
    pub(crate) judged: u64,
    /// Could not be compared.
    pub(crate) rejected: u64,
}

impl Count {
    /// Cases that were compared.
    pub(crate) fn executed(&self) -> u64 {
        self.completed + self.faulted
    }
}

/// The counts of all forms.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tally {
    counts: BTreeMap<Code, Count>,
    /// Why cases were rejected.
    pub(crate) reasons: BTreeMap<&'static str, u64>,
    /// Cases whose first answer of the processor's side was not its second.
    pub(crate) unsteady: u64,
}

impl Tally {
    fn count(&mut self, code: Code) -> &mut Count {
        self.counts.entry(code).or_default()
    }

    /// Notes a case that was compared, for all forms that it got to.
    pub(crate) fn compared(&mut self, case: &Case, native: &Outcome) {
        let faulted = native.ending != Ending::Completed;
        let mut counted = Vec::with_capacity(case.instructions.len());
        for (code, offset) in &case.instructions {
            let at = case.address + u64::from(*offset);
            let reached = !case.owns(native.rip) || at <= native.rip;
            if reached && !counted.contains(code) {
                counted.push(*code);
                let is_last = !case.instructions.iter().any(|(_, other)| other > offset);
                let ends_here = if case.owns(native.rip) { at == native.rip } else { is_last };
                let count = self.count(*code);
                *if judge::has_rule(*code) {
                    &mut count.judged
                } else if faulted && ends_here {
                    &mut count.faulted
                } else {
                    &mut count.completed
                } += 1;
            }
        }
    }

    pub(crate) fn rejected(&mut self, code: Code, reason: &'static str) {
        self.count(code).rejected += 1;
        *self.reasons.entry(reason).or_default() += 1;
    }

    pub(crate) fn add(&mut self, other: &Self) {
        for (code, count) in &other.counts {
            let sum = self.count(*code);
            sum.completed += count.completed;
            sum.faulted += count.faulted;
            sum.judged += count.judged;
            sum.rejected += count.rejected;
        }
        for (reason, count) in &other.reasons {
            *self.reasons.entry(reason).or_default() += count;
        }
        self.unsteady += other.unsteady;
    }

    /// The count of a form.
    pub(crate) fn of(&self, code: Code) -> Count {
        self.counts.get(&code).copied().unwrap_or_default()
    }

    /// Whether a form has been compared or judged that often.
    #[cfg(test)]
    pub(crate) fn reaches(&self, code: Code, least: u64) -> bool {
        let count = self.of(code);
        count.executed() + count.judged >= least
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:32} {:>9} {:>9} {:>9} {:>9} {:>9}",
            "form", "executed", "completed", "faulted", "judged", "rejected"
        )?;
        for code in forms::forms() {
            let count = self.of(*code);
            writeln!(
                f,
                "{:32} {:>9} {:>9} {:>9} {:>9} {:>9}",
                format!("{code:?}"),
                count.executed(),
                count.completed,
                count.faulted,
                count.judged,
                count.rejected
            )?;
        }
        for (reason, count) in &self.reasons {
            writeln!(f, "rejected, since {reason}: {count}")?;
        }
        write!(f, "not the same when repeated: {}", self.unsteady)
    }
}
