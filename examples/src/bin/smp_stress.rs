//! Boots Debian with several vCPUs, again and again, and lets the program `examples/guest/stress` ask the guest's processors
//! for what they owe each other: parallel work, locks, barriers, the order of stores and loads, TLB shootdown, code that
//! another processor writes.
//!
//! The last line is `runs: N failures: M`; the status is 0 if M is.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;

/// The program for the guest, which the build made.
const STRESS: &str = env!("STRESS_GUEST");

/// Boots Debian with several vCPUs and lets them work against each other.
#[derive(Parser)]
struct Options {
    /// How often the machine is booted.
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..))]
    cpus: u32,
    /// How much the guest does in each run.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    rounds: u32,
    /// What runs the guest.
    #[arg(long, default_value = "translate")]
    backend: String,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("smp_stress: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// How many runs failed.
fn run(options: &Options) -> Result<u32> {
    let linux: PathBuf = std::env::current_exe()?.with_file_name("linux");
    ensure!(linux.exists(), "{} is absent: build it with `cargo build --release --bins`", linux.display());
    let (mut failures, mut longest) = (0, Duration::ZERO);
    for run in 1..=options.runs {
        let start = Instant::now();
        let output = Command::new(&linux)
            .args(["--backend", &options.backend, "--cpus", &options.cpus.to_string(), "--seconds", "600"])
            .args(["--add", &format!("{STRESS}:/bin/stress")])
            .args(["--command", &format!("stress {}", options.rounds)])
            .output()
            .with_context(|| format!("starting {}", linux.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let expected = format!("{} processors", options.cpus);
        let is_right = output.status.success()
            && text.lines().last() == Some("stress: ok")
            && text.lines().rev().skip(1).all(|line| line.contains(&expected));
        longest = longest.max(start.elapsed());
        if is_right {
            println!("run {run}: ok, {:.1} s", start.elapsed().as_secs_f64());
        } else {
            failures += 1;
            println!(
                "run {run}: FAILED, {}\n{text}{}",
                output.status,
                String::from_utf8_lossy(&output.stderr)
            );
        }
    }
    println!("longest: {:.1} s", longest.as_secs_f64());
    println!("runs: {} failures: {failures}", options.runs);
    Ok(failures)
}
