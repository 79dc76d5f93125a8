//! Hostile guests on a switch whose flows are judged, beside a model.

#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../vmm-devices/tests/support/flows.rs"]
mod flows;

fuzz_target!(|actions: Vec<flows::Action>| {
    flows::exercise(&actions);
});
