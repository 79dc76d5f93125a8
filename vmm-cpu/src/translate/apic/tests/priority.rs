//! TPR, PPR, nesting, EOI, and the timer as the guest sees it.

use super::*;

#[test]
fn the_highest_vector_above_the_priority_is_pending() {
    let mut guest = Guest::xapic();
    assert_eq!(guest.apic.pending(), None);
    guest.receive(&[0x31, 0x5f, 0x50], false);
    assert_eq!(guest.apic.pending(), Some(0x5f));
    guest.store(TPR, 0x4f);
    assert_eq!(guest.apic.pending(), Some(0x5f));
    guest.store(TPR, 0x50);
    assert_eq!(guest.apic.pending(), None, "the class counts, not the vector");
    guest.store(TPR, 0);
    for (task, pending) in (0..16).zip([Some(0x5f); 5].into_iter().chain([None; 11])) {
        guest.apic.set_cr8(task);
        assert_eq!((guest.apic.cr8(), guest.apic.pending()), (task, pending));
        assert_eq!(guest.load(TPR), u32::from(task) << 4);
    }
}

#[test]
fn ppr_is_the_higher_of_task_and_service() {
    let cases =
        [(0x00, 0x00), (0x1f, 0x40), (0x3f, 0x40), (0x4a, 0x4a), (0x40, 0x40), (0x5c, 0x5c), (0xff, 0xff)];
    for (task, expected) in cases {
        let mut guest = Guest::xapic();
        if expected != 0 {
            guest.receive(&[0x4d], false);
            assert_eq!(guest.apic.acknowledge(), 0x4d);
        }
        guest.store(TPR, task);
        assert_eq!(guest.load(PPR), expected, "TPR {task:#x}");
        assert_eq!(u32::from(guest.apic.inbox.priority()), expected, "others see it");
    }
}

#[test]
fn interrupts_nest_by_class() {
    let mut guest = Guest::xapic();
    guest.receive(&[0x41], false);
    assert_eq!(guest.apic.acknowledge(), 0x41);
    guest.receive(&[0x4f, 0x21, 0x41], false);
    assert_eq!(guest.apic.pending(), None, "same class");
    guest.receive(&[0x61], false);
    assert_eq!(guest.apic.acknowledge(), 0x61);
    assert_eq!((guest.load(ISR + 0x20), guest.load(ISR + 0x30)), (2, 2));
    assert_eq!(guest.load(IRR + 0x20), 0x8002);
    guest.store(EOI, 0);
    assert_eq!((guest.load(ISR + 0x30), guest.apic.pending()), (0, None));
    guest.store(EOI, 0);
    let mut order = Vec::new();
    while guest.apic.pending().is_some() {
        order.push(guest.apic.acknowledge());
        guest.store(EOI, 0);
    }
    assert_eq!(order, [0x4f, 0x41, 0x21]);
}

#[test]
fn what_vanished_is_acknowledged_as_spurious() {
    let mut guest = Guest::xapic();
    guest.store(SVR, 0x1e7);
    guest.receive(&[0x41], false);
    guest.store(TPR, 0x40);
    assert_eq!(guest.apic.acknowledge(), 0xe7);
    assert_eq!(guest.load(PPR), 0x40, "it is not in service");
    guest.store(TPR, 0);
    assert_eq!(guest.apic.acknowledge(), 0x41, "and the other one still waits");
}

#[test]
fn eoi_tells_of_level_triggered_interrupts_only() {
    let mut guest = Guest::xapic();
    guest.store(EOI, 0);
    guest.receive(&[0x41], true);
    guest.receive(&[0x51], false);
    assert_eq!(guest.load(TMR + 0x20), 2);
    assert_eq!((guest.apic.acknowledge(), guest.act(EOI, 0)), (0x51, ApicAction::None));
    assert_eq!((guest.apic.acknowledge(), guest.act(EOI, 0)), (0x41, ApicAction::Eoi(0x41)));
    guest.receive(&[0x41], false);
    assert_eq!(guest.load(TMR + 0x20), 0, "the last one accepted decides");
    guest.receive(&[0x41], true);
    guest.apic.acknowledge();
    guest.store(SVR, 0x11ff);
    assert_eq!(guest.act(EOI, 0), ApicAction::None, "suppressed");
}

#[test]
fn x2apic_eoi_tells_as_well() {
    let mut guest = Guest::x2apic();
    guest.receive(&[0x41], true);
    guest.apic.acknowledge();
    assert_eq!(guest.wrmsr(0x80b, 0), Ok(ApicAction::Eoi(0x41)));
}

#[test]
fn one_post_as_level_and_one_as_edge_is_level() {
    let mut guest = Guest::xapic();
    guest.apic.inbox.post_interrupt(0x41, true);
    guest.apic.inbox.post_interrupt(0x41, false);
    guest.apic.drain();
    guest.apic.acknowledge();
    assert_eq!(guest.act(EOI, 0), ApicAction::Eoi(0x41));
    assert_eq!(guest.apic.pending(), None);
}

#[test]
fn one_shot_and_periodic_at_exact_times() {
    for (mode, again) in [(0, None), (0x2_0000, Some(0x40))] {
        let mut guest = Guest::xapic();
        guest.now = 1000;
        guest.store(DIVIDE, 0b0001);
        guest.store(LVT_TIMER, mode | 0x40);
        guest.store(INITIAL, 100_000);
        assert_eq!(guest.apic.next_deadline(), Deadline::Ns(401_000));
        guest.expire(400_999, 0);
        assert_eq!((guest.apic.pending(), guest.load(CURRENT)), (None, 1));
        guest.expire(401_000, 0);
        assert_eq!(guest.apic.acknowledge(), 0x40);
        guest.store(EOI, 0);
        guest.expire(801_000, 0);
        assert_eq!(guest.apic.pending(), again);
    }
}

#[test]
fn missed_periods_are_one_interrupt() {
    let mut guest = Guest::xapic();
    guest.store(DIVIDE, 0b1011);
    guest.store(LVT_TIMER, 0x2_0040);
    guest.store(INITIAL, 100_000);
    guest.expire(1_234_567, 0);
    assert_eq!(guest.apic.acknowledge(), 0x40);
    guest.store(EOI, 0);
    guest.expire(1_234_567, 0);
    assert_eq!(guest.apic.pending(), None);
    assert_eq!(guest.apic.next_deadline(), Deadline::Ns(1_300_000));
}

#[test]
fn a_masked_timer_goes_on_in_silence() {
    let mut guest = Guest::xapic();
    guest.store(DIVIDE, 0b1011);
    guest.store(LVT_TIMER, 0x3_0040);
    guest.store(INITIAL, 100_000);
    assert_eq!(guest.apic.next_deadline(), Deadline::None);
    guest.now = 250_000;
    assert_eq!(guest.load(CURRENT), 50_000);
    guest.store(LVT_TIMER, 0x2_0040);
    assert_eq!(guest.apic.pending(), None, "what came due while masked is gone");
    assert_eq!(guest.apic.next_deadline(), Deadline::Ns(300_000));
    guest.store(LVT_TIMER, 0x3_0040);
    guest.now = 310_000;
    guest.store(LVT_TIMER, 0x2_0040);
    guest.expire(320_000, 0);
    assert_eq!(guest.apic.pending(), None, "also if nobody looked meanwhile");
}

#[test]
fn tsc_deadline_at_exact_times() {
    let mut guest = Guest::x2apic();
    assert_eq!(guest.wrmsr(MSR_TSC_DEADLINE, 500), Ok(ApicAction::None));
    assert_eq!(guest.rdmsr(MSR_TSC_DEADLINE), Ok(0), "not in this mode");
    guest.set_msr(0x832, 0x4_0040);
    guest.set_msr(MSR_TSC_DEADLINE, 500);
    assert_eq!(guest.rdmsr(MSR_TSC_DEADLINE), Ok(500));
    assert_eq!(guest.apic.next_deadline(), Deadline::Tsc(500));
    assert_eq!(guest.wrmsr(0x838, 77), Ok(ApicAction::None));
    assert_eq!((guest.rdmsr(0x838), guest.rdmsr(0x839)), (Ok(0), Ok(0)));
    guest.expire(u64::MAX, 499);
    assert_eq!(guest.apic.pending(), None);
    guest.expire(0, 500);
    assert_eq!((guest.apic.acknowledge(), guest.rdmsr(MSR_TSC_DEADLINE)), (0x40, Ok(0)));
    guest.set_msr(0x80b, 0);
    guest.set_msr(MSR_TSC_DEADLINE, 1);
    assert_eq!(guest.apic.pending(), Some(0x40), "one in the past at once");
}

#[test]
fn leaving_tsc_deadline_mode_disarms() {
    let mut guest = Guest::xapic();
    guest.store(LVT_TIMER, 0x4_0040);
    guest.set_msr(MSR_TSC_DEADLINE, 500);
    guest.store(LVT_TIMER, 0x40);
    guest.store(LVT_TIMER, 0x4_0040);
    assert_eq!((guest.rdmsr(MSR_TSC_DEADLINE), guest.apic.next_deadline()), (Ok(0), Deadline::None));
}

#[test]
fn a_timer_with_an_illegal_vector_is_an_error() {
    let mut guest = Guest::xapic();
    guest.store(LVT_TIMER, 0x0f);
    guest.store(INITIAL, 1);
    guest.expire(10, 0);
    assert_eq!((guest.apic.pending(), guest.errors()), (None, 0x40));
}
