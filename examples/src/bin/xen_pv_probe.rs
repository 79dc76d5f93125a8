//! Boots Debian as a paravirtual guest and lets an unprivileged program of it, `examples/guest/probe`, try to get at what is
//! not its own: memory of the kernel and of the engine, and every gate out of its ring.
//!
//! Prints what the program does, and troubles in the kernel's log, for each engine. The last line is
//! `probes: N unexpected: M`; the status is 0 if M is and all went well.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use vmm_examples::trial::{Trial, linux};

/// The program for the guest, which the build made.
const PROBE: &str = env!("PROBE_GUEST");

/// Lets an unprivileged program of a paravirtual guest try to get at what is not its own.
#[derive(Parser)]
struct Options {
    /// What executes the guest, as `linux --engine` takes it. Several are run one after the other.
    #[arg(long = "engine", value_delimiter = ',', default_value = "translate")]
    engines: Vec<String>,
    /// Number of vCPUs.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    cpus: u32,
    /// Tries all of what is sampled otherwise: 1.4 million attempts instead of 20 thousand.
    #[arg(long)]
    long: bool,
    /// Tries INT1 too, by which a processor of some hypervisors never comes back.
    #[arg(long)]
    int1: bool,
    /// Ends a run after that time.
    #[arg(long, default_value_t = 3600)]
    seconds: u64,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xen_pv_probe: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether all was as expected.
fn run(options: &Options) -> Result<bool> {
    let linux = linux()?;
    let mut line = "probe".to_owned();
    for (word, wanted) in [("long", options.long), ("int1", options.int1)] {
        if wanted {
            line.push(' ');
            line.push_str(word);
        }
    }
    let (mut probes, mut unexpected, mut well) = (0, 0, true);
    for engine in &options.engines {
        let trial = Trial {
            backend: &["--backend", "xen-pv", "--engine", engine],
            cpus: options.cpus,
            limit: Duration::from_secs(options.seconds),
            files: &[&format!("{PROBE}:/bin/probe")],
            line: &line,
        };
        let verdict = trial.run(&linux)?;
        println!("engine {engine}, {:.1} s, {}", verdict.time.as_secs_f64(), verdict.status);
        print!("{}", verdict.output);
        let troubles: Vec<&str> = verdict.troubles().collect();
        for line in &troubles {
            println!("kernel: {line}");
        }
        let counts = counts(&verdict.output);
        if !verdict.status.success() && counts.is_none_or(|(_, unexpected)| unexpected == 0) {
            println!("{}", verdict.log);
        }
        well &= verdict.status.success() && troubles.is_empty();
        let (all, wrong) = counts.unwrap_or_default();
        probes += all;
        // A guest that did not come to its end is one, whatever it came to.
        unexpected += wrong.max(u64::from(!verdict.status.success() || !troubles.is_empty()));
    }
    println!("probes: {probes} unexpected: {unexpected}");
    Ok(well && unexpected == 0 && probes > 0)
}

/// What the program's last line says.
fn counts(output: &str) -> Option<(u64, u64)> {
    let (probes, unexpected) =
        output.lines().last()?.strip_prefix("probes: ")?.split_once(" unexpected: ")?;
    Some((probes.parse().ok()?, unexpected.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_last_line_counts() {
        assert_eq!(counts("x: 1\nprobes: 12 unexpected: 3\n"), Some((12, 3)));
        assert_eq!(counts("probes: 12 unexpected: 3\nmore"), None);
        assert_eq!(counts("probes: 12 unexpec"), None);
    }
}
