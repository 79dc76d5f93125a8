//! Programs of a guest on the translator: work whose results are known. The same programs run longer as `soak`.

#![allow(clippy::unwrap_used, reason = "a test may panic, also in functions that it calls")]

use std::process::Command;

use vmm_examples::debian::{self, Series};

#[test]
fn programs_work_on_one_two_and_four_processors() {
    if let Err(error) = debian::kernel(Series::V6_1).and_then(|_| debian::busybox()) {
        println!("soak: skipped: {error:#}");
        return;
    }
    let output = Command::new(env!("CARGO_BIN_EXE_soak"))
        // `linux` is there, and as it is to be.
        .env_remove("CARGO")
        .args(["--on", "translate,window,no-window", "--runs", "9", "--seconds", "600"])
        .output()
        .unwrap();
    let text =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success() && text.ends_with("runs: 9 failures: 0\n"), "{text}");
}
