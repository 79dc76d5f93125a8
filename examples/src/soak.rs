//! Guests that are booted again and again and do work whose results are known: what `examples/guest/workload` checks
//! (processes, pipes, signals, timers, pages, registers, threads, clocks), digests, compression and a shell's arithmetic.
//!
//! A run fails if the output is not exactly what it is to be, the status is not 0, the kernel's log tells of a crash, or it takes
//! too long.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::Args;

use crate::trial::{Trial, Verdict};

/// The program for the guest, which the build made.
const WORKLOAD: &str = env!("WORKLOAD_GUEST");

/// What the guest does after `workload check`.
const SCRIPT: &str = "
cd /tmp
workload data >data
sha256sum data
gzip -c data | gunzip -c | cmp - data && echo the same
i=0; sum=0
while [ $i -lt 2000 ]; do i=$((i + 1)); sum=$(((sum * 31 + i) % 1000003)); done
echo $sum
for i in 1 2 3 4 5 6 7 8; do (exit $i); echo -n \"$? \"; done
echo
for i in 1 2 3 4; do { seq 1 2000 | sort -r | head -n 1; } & done
wait
i=0
while [ $i -lt 30 ]; do i=$((i + 1)); /bin/busybox true || echo failed; done
";

/// What all of it prints.
const EXPECTED: &str = "\
children and their status: ok
programs that are started: ok
pipes: ok
signals: ok
timers: ok
fresh pages and rights: ok
copies on write: ok
vector registers: ok
threads: ok
clocks: ok
6d693407cca9546cf1cdfae3ab6bb57f6ff5bc48e6905384ee7abdf0eabd3c6d  data
the same
380591
1 2 3 4 5 6 7 8 
999
999
999
999
";

/// What runs a guest.
#[derive(Clone, Debug)]
pub struct Runner {
    /// For people.
    pub name: String,
    /// Arguments of `linux`.
    pub arguments: Vec<String>,
}

/// How often and how long.
#[derive(Args, Clone, Debug)]
pub struct Soak {
    /// How often the guest is booted.
    #[arg(long, default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..))]
    runs: u32,
    /// Numbers of vCPUs, which take turns.
    #[arg(long, value_delimiter = ',', default_value = "1,2,4", value_parser = clap::value_parser!(u32).range(1..))]
    cpus: Vec<u32>,
    /// How much the guest does in each run.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Guests at a time.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=16))]
    jobs: u32,
    /// Seconds after which a run has failed.
    #[arg(long, default_value_t = 300)]
    seconds: u64,
    /// Keeps output and log of runs that fail in this directory.
    #[arg(long, value_name = "DIRECTORY")]
    keep: Option<PathBuf>,
}

impl Soak {
    /// Lets guests run in `linux`, the path of that program, on each of `runners` by turns, and prints a line for each run and `runs: N failures: M`; how many
    /// failed.
    ///
    /// # Errors
    /// Fails if `linux` cannot be run or what is kept cannot be written.
    pub fn run(&self, linux: &Path, runners: &[Runner]) -> Result<u32> {
        if let Some(directory) = &self.keep {
            std::fs::create_dir_all(directory)
                .with_context(|| format!("creating {}", directory.display()))?;
        }
        let (next, failures) = (AtomicU32::new(0), AtomicU32::new(0));
        let job = || -> Result<()> {
            loop {
                let number = next.fetch_add(1, Ordering::SeqCst);
                if number >= self.runs {
                    return Ok(());
                }
                if !self.one(runners, linux, number)? {
                    failures.fetch_add(1, Ordering::SeqCst);
                }
            }
        };
        std::thread::scope(|scope| {
            let jobs: Vec<_> = (0..self.jobs).map(|_| scope.spawn(job)).collect();
            jobs.into_iter().try_for_each(|job| job.join().map_err(|_| anyhow!("a job panicked"))?)
        })?;
        let failures = failures.load(Ordering::SeqCst);
        println!("runs: {} failures: {failures}", self.runs);
        Ok(failures)
    }

    /// A run; whether it went well.
    fn one(&self, runners: &[Runner], linux: &Path, number: u32) -> Result<bool> {
        let turn = usize::try_from(number)?;
        let runner = runners.get(turn % runners.len().max(1)).context("nothing to run guests on")?;
        // Each sees each number of vCPUs.
        let turn = turn / runners.len().max(1);
        let cpus = self.cpus.get(turn % self.cpus.len().max(1)).context("no number of vCPUs")?;
        let arguments: Vec<&str> = runner.arguments.iter().map(String::as_str).collect();
        let trial = Trial {
            backend: &arguments,
            cpus: *cpus,
            limit: Duration::from_secs(self.seconds),
            files: &[&format!("{WORKLOAD}:/bin/workload")],
            line: &format!("workload check {} || exit 1{SCRIPT}", self.rounds),
        };
        let verdict = trial.run(linux)?;
        let seconds = verdict.time.as_secs_f64();
        let what = format!("run {}, {}, {cpus} vCPUs, {seconds:.1} s", number + 1, runner.name);
        let Some(why) = failure(&verdict) else {
            println!("{what}: ok");
            return Ok(true);
        };
        println!("{what}: FAILED: {why}");
        if let Some(directory) = &self.keep {
            let name = runner.name.replace('/', "-");
            let path = directory.join(format!("run-{}-{name}-{cpus}.log", number + 1));
            let text = format!("{what}: {why}\n--- output\n{}--- log\n{}", verdict.output, verdict.log);
            std::fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(false)
    }
}

/// Why a run has failed.
fn failure(verdict: &Verdict) -> Option<String> {
    if let Some(trouble) = verdict.troubles().next() {
        return Some(trouble.to_owned());
    }
    if !verdict.status.success() {
        return Some(verdict.status.to_string());
    }
    let difference = || {
        let (got, expected) = (verdict.output.lines(), EXPECTED.lines());
        let pair = got.zip(expected).find(|(got, expected)| got != expected);
        pair.map_or_else(
            || format!("{} lines of output", verdict.output.lines().count()),
            |(got, expected)| format!("{got:?} in place of {expected:?}"),
        )
    };
    (verdict.output != EXPECTED).then(difference)
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::ExitStatus;

    use super::*;

    #[test]
    fn a_run_is_right_only_as_a_whole() {
        let verdict = |output: &str, log: &str, status| {
            let (output, log) = (output.to_owned(), log.to_owned());
            Verdict { output, log, status: ExitStatus::from_raw(status), time: Duration::ZERO }
        };
        assert_eq!(failure(&verdict(EXPECTED, "booted\n", 0)), None);
        let changed = EXPECTED.replace("the same", "not the same");
        for (output, log, status, reason) in [
            (EXPECTED, "sh[1]: segfault at 0\n", 0, "segfault"),
            (EXPECTED, "", 124 << 8, "124"),
            (&changed, "", 0, "\"not the same\" in place of \"the same\""),
            (&format!("{EXPECTED}more\n"), "", 0, "19 lines"),
            (EXPECTED.trim_end_matches("999\n"), "", 0, "14 lines"),
        ] {
            let why = failure(&verdict(output, log, status)).unwrap();
            assert!(why.contains(reason), "{why}");
        }
    }
}
