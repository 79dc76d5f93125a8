//! Each register's access matrix, in both modes.

use super::*;
use crate::vcpu::MsrFault;

/// Registers of the page that can be written: number, and the bits that keep what is written with all others at 0
/// or 1 as given.
fn writable() -> Vec<(u64, u32, u32)> {
    vec![
        (ID, 0xff00_0000, 0),
        (TPR, 0xff, 0),
        (LDR, 0xff00_0000, 0),
        (DFR, 0xf000_0000, 0x0fff_ffff),
        (SVR, 0x13ff, 0),
        (ICR_LOW, 0x000c_cfff, 0),
        (ICR_HIGH, 0xff00_0000, 0),
        (LVT_TIMER, 0x0007_00ff, 0),
        (0x330, 0x0001_07ff, 0),
        (0x340, 0x0001_07ff, 0),
        (LVT_LINT0, 0x0001_a7ff, 0),
        (LVT_LINT1, 0x0001_a7ff, 0),
        (LVT_ERROR, 0x0001_00ff, 0),
        (INITIAL, u32::MAX, 0),
        (DIVIDE, 0b1011, 0),
    ]
}

/// Registers that ignore stores, and their value in [`Guest::xapic`].
fn read_only() -> Vec<(u64, u32)> {
    let mut registers = vec![(VERSION, 0x0105_0014), (0x90, 0), (PPR, 0), (0xc0, 0), (CURRENT, 0)];
    registers.extend((0..24).map(|word| (ISR + 16 * word, 0)));
    registers
}

#[test]
fn page_registers_keep_the_bits_that_exist() {
    for (offset, bits, fixed) in writable() {
        for value in [u32::MAX, 0, 0xa5a5_a5a5, 0x5a5a_5a5a] {
            let mut guest = Guest::xapic();
            // No wish to send, and no masking by software-disabling, on the way.
            guest.store_any(offset, value);
            assert_eq!(guest.load(offset), value & bits | fixed, "{value:#x} to {offset:#x}");
            assert_eq!(guest.errors() & 0x80, 0, "{offset:#x} exists");
        }
    }
}

#[test]
fn read_only_page_registers_ignore_stores_without_error() {
    for (offset, value) in read_only() {
        let mut guest = Guest::xapic();
        assert_eq!(guest.load(offset), value, "{offset:#x}");
        guest.store(offset, u32::MAX);
        assert_eq!(guest.load(offset), value, "{offset:#x}");
        assert_eq!(guest.errors(), 0, "{offset:#x}");
    }
    let mut guest = Guest::xapic();
    assert_eq!(guest.load(EOI), 0, "write-only");
    assert_eq!(guest.errors(), 0);
}

#[test]
fn every_other_page_offset_is_an_illegal_register() {
    let mut known: Vec<u64> = writable().iter().map(|(offset, ..)| *offset).collect();
    known.extend(read_only().iter().map(|(offset, _)| *offset));
    known.extend([EOI, ESR]);
    let mut guest = Guest::xapic();
    for offset in (0..0x1000).step_by(16).filter(|offset| !known.contains(offset)) {
        assert_eq!(guest.load(offset), 0);
        assert_eq!(guest.errors(), 0x80, "load at {offset:#x}");
        guest.store(offset, u32::MAX);
        assert_eq!(guest.errors(), 0x80, "store at {offset:#x}");
        assert_eq!(guest.errors(), 0);
    }
    assert_eq!(known.len(), 15 + 29 + 2);
    for offset in [0x1000, 0x1_0000_0020, u64::MAX - 15, u64::MAX] {
        assert_eq!(guest.load(offset), 0, "{offset:#x}");
        guest.store_any(offset, 1);
        assert_eq!(guest.errors(), 0x80, "{offset:#x}");
    }
}

#[test]
fn loads_of_any_width_see_the_bytes_of_the_page() {
    let mut guest = Guest::xapic();
    guest.store(LDR, 0xab00_0000);
    let mut line = [0xaa; 32];
    guest.apic.mmio_read(LDR, &mut line, 0, 0);
    let mut expected = [0; 32];
    expected[3] = 0xab;
    // The next register is DFR.
    expected[16..20].fill(0xff);
    assert_eq!(line, expected);
    for start in 0..20 {
        for width in [0, 1, 2, 3, 4, 8] {
            let mut data = vec![0xaa; width];
            guest.apic.mmio_read(LDR + start, &mut data, 0, 0);
            let at = usize::try_from(start).expect("small");
            assert_eq!(data, expected[at..at + width]);
        }
    }
    assert_eq!(guest.errors(), 0);
}

#[test]
fn stores_that_are_not_four_aligned_bytes_do_nothing() {
    let mut guest = Guest::xapic();
    for width in [0, 1, 2, 3, 5, 8, 16, 64] {
        assert_eq!(guest.apic.mmio_write(TPR, &vec![0x55; width], 0, 0), ApicAction::None);
    }
    for offset in (TPR + 1..TPR + 16).chain([u64::MAX]) {
        assert_eq!(guest.act(offset, 0x55), ApicAction::None);
    }
    assert_eq!((guest.load(TPR), guest.errors()), (0, 0));
}

#[test]
fn modes_without_a_page_have_none() {
    let mut guest = Guest::x2apic();
    assert_eq!(guest.apic.page(), None);
    assert_eq!(guest.load(TPR), u32::MAX);
    guest.store(TPR, 0x20);
    assert_eq!(guest.rdmsr(0x808), Ok(0));
    guest.set_msr(MSR_APIC_BASE, 0xfee0_0000);
    assert_eq!((guest.apic.page(), guest.load(TPR)), (None, u32::MAX));
}

/// x2APIC registers: number, whether RDMSR works, and which bits WRMSR takes, if it works.
fn x2apic_matrix() -> Vec<(u32, bool, Option<u64>)> {
    let mut matrix = vec![
        (0x802, true, None),
        (0x803, true, None),
        (0x808, true, Some(0xff)),
        (0x80a, true, None),
        (0x80b, false, Some(0)),
        (0x80d, true, None),
        (0x80f, true, Some(0x13ff)),
        (0x828, true, Some(0)),
        (0x830, true, Some(0xffff_ffff_000c_cfff)),
        (0x832, true, Some(0x0007_10ff)),
        (0x833, true, Some(0x0001_17ff)),
        (0x834, true, Some(0x0001_17ff)),
        (0x835, true, Some(0x0001_f7ff)),
        (0x836, true, Some(0x0001_f7ff)),
        (0x837, true, Some(0x0001_10ff)),
        (0x838, true, Some(0xffff_ffff)),
        (0x839, true, None),
        (0x83e, true, Some(0b1011)),
        (0x83f, false, Some(0xff)),
    ];
    matrix.extend((0x810..0x828).map(|index| (index, true, None)));
    matrix
}

#[test]
fn x2apic_registers_and_nothing_else_are_accessible() {
    let matrix = x2apic_matrix();
    // The whole range plus and minus one, and the larger range that some processors once reserved.
    for index in 0x7ff..=0xc00 {
        let entry = matrix.iter().find(|(number, ..)| *number == index);
        let (readable, writable) =
            entry.map_or((false, None), |(_, readable, writable)| (*readable, *writable));
        let mut guest = Guest::x2apic();
        assert_eq!(guest.rdmsr(index).is_ok(), readable, "RDMSR {index:#x}");
        assert_eq!(guest.wrmsr(index, 0).is_ok(), writable.is_some(), "WRMSR {index:#x}");
        for bit in 0..64 {
            let mut guest = Guest::x2apic();
            let legal = writable.is_some_and(|bits| bits >> bit & 1 != 0);
            let before = guest.apic.registers.clone();
            assert_eq!(guest.wrmsr(index, 1 << bit).is_ok(), legal, "WRMSR {index:#x}, bit {bit}");
            assert!(legal || guest.apic.registers == before, "a fault changes nothing");
        }
        assert_eq!(LocalApic::owns_msr(index), (0x800..=0x8ff).contains(&index), "{index:#x}");
    }
}

#[test]
fn x2apic_range_faults_in_the_other_modes() {
    let mut guest = Guest::xapic();
    for base in [XAPIC, 0xfee0_0000] {
        guest.set_msr(MSR_APIC_BASE, base);
        for index in 0x7ff..=0x900 {
            assert_eq!(guest.rdmsr(index), Err(MsrFault), "{index:#x}");
            assert_eq!(guest.wrmsr(index, 0), Err(MsrFault), "{index:#x}");
        }
    }
}

#[test]
fn other_msrs_are_not_ours() {
    let mut guest = Guest::x2apic();
    for index in [0, 0x1a, 0x1c, 0x6df, 0x6e1, 0x1_0802, u32::MAX] {
        assert!(!LocalApic::owns_msr(index));
        assert_eq!((guest.rdmsr(index), guest.wrmsr(index, 0)), (Err(MsrFault), Err(MsrFault)));
    }
    assert!(LocalApic::owns_msr(MSR_APIC_BASE) && LocalApic::owns_msr(MSR_TSC_DEADLINE));
}

#[test]
fn ids_in_both_modes() {
    let mut guest = Guest::new(0x1234);
    assert_eq!(guest.load(ID), 0x3400_0000);
    guest.set_msr(MSR_APIC_BASE, X2APIC);
    assert_eq!((guest.rdmsr(0x802), guest.rdmsr(0x80d)), (Ok(0x1234), Ok(0x0123_0010)));
    assert_eq!(guest.rdmsr(0x803), Ok(0x0105_0014));
    assert_eq!(Guest::with(0, PLAIN).load(VERSION), 0x0005_0014);
}

#[test]
fn absent_features_are_reserved() {
    let mut guest = Guest::with(0, PLAIN);
    assert_eq!(guest.wrmsr(MSR_APIC_BASE, X2APIC), Err(MsrFault));
    assert_eq!(
        (guest.rdmsr(MSR_TSC_DEADLINE), guest.wrmsr(MSR_TSC_DEADLINE, 0)),
        (Err(MsrFault), Err(MsrFault))
    );
    guest.store(SVR, u32::MAX);
    assert_eq!(guest.load(SVR), 0x3ff);
    guest.store(LVT_TIMER, u32::MAX);
    assert_eq!(guest.load(LVT_TIMER), 0x3_00ff);
    let mut guest = Guest::with(0, ApicFeatures { x2apic: true, ..PLAIN });
    guest.set_msr(MSR_APIC_BASE, X2APIC);
    assert_eq!(guest.wrmsr(0x80f, 0x11ff), Err(MsrFault));
    assert_eq!(guest.wrmsr(0x832, 0x4_0000), Err(MsrFault));
}

#[test]
fn commands_become_messages() {
    let mut guest = Guest::xapic();
    guest.store(ICR_HIGH, 0x0500_0000);
    let vector = 0x41;
    let expected =
        Message { destination: Destination::Physical(5), delivery: Delivery::Fixed { vector, level: false } };
    assert_eq!(guest.act(ICR_LOW, 0x4041), ApicAction::Ipi(expected));
    assert_eq!((guest.load(ICR_LOW), guest.load(ICR_HIGH)), (0x4041, 0x0500_0000));
    guest.store(ICR_LOW, 0x4341);
    assert_eq!(guest.errors(), 0, "a reserved delivery mode sends nothing");

    let mut guest = Guest::x2apic();
    let command = 0x0001_0003_0000_0c44;
    let expected = Message { destination: Destination::Logical(0x0001_0003), delivery: Delivery::Nmi };
    assert_eq!(guest.wrmsr(0x830, command), Ok(ApicAction::Ipi(expected)));
    assert_eq!(guest.rdmsr(0x830), Ok(command));
}

#[test]
fn ipis_to_oneself_are_accepted_at_once() {
    let mut guest = Guest::xapic();
    guest.store(ICR_LOW, 0x0004_4041);
    assert_eq!(guest.apic.pending(), Some(0x41));
    let nmi = Message { destination: Destination::Sender, delivery: Delivery::Nmi };
    assert_eq!(guest.act(ICR_LOW, 0x0004_4400), ApicAction::Ipi(nmi));
    let mut guest = Guest::x2apic();
    assert_eq!(guest.wrmsr(0x83f, 0x42), Ok(ApicAction::None));
    assert_eq!(guest.apic.pending(), Some(0x42));
    let mut guest = Guest::new(0);
    guest.store(ICR_LOW, 0x0004_4041);
    assert_eq!(guest.apic.pending(), None, "software-disabled");
}

#[test]
fn illegal_vectors_are_errors_where_they_are_seen() {
    let mut guest = Guest::xapic();
    for low in [0x4000, 0x400f, 0x410f, 0x000c_400f] {
        guest.store(ICR_LOW, low);
        assert_eq!(guest.errors(), 0x20, "{low:#x}");
    }
    guest.store(ICR_LOW, 0x0004_400f);
    assert_eq!(guest.errors(), 0x60, "sent and received");
    for low in [0x440f, 0x450f, 0x460f] {
        assert!(matches!(guest.act(ICR_LOW, low), ApicAction::Ipi(_)), "{low:#x} has no vector");
    }
    guest.receive(&[15], false);
    guest.receive(&[0], true);
    assert_eq!((guest.errors(), guest.apic.pending()), (0x40, None));
    assert_eq!(guest.load(TMR), 0);
    let mut guest = Guest::x2apic();
    assert_eq!(guest.wrmsr(0x83f, 3), Ok(ApicAction::None));
    assert_eq!((guest.wrmsr(0x828, 0), guest.rdmsr(0x828)), (Ok(ApicAction::None), Ok(0x60)));
}

#[test]
fn error_status_shows_errors_up_to_the_last_write() {
    let mut guest = Guest::xapic();
    guest.load(0x3f0);
    assert_eq!(guest.load(ESR), 0, "not written yet");
    guest.store(ESR, u32::MAX);
    assert_eq!((guest.load(ESR), guest.load(ESR)), (0x80, 0x80));
    guest.store(ESR, 0);
    assert_eq!(guest.load(ESR), 0);
}

#[test]
fn error_interrupt_is_armed_by_writing_the_status() {
    let mut guest = Guest::xapic();
    guest.load(0x3f0);
    guest.store(LVT_ERROR, 0xfe);
    assert_eq!(guest.apic.pending(), None, "masked when it happened");
    guest.load(0x3f0);
    assert_eq!(guest.apic.acknowledge(), 0xfe);
    guest.store(EOI, 0);
    guest.load(0x3f0);
    assert_eq!(guest.apic.pending(), None, "not armed");
    guest.store(ESR, 0);
    guest.load(0x3f0);
    assert_eq!(guest.apic.pending(), Some(0xfe));
}

#[test]
fn error_interrupt_with_an_illegal_vector_ends() {
    let mut guest = Guest::xapic();
    guest.store(LVT_ERROR, 3);
    guest.load(0x3f0);
    assert_eq!((guest.errors(), guest.apic.pending()), (0xc0, None));
}
