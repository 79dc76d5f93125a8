//! What a decision costs, by the number of rules, beside Cedar on the same policy.
//!
//! `cargo bench -p vmm-policy --bench decision` prints a line for each number of rules, and below it what the figures are of.
//!
//! * 2^20 requests, no two of which are equal, in random order; `support/workload.rs` says what they are and that all layers are asked, and
//!   the line below says how often which one answered. A first round does not count: by its end the histories at walls have
//!   grown as far as they will, and the table has been read. It is not in the first cache then: a request comes to what it was about
//!   a million requests ago.
//! * A decision takes less than reading a clock, so batches of 64 are timed, with one reading (about 25 ns, not taken off); p50 and p99
//!   are those of the 16,384 batches' means. With other sizes of batches, which are there for comparison, the mean is the same, and the tail is longer the
//!   less there is in a batch to even it out.
//! * Whatever else runs on the processor, or beside it on the same core, takes its part of a round, and another part of the next. Of forty rounds, two
//!   seconds, the one with the least p99 counts, whole. The line below has the middle one and the last, too, and what it is if each batch counts with its
//!   least time, which leaves what repeats: between two of a batch's times are all others, so that it does not find its own in the cache.
//! * The requests of a batch are made just before it, untimed: who asks has just decoded what it asks for, so that it is in the cache.
//! * Beside it stands what a load costs that depends on the one before, over as much memory as 256 KiB to 32 MiB at random: what
//!   a decision would wait for at least if that much was read at random; and what a branch costs that is foreseen every other time. Of those a
//!   decision about random requests has several: number or name, one range of objects or more, allowed by a level, a wall, a condition or not.
//!
//! Cedar is asked by the package in `oracle`, a workspace of its own that is built and run for that: as a dependency of this package it would
//! be built, which takes minutes, for whoever runs a test. It decides the same policy without the limit and with walls as they are before
//! anything has been done, its p50 is of single requests, and each of its answers is compared with this crate's.

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

use std::collections::BTreeMap;
use std::hint::black_box;
use std::process::Command;
use std::time::Instant;

use vmm_policy::{Judge, SubjectId};
use workload::{Asked, Workload};

const REQUESTS: usize = 1 << 20;
/// Requests that are timed together.
const BATCH: usize = 64;
/// The same with others, for comparison.
const OTHERS: [usize; 2] = [16, 256];
const ROUNDS: usize = 40;

fn main() {
    // `cargo test --benches` runs it to see that it runs.
    let quick = std::env::args().any(|argument| argument == "--test");
    let without_cedar = quick || std::env::args().any(|argument| argument == "--without-cedar");
    if !quick {
        let waits = [256, 512, 1024, 4096, 32_768].map(|kib: usize| {
            format!("{:.1} ns in {kib} KiB", load(kib << 10, &mut fastrand::Rng::with_seed(3)))
        });
        println!("a load that depends on the one before takes {}", waits.join(", "));
        println!("a branch that is not foreseen takes {:.1} ns", branch(&mut fastrand::Rng::with_seed(4)));
    }
    let only = std::env::args().filter_map(|argument| argument.parse().ok()).next();
    let all: &[usize] = if quick { &[10] } else { &[10, 1000, 10_000, 100_000] };
    for rules in only.map_or(all.to_vec(), |only| vec![only]) {
        let workload = Workload::new(rules);
        let begin = Instant::now();
        let (monitor, subjects) = workload.monitor().unwrap();
        let compiled = begin.elapsed();
        let all = workload.distinct(if quick { 4096 } else { REQUESTS }, &mut fastrand::Rng::with_seed(1));
        let mut judge = monitor.judge();
        run(&mut judge, &all, &subjects, BATCH);
        let mut rounds: Vec<_> =
            (0..if quick { 1 } else { ROUNDS }).map(|_| run(&mut judge, &all, &subjects, BATCH)).collect();
        let mut least = rounds[0].clone();
        for round in &rounds {
            least.iter_mut().zip(round).for_each(|(least, time)| *least = least.min(*time));
        }
        let mut others = OTHERS.map(|batch| run(&mut judge, &all, &subjects, batch));
        for times in rounds.iter_mut().chain([&mut least]).chain(&mut others) {
            times.sort_by(f64::total_cmp);
        }
        let at = |times: &[f64], part: f64| times[((times.len() - 1) as f64 * part) as usize];
        rounds.sort_by(|one, other| at(one, 0.99).total_cmp(&at(other, 0.99)));
        let (p50, p99) = (at(&rounds[0], 0.5), at(&rounds[0], 0.99));
        let cedar = if without_cedar { "skipped".to_owned() } else { cedar(rules) };
        println!("rules: {rules} p50: {p50:.1} ns p99: {p99:.1} ns cedar_p50: {cedar}");
        let both = |times: &[f64]| format!("p50 {:.1} p99 {:.1}", at(times, 0.5), at(times, 0.99));
        let [first, middle, last] = [0, rounds.len() / 2, rounds.len() - 1].map(|at| both(&rounds[at]));
        println!(
            "  {} rounds by p99, the first {first}, the middle one {middle}, the last {last}; batches' least: {}",
            rounds.len(),
            both(&least)
        );
        let sizes =
            OTHERS.iter().zip(&others).map(|(batch, times)| format!("batches of {batch}: {}", both(times)));
        println!("  {}", sizes.collect::<Vec<_>>().join("; "));
        println!("  {} distinct requests: {}", all.len(), shares(&mut judge, &all, &subjects));
        println!("  compiled, and {} machines registered, in {compiled:.2?}", subjects.len());
    }
}

/// The means of batches in nanoseconds.
fn run(judge: &mut Judge, all: &[Asked], subjects: &[SubjectId], batch: usize) -> Vec<f64> {
    let mut times = Vec::with_capacity(all.len() / batch + 1);
    let mut names = String::new();
    for batch in all.chunks(batch) {
        let ends = write_names(batch, &mut names);
        let requests: Vec<_> = batch
            .iter()
            .zip(&ends)
            .map(|(asked, (from, to))| asked.of(&names[*from..*to], subjects))
            .collect();
        let begin = Instant::now();
        for request in &requests {
            black_box(judge.authorize(black_box(request)).verdict);
        }
        times.push(begin.elapsed().as_nanos() as f64 / batch.len() as f64);
    }
    times
}

fn write_names(batch: &[Asked], names: &mut String) -> Vec<(usize, usize)> {
    names.clear();
    let mut write = |asked: &Asked| {
        let from = names.len();
        asked.write_name(names);
        (from, names.len())
    };
    batch.iter().map(&mut write).collect()
}

/// How often what was said, by which layer.
fn shares(judge: &mut Judge, all: &[Asked], subjects: &[SubjectId]) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let mut name = String::new();
    for asked in all {
        name.clear();
        asked.write_name(&mut name);
        let decision = judge.authorize(&asked.of(&name, subjects));
        *counts.entry(format!("{} ({})", decision.verdict, decision.layer)).or_default() += 1;
    }
    let share = |(what, count): (&String, &usize)| {
        format!("{:.1} % {what}", 100.0 * *count as f64 / all.len() as f64)
    };
    counts.iter().map(share).collect::<Vec<_>>().join(", ")
}

/// What a branch takes that is not foreseen, in nanoseconds: the same branches in an order that is foreseen take that much less.
fn branch(rng: &mut fastrand::Rng) -> f64 {
    let mut ways: Vec<bool> = (0..1 << 20).map(|_| rng.bool()).collect();
    let mut sum = 0_u64;
    let mut time = |ways: &[bool]| {
        let begin = Instant::now();
        for way in ways {
            // What is opaque is not turned into a choice without a branch.
            sum = if *way { black_box(sum + 1) } else { black_box(sum ^ 3) };
        }
        begin.elapsed().as_nanos() as f64
    };
    let random = time(&ways);
    let wrong = ways.len() as f64 / 2.0;
    ways.sort_unstable();
    (random - time(&ways)) / wrong
}

/// What a load takes whose address is what the one before has read, in nanoseconds.
fn load(bytes: usize, rng: &mut fastrand::Rng) -> f64 {
    // One cycle through all cache lines.
    let lines = bytes / 64;
    let mut order: Vec<usize> = (0..lines).collect();
    rng.shuffle(&mut order);
    let mut next = vec![0_usize; lines * 8];
    for (one, other) in order.iter().zip(order.iter().skip(1).chain(order.first())) {
        next[one * 8] = other * 8;
    }
    let (mut at, steps) = (0, 2_000_000);
    (0..lines).for_each(|_| at = next[at]);
    let begin = Instant::now();
    (0..steps).for_each(|_| at = next[at]);
    black_box(at);
    begin.elapsed().as_nanos() as f64 / f64::from(steps)
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
