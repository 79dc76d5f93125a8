//! What the attempts came to.

use std::collections::BTreeMap;
use std::fmt::Display;

/// Unexpected outcomes of a subject that are kept for the table; the others are counted.
const KEPT: usize = 20;

/// Outcomes by subject.
#[derive(Default)]
pub(crate) struct Report {
    subject: &'static str,
    kinds: BTreeMap<&'static str, u64>,
    table: Vec<String>,
    /// Unexpected outcomes of the subject.
    here: usize,
    probes: u64,
    unexpected: u64,
}

impl Report {
    /// Whatever is recorded from here on belongs to `subject`. What came before is printed: nobody knows what comes.
    pub(crate) fn subject(&mut self, subject: &'static str) {
        if !self.kinds.is_empty() {
            let kinds: Vec<String> =
                self.kinds.iter().map(|(kind, count)| format!("{kind} {count}")).collect();
            println!("{}: {}", self.subject, kinds.join(", "));
        }
        if self.here > KEPT {
            self.table.push(format!("unexpected: {}: {} more", self.subject, self.here - KEPT));
        }
        (self.subject, self.here) = (subject, 0);
        self.kinds.clear();
    }

    /// Records an outcome: its kind, and what was tried and came of it, for the table if that was not expected.
    pub(crate) fn record(
        &mut self,
        is_expected: bool,
        kind: &'static str,
        tried: impl Display,
        came: impl Display,
    ) {
        self.probes += 1;
        *self.kinds.entry(kind).or_default() += 1;
        if !is_expected {
            self.unexpected += 1;
            self.here += 1;
            if self.here <= KEPT {
                self.table.push(format!("unexpected: {}: {tried}: {came}", self.subject));
            }
        }
    }

    /// Prints the rest; whether all was as expected.
    pub(crate) fn print(&mut self) -> bool {
        self.subject("");
        for line in &self.table {
            println!("{line}");
        }
        println!("probes: {} unexpected: {}", self.probes, self.unexpected);
        self.unexpected == 0
    }
}
