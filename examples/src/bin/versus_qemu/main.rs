//! Every backend that runs on this machine beside QEMU's translator (TCG) on its smallest machine, and beside the machine itself:
//! one table of how long the same kernel boots and the same programs take.
//!
//! All guests are Debian's cloud kernel with one initial RAM disk, 256 MiB and one vCPU, and run by turns. The kernel is told the
//! same, the console and what a paravirtual one needs aside; also TCG's is told the rate of its clock if the host's KVM knows it.
//! Boots are timed from the start of the program that runs the guest to a line of init, and to the program's end; QEMU's microvm does
//! not end on power-off, so there it is the kernel's last line. Programs are `examples/guest/workload`, the same file natively, by the
//! guest's own monotonic clock; a run in which that differs from the host's does not count. Each piece of work is done as often as
//! takes a fifth of a second where it runs. Each has a known result: one that is wrong is a failure.
//!
//! The table informs and decides nothing: the status is 0 unless something failed to run.

mod columns;
mod contest;
mod results;
mod rows;
mod table;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use vmm_examples::debian::Series;
use vmm_examples::race::{Guests, qemu_version};

use crate::columns::{Columns, TCG};
use crate::contest::Contest;
use crate::results::Results;
use crate::rows::{chosen, legend};

/// Characters of a line, below the table.
const WIDTH: usize = 120;

/// Compares every backend that runs here with QEMU's TCG and with the machine itself: boots and programs, in one table.
#[derive(Parser)]
struct Options {
    /// What runs guests beside TCG: `translate`, `kvm`, or `xen-pv/` and an engine as `linux --engine` takes it. All that there are
    /// unless given.
    #[arg(long = "backend", value_delimiter = ',')]
    backends: Vec<String>,
    /// Names of rows; all unless given.
    #[arg(long, value_delimiter = ',')]
    rows: Vec<String>,
    /// How often each of them runs, by turns. Unless given it is 5 times, or as often as takes less than ten minutes.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pairs: Option<u32>,
    /// Which of Debian's kernels.
    #[arg(long, value_enum, default_value_t)]
    series: Series,
}

fn main() -> ExitCode {
    let started = Instant::now();
    let result = run(Options::parse());
    eprintln!("versus_qemu: took {} s", started.elapsed().as_secs());
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("versus_qemu: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether nothing failed.
fn run(options: Options) -> Result<bool> {
    let rows = chosen(&options.rows)?;
    let Columns { machines, left_out } = Columns::chosen(&options.backends)?;
    let guests = Guests::get(options.series)?;
    let legend = legend(&rows);
    let results = Results::new(machines, rows);
    let mut contest = Contest { guests, results, pairs: options.pairs, started: Instant::now() };
    contest.run();
    let Contest { guests, results, .. } = contest;

    println!("{}", results.table(TCG));
    let about = format!(
        "Medians ± half the range, × the median of TCG. Kernel {}; TCG is QEMU {} -M microvm.",
        guests.release(),
        qemu_version().unwrap_or_default()
    );
    let left_out = left_out.iter().map(|(name, reason)| format!("Left out: {name}: {reason}."));
    let failures = results.failures();
    let failed = failures.iter().map(|failure| format!("Failed: {failure}."));
    let notes = [vec![about], results.remarks(), vec![legend]].concat();
    for note in notes.into_iter().chain(left_out).chain(failed) {
        println!("{}", wrapped(&note));
    }
    Ok(failures.is_empty())
}

/// `text` in lines that are not too long, an item of a list.
fn wrapped(text: &str) -> String {
    let (mut wrapped, mut length) = ("-".to_owned(), 1);
    for word in text.split_whitespace() {
        let characters = word.chars().count();
        if length + 1 + characters > WIDTH {
            wrapped.push_str("\n ");
            length = 1;
        }
        wrapped.push(' ');
        wrapped.push_str(word);
        length += 1 + characters;
    }
    wrapped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_wrapped_between_words() {
        let text = "± word".repeat(60);
        let wrapped = wrapped(&text);
        assert!(wrapped.starts_with("- ± word± word"));
        assert!(wrapped.lines().count() > 2);
        assert!(wrapped.lines().all(|line| line.chars().count() <= WIDTH), "{wrapped}");
        assert!(wrapped.lines().skip(1).all(|line| line.starts_with("  ") && !line.starts_with("   ")));
        assert_eq!(wrapped.trim_start_matches("- ").split_whitespace().collect::<Vec<_>>().join(" "), text);
    }
}
