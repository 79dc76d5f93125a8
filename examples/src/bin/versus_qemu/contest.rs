//! The runs, by turns, and what they come to.

use std::time::{Duration, Instant};

use anyhow::Result;
use vmm_examples::race::{Guests, Machine, Report, order};

use crate::rows::{Kind, Row};
use crate::table::{Cell, Line, Table};

/// Time that a guest may take to its init, or to power-off.
const BOOT_LIMIT: Duration = Duration::from_secs(60);

/// Time in which something must come of each row.
const ROW_LIMIT: Duration = Duration::from_secs(60);

/// Pairs unless the user asks for some.
const PAIRS: u32 = 5;

/// After so long no further pair begins, unless the user has asked for it: of boots, and of anything.
const BOOTS_TIME: Duration = Duration::from_secs(240);
const ALL_TIME: Duration = Duration::from_secs(570);

/// By how much of the time, and by how many seconds besides, a guest's clock may differ from the host's.
const CLOCK_SHARE: f64 = 0.02;
const CLOCK_SECONDS: f64 = 0.2;

/// All runs.
#[derive(Debug)]
pub(crate) struct Contest {
    guests: Guests,
    machines: Vec<Machine>,
    rows: Vec<Row>,
    /// What the user asks for.
    pairs: Option<u32>,
    started: Instant,
    /// By row, and there by machine.
    cells: Vec<Vec<Cell>>,
    /// What went wrong that is no cell's own.
    troubles: Vec<String>,
    /// What else a reader is to know.
    remarks: Vec<String>,
    /// The largest share by which a guest's clock differed from the host's.
    worst_clock: f64,
}

impl Contest {
    pub(crate) fn new(
        guests: Guests,
        machines: Vec<Machine>,
        rows: Vec<Row>,
        pairs: Option<u32>,
        started: Instant,
    ) -> Self {
        let cells = vec![vec![Cell::default(); machines.len()]; rows.len()];
        let (troubles, remarks) = (Vec::new(), Vec::new());
        Self { guests, machines, rows, pairs, started, cells, troubles, remarks, worst_clock: 0.0 }
    }

    /// Does them all. What goes wrong is in what [`Self::table`] and [`Self::notes`] say.
    pub(crate) fn run(&mut self) {
        if self.rows.iter().any(|row| row.kind != Kind::Program) {
            self.pairs("boots", BOOTS_TIME, Self::boot);
        }
        if self.rows.iter().any(|row| row.kind == Kind::Program) {
            self.pairs("programs", ALL_TIME, Self::work);
        }
        for (row, cells) in self.rows.iter().zip(&mut self.cells) {
            for (cell, machine) in cells.iter_mut().zip(&self.machines) {
                if cell.seconds.is_empty()
                    && cell.failure.is_none()
                    && (machine.boots() || row.kind == Kind::Program)
                {
                    cell.failure = Some("no run of it counts".to_owned());
                }
            }
        }
    }

    /// Lets the machines take turns at `one`, which is told the pair as text and the machine's index, until `time`.
    fn pairs(&mut self, what: &str, time: Duration, mut one: impl FnMut(&mut Self, &str, usize)) {
        let pairs = self.pairs.unwrap_or(PAIRS);
        let mut longest = Duration::ZERO;
        for pair in 0..pairs {
            let began = self.started.elapsed();
            if self.pairs.is_none() && began + longest > time {
                self.remarks
                    .push(format!("Of {what} there are {pair} pairs only: there was no time for more."));
                return;
            }
            for index in order(pair, self.machines.len()) {
                one(self, &format!("{what}, pair {} of {pairs}", pair + 1), index);
            }
            longest = longest.max(self.started.elapsed().saturating_sub(began));
        }
    }

    fn boot(&mut self, pair: &str, index: usize) {
        let Some(machine) = self.machines.get(index).filter(|machine| machine.boots()).cloned() else {
            return;
        };
        if self.rows_left(index, false).is_empty() {
            return;
        }
        let times = self.guests.times(&machine, BOOT_LIMIT);
        match &times {
            Ok(times) => {
                self.say(pair, &machine, &format!("init {:.3} s, off {:.3} s", times.init, times.power_off))
            }
            Err(error) => self.say(pair, &machine, &format!("failed: {error:#}")),
        }
        for row in self.rows_left(index, false) {
            let result = match &times {
                Ok(times) if row.kind == Kind::Init => Ok(times.init),
                Ok(times) => Ok(times.power_off),
                Err(error) => Err(format!("{error:#}")),
            };
            self.enter(row.name, index, result);
        }
    }

    fn work(&mut self, pair: &str, index: usize) {
        let Some(machine) = self.machines.get(index).cloned() else { return };
        let mut rows: Vec<&str> = self.rows_left(index, true).iter().map(|row| row.name).collect();
        // A guest in which a row hangs, or which dies of it, is booted anew for the others.
        while !rows.is_empty() {
            let mut report = match self.guests.work(&machine, &rows, BOOT_LIMIT) {
                Ok(mut runner) => Report::of(&mut runner, &rows, ROW_LIMIT),
                Err(error) => {
                    self.say(pair, &machine, &format!("failed: {error:#}"));
                    rows.iter().for_each(|row| self.enter(row, index, Err(format!("{error:#}"))));
                    return;
                }
            };
            self.look_at_clock(pair, &machine, &mut report);
            for (row, nanoseconds) in &report.figures {
                self.enter(row, index, Ok(nanoseconds / 1e9));
            }
            for (row, reason) in &report.failures {
                self.say(pair, &machine, &format!("{row} failed: {reason}"));
                self.enter(row, index, Err(reason.clone()));
            }
            let left = report.left();
            rows.retain(|row| left.contains(row));
        }
    }

    /// Takes the figures away if the guest measured them with a clock that is not right.
    fn look_at_clock(&mut self, pair: &str, machine: &Machine, report: &mut Report) {
        // One that died is reported as such.
        let Ok((by_guest, by_host)) = report.clocks() else { return };
        let clocks = format!("{by_guest:.3} s by its clock, {by_host:.3} s by the host's");
        self.say(pair, machine, &format!("{} rows, {clocks}", report.figures.len()));
        if (by_guest - by_host).abs() > by_host * CLOCK_SHARE + CLOCK_SECONDS {
            self.troubles.push(format!(
                "{}, {pair}: not counted, since its clock is not right: {clocks}",
                machine.name
            ));
            report.figures.clear();
        } else {
            self.worst_clock = self.worst_clock.max((by_guest / by_host - 1.0).abs());
        }
    }

    /// Rows that the machine has not failed in: those of programs, or the others.
    fn rows_left(&self, machine: usize, programs: bool) -> Vec<Row> {
        let is_left = |cells: &[Cell]| cells.get(machine).is_some_and(|cell| cell.failure.is_none());
        let rows = self.rows.iter().zip(&self.cells);
        rows.filter(|(row, cells)| (row.kind == Kind::Program) == programs && is_left(cells))
            .map(|(row, _)| *row)
            .collect()
    }

    fn enter(&mut self, row: &str, machine: usize, result: Result<f64, String>) {
        let place = self.rows.iter().position(|known| known.name == row);
        let cell = place.and_then(|place| self.cells.get_mut(place)?.get_mut(machine));
        match (cell, result) {
            (Some(cell), Ok(seconds)) => cell.seconds.push(seconds),
            (Some(cell), Err(reason)) => cell.failure = Some(reason),
            (None, _) => {}
        }
    }

    fn say(&self, pair: &str, machine: &Machine, text: &str) {
        eprintln!("[{:>3} s] {pair}: {}: {text}", self.started.elapsed().as_secs(), machine.name);
    }

    pub(crate) fn release(&self) -> &str {
        self.guests.release()
    }

    pub(crate) fn table(&self, compared_with: &str) -> Table {
        let names: Vec<String> = self.machines.iter().map(|machine| machine.name.clone()).collect();
        let compared_with = names.iter().position(|name| name == compared_with).unwrap_or(0);
        let lines = self.rows.iter().zip(&self.cells).map(|(row, cells)| Line {
            label: format!("{}, {}", row.label, row.unit.symbol()),
            per_second: row.unit.per_second(),
            cells: cells.clone(),
        });
        Table { names, compared_with, lines: lines.collect() }
    }

    /// What failed: of several rows for one reason, once.
    pub(crate) fn failures(&self) -> Vec<String> {
        let mut failures: Vec<(&str, &str, Vec<&str>)> = Vec::new();
        for (row, cells) in self.rows.iter().zip(&self.cells) {
            for (machine, cell) in self.machines.iter().zip(cells) {
                let Some(reason) = &cell.failure else { continue };
                match failures.iter_mut().find(|(name, why, _)| *name == machine.name && why == reason) {
                    Some((_, _, rows)) => rows.push(row.name),
                    None => failures.push((&machine.name, reason, vec![row.name])),
                }
            }
        }
        let told = failures.iter().map(|(name, why, rows)| format!("{name}, {}: {why}", rows.join(", ")));
        told.chain(self.troubles.iter().cloned()).collect()
    }

    /// What else a reader is to know.
    pub(crate) fn remarks(&self) -> Vec<String> {
        let clock = format!(
            "Programs are timed by the guest's clock, which differed from the host's by at most {:.1}%.",
            self.worst_clock * 100.0
        );
        let has_programs = self.rows.iter().any(|row| row.kind == Kind::Program);
        has_programs.then_some(clock).into_iter().chain(self.remarks.iter().cloned()).collect()
    }
}
