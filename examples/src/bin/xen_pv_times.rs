//! How long a paravirtual Debian takes to its init and to power-off, and with `--workloads` for what programs do, beside
//! QEMU's translator (TCG) on its smallest machine.
//!
//! All run the same kernel and the same initial RAM disk, by turns. Wall times are from the start of the process to a line of the
//! guest's, or to the end of the process; QEMU's microvm does not end on power-off, so there it is the kernel's last line.
//! Times of work are by the guest's own monotonic clock (`examples/guest/workload`), and the host looks
//! whether that clock is right. What is printed informs and decides nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use vmm_examples::debian::{self, Series};
use vmm_examples::initramfs::Archive;
use vmm_examples::race::{QEMU, Runner, Spread, install_qemu, microvm};
use vmm_examples::trial::linux;

/// The program for the guest, which the build made.
const WORKLOAD: &str = env!("WORKLOAD_GUEST");

/// The guest's first process. The kernel puts `times=work` of its command line into the environment.
const INIT: &str = "#!/bin/busybox sh
echo 'times: init'
/bin/workload clock
if [ \"$times\" = work ]; then
    /bin/busybox mount -t proc proc /proc
    /bin/workload clock
    /bin/workload time
    /bin/workload clock
    echo 'times: end of work'
fi
exec /bin/busybox poweroff -f
";

/// What the kernel says when it can do no more.
const LAST_LINE: &str = "reboot: Power down";

/// Time that a boot may take, and all of a run.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
const LIMIT: Duration = Duration::from_secs(1800);

/// On a busy host the guest on QEMU may fail to measure the rate of its clock, and hang; it is booted again so often.
const ATTEMPTS: u32 = 5;

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
    let kernel = debian::kernel(options.series)?;
    install_qemu()?;
    let directory = tempfile::tempdir()?;
    let initrd = directory.path().join("initrd");
    std::fs::write(&initrd, archive()?).context("writing the initial RAM disk")?;

    let qemu = || format!("{QEMU} -M microvm -accel tcg");
    let mut machines = vec![Machine { name: qemu(), engine: None, append: String::new() }];
    if let Some(khz) = options.tsc_khz {
        let append = format!("tsc_early_khz={khz}");
        machines.push(Machine { name: format!("{}, {append}", qemu()), engine: None, append });
    }
    machines.extend(options.engines.iter().map(|engine| Machine {
        name: format!("xen-pv, engine {engine}"),
        engine: Some(engine.clone()),
        append: String::new(),
    }));
    let race = Race { machines, linux: linux()?, kernel: kernel.image.clone(), initrd };
    println!("kernel {}, {} pairs; median (least to most)", kernel.release, options.pairs);
    if !options.only_workloads {
        race.boots(options.pairs)?;
    }
    if options.workloads || options.only_workloads {
        race.work(options.pairs)?;
    }
    Ok(())
}

/// Busybox, the workload and init.
fn archive() -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for directory in ["bin", "dev", "proc", "tmp"] {
        archive.directory(directory, 0o755)?;
    }
    archive.device("dev/console", 0o600, 5, 1)?;
    archive.device("dev/null", 0o666, 1, 3)?;
    archive.file("bin/busybox", 0o755, std::fs::read(debian::busybox()?)?)?;
    archive.file("bin/workload", 0o755, std::fs::read(WORKLOAD).with_context(|| WORKLOAD)?)?;
    archive.file("init", 0o755, INIT.as_bytes().to_vec())?;
    archive.to_bytes()
}

/// What runs the guest: QEMU, or this library with an engine.
struct Machine {
    name: String,
    engine: Option<String>,
    /// Added to the kernel's command line.
    append: String,
}

/// Times of one boot, in seconds.
#[derive(Clone, Copy)]
struct BootTimes {
    init: f64,
    init_by_guest: f64,
    power_off: f64,
}

/// Nanoseconds per operation, by the name of the work.
type WorkTimes = BTreeMap<String, f64>;

struct Race {
    machines: Vec<Machine>,
    linux: PathBuf,
    kernel: PathBuf,
    initrd: PathBuf,
}

impl Race {
    fn command(&self, machine: &Machine, append: &str) -> Command {
        let append = &format!("quiet {append} {}", machine.append);
        let Some(engine) = &machine.engine else { return microvm(&self.kernel, &self.initrd, append) };
        let mut command = Command::new(&self.linux);
        let files: [(&str, &Path); 2] = [("--kernel", &self.kernel), ("--initrd", &self.initrd)];
        command.args(["--backend", "xen-pv", "--engine", engine, "--append", append]);
        for (option, path) in files {
            command.arg(option).arg(path);
        }
        command
    }

    /// Does `one` for each machine, `pairs` times by turns; each turn begins with another machine. The results by machine.
    fn by_turns<T>(
        &self,
        pairs: u32,
        mut one: impl FnMut(u32, &Machine) -> Result<T>,
    ) -> Result<Vec<Vec<T>>> {
        let mut results: Vec<Vec<T>> = self.machines.iter().map(|_| Vec::new()).collect();
        for pair in 0..pairs {
            let count = self.machines.len();
            for turn in 0..count {
                let index = (turn + usize::try_from(pair)?) % count;
                if let (Some(machine), Some(results)) = (self.machines.get(index), results.get_mut(index)) {
                    results.push(one(pair + 1, machine).with_context(|| machine.name.clone())?);
                }
            }
        }
        Ok(results)
    }

    fn boots(&self, pairs: u32) -> Result<()> {
        let results = self.by_turns(pairs, |pair, machine| {
            let times = self.boot(machine)?;
            println!(
                "pair {pair}: {}: init {:.3} s, by the guest's clock {:.3} s, power-off {:.3} s",
                machine.name, times.init, times.init_by_guest, times.power_off
            );
            Ok(times)
        })?;
        type Column = (&'static str, fn(&BootTimes) -> f64);
        let columns: [Column; 3] = [
            ("exec to init, wall", |times| times.init),
            ("init by the guest's clock", |times| times.init_by_guest),
            ("exec to power-off, wall", |times| times.power_off),
        ];
        for (what, column) in columns {
            let spreads: Vec<Spread> =
                results.iter().map(|times| Spread::of(times.iter().map(column).collect())).collect();
            println!("{what}:");
            self.table(&spreads, "s", 1.0);
        }
        Ok(())
    }

    /// A line for each machine, with the ratio to QEMU's median.
    fn table(&self, spreads: &[Spread], unit: &str, scale: f64) {
        let theirs = spreads.first().map_or(0.0, |spread| spread.median);
        for (machine, spread) in self.machines.iter().zip(spreads) {
            let [median, least, most] = [spread.median, spread.least, spread.most].map(|value| value / scale);
            let name = &machine.name;
            let ratio = spread.median / theirs;
            println!("  {name:<64} {median:>10.3} {unit} ({least:.3} to {most:.3}), ratio {ratio:.2}");
        }
    }

    /// Boots until init says that it runs; when that was.
    fn until_init(&self, machine: &Machine, append: &str) -> Result<(Runner, Duration)> {
        let mut left = if machine.engine.is_some() { 1 } else { ATTEMPTS };
        loop {
            let mut runner = Runner::start(&mut self.command(machine, append), BOOT_LIMIT)?;
            left -= 1;
            match runner.until("times: init") {
                Ok((time, _)) => {
                    runner.allow(LIMIT);
                    return Ok((runner, time));
                }
                Err(error) if left > 0 => println!("not counted: {error:#}"),
                Err(error) => return Err(error),
            }
        }
    }

    fn boot(&self, machine: &Machine) -> Result<BootTimes> {
        let (mut runner, init) = self.until_init(machine, "")?;
        let init_by_guest = clock(&runner.until("clock ")?.1)?;
        let power_off = if machine.engine.is_some() {
            let (time, status) = runner.end()?;
            ensure!(status.success(), "it ended with {status}");
            time
        } else {
            runner.until(LAST_LINE)?.0
        };
        let init = init.as_secs_f64();
        Ok(BootTimes { init, init_by_guest, power_off: power_off.as_secs_f64() })
    }

    fn work(&self, pairs: u32) -> Result<()> {
        let results = self.by_turns(pairs, |pair, machine| {
            let (times, by_guest, by_host) = self.work_once(machine)?;
            println!(
                "pair {pair}: {}: all work took {by_guest:.3} s by the guest's clock, {by_host:.3} s by the host's",
                machine.name
            );
            Ok(times)
        })?;
        let names = results.iter().flatten().next().map(|times| times.keys().cloned().collect::<Vec<_>>());
        for name in names.unwrap_or_default() {
            let of = |times: &WorkTimes| times.get(&name).copied().unwrap_or(f64::NAN);
            let spreads: Vec<Spread> =
                results.iter().map(|times| Spread::of(times.iter().map(of).collect())).collect();
            println!("{name}, time of one by the guest's clock:");
            self.table(&spreads, "us", 1000.0);
        }
        Ok(())
    }

    /// Times of the work, and how long all of it took by the guest's clock and by the host's.
    fn work_once(&self, machine: &Machine) -> Result<(WorkTimes, f64, f64)> {
        let (mut runner, _) = self.until_init(machine, "times=work")?;
        runner.until("clock ")?;
        let (began, line) = runner.until("clock ")?;
        let guest_began = clock(&line)?;
        let mut times = WorkTimes::new();
        loop {
            let (at, line) = runner.line()?.context("the guest ended amid its work")?;
            if line.starts_with("clock ") {
                runner.until("times: end of work")?;
                return Ok((times, clock(&line)? - guest_began, (at - began).as_secs_f64()));
            }
            if let [name, operations, nanoseconds] = line.split(' ').collect::<Vec<_>>()[..]
                && let (Ok(operations), Ok(nanoseconds)) =
                    (operations.parse::<f64>(), nanoseconds.parse::<f64>())
            {
                times.insert(name.to_owned(), nanoseconds / operations);
            }
        }
    }
}

/// Seconds of a line `clock NANOSECONDS`.
fn clock(line: &str) -> Result<f64> {
    let nanoseconds = line.strip_prefix("clock ").and_then(|text| text.parse::<f64>().ok());
    Ok(nanoseconds.with_context(|| format!("the guest's clock says {line:?}"))? / 1e9)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_clock_is_in_nanoseconds() {
        assert_eq!(clock("clock 1500000000").unwrap(), 1.5);
        assert!(clock("clock").is_err());
    }
}
