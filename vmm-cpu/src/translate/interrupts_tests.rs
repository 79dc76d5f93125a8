use super::*;
use crate::hypervisor::{ClockSource, InterruptMode};
use crate::translate::apic::{ApicFeatures, LocalApic};
use crate::translate::clock::Clock;
use crate::translate::signals::Signals;
use crate::translate::vm::Peer;
use crate::vcpu::EmptyBus;

#[test]
fn an_init_to_itself_waits_for_the_end_of_the_instruction() {
    let clock = Clock::new(None, ClockSource::Deterministic);
    let shared = Shared::new(
        crate::translate::cpuid::supported(),
        InterruptMode::LocalApic,
        1,
        clock,
        crate::translate::TranslateOptions::default(),
    );
    let (shared, signals) = (Arc::new(shared), Arc::new(Signals::new()));
    shared.peers().push(Peer { index: 0, signals: Arc::clone(&signals) });
    let features =
        ApicFeatures { x2apic: true, tsc_deadline: true, suppress_eoi_broadcast: true, gpa_bits: 46 };
    let apic = LocalApic::new(Arc::clone(&shared.inboxes[0]), features, true);
    let mut core = Core::new(0, shared, Arc::clone(&signals), Some(apic));
    (core.cpu.rip, core.cpu.cr2) = (0x1234, 0x5678);
    let init = Message::from_msi(MsiMessage { address: 0xfee0_0000, data: 0x500 }).unwrap().unwrap();
    Machine::new(&mut core, &mut EmptyBus).act(ApicAction::Ipi(init));
    assert_eq!((core.cpu.rip, core.cpu.cr2), (0x1234, 0x5678));
    assert!(signals.take_attention());
    core.drain_inbox();
    assert_eq!((core.cpu.rip, core.cpu.cr2), (0xfff0, 0));
}
