//! A hostile guest of the interpreter or of the translator, with its address window or without, as the input chooses: code,
//! registers, page and descriptor tables, model-specific registers, and a VMM that answers at random and changes the machine
//! under it. Or a guest of all of them, which must come to the same.

#![no_main]

use std::sync::atomic::{AtomicU64, Ordering};

use libfuzzer_sys::fuzz_target;

// The robustness test of vmm-cpu uses the rest.
#[path = "../../vmm-cpu/tests/translate_support/mod.rs"]
mod translate_support;

use translate_support::exercise::exercise;
use translate_support::guest::Guest;
use translate_support::resident;

/// Inputs between two looks at the resident memory.
const LOOK: u64 = 4096;
/// How much it may grow after the first look: the sanitizer's quarantine and the fuzzer's corpus are in it.
const GROWTH: u64 = 1 << 30;

fn check_growth() {
    static INPUTS: AtomicU64 = AtomicU64::new(0);
    static FIRST: AtomicU64 = AtomicU64::new(0);
    let inputs = INPUTS.fetch_add(1, Ordering::Relaxed);
    if inputs % LOOK == LOOK - 1 {
        let now = resident();
        let first = FIRST.load(Ordering::Relaxed);
        if first == 0 {
            FIRST.store(now, Ordering::Relaxed);
        } else {
            assert!(now < first + GROWTH, "resident memory has grown from {first} to {now} bytes");
        }
    }
}

fuzz_target!(|guest: Guest| {
    exercise(&guest);
    check_growth();
});
