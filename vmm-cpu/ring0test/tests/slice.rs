//! A slice of what `ring0_versus_qemu` does, where there is a QEMU.

use vmm_ring0test::{Options, Summary, TOPICS, compare, engines};

#[test]
fn a_slice_of_each_topic_agrees_with_qemu() {
    let Some(version) = engines::version() else {
        eprintln!("skipped: no {} (Debian's package qemu-system-x86)", engines::QEMU);
        return;
    };
    let options = Options { seed: 7, from: 0, rounds: 250, topic: None, told: 5 };
    let expected = Summary { scenarios: 250 * TOPICS.len() as u64, mismatches: 0 };
    assert_eq!(compare(&options).unwrap(), expected, "{version}");
}
