//! RESET, INIT, enabling and disabling, and the pins.

use super::*;
use crate::vcpu::MsrFault;

/// The page after RESET (Intel SDM 3A 12.4.7.1) but for ID and LINT0.
fn assert_reset(guest: &mut Guest) {
    let mut expected = vec![(VERSION, 0x0105_0014), (DFR, u32::MAX), (SVR, 0xff)];
    expected.extend([LVT_TIMER, 0x330, 0x340, LVT_LINT1, LVT_ERROR].map(|offset| (offset, 0x1_0000)));
    let zero = [TPR, PPR, LDR, ESR, ICR_LOW, ICR_HIGH, INITIAL, CURRENT, DIVIDE];
    expected.extend(zero.map(|offset| (offset, 0)));
    expected.extend((0..24).map(|word| (ISR + 16 * word, 0)));
    for (offset, value) in expected {
        assert_eq!(guest.load(offset), value, "{offset:#x}");
    }
    assert_eq!(guest.errors(), 0);
}

/// Leaves no register as it was.
fn scribble(guest: &mut Guest) {
    guest.store(SVR, 0x1e0);
    guest.store(ID, 0x0900_0000);
    guest.receive(&[0x41, 0x51], true);
    guest.apic.acknowledge();
    for (offset, value) in [(TPR, 0x13), (LDR, 0x0200_0000), (DFR, 0), (ICR_HIGH, 0x0500_0000)] {
        guest.store(offset, value);
    }
    guest.store_any(ICR_LOW, 0x4041);
    for offset in [LVT_TIMER, 0x330, 0x340, LVT_LINT0, LVT_LINT1, LVT_ERROR] {
        guest.store(offset, 0x2f);
    }
    guest.store(DIVIDE, 0b1011);
    guest.store(INITIAL, 1000);
    guest.load(0x3f0);
}

#[test]
fn reset_state() {
    let mut bootstrap = Guest::new(0);
    assert_reset(&mut bootstrap);
    assert_eq!((bootstrap.load(LVT_LINT0), bootstrap.load(ID)), (0x700, 0));
    assert_eq!(bootstrap.rdmsr(MSR_APIC_BASE), Ok(0xfee0_0900));
    let mut other = Guest::new(3);
    assert_reset(&mut other);
    assert_eq!((other.load(LVT_LINT0), other.load(ID)), (0x1_0000, 0x0300_0000));
    assert_eq!(other.rdmsr(MSR_APIC_BASE), Ok(0xfee0_0800));
    assert_eq!(other.apic.page(), Some(0xfee0_0000));
}

#[test]
fn init_keeps_mode_and_ids() {
    let mut guest = Guest::new(3);
    scribble(&mut guest);
    guest.apic.inbox.post_interrupt(0x60, false);
    guest.apic.inbox.post_start_up(0x9a);
    guest.apic.init();
    assert_reset(&mut guest);
    assert_eq!(guest.load(ID), 0x0900_0000);
    assert_eq!(guest.apic.next_deadline(), Deadline::None);
    assert_eq!(guest.apic.inbox.address(), guest.apic.address());
    guest.store(SVR, 0x1ff);
    assert_eq!(guest.apic.drain(), Events { start_up: Some(0x9a), ..Events::default() });
    assert_eq!(guest.apic.pending(), None, "interrupts on their way are gone");

    let mut guest = Guest::x2apic();
    guest.apic.init();
    assert_eq!(guest.apic.mode(), Mode::X2apic);
    assert_eq!((guest.rdmsr(0x80f), guest.rdmsr(0x80d)), (Ok(0xff), Ok(1)));
    guest.set_msr(MSR_APIC_BASE, 0xfee0_0000);
    guest.apic.init();
    assert_eq!(guest.apic.mode(), Mode::Disabled);
}

#[test]
fn reset_forgets_all() {
    let mut guest = Guest::new(3);
    scribble(&mut guest);
    guest.set_msr(MSR_APIC_BASE, X2APIC | 0x1000);
    guest.apic.inbox.post_init();
    guest.apic.inbox.post_interrupt(0x60, false);
    guest.apic.reset();
    assert_eq!(guest.apic.drain(), Events::default());
    assert_reset(&mut guest);
    assert_eq!((guest.load(ID), guest.rdmsr(MSR_APIC_BASE)), (0x0300_0000, Ok(XAPIC)));
}

#[test]
fn transitions_by_wrmsr() {
    let mut guest = Guest::new(0);
    let disabled = 0xfee0_0000;
    let steps = [
        (XAPIC, Ok(ApicAction::BaseChanged)),
        (XAPIC, Ok(ApicAction::None)),
        (0xfee0_0400, Err(MsrFault)),
        (X2APIC, Ok(ApicAction::BaseChanged)),
        (XAPIC, Err(MsrFault)),
        (disabled, Ok(ApicAction::BaseChanged)),
        (X2APIC, Err(MsrFault)),
        (XAPIC, Ok(ApicAction::BaseChanged)),
        (0x0012_3000 | 0x900, Ok(ApicAction::BaseChanged)),
        (1 << 40 | XAPIC, Err(MsrFault)),
    ];
    for (value, expected) in steps {
        assert_eq!(guest.wrmsr(MSR_APIC_BASE, value), expected, "{value:#x}");
    }
    assert_eq!((guest.apic.page(), guest.rdmsr(MSR_APIC_BASE)), (Some(0x0012_3000), Ok(0x0012_3900)));
}

#[test]
fn entering_x2apic_keeps_what_is_common() {
    let mut guest = Guest::new(3);
    scribble(&mut guest);
    guest.set_msr(MSR_APIC_BASE, X2APIC);
    assert_eq!((guest.rdmsr(0x802), guest.rdmsr(0x80d)), (Ok(3), Ok(8)));
    assert_eq!(
        (guest.rdmsr(0x808), guest.rdmsr(0x80f), guest.rdmsr(0x830)),
        (Ok(0x13), Ok(0x1e0), Ok(0x4041))
    );
    assert_eq!((guest.rdmsr(0x812), guest.rdmsr(0x822)), (Ok(1 << 17), Ok(1 << 1)));
    assert_eq!((guest.rdmsr(0x832), guest.rdmsr(0x838), guest.rdmsr(0x839)), (Ok(0x2f), Ok(1000), Ok(1000)));
}

#[test]
fn disabling_forgets_and_neither_delivers_nor_receives() {
    let mut guest = Guest::xapic();
    scribble(&mut guest);
    guest.receive(&[0x71], false);
    guest.set_msr(MSR_APIC_BASE, 0xfee0_0000);
    assert_eq!((guest.apic.pending(), guest.apic.next_deadline()), (None, Deadline::None));
    let inboxes = [Arc::clone(&guest.apic.inbox)];
    let message = Message { destination: Destination::All, delivery: Delivery::Nmi };
    assert!(deliver(&inboxes, None, message).is_empty());
    guest.receive(&[0x71], false);
    assert_eq!(guest.apic.pending(), None);
    guest.set_msr(MSR_APIC_BASE, XAPIC);
    assert_reset(&mut guest);
    assert_eq!(guest.load(ID), 0x0900_0000, "the ID is kept");
    guest.store(SVR, 0x1ff);
    guest.apic.inbox.post_interrupt(0x71, false);
    guest.set_msr(MSR_APIC_BASE, 0xfee0_0000);
    guest.set_msr(MSR_APIC_BASE, XAPIC);
    guest.store(SVR, 0x1ff);
    guest.receive(&[], false);
    assert_eq!(guest.apic.pending(), None, "what was on its way is gone");
}

#[test]
fn software_disabling_masks_and_holds() {
    let mut guest = Guest::xapic();
    for offset in [LVT_TIMER, 0x330, 0x340, LVT_LINT0, LVT_LINT1, LVT_ERROR] {
        guest.store(offset, 0x2f);
    }
    guest.receive(&[0x41], false);
    guest.apic.inbox.post_interrupt(0x51, false);
    guest.store(SVR, 0xff);
    guest.apic.inbox.post_interrupt(0x61, false);
    guest.apic.drain();
    for offset in [LVT_TIMER, 0x330, 0x340, LVT_LINT0, LVT_LINT1, LVT_ERROR] {
        guest.store(offset, 0x2e);
        assert_eq!(guest.load(offset), 0x1_002e, "{offset:#x} stays masked");
    }
    assert_eq!(guest.apic.acknowledge(), 0x51, "was on its way");
    assert_eq!(guest.load(IRR + 0x20), 2, "what it had it keeps");
    assert_eq!(guest.load(IRR + 0x30), 0, "what came later it did not take");
    guest.store(SVR, 0x1ff);
    assert_eq!(guest.load(LVT_TIMER), 0x1_002e, "enabling unmasks nothing");
}

#[test]
fn the_address_that_others_see_follows_every_change() {
    let mut guest = Guest::new(0);
    for (offset, value) in [(SVR, 0x1ff), (ID, 0x0700_0000), (LDR, 0x4200_0000), (DFR, 0x0fff_ffff), (SVR, 0)]
    {
        guest.store(offset, value);
        assert_eq!(guest.apic.inbox.address(), guest.apic.address(), "{offset:#x}");
    }
    let seen = guest.apic.inbox.address();
    assert_eq!((seen.xapic_id, seen.logical_id, seen.model, seen.software_enabled), (7, 0x42, 0, false));
    for base in [X2APIC, 0xfee0_0000] {
        guest.set_msr(MSR_APIC_BASE, base);
        assert_eq!(guest.apic.inbox.address(), guest.apic.address());
    }
}

#[test]
fn ext_int_reaches_the_processor_where_lint0_lets_it() {
    assert!(Guest::new(0).apic.takes_ext_int(), "as firmware leaves the bootstrap processor");
    assert!(!Guest::new(1).apic.takes_ext_int());
    let mut guest = Guest::xapic();
    for (entry, takes) in [(0x700, true), (0x1_0700, false), (0x041, false), (0x400, false), (0x8700, true)] {
        guest.store(LVT_LINT0, entry);
        assert_eq!(guest.apic.takes_ext_int(), takes, "{entry:#x}");
    }
    guest.store(SVR, 0xff);
    assert!(!guest.apic.takes_ext_int(), "masked by software-disabling");
    guest.set_msr(MSR_APIC_BASE, 0xfee0_0000);
    assert!(guest.apic.takes_ext_int(), "the pin is the processor's");
}

#[test]
fn pins_deliver_what_their_entry_says() {
    let mut guest = Guest::xapic();
    for (pin, offset) in [(Lint::Lint0, LVT_LINT0), (Lint::Lint1, LVT_LINT1)] {
        for (mode, expected) in [
            (0x400, Events { nmi: true, ..Events::default() }),
            (0x500, Events { init: true, ..Events::default() }),
            (0x200, Events::default()),
            (0x700, Events::default()),
            (0x1_0400, Events::default()),
        ] {
            guest.store(offset, mode);
            assert_eq!(guest.apic.set_pin(pin, true), expected, "{pin:?} {mode:#x}");
            assert_eq!(guest.apic.set_pin(pin, true), Events::default(), "no edge");
            assert_eq!(guest.apic.set_pin(pin, false), Events::default());
        }
        guest.store(offset, 0x61);
        assert_eq!((guest.apic.set_pin(pin, true), guest.apic.acknowledge()), (Events::default(), 0x61));
        guest.store(EOI, 0);
        assert_eq!(guest.apic.pending(), None);
        guest.apic.set_pin(pin, false);
    }
}

#[test]
fn pins_of_a_disabled_apic_are_the_processors() {
    let mut guest = Guest::xapic();
    guest.set_msr(MSR_APIC_BASE, 0xfee0_0000);
    assert_eq!(guest.apic.set_pin(Lint::Lint1, true), Events { nmi: true, ..Events::default() });
    assert_eq!(guest.apic.set_pin(Lint::Lint1, true), Events::default());
    assert_eq!(guest.apic.set_pin(Lint::Lint0, true), Events::default());
}

#[test]
fn level_triggered_lint0_comes_again_after_eoi() {
    let mut guest = Guest::xapic();
    guest.store(LVT_LINT0, 0x8061);
    guest.apic.set_pin(Lint::Lint0, true);
    assert_eq!(guest.load(LVT_LINT0), 0xc061, "remote IRR");
    assert_eq!(guest.apic.acknowledge(), 0x61);
    guest.store(LVT_LINT0, 0x8061);
    assert_eq!(guest.load(IRR + 0x30), 0, "not before its EOI");
    assert_eq!(guest.act(EOI, 0), ApicAction::Eoi(0x61));
    assert_eq!(guest.apic.acknowledge(), 0x61, "still asserted");
    guest.apic.set_pin(Lint::Lint0, false);
    guest.store_any(EOI, 0);
    assert_eq!((guest.apic.pending(), guest.load(LVT_LINT0)), (None, 0x8061));
    guest.store(LVT_LINT0, 0x1_8061);
    guest.apic.set_pin(Lint::Lint0, true);
    assert_eq!(guest.apic.pending(), None);
    guest.store(LVT_LINT0, 0x8061);
    assert_eq!(guest.apic.pending(), Some(0x61), "unmasked while asserted");
}
