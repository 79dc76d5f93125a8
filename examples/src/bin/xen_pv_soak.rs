//! Boots Debian as a paravirtual guest, again and again, and lets it do work whose results are known.
//!
//! The last line is `runs: N failures: M`; the status is 0 if M is.

use std::process::ExitCode;

use clap::Parser;
use vmm_examples::soak::{Runner, Soak};
use vmm_examples::trial::linux;

/// Boots a paravirtual Debian again and again and lets it do work whose results are known.
#[derive(Parser)]
struct Options {
    /// What executes the guest, as `linux --engine` takes it. Several take turns.
    #[arg(long = "engine", value_delimiter = ',', default_value = "translate")]
    engines: Vec<String>,
    #[command(flatten)]
    soak: Soak,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let runner = |engine: &String| Runner {
        name: engine.clone(),
        arguments: ["--backend", "xen-pv", "--engine", engine].map(String::from).to_vec(),
    };
    let runners: Vec<Runner> = options.engines.iter().map(runner).collect();
    match linux().and_then(|linux| options.soak.run(&linux, &runners)) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xen_pv_soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}
