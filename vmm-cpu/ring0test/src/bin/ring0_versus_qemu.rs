//! Compares ring-0 behaviour of the `translate` backend with QEMU's, on scenarios made from a seed.
//!
//! The last line is `scenarios: N mismatches: M`; the exit status is 1 if there are mismatches, 2 if something else is
//! wrong. QEMU is Debian's package, installed by apt if it is absent and the user is root.

use std::process::ExitCode;

use anyhow::{Result, ensure};
use clap::Parser;
use vmm_ring0test::{Options, Summary, TOPICS, compare, engines};

/// Compares ring-0 behaviour of the translate backend with QEMU's.
#[derive(Parser)]
struct Arguments {
    /// What the scenarios are made from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// How many rounds; each has a scenario of each topic.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// The first round.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// One topic alone.
    #[arg(long)]
    topic: Option<String>,
    /// How many mismatches are told in full.
    #[arg(long, default_value_t = 10)]
    told: u64,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(Summary { scenarios, mismatches }) => {
            println!("scenarios: {scenarios} mismatches: {mismatches}");
            ExitCode::from(u8::from(mismatches > 0))
        }
        Err(error) => {
            eprintln!("ring0_versus_qemu: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(arguments: Arguments) -> Result<Summary> {
    let Arguments { seed, rounds, from, topic, told } = arguments;
    if let Some(topic) = &topic {
        let names: Vec<&str> = TOPICS.iter().map(|(name, _)| *name).collect();
        ensure!(names.contains(&topic.as_str()), "--topic {topic}: there are {}", names.join(", "));
    }
    engines::install()?;
    compare(&Options { seed, from, rounds, topic, told })
}
