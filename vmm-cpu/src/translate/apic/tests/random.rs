//! Whatever a guest does, and in whatever order: no panic, and what must hold holds.

use proptest::prelude::*;

use super::super::vectors::class;
use super::*;
use crate::state::LocalApicState;

#[derive(Clone, Debug)]
enum Step {
    Load { offset: u64, width: usize },
    Store { offset: u64, data: Vec<u8> },
    Rdmsr(u32),
    Wrmsr(u32, u64),
    Post { vector: u8, level: bool },
    Event(u8),
    Drain,
    Acknowledge,
    TaskPriority(u8),
    Pin { lint1: bool, asserted: bool },
    Time { ns: u64, tsc: u64 },
    Init,
    Reset,
    LoadBase(u64),
    Migrate,
}

fn offset() -> impl Strategy<Value = u64> {
    prop_oneof![8 => (0_u64..0x40).prop_map(|number| number * 16), 2 => 0_u64..0x1010, 1 => any::<u64>()]
}

fn base() -> impl Strategy<Value = u64> {
    prop_oneof![
        2 => Just(XAPIC),
        4 => Just(X2APIC),
        1 => Just(0xfee0_0000),
        1 => any::<u64>(),
        1 => (any::<u64>(), 0_u64..0x1000).prop_map(|(page, low)| (page & 0xff_ffff_f000) | low),
    ]
}

/// Values with few bits set hit more than uniform ones.
fn value() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        any::<u32>().prop_map(u64::from),
        0_u64..0x200,
        (any::<u8>(), 0_u32..64).prop_map(|(low, bit)| 1 << bit | u64::from(low)),
        (any::<u8>(), 0_u64..4).prop_map(|(vector, mode)| mode << 17 | u64::from(vector)),
        Just(0x1ff),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (offset(), 0_usize..20).prop_map(|(offset, width)| Step::Load { offset, width }),
        8 => (offset(), value()).prop_map(|(offset, value)| Step::Store { offset, data: value.to_le_bytes()[..4].to_vec() }),
        1 => (offset(), prop::collection::vec(any::<u8>(), 0..20))
            .prop_map(|(offset, data)| Step::Store { offset, data }),
        4 => prop_oneof![0x7fe_u32..0x842, Just(0x6e0), Just(0x1b), any::<u32>()].prop_map(Step::Rdmsr),
        8 => (prop_oneof![0x7fe_u32..0x842, Just(0x6e0)], value()).prop_map(|(index, value)| Step::Wrmsr(index, value)),
        2 => base().prop_map(|base| Step::Wrmsr(0x1b, base)),
        6 => (any::<u8>(), any::<bool>()).prop_map(|(vector, level)| Step::Post { vector, level }),
        1 => any::<u8>().prop_map(Step::Event),
        4 => Just(Step::Drain),
        4 => Just(Step::Acknowledge),
        2 => (0_u8..16).prop_map(Step::TaskPriority),
        2 => (any::<bool>(), any::<bool>()).prop_map(|(lint1, asserted)| Step::Pin { lint1, asserted }),
        3 => prop_oneof![
            (0_u64..1 << 20, 0_u64..1 << 20),
            (any::<u64>(), any::<u64>()),
        ].prop_map(|(ns, tsc)| Step::Time { ns, tsc }),
        1 => Just(Step::Init),
        1 => Just(Step::Reset),
        1 => base().prop_map(Step::LoadBase),
        1 => Just(Step::Migrate),
    ]
}

fn take(guest: &mut Guest, step: Step) {
    match step {
        Step::Load { offset, width } => {
            guest.apic.mmio_read(offset, &mut vec![0; width], guest.now, guest.tsc)
        }
        Step::Store { offset, data } => {
            let action = guest.apic.mmio_write(offset, &data, guest.now, guest.tsc);
            answer(guest, action);
        }
        Step::Rdmsr(index) => {
            let _whatever = guest.rdmsr(index);
        }
        Step::Wrmsr(index, value) => {
            if let Ok(action) = guest.wrmsr(index, value) {
                answer(guest, action);
            }
        }
        Step::Post { vector, level } => guest.apic.inbox.post_interrupt(vector, level),
        Step::Event(page) => match page % 4 {
            0 => guest.apic.inbox.post_nmi(),
            1 => guest.apic.inbox.post_init(),
            2 => guest.apic.inbox.post_start_up(page),
            _ => guest.apic.inbox.post_ext_int(),
        },
        Step::Drain => {
            if guest.apic.drain().init {
                guest.apic.init();
            }
        }
        Step::Acknowledge => {
            let pending = guest.apic.pending();
            let vector = guest.apic.acknowledge();
            if let Some(pending) = pending {
                assert_eq!(vector, pending);
                assert_eq!(guest.apic.pending().filter(|next| class(*next) <= class(vector)), None);
            }
        }
        Step::TaskPriority(value) => guest.apic.set_cr8(value),
        Step::Pin { lint1, asserted } => {
            guest.apic.set_pin(if lint1 { Lint::Lint1 } else { Lint::Lint0 }, asserted);
        }
        Step::Time { ns, tsc } => {
            let (now, tsc) = (guest.now.saturating_add(ns), guest.tsc.saturating_add(tsc));
            guest.expire(now, tsc);
        }
        Step::Init => guest.apic.init(),
        Step::Reset => guest.apic.reset(),
        Step::LoadBase(base) => {
            drop(guest.apic.load_base(base));
        }
        Step::Migrate => migrate(guest),
    }
}

/// Does what the run loop would.
fn answer(guest: &mut Guest, action: ApicAction) {
    if let ApicAction::Ipi(message) = action {
        deliver(&[Arc::clone(&guest.apic.inbox)], Some(0), message);
    }
}

/// Saves, restores into another, and compares.
fn migrate(guest: &mut Guest) {
    let state = guest.apic.save(guest.now, guest.tsc);
    let base = guest.rdmsr(MSR_APIC_BASE).expect("always there");
    let mut copy = Guest::new(guest.apic.inbox.x2apic_id());
    copy.apic.restore(base, &state, guest.now).expect("a state that an APIC was in");
    assert_eq!(copy.apic.save(guest.now, guest.tsc), state);
    assert_eq!(copy.apic.pending(), guest.apic.pending());
    assert_eq!(copy.apic.address(), guest.apic.address());
}

fn check(guest: &Guest) {
    let apic = &guest.apic;
    let registers = &apic.registers;
    let priority = apic.processor_priority();
    let serviced = registers.in_service.highest().map_or(0, class);
    assert_eq!(class(priority), serviced.max(class(registers.task_priority)));
    assert_eq!(apic.inbox.priority(), priority);
    assert_eq!(apic.inbox.address(), apic.address());
    if let Some(vector) = apic.pending() {
        assert!(class(vector) > class(priority) && registers.request.contains(vector));
        assert_ne!(apic.mode(), Mode::Disabled);
    }
    for set in [&registers.request, &registers.in_service, &registers.trigger_mode] {
        assert_eq!(set.word(0) & 0xffff, 0, "vectors below 16");
    }
    if !registers.software_enabled() {
        use super::super::lvt::Lvt;
        for lvt in [Lvt::Timer, Lvt::Thermal, Lvt::Performance, Lvt::Lint1, Lvt::Error] {
            assert!(registers.lvt.get(lvt).masked(), "{lvt:?}");
        }
        assert_eq!(apic.next_deadline(), Deadline::None);
    }
    if apic.mode() == Mode::Disabled {
        assert_eq!((apic.page(), apic.next_deadline()), (None, Deadline::None));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(400) })]

    #[test]
    fn invariants_hold(id in prop_oneof![Just(0_u32), any::<u32>()], steps in prop::collection::vec(step(), 1..120)) {
        let mut guest = Guest::new(id);
        for step in steps {
            let told = format!("{step:?}");
            take(&mut guest, step);
            let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check(&guest)));
            prop_assert!(checked.is_ok(), "after {told}");
        }
        // What was due is told at once, and then is due no more.
        guest.expire(guest.now, guest.tsc);
        match guest.apic.next_deadline() {
            Deadline::Ns(ns) => prop_assert!(ns > guest.now || guest.now == u64::MAX),
            Deadline::Tsc(tsc) => prop_assert!(tsc > guest.tsc),
            Deadline::None => {}
        }
    }

    #[test]
    fn any_page_is_restored_or_refused(
        registers in prop::collection::vec(prop_oneof![4 => Just(0_u32), 1 => any::<u32>(), 1 => 0_u32..0x200], 64),
        base in base(),
        now in any::<u64>(),
    ) {
        let mut state = LocalApicState::default();
        state.registers.copy_from_slice(&registers);
        // So that some pass.
        state.registers[0x2] &= 0xff00_0000;
        state.registers[0xd] = if base == X2APIC { 1 } else { 0 };
        state.registers[0xe] |= 0x0fff_ffff;
        let mut guest = Guest::new(0);
        let before = guest.apic.registers.clone();
        match guest.apic.restore(base, &state, now) {
            Ok(()) => check_restored(&mut guest, base, now),
            Err(_) => prop_assert_eq!(&guest.apic.registers, &before),
        }
    }

    #[test]
    fn any_msi_is_parsed_or_refused(address in any::<u64>(), data in any::<u32>(), low in 0xfee0_0000_u64..0xfef0_0000) {
        let inboxes: Vec<_> = (0..4).map(|id| Arc::new(Inbox::new(id))).collect();
        for address in [address, low, low | address & 0xffff_ff00_0000_0000] {
            let parsed = Message::from_msi(crate::vm::MsiMessage { address, data });
            prop_assert_eq!(parsed.is_ok(), address & 0xff_fff0_0000 == 0xfee0_0000);
            if let Ok(Some(message)) = parsed {
                prop_assert!(deliver(&inboxes, None, message).is_empty(), "nobody is there");
            }
        }
    }
}

fn check_restored(guest: &mut Guest, base: u64, now: u64) {
    assert_eq!(guest.rdmsr(MSR_APIC_BASE), Ok(base));
    guest.expire(now, 0);
    let state = guest.apic.save(now, 0);
    let mut copy = Guest::new(0);
    copy.apic.restore(base, &state, now).expect("saved is restored");
    assert_eq!(copy.apic.save(now, 0), state);
}
