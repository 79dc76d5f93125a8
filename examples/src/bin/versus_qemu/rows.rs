//! The rows: what is timed, and in what it is measured.

use anyhow::{Result, bail};

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Row {
    /// As `--rows` takes it; of what programs do, as `examples/guest/workload` calls it.
    pub(crate) name: &'static str,
    /// As the table has it.
    pub(crate) label: &'static str,
    /// What one of it is, as the legend has it.
    pub(crate) what: &'static str,
    pub(crate) unit: Unit,
    pub(crate) kind: Kind,
}

/// Who does what is timed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The whole guest, from the start of the program that runs it to a line of init.
    Init,
    /// The same, to its end.
    PowerOff,
    /// A program.
    Program,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    Seconds,
    Milliseconds,
    Microseconds,
}

impl Unit {
    /// Of it, in a second.
    pub(crate) fn per_second(self) -> f64 {
        match self {
            Self::Seconds => 1.0,
            Self::Milliseconds => 1e3,
            Self::Microseconds => 1e6,
        }
    }

    pub(crate) fn symbol(self) -> &'static str {
        match self {
            Self::Seconds => "s",
            Self::Milliseconds => "ms",
            Self::Microseconds => "us",
        }
    }
}

const fn boot(name: &'static str, label: &'static str, what: &'static str, kind: Kind) -> Row {
    Row { name, label, what, unit: Unit::Seconds, kind }
}

const fn program(name: &'static str, label: &'static str, unit: Unit, what: &'static str) -> Row {
    Row { name, label, what, unit, kind: Kind::Program }
}

/// All of them: the boot, what a program computes, and what it asks of its kernel.
pub(crate) const ROWS: [Row; 17] = {
    use Unit::{Microseconds as Us, Milliseconds as Ms};
    [
        boot("init", "exec to init", "to a line of the first process", Kind::Init),
        boot("power-off", "exec to off", "to power-off", Kind::PowerOff),
        program("alu", "ALU", Us, "1000 steps of 9 integer operations"),
        program("sieve", "sieve", Ms, "of 1 MiB"),
        program("qsort", "qsort", Ms, "100000 u32"),
        program("fib", "fib", Ms, "832039 recursive calls"),
        program("float", "float", Us, "1000 steps with a division and a square root"),
        program("matmul", "matmul", Ms, "256x256 f64"),
        program("memcpy", "memcpy", Us, "1 MiB"),
        program("sha256", "sha256", Us, "64 KiB"),
        program("gzip-KiB", "gzip", Us, "1 KiB through busybox"),
        program("getppid", "getppid", Us, "a system call"),
        program("read+write", "dd bs=1", Us, "a read(2) and a write(2) of a byte"),
        program("pipe-ping-pong", "ping-pong", Us, "a byte to another process and back"),
        program("mmap+touch", "mmap+touch", Us, "a page mapped, touched and unmapped"),
        program("fork+wait", "fork+wait", Us, "a child"),
        program("shell-exec", "shell exec", Ms, "`/bin/busybox true` from a busybox sh"),
    ]
};

/// What one of each row is.
pub(crate) fn legend(rows: &[Row]) -> String {
    let entries: Vec<String> = rows.iter().map(|row| format!("{}: {}", row.label, row.what)).collect();
    format!("{}.", entries.join("; "))
}

/// The rows of these names, in the table's order; all if there are none.
///
/// # Errors
/// Fails on a name that no row has.
pub(crate) fn chosen(names: &[String]) -> Result<Vec<Row>> {
    if let Some(unknown) = names.iter().find(|name| ROWS.iter().all(|row| row.name != **name)) {
        let known: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
        bail!("--rows: no row is named {unknown:?}; there are {}", known.join(", "));
    }
    Ok(ROWS.into_iter().filter(|row| names.is_empty() || names.iter().any(|name| name == row.name)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_legend_is_of_what_is_shown() {
        assert_eq!(legend(&ROWS[3..5]), "sieve: of 1 MiB; qsort: 100000 u32.");
        let mut labels = ROWS.map(|row| row.label);
        labels.sort_unstable();
        assert!(labels.windows(2).all(|pair| pair[0] != pair[1]), "{labels:?}");
    }

    #[test]
    fn rows_are_chosen_by_name_and_keep_their_order() {
        let names = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(chosen(&[]).unwrap(), ROWS);
        let rows = chosen(&names("fib init")).unwrap();
        assert_eq!(rows.iter().map(|row| row.name).collect::<Vec<_>>(), ["init", "fib"]);
        let error = chosen(&names("fib gzip")).unwrap_err().to_string();
        assert!(error.contains("\"gzip\"") && error.contains("gzip-KiB, getppid"), "{error}");
    }
}
