//! `vmm-audit`: looks at audit logs.

mod arguments;
mod commands;
mod forward;
mod output;

use std::process::ExitCode;

use clap::Parser as _;

use arguments::{Arguments, Command};

/// 0 if all is well, 1 if the log is not, 2 if the command could not be carried out.
fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = match arguments.command {
        Command::Verify(command) => commands::verify(&command),
        Command::Prove(command) => commands::prove(&command),
        Command::Consistency(command) => commands::consistency(&command),
        Command::Gaps(command) => commands::gaps(&command),
        Command::Tail(command) => forward::tail(&command),
        Command::Query(command) => forward::query(&command),
        Command::Export(command) => forward::export(&command),
        Command::Report(command) => commands::report(&command),
        Command::Key(command) => commands::key(&command),
    };
    match done {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            output::error(&error);
            ExitCode::from(2)
        }
    }
}
