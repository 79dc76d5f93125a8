use super::*;
use crate::interrupt::testing::Recorder;
use crate::interrupt::{InterruptLine as _, WiredOr};
use crate::pci::capability::id;

const IDENTITY: Identity =
    Identity::new(0x1af4, 0x1041, [0x02, 0x00, 0x01]).revision(1).subsystem(0x1af4, 0x40);

fn builder() -> ConfigBuilder {
    let mut config = ConfigBuilder::new(IDENTITY);
    config.bar(0, Bar::memory32(0x1000)).unwrap();
    config.bar(1, Bar::io(0x20)).unwrap();
    config.bar(2, Bar::memory64(0x2_0000_0000).prefetchable()).unwrap();
    config.interrupt_pin(InterruptPin::B);
    config
}

fn read<const N: usize>(config: &ConfigSpace, offset: u16) -> [u8; N] {
    let mut data = [0xff; N];
    config.read(offset, &mut data);
    data
}

fn write_register(config: &mut ConfigSpace, offset: u16, value: u32) {
    config.write(offset, &value.to_le_bytes());
}

#[test]
fn the_header_says_who_it_is() {
    let config = builder().build();
    assert_eq!(config.register(0x00), 0x1041_1af4);
    assert_eq!(config.register(0x08), 0x0200_0101);
    assert_eq!(config.register(0x0c), 0);
    assert_eq!(config.register(0x2c), 0x0040_1af4);
    assert_eq!(config.register(0x3c), 0x200);
    assert_eq!([0x10, 0x14, 0x18, 0x1c, 0x20].map(|bar| config.register(bar)), [0, 1, 0b1100, 0, 0]);
    assert_eq!(config.register(CONFIG_SIZE), u32::MAX);
}

#[test]
fn every_width_and_alignment_gives_the_bytes_that_it_touches() {
    let mut config = builder().build();
    assert_eq!(read(&config, 0x01), [0x1a]);
    assert_eq!(read(&config, 0x01), [0x1a, 0x41]);
    assert_eq!(read(&config, 0x03), [0x10, 0xff, 0xff, 0xff], "beyond the register it is left alone");
    config.write(0x3c, &[5]);
    assert_eq!(config.register(0x3c), 0x205);
    config.write(0x3d, &[9, 9, 9, 9]);
    assert_eq!((config.register(0x3c), config.register(0x40)), (0x205, 0), "read-only, and beyond");
    config.write(0x11, &[0x23, 0x45]);
    assert_eq!(config.register(0x10), 0x45_2000);
    for offset in [CONFIG_SIZE, u16::MAX] {
        assert_eq!(config.write(offset, &[1]), None);
        assert_eq!(read(&config, offset), [0xff]);
    }
    assert_eq!(config.write(0x10, &[]), None);
}

#[test]
fn only_what_is_writable_changes() {
    let mut config = builder().build();
    for offset in (0..CONFIG_SIZE).step_by(4) {
        write_register(&mut config, offset, u32::MAX);
    }
    let expected = |offset| match offset {
        0x00 => 0x1041_1af4,
        0x04 => 0x0000_0547,
        0x08 => 0x0200_0101,
        0x0c => 0xff,
        0x10 => 0xffff_f000,
        0x14 => 0xffff_ffe1,
        // 8 GiB: nothing of the low half is address.
        0x18 => 0b1100,
        0x1c => 0xffff_fffe,
        0x2c => 0x0040_1af4,
        0x3c => 0x2ff,
        _ => 0,
    };
    for offset in (0..CONFIG_SIZE).step_by(4) {
        assert_eq!(config.register(offset), expected(offset), "{offset:#x}");
    }
    // A function without ports has no bit to switch them on, one without BARs neither.
    let mut bare = ConfigBuilder::new(IDENTITY).build();
    write_register(&mut bare, 4, u32::MAX);
    assert_eq!(bare.register(4), 0x544);
    config.reset();
    assert_eq!(config.state(), builder().build().state());
}

#[test]
fn bars_are_sized_and_decoded() {
    let mut config = builder().build();
    config.place_bar(2, 0x45_0000_0000);
    config.place_bar(0, 0xe800_1000);
    assert_eq!(config.bar_base(2), Some(0x44_0000_0000), "aligned as it must be");
    // Sizing, as a kernel does it.
    let saved = config.register(0x10);
    write_register(&mut config, 0x10, u32::MAX);
    let size = !(config.register(0x10) & !0xf) + 1;
    write_register(&mut config, 0x10, saved);
    assert_eq!((size, config.bar_base(0)), (0x1000, Some(0xe800_1000)));

    assert_eq!([0, 1, 2, 3].map(|bar| config.decoded(bar)), [None; 4]);
    write_register(&mut config, 4, 2);
    assert_eq!(config.decoded(0), Some(BusRange::new(0xe800_1000, 0x1000)));
    assert_eq!(config.decoded(1), None, "ports are another bit");
    assert_eq!(config.decoded(2), Some(BusRange::new(0x44_0000_0000, 0x2_0000_0000)));
    assert_eq!((config.decoded(3), config.bar_base(6)), (None, None), "the high half, and none");
    write_register(&mut config, 4, 1);
    assert_eq!(config.decoded(1), Some(BusRange::new(0, 0x20)));
    write_register(&mut config, 0x10, 0xc000_0000);
    config.reset();
    assert_eq!((config.bar_base(0), config.decoded(0)), (Some(0xe800_1000), None));
}

#[test]
fn bars_share_no_register() {
    for index in [0, 1, 2, 3, 6, usize::MAX] {
        let error = builder().bar(index, Bar::memory32(16)).unwrap_err();
        assert_eq!(error, PciError::BarIndex { bar: index, kind: BarKind::Memory32 });
    }
    let mut config = builder();
    assert!(matches!(config.bar(5, Bar::memory64(16)), Err(PciError::BarIndex { .. })));
    config.bar(4, Bar::memory64(16)).unwrap();
    let mut config = ConfigBuilder::new(IDENTITY);
    config.bar(1, Bar::io(4)).unwrap();
    assert!(matches!(config.bar(0, Bar::memory64(16)), Err(PciError::BarIndex { .. })));
}

/// The capabilities as a kernel finds them: offset and header of each.
fn walk(config: &ConfigSpace) -> Vec<(u16, u32)> {
    let mut found = Vec::new();
    let [mut next] = read(config, 0x34);
    while next != 0 {
        let header = config.register(next.into());
        found.push((u16::from(next), header & 0xffff_00ff));
        next = header.to_le_bytes()[1];
    }
    let mut next = 0x100;
    while next != 0 && config.register(next) != 0 {
        let header = config.register(next);
        found.push((next, header & 0xf_ffff));
        next = (header >> 20) as u16;
    }
    found
}

#[test]
fn capabilities_are_in_their_lists() {
    let bare = builder().build();
    assert_eq!((walk(&bare), bare.register(4) & CAPABILITIES_LIST), (vec![], 0));

    let mut config = builder();
    let first = config.capability(Capability::new(id::VENDOR, [9, 1, 2, 3, 4, 5, 6])).unwrap();
    let serial = config.capability(Capability::extended(3, 1, [0; 8])).unwrap();
    let second = config.capability(Capability::new(id::PCI_EXPRESS, [])).unwrap();
    let last = config.capability(Capability::extended(0xb, 0xf1, [7])).unwrap();
    assert_eq!([first, second, serial, last].map(CapabilityOffset::get), [0x40, 0x4c, 0x100, 0x10c]);
    let config = config.build();
    let expected = [(0x40, 0x0109_0009), (0x4c, 0x10), (0x100, 0x1_0003), (0x10c, 0x1_000b)];
    assert_eq!(walk(&config), expected);
    assert_ne!(config.register(4) & CAPABILITIES_LIST, 0);
    assert_eq!(read(&config, 0x42), [9, 1]);
    assert_eq!((config.register(0x44), config.register(0x48)), (0x0504_0302, 6));
    assert_eq!(config.register(0x110), 7);
}

#[test]
fn capabilities_end_where_their_space_does() {
    let mut config = builder();
    config.capability(Capability::new(id::VENDOR, [0; 0xb8])).unwrap();
    let error = config.capability(Capability::new(id::VENDOR, [0; 3])).unwrap_err();
    assert_eq!(error, PciError::CapabilityRoom { size: 8, room: 4 });
    let at = config.capability(Capability::new(id::VENDOR, [0; 2])).unwrap();
    assert_eq!(at.get(), 0xfc);
    assert!(config.capability(Capability::new(id::VENDOR, [])).is_err());
    assert!(config.capability(Capability::extended(1, 1, [0; 0xf00])).is_err());
    config.capability(Capability::extended(1, 1, [0; 0xefc])).unwrap();
    assert!(config.capability(Capability::extended(1, 1, [])).is_err());
    let config = config.build();
    assert_eq!(walk(&config).len(), 3);
}

#[test]
fn a_write_of_a_capability_is_masked_and_told() {
    let mut config = builder();
    let other = config.capability(Capability::new(id::VENDOR, [0xa5; 2])).unwrap();
    let capability = Capability::new(id::VENDOR, [0, 0x11, 0xff, 0xff, 0x22])
        .writable([0xff, 0x0f, 0x1f, 0, 0, 0xff, 0xff])
        .cleared_by_one([0, 0, 0xf0, 0x01]);
    let at = config.capability(capability).unwrap();
    let mut config = config.build();
    assert_eq!(config.write(other.get(), &[0; 4]).map(|write| write.capability), Some(other));
    assert_eq!(config.register(other.get()), 0xa5a5_4409, "read-only");
    assert_eq!(config.write(0x3c, &[1]), None, "no capability");

    let write = config.write(at.get() + 2, &[0x33, 0x44]).unwrap();
    assert_eq!((write.capability, write.offset, write.size), (at, 2, 2));
    assert_eq!(config.register(at.get()), 0x1433_0009);
    assert!(write.reaches(at, 3) && !write.reaches(at, 1) && !write.reaches(at, 4));
    assert!(!write.reaches(other, 3));

    assert_eq!(config.register(at.get() + 4), 0x22_ffff);
    write_register(&mut config, at.get() + 4, 0x0000_0000);
    assert_eq!(config.register(at.get() + 4), 0x22_fff0, "ones clear, zeros do not");
    config.write(at.get() + 4, &[0x50]);
    assert_eq!(config.register(at.get() + 4), 0x22_ffa0);
    write_register(&mut config, at.get() + 4, u32::MAX);
    assert_eq!(config.register(at.get() + 4), 0x22_fe0f, "a mask does not reach beyond the body");

    config.set_register(at.get() + 4, 0xf1);
    assert_eq!(config.register(at.get() + 4), 0x22_fef1);
    let before = config.state();
    config.set_register(0, 0);
    config.set_register(CONFIG_SIZE, 0);
    assert_eq!(config.state(), before);
    config.reset();
    assert_eq!(config.register(at.get() + 4), 0x22_ffff);
}

#[test]
fn errors_are_cleared_by_ones() {
    let mut config = builder().build();
    config.set_register(4, 1 << 31 | 1 << 27 | 2);
    assert_eq!(config.register(4), 1 << 31 | 1 << 27 | 2);
    config.write(6, &[0, 0x08]);
    assert_eq!(config.register(4), 1 << 31 | 2);
}

#[test]
fn the_pin_shows_in_the_status_and_obeys_the_command() {
    let line = Recorder::default();
    let mut config = builder().build();
    assert_eq!(config.pin(), 1);
    let intx = config.intx().unwrap().clone();
    intx.connect(Some(WiredOr::new(line.clone()).input()));
    intx.set_level(true);
    assert_eq!((line.take(), config.register(4)), (vec![true], INTERRUPT_STATUS));
    config.write(5, &[4]);
    assert_eq!((line.take(), read(&config, 6)), (vec![false], [8]), "disabled, and still there");
    let state = config.state();
    config.reset();
    assert_eq!(line.take(), [true]);
    config.restore(&state).unwrap();
    assert_eq!(line.take(), [false]);
    config.write(4, &[0, 0]);
    intx.set_level(false);
    assert_eq!((line.take(), config.register(4)), (vec![true, false], 0));
    assert!(ConfigBuilder::new(IDENTITY).build().intx().is_none());
}

#[test]
fn a_state_is_of_one_function() {
    let mut config = builder().build();
    write_register(&mut config, 4, 7);
    write_register(&mut config, 0x10, 0xe900_0000);
    write_register(&mut config, 0x1c, 0x44);
    let state = config.state();
    let mut other = builder().build();
    other.restore(&state).unwrap();
    assert_eq!(other.state(), state);
    assert_eq!(other.bar_base(2), Some(0x44_0000_0000));

    let before = ConfigState { ids: state.ids, ..builder().build().state() };
    let mut fresh = builder().build();
    let mut refused = |change: fn(&mut ConfigState), field: &str| {
        let mut bad = state.clone();
        change(&mut bad);
        let error = fresh.restore(&bad).unwrap_err();
        assert_eq!(error.field, field);
        assert_eq!(fresh.state(), before);
    };
    refused(|state| state.ids ^= 1, "ids");
    refused(|state| state.registers.truncate(3), "number of registers");
    refused(|state| state.registers.swap(0, 1), "offset");
    refused(|state| state.registers[0].0 = 0, "offset");
    // The last thing that is looked at: a bit of a BAR's size.
    refused(|state| state.registers.last_mut().unwrap().1 |= 1 << 16, "register");
}
