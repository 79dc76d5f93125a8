//! A hostile guest on a machine with every platform device: port and memory accesses, interrupts, time.

#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;

// The random test of vmm-devices uses the rest.
#[allow(dead_code)]
#[path = "../../vmm-devices/tests/support/machine.rs"]
mod machine;

use machine::{Action, Machine};

/// An [`Action`] in few bytes, most of which reach a device.
#[derive(Debug, Arbitrary)]
enum Step {
    In { port: u8, size: u8, count: u8 },
    Out { port: u8, size: u8, value: u32 },
    OutByte { port: u8, value: u8 },
    InAnywhere { port: u16, size: u8 },
    OutAnywhere { port: u16, size: u8, value: u32 },
    Load { offset: u16, size: u8 },
    Store { offset: u16, size: u8, value: u64 },
    IoApic { index: u8, value: u32 },
    Pass { ns: u32 },
    PassLong { ns: u64 },
    Line { irq: u8, asserted: bool },
    Acknowledge,
    EndOfInterrupt { vector: u8 },
    Input { count: u8 },
    PowerButton,
    SaveAndRestore,
}

impl Step {
    fn actions(&self, ports: &[u16]) -> Vec<Action> {
        let device_port = |port: u8| ports[usize::from(port) % ports.len()];
        let window = |offset: u16, value: u32| Action::Store {
            offset: Machine::BEFORE_IO_APIC as u16 + offset,
            size: 4,
            value: value.into(),
        };
        vec![match *self {
            Self::In { port, size, count } => Action::In { port: device_port(port), size, count },
            Self::Out { port, size, value } => Action::Out { port: device_port(port), size, value },
            Self::OutByte { port, value } => {
                Action::Out { port: device_port(port), size: 1, value: value.into() }
            }
            Self::InAnywhere { port, size } => Action::In { port, size, count: 1 },
            Self::OutAnywhere { port, size, value } => Action::Out { port, size, value },
            Self::Load { offset, size } => Action::Load { offset, size },
            Self::Store { offset, size, value } => Action::Store { offset, size, value },
            Self::IoApic { index, value } => return vec![window(0, index.into()), window(0x10, value)],
            Self::Pass { ns } => Action::Pass { ns: ns.into() },
            Self::PassLong { ns } => Action::Pass { ns },
            Self::Line { irq, asserted } => Action::Line { irq, asserted },
            Self::Acknowledge => Action::Acknowledge,
            Self::EndOfInterrupt { vector } => Action::EndOfInterrupt { vector },
            Self::Input { count } => Action::Input { count },
            Self::PowerButton => Action::PowerButton,
            Self::SaveAndRestore => Action::SaveAndRestore,
        }]
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let (machine, ports) = (Machine::new(), Machine::ports());
    for action in steps.iter().flat_map(|step| step.actions(&ports)) {
        machine.perform(&action);
    }
    machine.perform(&Action::SaveAndRestore);
});
