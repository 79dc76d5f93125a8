//! The runs, by turns.

use std::time::{Duration, Instant};

use vmm_examples::race::{Guests, Machine, Report, order};

use crate::results::Results;

/// Time that a guest may take to its init, or to power-off.
const BOOT_LIMIT: Duration = Duration::from_secs(60);

/// Time in which something must come of each row.
const ROW_LIMIT: Duration = Duration::from_secs(60);

/// So often a guest may die or hang in one turn before the rest of its rows is given up.
const MOST_DEATHS: u32 = 3;

/// Pairs unless the user asks for some.
const PAIRS: u32 = 5;

/// After so long no further pair begins, unless the user has asked for it: of boots, and of anything.
const BOOTS_TIME: Duration = Duration::from_secs(240);
const ALL_TIME: Duration = Duration::from_secs(570);

/// All runs.
#[derive(Debug)]
pub(crate) struct Contest {
    pub(crate) guests: Guests,
    pub(crate) results: Results,
    /// What the user asks for.
    pub(crate) pairs: Option<u32>,
    pub(crate) started: Instant,
}

impl Contest {
    /// Does them all. What comes of them, and what goes wrong, is in the results.
    pub(crate) fn run(&mut self) {
        if self.results.has(false) {
            self.by_turns("boots", BOOTS_TIME, Self::boot);
        }
        if self.results.has(true) {
            self.by_turns("programs", ALL_TIME, Self::work);
        }
        self.results.finish();
    }

    /// Lets the machines take turns at `one`, which is told the pair and the machine's index. No pair begins that would not
    /// be done by `time`.
    fn by_turns(&mut self, what: &str, time: Duration, one: fn(&mut Self, &str, usize)) {
        let pairs = self.pairs.unwrap_or(PAIRS);
        let mut longest = Duration::ZERO;
        for pair in 0..pairs {
            let began = self.started.elapsed();
            if self.pairs.is_none() && pair > 0 && began + longest > time {
                let remark =
                    format!("Of {what}, {pair} of {pairs} pairs were run: there was no time for more.");
                self.results.remark(remark);
                return;
            }
            for index in order(pair, self.results.machines().len()) {
                one(self, &format!("{what}, pair {} of {pairs}", pair + 1), index);
            }
            longest = longest.max(self.started.elapsed().saturating_sub(began));
        }
    }

    fn boot(&mut self, pair: &str, index: usize) {
        let Some(machine) = self.results.machines().get(index).cloned() else { return };
        if self.results.rows_left(index, false).is_empty() {
            return;
        }
        let times = self.guests.times(&machine, BOOT_LIMIT).map_err(|error| format!("{error:#}"));
        match &times {
            Ok(times) => {
                self.say(pair, &machine, &format!("init {:.3} s, off {:.3} s", times.init, times.power_off))
            }
            Err(reason) => self.say(pair, &machine, &format!("failed: {reason}")),
        }
        self.results.boot(index, &times);
    }

    fn work(&mut self, pair: &str, index: usize) {
        let Some(machine) = self.results.machines().get(index).cloned() else { return };
        let mut rows = self.results.rows_left(index, true);
        // A guest in which a row hangs, or which dies of it, is booted anew for the others.
        for _ in 0..MOST_DEATHS {
            if rows.is_empty() {
                return;
            }
            let report = match self.guests.work(&machine, &rows, BOOT_LIMIT) {
                Ok(mut runner) => Report::of(&mut runner, &rows, ROW_LIMIT),
                Err(error) => {
                    self.say(pair, &machine, &format!("failed: {error:#}"));
                    return self.results.failed(index, &rows, &format!("{error:#}"));
                }
            };
            let clocks = report.clocks().map_or_else(
                |error| error.to_string(),
                |(guest, host)| format!("{guest:.3} s by its clock, {host:.3} s by the host's"),
            );
            self.say(pair, &machine, &format!("{} rows, {clocks}", report.figures.len()));
            for (row, reason) in &report.failures {
                self.say(pair, &machine, &format!("{row} failed: {reason}"));
            }
            self.results.programs(index, pair, &report);
            let left = report.left();
            rows.retain(|row| left.contains(row));
        }
        self.results.failed(index, &rows, "given up, since the guest died or hung in others");
    }

    fn say(&self, pair: &str, machine: &Machine, text: &str) {
        eprintln!("[{:>3} s] {pair}: {}: {text}", self.started.elapsed().as_secs(), machine.name);
    }
}
