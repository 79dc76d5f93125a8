//! How long Debian's kernel takes to its init on `translate`, beside QEMU's translator (TCG) on its smallest machine.
//!
//! Both boot the same kernel and initial RAM disk, by turns, `--rounds` times; the time is that from starting the process to
//! a line that init prints. The last line is `ratio: N`: the median of ours over the median of QEMU's. It informs and
//! decides nothing. QEMU is Debian's package, installed by apt if it is absent and the user is root.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use vmm_examples::debian::Series;
use vmm_examples::race::{Guests, Machine, QEMU, Spread, by_turns};

/// Time that a boot may take.
const LIMIT: Duration = Duration::from_secs(180);

/// Boots Debian's kernel to its init on `translate` and on QEMU, by turns, and compares.
#[derive(Parser)]
struct Options {
    /// How often each of them boots.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Which of Debian's kernels.
    #[arg(long, value_enum, default_value_t)]
    series: Series,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("boot_times: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let guests = Guests::get(options.series)?;
    let machines = [Machine::tcg("qemu", ""), Machine::ours("translate", &["--backend", "translate"])];
    let times = by_turns(&machines, options.rounds, |round, machine| {
        let time = guests.until_init(machine, "", LIMIT)?.1.as_secs_f64();
        println!("round {round}: {} {time:.3} s", machine.name);
        Ok(time)
    })?;
    let medians: Vec<f64> = times.into_iter().map(|times| Spread::of(times).median).collect();
    let [theirs, ours] = medians[..] else { anyhow::bail!("there are two machines") };
    println!("kernel {}, exec to init, medians of {} rounds", guests.release(), options.rounds);
    println!("translate: {ours:.3} s");
    println!("{QEMU} -M microvm -accel tcg: {theirs:.3} s");
    println!("ratio: {:.2}", ours / theirs);
    Ok(())
}
