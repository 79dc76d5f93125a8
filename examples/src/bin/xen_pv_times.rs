//! How long a paravirtual Debian takes to its init and to power-off, and with `--workloads` for what programs do, beside
//! QEMU's translator (TCG) on its smallest machine.
//!
//! All run the same kernel and the same initial RAM disk, by turns. Wall times are from the start of the process to a line of the
//! guest's, or to the end of the process; QEMU's microvm does not end on power-off, so there it is the kernel's last line.
//! Times of work are by the guest's own monotonic clock (`examples/guest/workload`), and the host looks
//! whether that clock is right. What is printed informs and decides nothing.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};
use clap::Parser;
use vmm_examples::debian::Series;
use vmm_examples::race::{Guests, Machine, QEMU, Report, Spread, by_turns};

/// What programs do, as `examples/guest/workload` calls it.
const ROWS: [&str; 8] = [
    "fork+exec",
    "fork+wait",
    "getppid",
    "gzip-KiB",
    "mmap+touch",
    "pipe-ping-pong",
    "sha256-KiB",
    "shell-loop",
];

/// Time that a boot may take, and a row.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
const LIMIT: Duration = Duration::from_secs(300);

/// Boots Debian's kernel as a paravirtual guest and on QEMU, by turns, and compares.
#[derive(Parser)]
struct Options {
    /// What executes the guest, as `linux --engine` takes it. Several take turns.
    #[arg(long = "engine", value_delimiter = ',', default_value = "translate")]
    engines: Vec<String>,
    /// How often each of them, and QEMU, boots.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    pairs: u32,
    /// Times what programs do, too.
    #[arg(long)]
    workloads: bool,
    /// Times nothing but what programs do.
    #[arg(long)]
    only_workloads: bool,
    /// The rate of this machine's time-stamp counter in kHz. With it a second QEMU takes part, whose guest is told that rate as a
    /// paravirtual guest is, and need not measure it.
    #[arg(long, value_name = "KHZ")]
    tsc_khz: Option<u32>,
    /// Which of Debian's kernels.
    #[arg(long, value_enum, default_value_t)]
    series: Series,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xen_pv_times: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let guests = Guests::get(options.series)?;
    let qemu = format!("{QEMU} -M microvm -accel tcg");
    let mut machines = vec![Machine::tcg(&qemu, "")];
    if let Some(khz) = options.tsc_khz {
        let append = format!("tsc_early_khz={khz}");
        machines.push(Machine::tcg(&format!("{qemu}, {append}"), &append));
    }
    machines.extend(options.engines.iter().map(|engine| {
        Machine::ours(&format!("xen-pv, engine {engine}"), &["--backend", "xen-pv", "--engine", engine])
    }));
    println!("kernel {}, {} pairs; median (least to most)", guests.release(), options.pairs);
    if !options.only_workloads {
        boots(&guests, &machines, options.pairs)?;
    }
    if options.workloads || options.only_workloads {
        work(&guests, &machines, options.pairs)?;
    }
    Ok(())
}

fn boots(guests: &Guests, machines: &[Machine], pairs: u32) -> Result<()> {
    let results = by_turns(machines, pairs, |pair, machine| {
        let times = guests.times(machine, BOOT_LIMIT)?;
        println!(
            "pair {pair}: {}: init {:.3} s, by the guest's clock {:.3} s, power-off {:.3} s",
            machine.name, times.init, times.init_by_guest, times.power_off
        );
        Ok([times.init, times.init_by_guest, times.power_off])
    })?;
    let columns = ["exec to init, wall", "init by the guest's clock", "exec to power-off, wall"];
    for (index, what) in columns.into_iter().enumerate() {
        let of = |times: &[f64; 3]| times.get(index).copied().unwrap_or(f64::NAN);
        let spreads: Vec<Spread> =
            results.iter().map(|times| Spread::of(times.iter().map(of).collect())).collect();
        println!("{what}:");
        table(machines, &spreads, "s", 1.0);
    }
    Ok(())
}

/// A line for each machine, with the ratio to QEMU's median.
fn table(machines: &[Machine], spreads: &[Spread], unit: &str, scale: f64) {
    let theirs = spreads.first().map_or(0.0, |spread| spread.median);
    for (machine, spread) in machines.iter().zip(spreads) {
        let [median, least, most] = [spread.median, spread.least, spread.most].map(|value| value / scale);
        let name = &machine.name;
        let ratio = spread.median / theirs;
        println!("  {name:<64} {median:>10.3} {unit} ({least:.3} to {most:.3}), ratio {ratio:.2}");
    }
}

fn work(guests: &Guests, machines: &[Machine], pairs: u32) -> Result<()> {
    let results = by_turns(machines, pairs, |pair, machine| {
        let report = Report::of(&mut guests.work(machine, &ROWS, BOOT_LIMIT)?, &ROWS, LIMIT);
        if let Some((row, reason)) = report.failures.first_key_value() {
            bail!("{row}: {reason}");
        }
        let (by_guest, by_host) = report.clocks()?;
        println!(
            "pair {pair}: {}: all work took {by_guest:.3} s by the guest's clock, {by_host:.3} s by the host's",
            machine.name
        );
        Ok(report.figures)
    })?;
    for row in ROWS {
        let of = |figures: &BTreeMap<String, f64>| figures.get(row).copied().unwrap_or(f64::NAN);
        let spreads: Vec<Spread> =
            results.iter().map(|figures| Spread::of(figures.iter().map(of).collect())).collect();
        println!("{row}, time of one by the guest's clock:");
        table(machines, &spreads, "us", 1000.0);
    }
    Ok(())
}
