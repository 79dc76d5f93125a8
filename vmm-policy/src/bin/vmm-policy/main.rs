//! `vmm-policy`: looks at policies before they are put in force.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "that is what it is for")]

mod commands;
mod show;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand, ValueEnum};

/// Looks at policies before they are put in force.
#[derive(Parser)]
#[command(version, about, max_term_width = 100)]
struct Arguments {
    /// Prints JSON, for programs.
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Clone, Copy, ValueEnum)]
enum Picture {
    /// For Graphviz.
    Dot,
    /// For eyes.
    Svg,
}

#[derive(Subcommand)]
enum Command {
    /// Reads a policy and says what is wrong with it, and which rules do nothing. Exits with 1 if something is wrong.
    Check {
        /// The policy.
        file: PathBuf,
        /// Rules that do nothing are wrong, too.
        #[arg(long)]
        strict: bool,
    },
    /// Why a request is answered as it is: `web to connect vsock 5432 of db when running and attested`. Exits with 1 if it is not allowed.
    Explain {
        /// The policy.
        file: PathBuf,
        /// The request, in one argument or in many.
        #[arg(required = true, trailing_var_arg = true)]
        request: Vec<String>,
    },
    /// Proves that nothing that A has can come to B, through whomever: exits with 0 and `no path`, or with 1 and the way.
    Prove {
        /// The policy.
        file: PathBuf,
        /// From whom: a name, a label, `red and not web`.
        a: String,
        /// To whom.
        b: String,
        /// Guards may hand on what they learn.
        #[arg(long)]
        distrust_guards: bool,
    },
    /// Draws who may talk to whom.
    Graph {
        /// The policy.
        file: PathBuf,
        /// As what; by the name of the output, if that is not said.
        #[arg(long, value_enum)]
        format: Option<Picture>,
        /// Where to; otherwise to standard output.
        #[arg(long, short)]
        output: Option<PathBuf>,
    },
    /// What another policy answers differently. Exits with 1 if something is.
    Diff {
        /// The policy before.
        before: PathBuf,
        /// The policy after.
        after: PathBuf,
    },
    /// Writes policies as they should look. With `--json`, prints their documents; of a document, prints the text.
    Fmt {
        /// The policies.
        #[arg(required = true)]
        files: Vec<PathBuf>,
        /// Changes nothing; exits with 1 if something would.
        #[arg(long)]
        check: bool,
    },
    /// Answers the requests of a log, one a line, and says which rules they needed.
    Simulate {
        /// The policy.
        file: PathBuf,
        /// The requests; `-` for standard input. A line may begin with an answer and a tab: those that differ are marked.
        log: PathBuf,
        /// Exits with 1 if a rule was not needed.
        #[arg(long)]
        cover: bool,
    },
}

fn main() -> ExitCode {
    let Arguments { json, command } = Arguments::parse();
    let result = match command {
        Command::Check { file, strict } => commands::check(&file, strict, json),
        Command::Explain { file, request } => commands::explain(&file, &request.join(" "), json),
        Command::Prove { file, a, b, distrust_guards } => {
            commands::prove(&file, &a, &b, !distrust_guards, json)
        }
        Command::Graph { file, format, output } => {
            let by_name = |path: &PathBuf| path.extension().is_some_and(|extension| extension == "svg");
            let svg = match format {
                Some(format) => matches!(format, Picture::Svg),
                None => output.as_ref().is_some_and(by_name),
            };
            commands::graph(&file, svg, output.as_deref(), json)
        }
        Command::Diff { before, after } => commands::diff(&before, &after, json),
        Command::Fmt { files, check } => commands::fmt(&files, check, json),
        Command::Simulate { file, log, cover } => commands::simulate(&file, &log, cover, json),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            show::error(&error);
            ExitCode::from(2)
        }
    }
}
