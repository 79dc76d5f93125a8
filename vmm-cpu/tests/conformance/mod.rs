//! Table of contents, and the program that runs the cases.

mod backend;
mod case;
mod cases;
mod machine;
mod program;
mod recorder;
mod toy;

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Trial};

/// Runs every case against every backend.
pub(crate) fn run() -> ExitCode {
    let mut trials = Vec::new();
    for candidate in backend::candidates() {
        let candidate = Arc::new(candidate);
        for (subject, cases) in cases::ALL {
            if !candidate.is_for(subject) {
                continue;
            }
            for case in *cases {
                let name = format!("{subject}::{}", case.name);
                let candidate = Arc::clone(&candidate);
                let full_name = format!("{}::{name}", candidate.name);
                trials
                    .push(Trial::ignorable_test(full_name, move || case::conclude(&name, &candidate, case)));
            }
        }
    }
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}
