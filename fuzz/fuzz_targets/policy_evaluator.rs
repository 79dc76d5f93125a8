//! A policy that mostly means something, and requests: the table says what the rules say one by one, and analyses end.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../vmm-policy/tests/support/words.rs"]
mod words;

fuzz_target!(|bytes: &[u8]| {
    words::exercise(bytes);
});
