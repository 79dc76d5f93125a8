//! What a decision costs, by the number of rules, beside Cedar on the same policy.
//!
//! `cargo bench -p vmm-policy --bench decision` prints a line for each number of rules. A decision takes less than reading a clock, so batches
//! of 256 are timed: p50 and p99 are those of the batches' means. Cedar is asked by the package in `oracle`, a workspace of its own that is built
//! and run for that: as a dependency of this package it would be built, which takes minutes, for whoever runs a test.

#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::print_stdout,
    missing_docs,
    reason = "a benchmark"
)]

#[path = "support/workload.rs"]
mod workload;

use std::collections::HashSet;
use std::hint::black_box;
use std::process::Command;
use std::time::Instant;

use workload::Workload;

const REQUESTS: usize = 1 << 20;
const BATCH: usize = 256;

fn main() {
    // `cargo test --benches` runs it to see that it runs.
    let quick = std::env::args().any(|argument| argument == "--test");
    for rules in if quick { vec![10] } else { vec![10, 1000, 10_000, 100_000] } {
        let workload = Workload::new(rules);
        let begin = Instant::now();
        let (monitor, subjects) = workload.monitor().unwrap();
        let compiled = begin.elapsed();
        let mut rng = fastrand::Rng::with_seed(1);
        let count = if quick { 4096 } else { REQUESTS };
        let requests: Vec<_> = (0..count).map(|_| workload.request(&mut rng).of(&subjects)).collect();
        let mut judge = monitor.judge();
        let (mut allowed, mut times) = (0_u64, Vec::with_capacity(count / BATCH));
        for round in 0..2 {
            allowed = 0;
            times.clear();
            for batch in requests.chunks(BATCH) {
                let begin = Instant::now();
                for request in batch {
                    allowed += u64::from(judge.authorize(black_box(request)).permits());
                }
                times.push(begin.elapsed().as_nanos() as f64 / batch.len() as f64);
            }
            // The first round brings the table into the caches.
            black_box(round);
        }
        times.sort_by(f64::total_cmp);
        let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
        let distinct: HashSet<String> =
            requests.iter().take(100_000).map(|request| format!("{request:?}")).collect();
        let cedar = if quick { "skipped".to_owned() } else { cedar(rules) };
        println!("rules: {rules} p50: {:.1} ns p99: {:.1} ns cedar_p50: {cedar}", at(0.5), at(0.99));
        println!(
            "  {count} requests, {} of the first {} distinct, {:.0} % allowed; compiled and {} machines registered in {compiled:.2?}",
            distinct.len(),
            count.min(100_000),
            100.0 * allowed as f64 / count as f64,
            subjects.len(),
        );
    }
}

/// What the oracle says; why it says nothing, if it does not.
fn cedar(rules: usize) -> String {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let run = Command::new(cargo)
        .args(["run", "--release", "--quiet", "--manifest-path"])
        .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/oracle/Cargo.toml"))
        .args(["--", "times", "--rules"])
        .arg(rules.to_string())
        .output();
    match run {
        Ok(output) if output.status.success() => String::from_utf8_lossy(&output.stdout).trim().to_owned(),
        Ok(output) => format!(
            "skipped ({})",
            String::from_utf8_lossy(&output.stderr).lines().last().unwrap_or("it failed")
        ),
        Err(error) => format!("skipped ({error})"),
    }
}
