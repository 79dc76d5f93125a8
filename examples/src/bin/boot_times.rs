//! How long Debian's kernel takes to its init on `translate`, beside QEMU's translator (TCG) on its smallest machine.
//!
//! Both boot the same kernel and initial RAM disk, by turns, `--rounds` times; the time is that from starting the process to
//! a line that init prints. The last line is `ratio: N`: the median of ours over the median of QEMU's. It informs and
//! decides nothing. QEMU is Debian's package, installed by apt if it is absent and the user is root.

use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use vmm_examples::debian::{self, Series};
use vmm_examples::initramfs::Archive;
use vmm_examples::race::{QEMU, Runner, Spread, install_qemu, microvm};
use vmm_examples::trial::linux;

const MARK: &str = "boot_times: init";

/// Time that a boot may take.
const LIMIT: Duration = Duration::from_secs(600);

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
    let kernel = debian::kernel(options.series)?;
    install_qemu()?;
    let directory = tempfile::tempdir()?;
    let initrd = directory.path().join("initrd");
    std::fs::write(&initrd, archive()?).context("writing the initial RAM disk")?;

    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for round in 1..=options.rounds {
        // Take turns also in who is first.
        let order: [bool; 2] = if round % 2 == 0 { [true, false] } else { [false, true] };
        for is_ours in order {
            if is_ours {
                ours.push(until_init(&mut translate(&kernel.image, &initrd)?)?);
            } else {
                theirs.push(until_init(&mut microvm(&kernel.image, &initrd, "quiet"))?);
            }
        }
        let last = |times: &[f64]| times.last().copied().unwrap_or_default();
        println!("round {round}: translate {:.3} s, qemu {:.3} s", last(&ours), last(&theirs));
    }
    let (ours, theirs) = (Spread::of(ours).median, Spread::of(theirs).median);
    println!("kernel {}, exec to init, medians of {} rounds", kernel.release, options.rounds);
    println!("translate: {ours:.3} s");
    println!("{QEMU} -M microvm -accel tcg: {theirs:.3} s");
    println!("ratio: {:.2}", ours / theirs);
    Ok(())
}

/// Busybox, and an init that says so and waits to be killed.
fn archive() -> Result<Vec<u8>> {
    let mut archive = Archive::new();
    for directory in ["bin", "dev"] {
        archive.directory(directory, 0o755)?;
    }
    archive.device("dev/console", 0o600, 5, 1)?;
    archive.file("bin/busybox", 0o755, std::fs::read(debian::busybox()?)?)?;
    let init = format!("#!/bin/busybox sh\necho {MARK}\nexec /bin/busybox sleep 1000\n");
    archive.file("init", 0o755, init.into_bytes())?;
    archive.to_bytes()
}

fn translate(kernel: &Path, initrd: &Path) -> Result<Command> {
    let mut command = Command::new(linux()?);
    command.args(["--backend", "translate", "--append", "quiet", "--kernel"]).arg(kernel);
    command.arg("--initrd").arg(initrd);
    Ok(command)
}

/// Starts `command` and waits until its guest's init says that it runs.
fn until_init(command: &mut Command) -> Result<f64> {
    Ok(Runner::start(command, LIMIT)?.until(MARK)?.0.as_secs_f64())
}
