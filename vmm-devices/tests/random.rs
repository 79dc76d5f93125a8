//! A guest that does anything at all, on a machine with every device.

// The lint spares test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "support/machine.rs"]
mod machine;

use machine::{Action, Machine};
use proptest::prelude::*;

fn action() -> impl Strategy<Value = Action> {
    let ports = Machine::ports();
    let port = prop_oneof![9 => prop::sample::select(ports), 1 => any::<u16>()];
    let size = prop_oneof![9 => prop::sample::select(vec![1_u8, 2, 4]), 1 => 0..10_u8];
    let offset = prop_oneof![0..0x60_u16, 0xff0..0x1020_u16, any::<u16>()];
    let wide = prop_oneof![9 => 1..9_u8, 1 => any::<u8>()];
    // Values that select registers, and any other.
    let value = prop_oneof![0..0x100_u32, any::<u32>()];
    let ns = prop_oneof![0..10_000_u64, 0..3_000_000_000_u64, any::<u64>().prop_map(|ns| ns >> 8)];
    prop_oneof![
        8 => (port.clone(), size.clone(), 1..5_u8).prop_map(|(port, size, count)| Action::In { port, size, count }),
        16 => (port, size, value).prop_map(|(port, size, value)| Action::Out { port, size, value }),
        2 => (offset.clone(), wide.clone()).prop_map(|(offset, size)| Action::Load { offset, size }),
        8 => (offset, wide, any::<u64>())
            .prop_map(|(offset, size, value)| Action::Store { offset, size, value: value & 0xff_ffff }),
        4 => ns.prop_map(|ns| Action::Pass { ns }),
        4 => (0..26_u8, any::<bool>()).prop_map(|(irq, asserted)| Action::Line { irq, asserted }),
        2 => Just(Action::Acknowledge),
        2 => any::<u8>().prop_map(|vector| Action::EndOfInterrupt { vector }),
        1 => any::<u8>().prop_map(|count| Action::Input { count }),
        1 => Just(Action::PowerButton),
        1 => Just(Action::SaveAndRestore),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_a_guest_does_breaks_a_device(actions in prop::collection::vec(action(), 1..400)) {
        let machine = Machine::new();
        for action in &actions {
            machine.perform(action);
        }
        machine.perform(&Action::SaveAndRestore);
    }
}
