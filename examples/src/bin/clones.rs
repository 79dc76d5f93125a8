//! One booted virtual machine, and many clones of it: a guest is booted once and saved, and each clone goes on from there in a process of its
//! own, sharing the pages of the snapshot until it writes them.
//!
//! Each clone says which kernel it runs and draws a random number. The program prints what it took to boot, to save beside writing the same bytes
//! to a file, and to start a clone up to its first instruction; and what memory each clone has for itself while all of them are there.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use vmm_examples::moment::now;

#[derive(Parser)]
struct Options {
    /// What runs the guests.
    #[arg(long, default_value = "translate")]
    backend: String,
    /// How many clones there are.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=4096))]
    clones: u32,
    /// RAM of each in MiB.
    #[arg(long, default_value_t = 256)]
    memory: u64,
}

/// A clone that runs.
struct Clone {
    process: Child,
    output: BufReader<std::process::ChildStdout>,
    /// The random number that it has drawn.
    number: String,
    /// Of the process: what it shares counts in parts, and what it alone has.
    proportional: u64,
    private: u64,
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    let linux = std::env::current_exe()?.with_file_name("linux");
    ensure!(linux.exists(), "{} is not there: build it with `cargo build --bin linux`", linux.display());
    let directory = tempfile::tempdir()?;
    let snapshot = directory.path().join("booted");
    // They wait until all are there.
    let seconds = 5 + options.clones / 5;
    // The kernel's random numbers have begun before, as they have in a machine that has run for a while.
    let line = format!(
        "head -c 1 /dev/urandom >/dev/null; snapshot; uname -r; head -c 16 /dev/urandom | md5sum; sleep {seconds}; exit 7"
    );

    let started = Instant::now();
    let boot = Command::new(&linux)
        .args([
            "--backend",
            &options.backend,
            // It hears of another generation of its machine, and draws other random numbers.
            "--series",
            "6.12",
            "--memory",
            &options.memory.to_string(),
            "--seconds",
            "300",
            "--snapshot-to",
        ])
        .arg(&snapshot)
        .args(["--command", &line])
        .output()?;
    let booted = started.elapsed();
    let said = String::from_utf8_lossy(&boot.stderr);
    ensure!(boot.status.success() && snapshot.exists(), "the guest was not saved: {said}");
    let saved =
        said.split(", in ").nth(1).and_then(|text| text.split_once(" s;")).map(|(seconds, _)| seconds);
    let saved: f64 = saved.context("no time of saving")?.parse()?;
    let (bytes, written) = write_again(&snapshot, &directory.path().join("copy"))?;
    println!(
        "booted and saved in {:.2} s, of which saving {:.1} MiB took {saved:.3} s",
        booted.as_secs_f64(),
        mib(bytes)
    );
    println!("writing the same bytes to a file takes {:.3} s", written.as_secs_f64());

    let mut clones = Vec::new();
    for _ in 0..options.clones {
        clones.push(Clone::start(&linux, &options.backend, &snapshot)?);
    }
    for clone in &mut clones {
        (clone.proportional, clone.private) = memory_of(clone.process.id())?;
    }
    let numbers: BTreeSet<&str> = clones.iter().map(|clone| &*clone.number).collect();
    println!("{} clones run, with {} random numbers", clones.len(), numbers.len());
    let different = numbers.len() == clones.len();
    let median = |mut values: Vec<u64>| {
        values.sort_unstable();
        values.get(values.len() / 2).copied().unwrap_or(0)
    };
    let private = median(clones.iter().map(|clone| clone.private).collect());
    let proportional = median(clones.iter().map(|clone| clone.proportional).collect());
    println!(
        "memory of a clone: {:.1} MiB of its own, {:.1} MiB with its part of what they share (medians)",
        mib(private),
        mib(proportional)
    );
    let begun: Vec<Duration> = clones.into_iter().map(Clone::end).collect::<Result<_>>()?;
    let microseconds = |duration: &Duration| u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    let (first, most) =
        (median(begun.iter().map(microseconds).collect()), begun.iter().max().map_or(0, microseconds));
    println!(
        "from asking for a clone's process to its first instruction: {:.1} ms, at most {:.1} ms",
        first as f64 / 1000.0,
        most as f64 / 1000.0
    );
    if !different {
        println!("some clones have drawn the same random number");
    }
    Ok(if different { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Clone {
    /// Starts one, and waits until it has done its work.
    fn start(linux: &Path, backend: &str, snapshot: &Path) -> Result<Self> {
        let mut process = Command::new(linux)
            .args(["--backend", backend, "--timings", "--wanted-at", &now().as_nanos().to_string()])
            .arg("--restore-from")
            .arg(snapshot)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut output = BufReader::new(process.stdout.take().context("no output")?);
        let (mut kernel, mut number) = (String::new(), String::new());
        output.read_line(&mut kernel)?;
        output.read_line(&mut number)?;
        ensure!(kernel.starts_with("6.") && number.len() > 32, "a clone says {kernel:?} and {number:?}");
        Ok(Self { process, output, number, proportional: 0, private: 0 })
    }

    /// Waits until it ends; how long it took to its first instruction.
    fn end(mut self) -> Result<Duration> {
        self.output.read_to_string(&mut String::new())?;
        let mut said = String::new();
        self.process.stderr.take().context("no errors")?.read_to_string(&mut said)?;
        let status = self.process.wait()?;
        ensure!(status.code() == Some(7), "a clone ended with {status}: {said}");
        let begun =
            said.lines().find_map(|line| line.strip_prefix("first instruction: ")?.strip_suffix(" s"));
        Ok(Duration::from_secs_f64(begun.context("no time of the first instruction")?.parse()?))
    }
}

/// Of a process, in bytes: its proportional set, and what it alone has.
fn memory_of(process: u32) -> Result<(u64, u64)> {
    let path = format!("/proc/{process}/smaps_rollup");
    let text = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    let (mut proportional, mut private) = (0, 0);
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(kib)) = (words.next(), words.next().and_then(|word| word.parse::<u64>().ok()))
        else {
            continue;
        };
        match name {
            "Pss:" => proportional += kib << 10,
            "Private_Clean:" | "Private_Dirty:" => private += kib << 10,
            _ => {}
        }
    }
    Ok((proportional, private))
}

/// Writes what a sparse file has to another one, as plainly as can be: how many bytes, and how long that took.
fn write_again(from: &Path, to: &Path) -> Result<(u64, Duration)> {
    let mut file = File::open(from)?;
    let mut bytes = Vec::new();
    let mut at = 0;
    while let Ok(data) = rustix::fs::seek(&file, rustix::fs::SeekFrom::Data(at)) {
        let hole = rustix::fs::seek(&file, rustix::fs::SeekFrom::Hole(data))?;
        file.seek(SeekFrom::Start(data))?;
        (&file).take(hole - data).read_to_end(&mut bytes)?;
        at = hole;
    }
    let started = Instant::now();
    let mut copy = File::create(to)?;
    copy.write_all(&bytes)?;
    copy.sync_all()?;
    let took = started.elapsed();
    std::fs::remove_file(to)?;
    Ok((bytes.len() as u64, took))
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
