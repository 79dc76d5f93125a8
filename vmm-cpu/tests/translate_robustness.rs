//! The guest cannot hurt the host: hostile guests on the `translate` backend, the same that the fuzz target
//! `translate_guest` runs, and single attacks by name.

#![cfg(feature = "translate")]
#![allow(clippy::unwrap_used)]

mod own_process;
mod translate_support;

use std::time::Duration;

use arbitrary::{Arbitrary, Unstructured};
use translate_support::compare::compare;
use translate_support::exercise::{Tally, exercise_on};
use translate_support::guest::{Guest, Tier};
use translate_support::{alone, resident, watchdog};

/// Bytes of one input.
const INPUT: usize = 1600;
/// Inputs that the test runs, unless the environment says `GUESTS`.
const GUESTS: u64 = 600;

/// The bytes of an input from a seed: splitmix64.
fn bytes(seed: u64) -> Vec<u8> {
    let mut state = seed;
    let mut bytes = Vec::with_capacity(INPUT);
    while bytes.len() < INPUT {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        bytes.extend((word ^ word >> 31).to_le_bytes());
    }
    bytes
}

fn input(seed: u64) -> Guest {
    Guest::arbitrary(&mut Unstructured::new(&bytes(seed))).unwrap()
}

fn count() -> u64 {
    std::env::var("GUESTS").ok().and_then(|count| count.parse().ok()).unwrap_or(GUESTS)
}

#[test]
fn no_guest_breaks_the_host() {
    if !own_process::is_it("no_guest_breaks_the_host") {
        return;
    }
    for tier in Tier::ALL {
        no_guest_breaks_the_host_of(tier);
    }
}

fn no_guest_breaks_the_host_of(tier: Tier) {
    watchdog::set_patience(Duration::from_secs(10));
    let mut sum = Tally::default();
    let mut before = 0;
    for seed in 0..count() {
        sum.add(&exercise_on(&input(seed), tier, None).0);
        if seed == count() / 4 {
            before = resident();
        }
    }
    let grown = resident().saturating_sub(before);
    eprintln!("{tier:?}: {sum:?}, grown by {grown} bytes");
    assert!(grown < 16 << 20, "resident memory has grown by {grown} bytes");
    // The inputs are worth something: they get to everything that a run can end with, and to devices.
    assert!(
        sum.halted > 50 && sum.debug > 50 && sum.interrupted > 50 && sum.shutdown > 5 && sum.unhandled > 0
    );
    assert!(sum.calls > 500 && sum.restored > 20 && sum.refused > 5 && sum.instructions > 100_000);
}

#[test]
fn all_tiers_come_to_the_same() {
    let _alone = alone();
    watchdog::set_patience(Duration::from_secs(10));
    let mut sum = Tally::default();
    let first = std::env::var("SEED").map_or(0, |l| l.parse().unwrap());
    for seed in first..count() {
        if std::env::var("SHOW").is_ok() {
            eprintln!("{seed}");
        }
        sum.add(&compare(&Guest { deterministic: true, two: false, ..input(seed) }));
    }
    eprintln!("{sum:?}");
    // Few were kicked.
    assert!(
        sum.compared > sum.runs * 2 * 9 / 10,
        "{} of twice {} runs were compared",
        sum.compared,
        sum.runs
    );
}

/// Writes inputs for the fuzz target `translate_guest` to start with.
#[test]
#[ignore = "writes the fuzz target's seeds instead of testing"]
fn write_fuzz_seeds() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/translate_guest");
    std::fs::create_dir_all(corpus).unwrap();
    for seed in 0..4000 {
        std::fs::write(format!("{corpus}/{seed}"), bytes(seed)).unwrap();
    }
}
