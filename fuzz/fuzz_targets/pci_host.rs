//! A hostile guest on a PCI host bridge: configuration space both ways, BARs that move, MSI-X, pins, functions that come and go.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;

// The random test of vmm-devices uses the rest.
#[allow(dead_code)]
#[path = "../../vmm-devices/tests/support/pci_machine.rs"]
mod pci_machine;

use pci_machine::{Action, Machine};

/// An [`Action`] in few bytes, most of which reach a function.
#[derive(Debug, Arbitrary)]
enum Step {
    LoadConfig { offset: u32, size: u8 },
    StoreConfig { offset: u32, size: u8, value: u64 },
    In { port: u8, size: u8 },
    Out { port: u8, size: u8, value: u32 },
    Select { function: u8, register: u8 },
    Configure { function: u8, register: u8, value: u32 },
    Move { function: u8, bar: u8, place: u8 },
    Command { function: u8, value: u16 },
    Decode { function: u8, bits: u8 },
    Load { function: u8, bar: u8, offset: u16, size: u8 },
    Store { function: u8, bar: u8, offset: u16, size: u8, value: u64 },
    Notify { vector: u8 },
    Pin { function: u8, asserted: bool },
    Plug { function: u8, present: bool },
    Reset,
    SaveAndRestore,
}

impl Step {
    fn action(&self) -> Action {
        match *self {
            Self::LoadConfig { offset, size } => Action::LoadConfig { offset, size },
            Self::StoreConfig { offset, size, value } => Action::StoreConfig { offset, size, value },
            Self::In { port, size } => Action::In { port, size },
            Self::Out { port, size, value } => Action::Out { port, size, value },
            Self::Select { function, register } => {
                let devfn = [0_u32, 0x08, 0x10, 0x13][usize::from(function % 4)];
                Action::Out { port: 0, size: 4, value: 1 << 31 | devfn << 8 | u32::from(register) }
            }
            Self::Configure { function, register, value } => Action::Configure { function, register, value },
            Self::Move { function, bar, place } => Action::Move { function, bar, place },
            Self::Command { function, value } => Action::Command { function, value },
            Self::Decode { function, bits } => Action::Command { function, value: (bits & 7).into() },
            Self::Load { function, bar, offset, size } => {
                Action::Load { function, bar: bar % 6, offset, size }
            }
            Self::Store { function, bar, offset, size, value } => {
                Action::Store { function, bar: bar % 6, offset, size, value }
            }
            Self::Notify { vector } => Action::Notify { vector: vector.into() },
            Self::Pin { function, asserted } => Action::Pin { function, asserted },
            Self::Plug { function, present } => Action::Plug { function, present },
            Self::Reset => Action::Reset,
            Self::SaveAndRestore => Action::SaveAndRestore,
        }
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let machine = Machine::new();
    for step in &steps {
        machine.perform(&step.action());
    }
    machine.perform(&Action::SaveAndRestore);
});
