//! The guest cannot hurt the host: hostile kernels on the ABI of `xen_pv`, the same that the fuzz target
//! `xen_pv_hypercalls` runs.

#![cfg(feature = "xen-pv")]
#![allow(clippy::unwrap_used)]

mod xen_pv_support;

use arbitrary::{Arbitrary, Unstructured};
use xen_pv_support::exercise::{Tally, exercise};
use xen_pv_support::guest::Kernel;

/// Bytes of one input.
const INPUT: usize = 2000;
/// Inputs that the test runs, unless the environment says `GUESTS`.
const GUESTS: u64 = 1000;

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

#[test]
fn no_kernel_breaks_the_host() {
    let count = std::env::var("GUESTS").ok().and_then(|count| count.parse().ok()).unwrap_or(GUESTS);
    let mut sum = Tally::default();
    for seed in 0..count {
        let kernel = Kernel::arbitrary(&mut Unstructured::new(&bytes(seed))).unwrap();
        sum.add(&exercise(&kernel));
    }
    eprintln!("{sum:?}");
    // The inputs are worth something.
    assert!(sum.succeeded > 1000 && sum.failed > 1000 && sum.bounced > 1000 && sum.waits > 20, "{sum:?}");
    assert!(sum.live_stores > 20 && sum.ended > 100 && sum.grants > 20 && sum.started > 20, "{sum:?}");
}

/// Writes inputs for the fuzz target `xen_pv_hypercalls` to start with.
#[test]
#[ignore = "writes the fuzz target's seeds instead of testing"]
fn write_fuzz_seeds() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus/xen_pv_hypercalls");
    std::fs::create_dir_all(corpus).unwrap();
    for seed in 0..2000 {
        std::fs::write(format!("{corpus}/{seed}"), bytes(seed)).unwrap();
    }
}
