//! What Cedar says to the same policy, and how long it takes.

#![allow(clippy::indexing_slicing, reason = "a program that compares; a slip of its own may end it")]

mod differ;
mod host;
mod random;
mod translate;
#[allow(clippy::indexing_slicing, missing_docs, dead_code, reason = "shared with a benchmark")]
#[path = "../../benches/support/workload.rs"]
mod workload;

use std::time::Instant;

use anyhow::Result;
use clap::{Parser, Subcommand};
use differ::Found;

/// Compares vmm-policy with Cedar.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Prints the median of a decision of Cedar's on the benchmark's policy.
    Times {
        /// How many rules.
        #[arg(long)]
        rules: usize,
    },
    /// Compares decisions on random policies, and ends with an error at the first that differs.
    Differ {
        /// How many pairs of a policy and a request.
        #[arg(long, default_value_t = 1_000_000)]
        pairs: usize,
        /// Of what is random.
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// The piece of 10,000 pairs to begin with, for a run in parts.
        #[arg(long, default_value_t = 0)]
        first: usize,
    },
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Times { rules } => {
            println!("{:.0} ns", differ::times(rules)?);
        }
        Command::Differ { pairs, seed, first } => {
            let begin = Instant::now();
            let progress = |so_far: Found| {
                // A line every hundred thousand.
                if so_far.pairs.is_multiple_of(100_000) || so_far.pairs == pairs {
                    let Found { pairs, policies, allowed } = so_far;
                    eprintln!(
                        "{pairs} pairs of {policies} policies agree, {allowed} allowed, after {:.0?}",
                        begin.elapsed()
                    );
                }
            };
            let found = differ::differ(pairs, seed, first, progress)?;
            println!(
                "{} pairs of {} policies agree; {} were allowed",
                found.pairs, found.policies, found.allowed
            );
        }
    }
    Ok(())
}
