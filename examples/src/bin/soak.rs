//! Boots Debian on PC hardware, again and again, and lets it do work whose results are known.
//!
//! The last line is `runs: N failures: M`; the status is 0 if M is.

use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use vmm_examples::soak::{Runner, Soak};
use vmm_examples::trial::built_linux;

/// What executes guests.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum How {
    /// The translator as it is.
    Translate,
    /// The same, with an address window for each program from its start.
    Window,
    /// The same without windows.
    NoWindow,
    /// The interpreter.
    Interpret,
    /// KVM.
    Kvm,
}

impl How {
    fn runner(self) -> Runner {
        let (name, arguments): (_, &[&str]) = match self {
            Self::Translate => ("translate", &["--backend", "translate"]),
            Self::Window => ("window", &["--backend", "translate", "--address-window", "always"]),
            Self::NoWindow => ("no-window", &["--backend", "translate", "--address-window", "never"]),
            Self::Interpret => ("interpret", &["--backend", "translate", "--interpret"]),
            Self::Kvm => ("kvm", &["--backend", "kvm"]),
        };
        Runner { name: name.to_owned(), arguments: arguments.iter().copied().map(String::from).collect() }
    }
}

/// Boots Debian again and again and lets it do work whose results are known.
#[derive(Parser)]
struct Options {
    /// What executes the guest. Several take turns.
    #[arg(long = "on", value_enum, value_delimiter = ',', default_value = "translate,window")]
    on: Vec<How>,
    #[command(flatten)]
    soak: Soak,
}

fn main() -> ExitCode {
    let options = Options::parse();
    let runners: Vec<Runner> = options.on.iter().map(|how| how.runner()).collect();
    match built_linux().and_then(|linux| options.soak.run(&linux, &runners)) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("soak: {error:#}");
            ExitCode::FAILURE
        }
    }
}
