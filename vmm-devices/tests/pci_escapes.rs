//! Public flaws of device models, as tests of the PCI host bridge; `escapes.md` says which flaw is tested where.

// The lint spares test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation)]

// The random test uses the rest.
#[allow(dead_code)]
#[path = "support/pci_machine.rs"]
mod pci_machine;

use pci_machine::{Action, Machine, ROM};
use vmm_devices::BusRange;
use vmm_devices::pci::{BarKind, BarStatus, HostBridgeState};
use vmm_devices::vmm_memory::vm_memory::GuestAddress;

/// With every BAR decoded where it was put.
fn machine() -> Machine {
    let machine = Machine::new();
    for function in 0..3 {
        machine.perform(&Action::Command { function, value: 7 });
    }
    assert!(machine.bridge.mappings().iter().filter(|m| m.status == BarStatus::Mapped).count() > 3);
    machine
}

/// The ranges of the BARs that are mapped, in memory or as ports.
fn bars(machine: &Machine, io: bool) -> Vec<BusRange> {
    let mappings = machine.bridge.mappings().into_iter();
    let mapped = mappings.filter(|m| m.status == BarStatus::Mapped && (matches!(m.kind, BarKind::Io)) == io);
    mapped.map(|mapping| mapping.range).collect()
}

/// CVE-2014-7188: ranges that were a little too wide. Configuration space both ways and each BAR, a few bytes around both ends,
/// with each size: claimed is what lies within, and the rest is all ones.
#[test]
fn cve_2014_7188_ranges_end_where_they_say() {
    let machine = machine();
    let mut memory = bars(&machine, false);
    memory.extend([machine.layout.ecam_range(), ROM]);
    let inside = |ranges: &[BusRange], at: u64| {
        ranges.iter().any(|range| range.base <= at && at - range.base < range.size)
    };
    for range in &memory {
        let end = range.base + range.size;
        for at in (range.base - 9..=range.base).chain(end - 9..end + 9) {
            for size in 1..=8 {
                let mut data = vec![0; size];
                let claimed = machine.mmio.read(GuestAddress(at), &mut data);
                assert_eq!(claimed, (at..at + size as u64).all(|at| inside(&memory, at)), "{at:#x}, {size}");
                for (at, byte) in (at..).zip(data) {
                    assert!(inside(&memory, at) || byte == 0xff, "{at:#x}");
                }
            }
        }
    }
    let mut ports = bars(&machine, true);
    ports.push(BusRange::new(0xcf8, 8));
    for range in &ports {
        let end = range.base + range.size;
        for at in (range.base - 5..=range.base).chain(end - 5..end + 5) {
            for size in [1, 2, 4_u16] {
                let mut data = vec![0; size.into()];
                let claimed = machine.pio.read(at as u16, size.into(), &mut data);
                assert_eq!(
                    claimed,
                    (at..at + u64::from(size)).all(|at| inside(&ports, at)),
                    "{at:#x}, {size}"
                );
                for (at, byte) in (at..).zip(data) {
                    assert!(inside(&ports, at) || byte == 0xff, "{at:#x}");
                }
            }
        }
    }
}

/// Cloud Hypervisor #7917: an index that selects beyond what there is. Every function of every bus, every register, read and
/// written by ports and by memory: nobody answers but those that are there.
#[test]
fn cloud_hypervisor_7917_any_function_can_be_selected() {
    let machine = machine();
    let (before, state) = (machine.bridge.mappings(), machine.bridge.state().config);
    let there = [0x00_u32, 0x08, 0x10, 0x13];
    for bus in [0_u32, 1, 2, 0x7f, 0x80, 0xff] {
        for devfn in 0..=0xff_u32 {
            let nobody = bus != 0 || !there.contains(&devfn);
            for register in (0..0x100_u32).step_by(4) {
                let address = 0x8000_0000 | bus << 16 | devfn << 8 | register;
                // The reserved bits as well.
                machine.pio.write(0xcf8, 4, &(address | 0x7f00_0003).to_le_bytes());
                let mut data = [0; 4];
                machine.pio.read(0xcfc, 4, &mut data);
                assert!(!nobody || data == [0xff; 4], "{address:#x}");
                if nobody {
                    machine.pio.write(0xcfc, 4, &[0xff; 4]);
                }
            }
        }
    }
    for devfn in (0..=0xff_u64).filter(|devfn| !there.contains(&(*devfn as u32))) {
        for register in (0..0x1000).step_by(64) {
            let at = GuestAddress(machine.layout.ecam.0 + (devfn << 12) + register);
            machine.mmio.write(at, &[0; 8]);
            let mut data = [0; 8];
            machine.mmio.read(at, &mut data);
            assert_eq!(data, [0xff; 8], "{at:?}");
        }
    }
    assert_eq!((machine.bridge.mappings(), machine.bridge.state().config), (before, state));
}

/// crosvm 002cd87a0: every byte of every BAR through the bus, that with MSI-X among them, with each size.
#[test]
fn crosvm_002cd87a0_every_bar_is_swept() {
    let machine = machine();
    for range in bars(&machine, false).into_iter().filter(|range| range.size <= 0x4000) {
        for offset in 0..range.size + 8 {
            for size in [1, 2, 4, 8] {
                let at = GuestAddress(range.base + offset);
                machine.mmio.write(at, &vec![0xff; size]);
                machine.mmio.read(at, &mut vec![0; size]);
            }
        }
    }
    machine.perform(&Action::SaveAndRestore);
}

/// CVE-2020-14364: a state that was changed before it was validated. A refused state leaves the old one.
#[test]
fn cve_2020_14364_a_refused_state_changes_nothing() {
    let machine = machine();
    machine.pio.write(0xcf8, 4, &0x8000_0810_u32.to_le_bytes());
    let (state, mappings) = (machine.bridge.state(), machine.bridge.mappings());
    let mut bad: [HostBridgeState; 2] = [state.clone(), state.clone()];
    bad[0].config_address = 0x0100_0000;
    (bad[1].config_address, bad[1].config.ids) = (0x8000_0004, 0);
    for bad in bad {
        machine.bridge.restore(&bad).unwrap_err();
        assert_eq!((machine.bridge.state(), machine.bridge.mappings()), (state.clone(), mappings.clone()));
    }
}
