//! A hostile guest on a block device over MMIO: registers, rings and requests, while the monitor resizes the disk.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../vmm-devices/tests/support/block.rs"]
mod block;

fuzz_target!(|actions: Vec<block::Action>| {
    block::exercise(&actions);
});
