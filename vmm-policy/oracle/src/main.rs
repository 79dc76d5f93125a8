//! What Cedar says to the same policy, and how long it takes.

#![allow(clippy::indexing_slicing, reason = "a program that compares; a slip of its own may end it")]

mod differ;
mod host;
mod random;
mod translate;
#[allow(clippy::indexing_slicing, missing_docs, dead_code, reason = "shared with a benchmark")]
#[path = "../../benches/support/workload.rs"]
mod workload;

use anyhow::Result;
use clap::{Parser, Subcommand};

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
    },
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Times { rules } => {
            println!("{:.0} ns", differ::times(rules)?);
        }
        Command::Differ { pairs, seed } => {
            let found = differ::differ(pairs, seed)?;
            println!(
                "{} pairs of {} policies agree; {} were allowed",
                found.pairs, found.policies, found.allowed
            );
        }
    }
    Ok(())
}
