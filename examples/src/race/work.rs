//! What `examples/guest/workload` prints, in a guest or natively.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result};

use super::Runner;

/// The most of what is printed besides figures that an error quotes, in bytes.
const LONGEST_REASON: usize = 200;

/// What a run has come to.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Report {
    /// Rows that were asked for and are still to come, in their order.
    left: Vec<String>,
    /// Nanoseconds per operation, by the name of the row.
    pub figures: BTreeMap<String, f64>,
    /// Why a row has no figure.
    pub failures: BTreeMap<String, String>,
    /// Lines since the last row that are none of the workload's.
    talk: String,
    /// The guest's clock and the host's, before the first row and after the last.
    began: Option<(Duration, Duration)>,
    ended: Option<(Duration, Duration)>,
}

impl Report {
    /// Of `rows`, of which nothing is known yet.
    pub fn new(rows: &[&str]) -> Self {
        Self { left: rows.iter().map(|&row| row.to_owned()).collect(), ..Self::default() }
    }

    /// Follows a run until its end. One in which nothing comes of a row for as long as `limit` is given up.
    pub fn of(runner: &mut Runner, rows: &[&str], limit: Duration) -> Self {
        let mut report = Self::new(rows);
        let mut since = runner.elapsed();
        loop {
            runner.allow(since + limit);
            let reason = match runner.line() {
                Ok(Some((at, line))) => {
                    let left = report.left.len();
                    if report.take(at, &line) {
                        return report;
                    }
                    if report.left.len() < left {
                        since = at;
                    }
                    continue;
                }
                Ok(None) => "it ended",
                Err(_) => &format!("nothing came for {} s", limit.as_secs()),
            };
            if !report.left.is_empty() {
                let row = report.left.remove(0);
                report.failures.insert(row, format!("{reason}{}", runner.last_words()));
            }
            return report;
        }
    }

    /// Takes a line that came at `at` of the host's time. Returns whether it is the last.
    pub fn take(&mut self, at: Duration, line: &str) -> bool {
        if let Ok(time) = clock(line) {
            // Init may look at the clock, too, before it begins.
            let before = self.figures.is_empty() && self.failures.is_empty();
            *(if before { &mut self.began } else { &mut self.ended }) = Some((time, at));
            return false;
        }
        let (row, result) = match line.split(' ').collect::<Vec<_>>()[..] {
            [row, operations, nanoseconds] => (row, per_operation(operations, nanoseconds).map(Ok)),
            ["failed", row] => (row, Some(Err(std::mem::take(&mut self.talk)))),
            _ => (line, None),
        };
        let place = self.left.iter().position(|left| left == row);
        if let (Some(place), Some(result)) = (place, result) {
            for lost in self.left.drain(..place) {
                self.failures.insert(lost, "its figure is missing from the output".to_owned());
            }
            let row = self.left.remove(0);
            match result {
                Ok(figure) => drop(self.figures.insert(row, figure)),
                Err(reason) if reason.is_empty() => drop(self.failures.insert(row, "it failed".to_owned())),
                Err(reason) => drop(self.failures.insert(row, reason)),
            }
            self.talk.clear();
            return false;
        }
        if line == "race: end of work" {
            return true;
        }
        self.overhear(line);
        false
    }

    /// Rows of which nothing has come, since the run ended before.
    pub fn left(&self) -> Vec<&str> {
        self.left.iter().map(String::as_str).collect()
    }

    /// Seconds that all rows took, by the guest's clock and by the host's.
    ///
    /// # Errors
    /// Fails if the run ended before its clock could be compared.
    pub fn clocks(&self) -> Result<(f64, f64)> {
        let (began, ended) = self.began.zip(self.ended).context("its clock could not be compared")?;
        let passed = |from: Duration, to: Duration| to.as_secs_f64() - from.as_secs_f64();
        Ok((passed(began.0, ended.0), passed(began.1, ended.1)))
    }

    /// Keeps what may be the reason of a failure.
    fn overhear(&mut self, line: &str) {
        // What Rust's panics add.
        let room = LONGEST_REASON.saturating_sub(self.talk.len());
        if line.is_empty() || line.starts_with("note: ") || room == 0 {
            return;
        }
        if !self.talk.is_empty() {
            self.talk.push(' ');
        }
        self.talk.extend(line.chars().take(room).map(|c| if c.is_control() { ' ' } else { c }));
    }
}

fn per_operation(operations: &str, nanoseconds: &str) -> Option<f64> {
    let operations: u64 = operations.parse().ok().filter(|operations| *operations > 0)?;
    let nanoseconds: u64 = nanoseconds.parse().ok()?;
    Some(nanoseconds as f64 / operations as f64)
}

/// The time in a line `clock NANOSECONDS`.
///
/// # Errors
/// Fails on any other line.
pub fn clock(line: &str) -> Result<Duration> {
    let nanoseconds = line.strip_prefix("clock ").and_then(|text| text.parse().ok());
    Ok(Duration::from_nanos(nanoseconds.with_context(|| format!("the guest's clock says {line:?}"))?))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    const ROWS: [&str; 4] = ["alu", "fib", "fork+wait", "memcpy"];

    /// The lines, a second apart; whether the last of them ends it.
    fn taken(lines: &[&str]) -> (Report, bool) {
        let mut report = Report::new(&ROWS);
        let mut is_end = false;
        for (second, line) in (0..).zip(lines) {
            assert!(!is_end, "the end before {line:?}");
            is_end = report.take(Duration::from_secs(second), line);
        }
        (report, is_end)
    }

    #[test]
    fn figures_are_per_operation_and_clocks_are_compared() {
        let (report, is_end) = taken(&[
            "clock 1000000000",
            "clock 1500000000",
            "alu 100 250",
            "[    9.1] fib 100 200",
            "fib 2 400000000",
            "fork+wait 1000 2000000000",
            "memcpy 4294967295 4294967295",
            "clock 7600000000",
            "race: end of work",
        ]);
        assert!(is_end && report.failures.is_empty() && report.left().is_empty(), "{report:?}");
        let figures = [("alu", 2.5), ("fib", 2e8), ("fork+wait", 2e6), ("memcpy", 1.0)];
        assert_eq!(report.figures, figures.map(|(row, figure)| (row.to_owned(), figure)).into());
        let (by_guest, by_host) = report.clocks().unwrap();
        assert!((by_guest - 6.1).abs() < 1e-9, "{by_guest}");
        assert_eq!(by_host, 6.0);
    }

    #[test]
    fn a_row_that_fails_says_why_and_the_others_go_on() {
        let (report, is_end) = taken(&[
            "clock 1",
            "thread 'main' panicked at examples/guest/workload/compute.rs:1:2:",
            "the sum\u{7}",
            "note: run with `RUST_BACKTRACE=1`",
            "failed alu",
            "failed fib",
            "memcpy 1 7",
            "clock 9",
            "race: end of work",
        ]);
        assert!(is_end && report.left().is_empty());
        let reasons: Vec<(&str, &str)> = report.failures.iter().map(|(a, b)| (&**a, &**b)).collect();
        let panicked = "thread 'main' panicked at examples/guest/workload/compute.rs:1:2: the sum ";
        let missing = "its figure is missing from the output";
        assert_eq!(reasons, [("alu", panicked), ("fib", "it failed"), ("fork+wait", missing)]);
        assert_eq!(report.figures.get("memcpy"), Some(&7.0));
        assert!(report.clocks().is_ok());
    }

    #[test]
    fn what_is_no_figure_is_passed_over() {
        let (report, _) = taken(&[
            "alu 0 5",
            "alu 5",
            "alu 5 -1",
            "alu 1 2 3",
            "alu 99999999999999999999 1",
            "alu x 1",
            "nobody 1 2",
            "failed nobody",
            "clock x",
            &"z".repeat(10_000),
        ]);
        assert_eq!((report.left().as_slice(), report.figures.len()), (&ROWS[..], 0));
        assert!(report.talk.len() <= LONGEST_REASON + 1, "{}", report.talk.len());
        assert!(report.clocks().is_err());
    }

    #[test]
    fn a_run_that_ends_or_hangs_is_given_up_at_that_row() {
        let follow = |line: &str| {
            let mut command = Command::new("sh");
            command.args(["-c", line]);
            let mut runner = Runner::start(command, Duration::from_secs(60)).unwrap();
            let report = Report::of(&mut runner, &ROWS, Duration::from_secs(2));
            assert_eq!(report.figures.get("alu"), Some(&3.0), "{report:?}");
            assert_eq!(report.left(), ["fork+wait", "memcpy"]);
            assert!(report.clocks().is_err());
            report.failures["fib"].clone()
        };
        let reason = follow("echo clock 5; echo alu 1 3; echo 'Kernel panic' >&2");
        assert_eq!(reason, "it ended; its last line: \"Kernel panic\"");
        assert_eq!(
            follow("echo alu 1 3; exec sleep 100"),
            "nothing came for 2 s; its last line: \"alu 1 3\""
        );
    }

    #[test]
    fn the_clock_is_in_nanoseconds() {
        assert_eq!(clock("clock 1500000000").unwrap(), Duration::from_millis(1500));
        for line in ["clock", "clock -1", "a clock 1"] {
            assert!(clock(line).is_err(), "{line}");
        }
    }
}
