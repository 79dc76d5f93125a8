//! Saves a guest again and again at random moments, each time into a fresh process, and looks whether it computes the same.
//!
//! The guest computes a running digest over its memory and, with `--disk`, over a disk (`examples/guest/digest`). `linux` runs it, saves it after a
//! random time, and ends; another `linux` goes on from there. What the guest prints in the end has to be what the same program prints on
//! this machine. The program counts what the machine was in the middle of when it was saved.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::process::{Command, ExitCode, Output};
use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Parser;
use vmm_examples::moment::{Moment, SAVED};

/// The program for the guest, which the build made.
const DIGEST: &str = env!("DIGEST_GUEST");

/// Bytes of a disk.
const DISK: usize = 4 << 20;

#[derive(Parser)]
struct Options {
    /// What runs the guest: backends by turns, of which each goes on from what the one before has saved.
    #[arg(long, value_delimiter = ',', default_value = "translate")]
    backend: Vec<String>,
    /// How often it is saved.
    #[arg(long, default_value_t = 100)]
    saves: u32,
    /// vCPUs.
    #[arg(long, default_value_t = 2)]
    cpus: u32,
    /// Milliseconds that it runs at most before it is saved.
    #[arg(long, default_value_t = 250, value_parser = clap::value_parser!(u64).range(20..))]
    longest: u64,
    /// Gives it a disk to compute over as well, on that transport.
    #[arg(long, value_name = "mmio|pci")]
    disk: Option<String>,
    /// How many requests a second that disk serves at most, 0 for as many as it can. One for which it is too early waits, and is saved with
    /// the disk.
    #[arg(long, value_name = "N", default_value_t = 200)]
    iops: u64,
    /// After each save of the whole machine, saves that many times just what has changed since the one before.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=63))]
    incremental: u32,
    /// Rounds that the guest computes; unless given, as many as take it as long as the runs, as far as can be foreseen.
    #[arg(long)]
    rounds: Option<u64>,
    /// Where the random numbers begin.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Further arguments of `linux`, of those that it is given each time.
    #[arg(last = true)]
    arguments: Vec<String>,
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    let linux = std::env::current_exe()?.with_file_name("linux");
    ensure!(linux.exists(), "{} is not there: build it with `cargo build --bin linux`", linux.display());
    let directory = tempfile::tempdir()?;
    let soak = Soak { options, linux, directory: directory.path().to_owned() };
    soak.run()
}

struct Soak {
    options: Options,
    linux: PathBuf,
    directory: PathBuf,
}

impl Soak {
    fn run(&self) -> Result<ExitCode> {
        let options = &self.options;
        let mut random = fastrand::Rng::with_seed(options.seed);
        let threads = options.cpus.to_string();
        // On this machine a round takes a quarter of a millisecond; in a guest, whose vCPUs share what there is, more.
        let rounds = options.rounds.unwrap_or(2000 + 2 * u64::from(options.saves) * options.longest);
        // A copy for this machine, and the guest's; what is in them is the same.
        let (here, there) = (self.directory.join("disk-here"), self.directory.join("disk"));
        for path in [&here, &there] {
            std::fs::write(path, (0..DISK).map(|at| (at / 7).to_le_bytes()[0]).collect::<Vec<_>>())?;
        }
        let mut native = Command::new(DIGEST);
        native.args([&rounds.to_string(), &threads]);
        let mut devices = Vec::new();
        if let Some(transport) = &options.disk {
            native.arg(&here);
            let mut disk = there.as_os_str().to_owned();
            if options.iops > 0 {
                disk.push(format!(",iops={}", options.iops));
            }
            devices.extend(["--transport".into(), transport.into(), "--disk".into(), disk]);
        }
        let native = native.output()?;
        ensure!(native.status.success(), "digest: {}", String::from_utf8_lossy(&native.stderr));
        let expected = native.stdout;
        println!(
            "{rounds} rounds, {} on this machine",
            String::from_utf8_lossy(&expected).trim().replace('\n', " ")
        );

        let mut found = BTreeMap::new();
        let (mut output, mut runs) = (Vec::new(), 0);
        let (mut whole, mut increments) = (Figures::default(), Figures::default());
        // The snapshot to go on from, behind those that it is based on.
        let mut chain: Vec<PathBuf> = Vec::new();
        let started = Instant::now();
        // The first one boots and is saved when the guest asks for it, the last one ends.
        loop {
            let backend = options.backend.get(runs as usize % options.backend.len()).context("no backend")?;
            let to = self.directory.join(runs.to_string());
            let is_increment = (1..=options.incremental as usize).contains(&chain.len());
            let mut command = Command::new(&self.linux);
            command.args(["--backend", backend, "--seconds", "600"]).args(&devices).args(&options.arguments);
            if runs == 0 {
                if options.backend.len() > 1 && backend == "translate" {
                    // For KVM without virtualization hardware to go on with.
                    command.arg("--host-tsc");
                }
                let disk = if options.disk.is_some() { " /dev/vda" } else { "" };
                let line = format!("snapshot; /root/digest {rounds} {threads}{disk}");
                command.args([
                    "--cpus",
                    &threads,
                    "--add",
                    &format!("{DIGEST}:/root/digest"),
                    "--command",
                    &line,
                ]);
            }
            if let Some((from, bases)) = chain.split_last() {
                command.arg("--restore-from").arg(from);
                for base in bases {
                    command.arg("--restore-base").arg(base);
                }
            }
            let mut milliseconds = 0;
            if runs <= options.saves {
                command.arg("--snapshot-to").arg(&to);
                if is_increment {
                    command.arg("--snapshot-incremental");
                }
                if runs > 0 {
                    milliseconds = random.u64(10..=options.longest);
                    command.args(["--snapshot-after", &milliseconds.to_string()]);
                }
            }
            let Output { status, stdout, stderr } = command.output()?;
            output.extend(stdout);
            let said = String::from_utf8_lossy(&stderr);
            let moment = said.lines().find_map(|line| line.split_once(SAVED)).map(|(_, moment)| moment);
            match moment {
                Some(moment) if status.success() => {
                    if runs > 0 {
                        let moment: Moment = moment.parse().map_err(anyhow::Error::msg)?;
                        count(&mut found, moment);
                        println!("{runs}: {backend}, after {milliseconds} ms: {moment}");
                    }
                    if is_increment { &mut increments } else { &mut whole }.add(&said)?;
                    if !is_increment {
                        chain.drain(..).try_for_each(std::fs::remove_file)?;
                    }
                    chain.push(to);
                    runs += 1;
                }
                _ if status.success() => break,
                _ => bail!("{backend} ended with {status}, in run {runs}: {said}"),
            }
        }
        let saves = runs.saturating_sub(1);
        println!("saves: {saves}, in {:.1} s", started.elapsed().as_secs_f64());
        println!("of the whole machine: {whole}");
        if options.incremental > 0 {
            println!("of what has changed: {increments}");
        }
        for (what, count) in &found {
            println!("in the middle of {what}: {count}");
        }
        let same = output == expected;
        if options.disk.is_some() {
            let disks = std::fs::read(&here)? == std::fs::read(&there)?;
            println!("disks: {}", if disks { "the same" } else { "different" });
            ensure!(disks, "the disk is another");
        }
        println!("digests: {}", if same { "the same" } else { "different" });
        if saves < options.saves {
            println!("the guest ended before the last save: more --rounds are needed");
        }
        Ok(if same && saves == options.saves { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// What saves took.
#[derive(Default)]
struct Figures {
    saves: u32,
    mib: f64,
    seconds: f64,
}

impl Figures {
    /// Adds a save, of which `linux` has said that.
    fn add(&mut self, said: &str) -> Result<()> {
        let numbers = said.lines().find_map(|line| {
            let (mib, rest) = line.split_once(" pages, ")?.1.split_once(" MiB, in ")?;
            Some((mib.parse::<f64>().ok()?, rest.split_once(" s;")?.0.parse::<f64>().ok()?))
        });
        let (mib, seconds) = numbers.context("a save without figures")?;
        (self.saves, self.mib, self.seconds) = (self.saves + 1, self.mib + mib, self.seconds + seconds);
        Ok(())
    }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { saves, mib, seconds } = self;
        let each = f64::from((*saves).max(1));
        write!(f, "{saves} saves of {:.1} MiB in {:.3} s each", mib / each, seconds / each)
    }
}

fn count(found: &mut BTreeMap<&'static str, u32>, moment: Moment) {
    let Moment { running, interrupts, repeats, drained, carried } = moment;
    for (what, is_there) in [
        ("a vCPU that computes", running > 0),
        ("several vCPUs that compute", running > 1),
        ("an interrupt", interrupts > 0),
        ("a REP", repeats > 0),
        ("a request of a disk, which was finished first", drained > 0),
        ("a request of a disk, which was saved with it", carried > 0),
    ] {
        *found.entry(what).or_default() += u32::from(is_there);
    }
}
