//! How much goes through a socket device of a guest on `translate`, beside a pair of Unix sockets that moves the same bytes.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use vmm_examples::rates::{remarks, table};
use vmm_examples::trial::built_linux;
use vmm_examples::vsock_times::{Amounts, rows};

/// Times a socket device beside a pair of Unix sockets.
#[derive(Parser)]
struct Options {
    /// MiB in each direction.
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..4096))]
    mib: u32,
    /// Messages there and back.
    #[arg(long, default_value_t = 5000, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vsock_times: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let amounts = Amounts { bytes: options.mib << 20, rounds: options.rounds, ..Amounts::default() };
    let rows = rows(&built_linux()?, amounts)?;
    print!("{}", table(&rows));
    remarks(&rows).iter().for_each(|remark| println!("- {remark}."));
    Ok(())
}
