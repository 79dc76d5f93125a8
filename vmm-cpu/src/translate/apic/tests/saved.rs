//! The portable state.

use super::*;
use crate::error::Error;
use crate::state::LocalApicState;

/// A guest with something in every register, at 1000 ns.
fn busy(base: u64) -> Guest {
    let mut guest = Guest::new(5);
    guest.now = 1000;
    guest.store(SVR, 0x1e0);
    guest.store(LDR, 0x2000_0000);
    guest.set_msr(MSR_APIC_BASE, base);
    guest.receive(&[0x41, 0x51], true);
    guest.apic.acknowledge();
    guest.receive(&[0x99], false);
    guest.apic.set_cr8(2);
    guest
}

fn write(guest: &mut Guest, offset: u64, value: u32) {
    match guest.apic.mode() {
        Mode::X2apic => {
            let index = 0x800 + u32::try_from(offset / 16).expect("in the page");
            guest.set_msr(index, value.into());
        }
        _ => {
            guest.store_any(offset, value);
        }
    }
}

fn restored(base: u64, state: &LocalApicState, now: u64) -> Guest {
    let mut guest = Guest::new(5);
    guest.apic.restore(base, state, now).expect("the state is legal");
    guest.now = now;
    guest
}

#[test]
fn round_trip_in_both_modes() {
    for base in [XAPIC, X2APIC] {
        let mut guest = busy(base);
        let writes =
            [(LVT_TIMER, 0x2_0071), (DIVIDE, 1), (INITIAL, 1000), (LVT_LINT0, 0xa7ff), (LVT_ERROR, 0xfe)];
        for (offset, value) in writes {
            write(&mut guest, offset, value);
        }
        let state = guest.apic.save(2000, 0);
        let mut copy = restored(base, &state, 50_000);
        assert_eq!(copy.apic.save(50_000, 0), state);
        assert_eq!(copy.apic.next_deadline(), Deadline::Ns(50_000 + 3000), "3000 ns were left");
        assert_eq!(copy.apic.acknowledge(), 0x99);
        assert_eq!((copy.apic.eoi(), copy.apic.eoi(), copy.apic.eoi()), (None, Some(0x51), None));
        assert_eq!(copy.apic.acknowledge(), 0x41);
        assert_eq!(copy.apic.inbox.address(), guest.apic.inbox.address());
    }
}

#[test]
fn page_has_the_portable_layout() {
    let state = busy(XAPIC).apic.save(1000, 0);
    let expected = [
        (0x2, 0x0500_0000),
        (0x3, 0x0105_0014),
        (0x8, 0x20),
        (0xa, 0x50),
        (0xd, 0x2000_0000),
        (0xe, u32::MAX),
        (0xf, 0x1e0),
        (0x12, 1 << 17),
        (0x1a, 1 << 17 | 1 << 1),
        (0x22, 1 << 1),
        (0x24, 1 << 25),
    ];
    for (number, value) in expected {
        assert_eq!(state.registers[number], value, "{number:#x}");
    }
    assert_eq!(
        state.registers.iter().filter(|value| **value != 0).count(),
        expected.len() + 6,
        "and the LVT"
    );
    assert_eq!(busy(X2APIC).apic.save(1000, 0).registers[0x2], 5, "the 32-bit ID");
}

#[test]
fn saving_takes_what_is_due_and_on_its_way() {
    let mut guest = Guest::xapic();
    guest.store(LVT_TIMER, 0x40);
    guest.store(INITIAL, 10);
    guest.apic.inbox.post_interrupt(0x41, true);
    let state = guest.apic.save(1000, 0);
    assert_eq!((state.registers[0x22], state.registers[0x1a]), (3, 2));
    assert_eq!((state.registers[0x38], state.registers[0x39]), (10, 0));
    let copy = restored(
        XAPIC,
        &LocalApicState {
            registers: {
                let mut r = state.registers;
                r[2] = 5 << 24;
                r
            },
        },
        0,
    );
    assert_eq!(copy.apic.next_deadline(), Deadline::None, "a one-shot that ended stays so");
}

#[test]
fn timers_go_on_from_the_restore() {
    let cases = [
        (0x0_0040, 100, 30, Deadline::Ns(1030)),
        (0x2_0040, 100, 30, Deadline::Ns(1030)),
        (0x2_0040, 100, 0, Deadline::Ns(1100)),
        (0x0_0040, 100, 0, Deadline::None),
        (0x4_0040, 100, 30, Deadline::None),
        (0x6_0040, 100, 30, Deadline::None),
        (0x1_0040, 100, 30, Deadline::None),
    ];
    for (entry, initial, current, expected) in cases {
        let mut state = busy(XAPIC).apic.save(1000, 0);
        for (number, value) in [(0x32, entry), (0x38, initial), (0x39, current), (0x3e, 0b1011)] {
            state.registers[number] = value;
        }
        assert_eq!(restored(XAPIC, &state, 1000).apic.next_deadline(), expected, "{entry:#x}, {current}");
    }
}

#[test]
fn what_no_apic_can_hold_is_refused_by_name() {
    let cases = [
        (XAPIC, 0x2, 1, "0x020"),
        (X2APIC, 0x2, 6, "0x020"),
        (XAPIC, 0x8, 0x100, "0x080"),
        (XAPIC, 0xd, 1, "0x0d0"),
        (X2APIC, 0xd, 1, "0x0d0"),
        (XAPIC, 0xe, 0xffff_fffe, "0x0e0"),
        (XAPIC, 0xf, 0x2000, "0x0f0"),
        (XAPIC, 0x10, 0x8000, "0x100"),
        (XAPIC, 0x18, 1, "0x180"),
        (XAPIC, 0x20, 2, "0x200"),
        (XAPIC, 0x28, 0x100, "0x280"),
        (XAPIC, 0x32, 0x8_0000, "0x320"),
        (XAPIC, 0x33, 0x8000, "0x330"),
        (XAPIC, 0x34, 0x8000, "0x340"),
        (XAPIC, 0x35, 0x2_0000, "0x350"),
        (XAPIC, 0x36, 0x2_0000, "0x360"),
        (XAPIC, 0x37, 0x400, "0x370"),
        (XAPIC, 0x39, 1, "0x390"),
    ];
    for (base, number, value, name) in cases {
        let mut state = busy(base).apic.save(1000, 0);
        state.registers[number] = value;
        let mut guest = Guest::xapic();
        let (before, inbox) = (guest.apic.save(0, 0), guest.apic.inbox.address());
        let mut guest5 = Guest::new(5);
        let error = guest5.apic.restore(base, &state, 0).expect_err(name);
        assert!(matches!(error, Error::InvalidState { element: "local_apic", .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains(name) && text.contains(&format!("{value:#x}")), "{text}");
        let untouched = guest.apic.restore(base, &state, 0).is_err();
        assert!(untouched && guest.apic.save(0, 0) == before && guest.apic.inbox.address() == inbox);
    }
}

#[test]
fn impossible_bases_are_refused() {
    let state = busy(XAPIC).apic.save(1000, 0);
    for base in [0xfee0_0400, 1 << 40 | XAPIC, XAPIC | 1, u64::MAX] {
        let mut guest = Guest::new(5);
        for error in [guest.apic.restore(base, &state, 0), guest.apic.load_base(base)] {
            let error = error.expect_err("no such base");
            assert!(matches!(error, Error::InvalidState { element: "system.apic_base", .. }), "{error:?}");
            assert!(error.to_string().contains(&format!("{base:#x}")), "{error}");
        }
    }
}

#[test]
fn the_base_is_loaded_from_any_mode() {
    let mut guest = Guest::new(5);
    for (base, mode) in [(0xfee0_0000, Mode::Disabled), (X2APIC, Mode::X2apic), (XAPIC, Mode::Xapic)] {
        guest.apic.load_base(base).expect("legal");
        assert_eq!((guest.apic.mode(), guest.apic.inbox.address().mode), (mode, mode));
    }
}

#[test]
fn junk_that_other_backends_keep_is_dropped() {
    let mut state = busy(XAPIC).apic.save(1000, 0);
    for (number, value) in
        [(0, 7), (3, 0), (0xa, 0xff), (0xb, 1), (0x2f, 0x1_0000), (0x30, u32::MAX), (0x3e, u32::MAX)]
    {
        state.registers[number] = value;
    }
    let mut guest = restored(XAPIC, &state, 0);
    assert_eq!((guest.load(ICR_LOW), guest.load(DIVIDE), guest.load(PPR)), (0xc_cfff, 0b1011, 0x50));
}

#[test]
fn a_disabled_apic_comes_back_empty() {
    let state = busy(XAPIC).apic.save(1000, 0);
    let guest = restored(0xfee0_0000, &state, 0);
    assert_eq!((guest.apic.mode(), guest.apic.pending()), (Mode::Disabled, None));
}
