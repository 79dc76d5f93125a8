//! A guest that does anything at all to a PCI host bridge and its functions. After each step every BAR that answers
//! lies in a window, touches nobody, and is whose it says; and functions are who they were.

// The lint spares test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::indexing_slicing)]

#[path = "support/pci_machine.rs"]
mod pci_machine;

use pci_machine::{Action, Machine};
use proptest::prelude::*;

fn action() -> impl Strategy<Value = Action> {
    let size = || prop_oneof![9 => prop::sample::select(vec![1_u8, 2, 4, 8]), 1 => any::<u8>()];
    // Mostly where the functions are.
    let offset = prop_oneof![
        4 => (prop::sample::select(vec![0x8000_u32, 0x1_0000, 0x1_3000]), 0..0x180_u32).prop_map(|(base, at)| base + 0x10 + at),
        1 => any::<u32>(),
    ];
    let bar = || prop_oneof![0x800..0xa20_u16, 0..0x20_u16, 0xc00..0xc18_u16, any::<u16>()];
    let function = || 0..3_u8;
    let pci_address = (prop::sample::select(vec![0_u32, 0x800, 0x1000, 0x1300]), 0..0x100_u32)
        .prop_map(|(devfn, register)| 1 << 31 | devfn | register);
    let out = prop_oneof![
        pci_address.prop_map(|value| Action::Out { port: 0, size: 4, value }),
        (any::<u8>(), prop::sample::select(vec![1_u8, 2, 4]), any::<u32>())
            .prop_map(|(port, size, value)| Action::Out { port, size, value }),
    ];
    prop_oneof![
        2 => (offset.clone(), size()).prop_map(|(offset, size)| Action::LoadConfig { offset, size }),
        4 => (offset, size(), any::<u64>())
            .prop_map(|(offset, size, value)| Action::StoreConfig { offset, size, value }),
        1 => (any::<u8>(), any::<u8>()).prop_map(|(port, size)| Action::In { port, size }),
        4 => out,
        2 => (function(), 0..0x60_u8, any::<u32>())
            .prop_map(|(function, register, value)| Action::Configure { function, register, value }),
        8 => (function(), any::<u8>(), any::<u8>())
            .prop_map(|(function, bar, place)| Action::Move { function, bar, place }),
        4 => (function(), prop_oneof![4 => Just(7_u16), 1 => any::<u16>()])
            .prop_map(|(function, value)| Action::Command { function, value }),
        2 => (function(), 0..6_u8, bar(), size())
            .prop_map(|(function, bar, offset, size)| Action::Load { function, bar, offset, size }),
        4 => (function(), 0..6_u8, bar(), size(), any::<u64>())
            .prop_map(|(function, bar, offset, size, value)| Action::Store { function, bar, offset, size, value }),
        2 => (0..40_u16).prop_map(|vector| Action::Notify { vector }),
        2 => (function(), any::<bool>()).prop_map(|(function, asserted)| Action::Pin { function, asserted }),
        2 => (function(), prop::bool::weighted(0.7))
            .prop_map(|(function, present)| Action::Plug { function, present }),
        1 => Just(Action::Reset),
        1 => Just(Action::SaveAndRestore),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_a_guest_does_breaks_the_bridge(actions in prop::collection::vec(action(), 1..200)) {
        let machine = Machine::new();
        for action in &actions {
            machine.perform(action);
        }
        machine.perform(&Action::SaveAndRestore);
    }
}
