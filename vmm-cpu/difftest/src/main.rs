//! Compares vmm-cpu's interpreter with the processor that it runs on: random instructions, run on both, must come to the
//! same registers, memory and exceptions.

#![allow(
    clippy::cast_possible_truncation,
    reason = "the program is for x86-64 alone, where addresses are sizes; other casts take fields out of words"
)]

mod backend;
mod case;
mod forms;
mod generate;
mod host;
mod judge;
mod memory;
mod native;
mod plant;
mod report;
mod run;
mod scan;
mod start;
mod tally;
#[cfg(test)]
mod tests;
mod undefined;

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Parser;
use iced_x86::Code;

use backend::Tier;
use generate::Shape;
use run::{Plan, Sides, Summary};

/// Compares vmm-cpu's interpreter with this processor.
#[derive(Debug, Parser)]
#[command(version)]
struct Options {
    /// How many cases.
    #[arg(long, default_value_t = 1_000_000)]
    cases: u64,
    /// What all cases follow from.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Cases of this form alone, by iced's name for it.
    #[arg(long, value_name = "NAME")]
    code: Option<String>,
    /// Cases of all forms that the interpreter's CPUID offers, not only of those in Debian's kernels and busybox.
    #[arg(long, conflicts_with = "code")]
    every: bool,
    /// The case of this number alone.
    #[arg(long, value_name = "NUMBER")]
    case: Option<u64>,
    /// What executes the cases on our side.
    #[arg(long, value_enum, default_value_t)]
    tier: Tier,
    /// Cases are sequences of 2 to 12 instructions with branches forwards, of which translated code runs each twice.
    #[arg(long)]
    sequences: bool,
    /// Threads, each with a child process.
    #[arg(long, default_value_t = default_threads())]
    threads: usize,
    /// Corrupts what the interpreter makes of this form: there must be mismatches.
    #[arg(long, value_name = "NAME")]
    plant: Option<String>,
    /// Corrupts one form after the other, and lists those where it is not noticed.
    #[arg(long)]
    plant_all: bool,
    /// Lists the forms.
    #[arg(long)]
    list: bool,
    /// Makes the list of forms from programs and kernels.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    scan: Vec<PathBuf>,
    /// The most mismatches that are shown.
    #[arg(long, default_value_t = 20)]
    show: usize,
    /// Shows how many cases of each form there were.
    #[arg(long)]
    table: bool,
}

fn default_threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn named(name: &str) -> Result<Code> {
    forms::named(name).with_context(|| format!("no form is called `{name}`: `--list` shows the names"))
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    if options.list {
        for code in forms::forms() {
            println!("{code:?}{}", if judge::has_rule(*code) { " (judged by rule)" } else { "" });
        }
        return Ok(ExitCode::SUCCESS);
    }
    if !options.scan.is_empty() {
        let (text, new) = forms::scan(&options.scan)?;
        print!("{text}");
        for name in &new {
            eprintln!("not in the list: {name}");
        }
        return Ok(if new.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    if let Some(problem) = host::problem() {
        bail!("the interpreter cannot be compared with this host: {problem}");
    }
    if options.threads == 0 {
        bail!("--threads is 0: give 1 or more");
    }
    let forms = match &options.code {
        Some(name) => vec![named(name)?],
        None if options.every => forms::offered(),
        None => run::all_forms(),
    };
    let plant = options.plant.as_deref().map(named).transpose()?;
    let plan = Plan {
        seed: options.seed,
        cases: options.cases,
        forms,
        threads: options.threads,
        plant,
        tier: options.tier,
        shape: if options.sequences { Shape::Sequence } else { Shape::Plain },
    };
    if options.plant_all {
        return plant_all(&plan);
    }
    let summary = match options.case {
        Some(number) => Sides::new(plan.tier)?.some(&plan, number, 1)?,
        None => run::run(&plan, &Progress::new(plan.cases).into_teller())?,
    };
    show(&plan, &summary, &options)?;
    let cases = if options.case.is_some() { 1 } else { plan.cases };
    println!("cases: {cases} mismatches: {}", summary.mismatches);
    Ok(if summary.mismatches == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Says every few seconds how far a run is.
struct Progress {
    cases: u64,
    begin: Instant,
    told: AtomicU64,
}

impl Progress {
    const STEP: Duration = Duration::from_secs(30);

    fn new(cases: u64) -> Self {
        Self { cases, begin: Instant::now(), told: AtomicU64::new(0) }
    }

    fn into_teller(self) -> impl Fn(u64) + Sync {
        move |done| {
            let now = self.begin.elapsed().as_secs() / Self::STEP.as_secs();
            if self.told.fetch_max(now, Ordering::Relaxed) < now {
                eprintln!("{done} of {} cases", self.cases);
            }
        }
    }
}

fn show(plan: &Plan, summary: &Summary, options: &Options) -> Result<()> {
    if options.table || options.case.is_none() && options.code.is_none() {
        println!("{}", summary.tally);
    } else if let [code] = plan.forms.as_slice() {
        println!("{code:?}: {:?}", summary.tally.of(*code));
    }
    if summary.kept.is_empty() {
        return Ok(());
    }
    let mut sides = Sides::new(plan.tier)?;
    for mismatch in summary.kept.iter().take(options.show) {
        println!("{}", report::describe(&mut sides, plan, mismatch)?);
    }
    for (code, count) in &summary.by_form {
        println!("mismatches of {code:?}: {count}");
    }
    Ok(())
}

/// Cases of a form at most until a planted error must have been noticed.
const PLANTED: u64 = 512;

fn plant_all(plan: &Plan) -> Result<ExitCode> {
    let mut sides = Sides::new(plan.tier)?;
    let mut missed = 0;
    for code in &plan.forms {
        let plan = Plan { forms: vec![*code], plant: Some(*code), ..plan.clone() };
        let mut first = 0;
        let mut found = false;
        while first < PLANTED && !found {
            let summary = sides.some(&plan, first, native::BATCH as u64)?;
            found = summary.mismatches != 0;
            first += native::BATCH as u64;
        }
        if !found {
            println!("not noticed: {code:?}");
            missed += 1;
        }
    }
    println!("planted: {} missed: {missed}", plan.forms.len());
    Ok(if missed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
