//! Public flaws of device models, as tests of the platform devices. Each names the flaw and what must not happen here. `escapes.md`
//! says which flaw is tested where, for these and all other devices.

// The lint spares test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

// The random test uses the rest.
#[allow(dead_code)]
#[path = "support/machine.rs"]
mod machine;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use machine::{Action, Machine};
use vmm_devices::platform::ports;
use vmm_devices::platform::serial::INPUT_CAPACITY;
use vmm_devices::vmm_memory::vm_memory::GuestAddress;

/// CVE-2015-3456: a FIFO whose index was not reset in one of its states. Every queue is overfilled in every mode that the
/// guest can choose for it.
#[test]
fn fifos_are_overfilled_in_every_state() {
    for modem_control in 0..=0x1f {
        for interrupts in 0..=0xf {
            for fifo_control in [0, 1, 7, 0xc7] {
                let machine = Machine::new();
                for (register, value) in [(4, modem_control), (1, interrupts), (2, fifo_control)] {
                    machine.pio.write(0x3f8 + register, 1, &[value]);
                }
                machine.pio.write(0x3f8, 1, &[b'o'; 3 * INPUT_CAPACITY]);
                machine.perform(&Action::Input { count: 255 });
                machine.pio.write(0x3f8, 1, b"o");
                let uart = machine.uart.lock().unwrap();
                assert!(uart.state().input.len() <= INPUT_CAPACITY);
            }
        }
    }
    // The keyboard controller's queue is one byte, in whatever command one is in the middle of.
    for command in 0..=0xff {
        let machine = Machine::new();
        for _ in 0..4 {
            machine.pio.write(0x64, 1, &[command]);
            machine.pio.write(0x60, 1, &[0xff; 64]);
        }
        machine.pio.read(0x60, 1, &mut [0]);
        assert_eq!(machine.i8042.lock().unwrap().state().output, None);
    }
}

/// CVE-2020-27174: a serial port that kept whatever nobody read. A megabyte in each direction leaves 64 bytes.
#[test]
fn a_flood_with_no_reader_is_not_kept() {
    let machine = Machine::new();
    let flood = vec![b'x'; 1 << 20];
    let mut uart = machine.uart.lock().unwrap();
    assert_eq!(uart.enqueue(&flood), INPUT_CAPACITY);
    for _ in 0..1000 {
        assert_eq!(uart.enqueue(&flood), 0);
    }
    drop(uart);
    assert!(machine.pio.write(0x3f8, 1, &flood));
    // Looped back, so that output becomes input.
    machine.pio.write(0x3fc, 1, &[0x10]);
    assert!(machine.pio.write(0x3f8, 1, &flood));
    assert_eq!(machine.uart.lock().unwrap().state().input.len(), INPUT_CAPACITY);
    // And events that nobody takes leave nothing in the devices that report them.
    assert!(machine.pio.write(0x64, 1, &vec![0xfe; 1 << 16]));
}

/// CVE-2014-7188 and crosvm 002cd87a0: ranges that were a little too wide. Every port and every offset around each
/// range, with each access size: what is beyond is all ones, and what is written there arrives nowhere.
#[test]
fn ranges_end_where_they_say() {
    let machine = Machine::new();
    let claimed: Vec<u16> = {
        let single = [ports::COM1, ports::RTC, ports::ACPI_PM, ports::DEBUG_EXIT];
        let ranges = ports::PIC.iter().chain(&ports::PIT).chain(&ports::I8042).chain(&single);
        ranges.flat_map(|range| range.base..range.base + range.size).map(|port| port as u16).collect()
    };
    for port in 0..=0xffff_u16 {
        for size in [1, 2, 4_u16] {
            let mut data = [0; 4];
            let data = &mut data[..size.into()];
            let expected = (0..size).all(|i| port.checked_add(i).is_some_and(|port| claimed.contains(&port)));
            assert_eq!(machine.pio.read(port, size.into(), data), expected, "{port:#x}, {size}");
            for (i, byte) in (0..).zip(data.iter()) {
                let inside = port.checked_add(i).is_some_and(|port| claimed.contains(&port));
                assert!(inside || *byte == 0xff, "{port:#x} + {i}");
            }
        }
    }
    let before = machine.io_apic.state();
    let (base, end) = (ports::IO_APIC.base, ports::IO_APIC.base + ports::IO_APIC.size);
    for gpa in (base - 9..base).chain(base + 0x20..base + 0x40).chain(base + 0x41..end + 9) {
        for size in 1..=8 {
            if gpa + size as u64 <= base || gpa >= base {
                machine.mmio.write(GuestAddress(gpa), &vec![0xa5; size]);
            }
            let mut data = vec![0; size];
            machine.mmio.read(GuestAddress(gpa), &mut data);
            if gpa + size as u64 <= base || gpa >= base + 0x20 {
                assert_eq!(data, vec![0xff; size], "{gpa:#x}");
            }
        }
    }
    assert_eq!(machine.io_apic.state(), before);
}

/// Cloud Hypervisor #7917: an index register that selects beyond the table. All 256 values, read and written.
#[test]
fn index_registers_select_nothing_beyond_the_table() {
    let machine = Machine::new();
    let window = |offset: u64| GuestAddress(ports::IO_APIC.base + offset);
    for index in (3..=0xf).chain(0x40..=0xff) {
        let before = machine.io_apic.state();
        machine.mmio.write(window(0), &[index, 0, 0, 0]);
        machine.mmio.write(window(0x10), &[0xff; 4]);
        let mut data = [0; 4];
        machine.mmio.read(window(0x10), &mut data);
        assert_eq!(data, [0; 4]);
        assert_eq!(machine.io_apic.state().entries, before.entries);
    }
    for index in 0..=0xff {
        machine.pio.write(0x70, 1, &[index]);
        machine.pio.write(0x71, 1, &[0xff]);
        machine.pio.read(0x71, 1, &mut [0]);
    }
}

/// CVE-2020-14364: a state that was changed before it was validated. A refused state leaves the old one.
#[test]
fn a_refused_state_changes_nothing() {
    let machine = Machine::new();
    for port in Machine::ports() {
        machine.pio.write(port, 1, &[0x35]);
    }
    let pit = machine.pit.lock().unwrap().state();
    let mut bad = pit.clone();
    // The last thing that is looked at.
    bad.channels[2].next_count = Some(0x1_0001);
    bad.channels[0].count = 5;
    assert!(machine.pit.lock().unwrap().restore(&bad).is_err());
    assert_eq!(machine.pit.lock().unwrap().state(), pit);

    let io_apic = machine.io_apic.state();
    let mut bad = io_apic.clone();
    (bad.id, bad.entries[23]) = (7, u64::MAX);
    assert!(machine.io_apic.restore(&bad).is_err());
    assert_eq!(machine.io_apic.state(), io_apic);
}

/// All Rust files under a folder, one after the other.
fn sources(folder: &Path) -> String {
    let mut all = String::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all += &sources(&path);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            all += &fs::read_to_string(path).unwrap();
        }
    }
    all
}

/// `a::{b,c}::d` is `a::b::d` and `a::c::d`.
fn expand(name: &str) -> Vec<String> {
    let Some((before, rest)) = name.split_once('{') else { return vec![name.to_owned()] };
    let (choices, after) = rest.split_once('}').unwrap();
    choices.split(',').map(|choice| format!("{before}{choice}{after}")).collect()
}

/// Each test and each patch that `escapes.md` names is there, and so is each patch, and each test that a patch names, in the
/// table.
#[test]
fn the_table_names_what_there_is() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let sources = sources(&root.join("src")) + &sources(&root.join("tests"));
    let table = fs::read_to_string(root.join("tests/escapes.md")).unwrap();
    // Every second piece is between back quotes.
    let named: Vec<&str> = table
        .lines()
        .filter(|line| line.starts_with("| "))
        .flat_map(|line| line.split('`').skip(1).step_by(2))
        .collect();
    let tests: BTreeSet<String> =
        named.iter().filter(|name| name.contains("::")).flat_map(|name| expand(name)).collect();
    assert!(tests.len() > 80, "{}", tests.len());
    for test in &tests {
        let function = test.rsplit("::").next().unwrap();
        assert!(sources.contains(&format!("fn {function}(")), "{test} is no test");
    }
    // A package comes without patches.
    let Ok(patches) = fs::read_dir(root.join("tests/flaws")) else { return };
    let names = patches.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let there: BTreeSet<String> = names.filter(|name| name.ends_with(".patch")).collect();
    let named = named.iter().filter(|name| name.ends_with(".patch")).map(|name| (*name).to_owned());
    assert_eq!(named.collect::<BTreeSet<_>>(), there);
    for patch in there {
        let text = fs::read_to_string(root.join("tests/flaws").join(&patch)).unwrap();
        for test in text.lines().filter_map(|line| line.strip_prefix("Test: ")) {
            assert!(tests.contains(test), "{patch}: {test} is not in the table");
        }
    }
}
