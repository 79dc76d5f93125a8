//! What the runs have come to.

use vmm_examples::race::{BootTimes, Machine, Report};

use crate::rows::{Kind, Row};
use crate::table::{Cell, Line, Table};

/// By how much of the time, and by how many seconds besides, a guest's clock may differ from the host's. The host may be late
/// to look.
const CLOCK_SHARE: f64 = 0.02;
const CLOCK_SECONDS: f64 = 0.5;

/// All figures so far, and what went wrong.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Results {
    machines: Vec<Machine>,
    rows: Vec<Row>,
    /// By row, and there by machine.
    cells: Vec<Vec<Cell>>,
    /// What went wrong that is no cell's own.
    troubles: Vec<String>,
    /// What else a reader is to know.
    remarks: Vec<String>,
    /// The largest share by which a guest's clock differed from the host's.
    worst_clock: Option<f64>,
}

impl Results {
    /// Of these machines and rows, of which nothing is known yet.
    pub(crate) fn new(machines: Vec<Machine>, rows: Vec<Row>) -> Self {
        let cells = vec![vec![Cell::default(); machines.len()]; rows.len()];
        Self { machines, rows, cells, troubles: Vec::new(), remarks: Vec::new(), worst_clock: None }
    }

    pub(crate) fn machines(&self) -> &[Machine] {
        &self.machines
    }

    /// Whether some row is of programs, or of boots.
    pub(crate) fn has(&self, programs: bool) -> bool {
        self.rows.iter().any(|row| (row.kind == Kind::Program) == programs)
    }

    /// Rows that a machine is still to run: those of programs, or those of boots. One that failed is not tried again.
    pub(crate) fn rows_left(&self, machine: usize, programs: bool) -> Vec<&'static str> {
        let is_left = |cells: &[Cell]| cells.get(machine).is_some_and(|cell| cell.failure.is_none());
        let boots = self.machines.get(machine).is_some_and(Machine::boots);
        let rows = self.rows.iter().zip(&self.cells).filter(|(row, cells)| {
            (row.kind == Kind::Program) == programs && (programs || boots) && is_left(cells)
        });
        rows.map(|(row, _)| row.name).collect()
    }

    /// Enters what came of a boot.
    pub(crate) fn boot(&mut self, machine: usize, times: &Result<BootTimes, String>) {
        for name in self.rows_left(machine, false) {
            let of = |times: &BootTimes| if name == "init" { times.init } else { times.power_off };
            self.enter(name, machine, times.as_ref().map(of).map_err(String::clone));
        }
    }

    /// Enters what came of programs. Figures by a clock that is not right do not count.
    pub(crate) fn programs(&mut self, machine: usize, pair: &str, report: &Report) {
        let mut counts = true;
        // One that ended early has no clock to look at, and is reported as such.
        if let Ok((by_guest, by_host)) = report.clocks() {
            counts = (by_guest - by_host).abs() <= by_host * CLOCK_SHARE + CLOCK_SECONDS;
            if counts {
                let worst = self.worst_clock.unwrap_or(0.0).max((by_guest / by_host - 1.0).abs());
                self.worst_clock = Some(worst);
            } else {
                let name = self.machines.get(machine).map(|machine| &*machine.name).unwrap_or_default();
                self.troubles.push(format!(
                    "{name}, {pair}: it does not count, since its clock went {by_guest:.3} s in {by_host:.3} s of the host's"
                ));
            }
        }
        for (row, nanoseconds) in report.figures.iter().filter(|_| counts) {
            self.enter(row, machine, Ok(nanoseconds / 1e9));
        }
        for (row, reason) in &report.failures {
            self.enter(row, machine, Err(reason.clone()));
        }
    }

    /// Enters why none of these rows can be run.
    pub(crate) fn failed(&mut self, machine: usize, rows: &[&str], reason: &str) {
        rows.iter().for_each(|row| self.enter(row, machine, Err(reason.to_owned())));
    }

    /// Enters what else a reader is to know.
    pub(crate) fn remark(&mut self, remark: String) {
        self.remarks.push(remark);
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

    /// Says of what has neither a figure nor a failure that no run of it counted.
    pub(crate) fn finish(&mut self) {
        for machine in 0..self.machines.len() {
            for programs in [false, true] {
                for name in self.rows_left(machine, programs) {
                    let is_empty = |(row, cells): (&Row, &Vec<Cell>)| {
                        row.name == name && cells.get(machine).is_some_and(|cell| cell.seconds.is_empty())
                    };
                    if self.rows.iter().zip(&self.cells).any(is_empty) {
                        self.failed(machine, &[name], "no run of it counts");
                    }
                }
            }
        }
    }

    /// The table, in which machines behind that of this name are compared with it.
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
        let clock = self.worst_clock.map(|share| {
            let percent = share * 100.0;
            format!("Programs are timed by the guest's clock, which differed from the host's by at most {percent:.2}%.")
        });
        clock.into_iter().chain(self.remarks.iter().cloned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::rows::chosen;

    fn results() -> Results {
        let machines = vec![Machine::native("native"), Machine::tcg("TCG", ""), Machine::ours("ours", &[])];
        Results::new(machines, chosen(&["init", "power-off", "fib", "alu"].map(str::to_owned)).unwrap())
    }

    /// A run in which the guest's clock goes `by_guest` seconds in 10 of the host's.
    fn report(by_guest: u64) -> Report {
        let mut report = Report::new(&["alu", "fib"]);
        let lines =
            ["clock 0", "alu 2 6000", "fib 1 7000000", &format!("clock {}", by_guest * 1_000_000_000)];
        for (line, second) in lines.into_iter().zip([0, 3, 9, 10]) {
            report.take(Duration::from_secs(second), line);
        }
        report
    }

    fn rendered(results: &Results) -> Vec<String> {
        results.table("TCG").to_string().lines().skip(2).map(str::to_owned).collect()
    }

    #[test]
    fn every_figure_has_its_place() {
        let mut results = results();
        for (machine, init) in [(1, 2.0), (2, 4.0)] {
            let times = BootTimes { init, init_by_guest: 1.0, power_off: init + 1.0 };
            results.boot(machine, &Ok(times));
            results.programs(machine, "pair 1", &report(10));
        }
        results.programs(0, "pair 1", &report(10));
        results.finish();
        assert_eq!(results.failures(), Vec::<String>::new());
        assert_eq!(
            rendered(&results),
            [
                "| exec to init, s |        | 2.00 | 4.00 ×2.00 |",
                "| exec to off, s  |        | 3.00 | 5.00 ×1.67 |",
                "| ALU, us         |   3.00 | 3.00 | 3.00 ×1.00 |",
                "| fib, ms         |   7.00 | 7.00 | 7.00 ×1.00 |",
            ]
        );
    }

    #[test]
    fn what_failed_is_not_tried_again_and_says_why() {
        let mut results = results();
        assert_eq!(results.rows_left(0, false), Vec::<&str>::new());
        assert_eq!(results.rows_left(2, false), ["init", "power-off"]);
        results.boot(2, &Err("it hung".to_owned()));
        assert_eq!(results.rows_left(2, false), Vec::<&str>::new());
        assert_eq!(results.rows_left(2, true), ["alu", "fib"]);

        let mut report = report(10);
        report.figures.remove("alu");
        report.failures.insert("alu".to_owned(), "the sum".to_owned());
        results.programs(2, "pair 1", &report);
        assert_eq!(results.rows_left(2, true), ["fib"]);
        let failures = results.failures();
        assert_eq!(failures, ["ours, init, power-off: it hung", "ours, alu: the sum"]);
        let lines = rendered(&results);
        assert!(lines[0].ends_with("|    - |") && lines[3].ends_with("| 7.00 |"), "{lines:?}");
    }

    #[test]
    fn a_wrong_clock_does_not_count() {
        let mut results = results();
        results.programs(1, "pair 1", &report(9));
        assert_eq!((results.failures().len(), results.remarks().len()), (1, 0));
        assert!(results.failures()[0].contains("pair 1: it does not count"), "{:?}", results.failures());
        results.programs(2, "pair 1", &report(10));
        assert_eq!(results.remarks().len(), 1);
        results.finish();
        assert!(
            results.failures().contains(&"TCG, init, power-off, alu, fib: no run of it counts".to_owned())
        );
        assert!(!results.failures().iter().any(|failure| failure.contains("ours, alu")));
    }
}
