//! How long Debian's kernel takes to its init on `translate`, beside QEMU's translator (TCG) on its smallest machine.
//!
//! Both boot the same kernel and initial RAM disk, by turns, `--rounds` times; the time is that from starting the process to
//! a line that init prints. The last line is `ratio: N`: the median of ours over the median of QEMU's. It informs and
//! decides nothing. QEMU is Debian's package, installed by apt if it is absent and the user is root.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use vmm_examples::debian::{self, Series};
use vmm_examples::initramfs::Archive;

const MARK: &str = "boot_times: init";

const QEMU: &str = "qemu-system-x86_64";

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
                theirs.push(until_init(&mut qemu(&kernel.image, &initrd))?);
            }
        }
        let last = |times: &[Duration]| times.last().map_or(0.0, Duration::as_secs_f64);
        println!("round {round}: translate {:.3} s, qemu {:.3} s", last(&ours), last(&theirs));
    }
    let (ours, theirs) = (median(ours), median(theirs));
    println!("kernel {}, exec to init, medians of {} rounds", kernel.release, options.rounds);
    println!("translate: {ours:.3} s");
    println!("{QEMU} -M microvm -accel tcg: {theirs:.3} s");
    println!("ratio: {:.2}", ours / theirs);
    Ok(())
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times.get(times.len() / 2).map_or(0.0, Duration::as_secs_f64)
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

/// The program `linux` that was built with this one.
fn translate(kernel: &Path, initrd: &Path) -> Result<Command> {
    let program: PathBuf = std::env::current_exe()?.with_file_name("linux");
    ensure!(
        program.exists(),
        "{} is absent: build it with `cargo build --release --bins`",
        program.display()
    );
    let mut command = Command::new(program);
    command.args(["--backend", "translate", "--append", "quiet", "--kernel"]).arg(kernel);
    command.arg("--initrd").arg(initrd);
    Ok(command)
}

fn qemu(kernel: &Path, initrd: &Path) -> Command {
    let mut command = Command::new(QEMU);
    command.args(["-M", "microvm", "-accel", "tcg", "-m", "256", "-no-reboot", "-display", "none"]);
    command.args(["-monitor", "none", "-serial", "stdio", "-kernel"]).arg(kernel).arg("-initrd").arg(initrd);
    command.args(["-append", "console=ttyS0 earlyprintk=serial,ttyS0 panic=-1 quiet"]);
    command
}

/// Starts `command` and waits until its guest's init says that it runs.
fn until_init(command: &mut Command) -> Result<Duration> {
    let started = Instant::now();
    let child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn();
    let name = command.get_program().display().to_string();
    let mut child = Killed(child.with_context(|| format!("starting {name}"))?);
    let output = child.0.stdout.take().context("a pipe")?;
    for line in BufReader::new(output).split(b'\n') {
        if String::from_utf8_lossy(&line?).contains(MARK) {
            return Ok(started.elapsed());
        }
    }
    bail!("{name} ended before its guest's init began")
}

/// A child that does not outlive this.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        if let Err(error) = self.0.kill().and_then(|()| self.0.wait().map(|_| ())) {
            eprintln!("boot_times: {error}");
        }
    }
}

fn install_qemu() -> Result<()> {
    let present = || Command::new(QEMU).arg("--version").stdout(Stdio::null()).status().is_ok();
    if present() {
        return Ok(());
    }
    eprintln!("boot_times: installing qemu-system-x86 (about 100 MB with what it needs)");
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").stdout(Stdio::null()).status()
    };
    let installed = apt(&["-q", "update"])
        .and_then(|_| apt(&["-qy", "install", "--no-install-recommends", "qemu-system-x86"]));
    ensure!(
        installed.is_ok_and(|status| status.success()) && present(),
        "{QEMU} is absent and cannot be installed here; install Debian's package qemu-system-x86"
    );
    Ok(())
}
