//! A hostile driver of a console with many ports over MMIO: registers, rings, control messages, configuration. The monitor adds,
//! removes, opens, closes and feeds ports meanwhile.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm_devices::testkit::Action;

#[path = "../../vmm-devices/tests/support/console.rs"]
mod console;

fuzz_target!(|input: (u64, Vec<u16>, Vec<Action>)| {
    let (features, steps, actions) = input;
    let mut all = vec![Action::Start { features: features ^ 3, size: 4 }, console::messages()];
    all.extend(actions);
    console::run(&all, steps);
});
