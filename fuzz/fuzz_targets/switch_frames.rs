//! Hostile guests on a switch, and hostile clients of its broker: frames, VLANs, segmentation, rings, messages, descriptors.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../vmm-devices/tests/support/switch.rs"]
mod switch;
mod threads;

fuzz_target!(|actions: Vec<switch::Action>| {
    threads::settled(|| switch::exercise(&actions));
});
