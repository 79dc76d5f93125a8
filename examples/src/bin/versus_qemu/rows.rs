//! The rows: what is timed, and in what it is measured.

use anyhow::{Result, bail};

/// A row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Row {
    /// As `--rows` takes it; of what programs do, as `examples/guest/workload` calls it.
    pub(crate) name: &'static str,
    /// As the table has it.
    pub(crate) label: &'static str,
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

const fn row(name: &'static str, label: &'static str, unit: Unit, kind: Kind) -> Row {
    Row { name, label, unit, kind }
}

/// All of them: the boot, what a program computes, and what it asks of its kernel.
pub(crate) const ROWS: [Row; 17] = [
    row("init", "exec to init", Unit::Seconds, Kind::Init),
    row("power-off", "exec to off", Unit::Seconds, Kind::PowerOff),
    row("alu", "ALU, 1000", Unit::Microseconds, Kind::Program),
    row("sieve", "sieve", Unit::Milliseconds, Kind::Program),
    row("qsort", "qsort", Unit::Milliseconds, Kind::Program),
    row("fib", "fib(27)", Unit::Milliseconds, Kind::Program),
    row("float", "sqrt, 1000", Unit::Microseconds, Kind::Program),
    row("matmul", "matmul", Unit::Milliseconds, Kind::Program),
    row("memcpy", "memcpy", Unit::Microseconds, Kind::Program),
    row("sha256", "sha256", Unit::Microseconds, Kind::Program),
    row("gzip-KiB", "gzip, KiB", Unit::Microseconds, Kind::Program),
    row("getppid", "getppid", Unit::Microseconds, Kind::Program),
    row("read+write", "dd bs=1", Unit::Microseconds, Kind::Program),
    row("pipe-ping-pong", "ping-pong", Unit::Microseconds, Kind::Program),
    row("mmap+touch", "mmap+touch", Unit::Microseconds, Kind::Program),
    row("fork+wait", "fork+wait", Unit::Microseconds, Kind::Program),
    row("shell-exec", "shell exec", Unit::Microseconds, Kind::Program),
];

/// What the labels stand for.
pub(crate) const LEGEND: &str = "Times of one: 1000 steps of integer operations in a chain; a sieve of 1 MiB; a quicksort of 100000 \
     u32; 832039 recursive calls; 1000 steps with a division and a square root; a product of two 256x256 matrices of f64; a \
     copy of 1 MiB; a digest of 64 KiB; 1 KiB through busybox gzip; a system call; a read(2) and a write(2) of a byte; a byte to \
     another process and back; a page mapped, touched and unmapped; a child; a busybox sh that runs `/bin/busybox true`.";

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
    fn rows_are_chosen_by_name_and_keep_their_order() {
        let names = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(chosen(&[]).unwrap(), ROWS);
        let rows = chosen(&names("fib init")).unwrap();
        assert_eq!(rows.iter().map(|row| row.name).collect::<Vec<_>>(), ["init", "fib"]);
        let error = chosen(&names("fib gzip")).unwrap_err().to_string();
        assert!(error.contains("\"gzip\"") && error.contains("gzip-KiB, getppid"), "{error}");
    }
}
