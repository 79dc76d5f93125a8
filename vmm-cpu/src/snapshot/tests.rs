//! Bytes of states.

use proptest::prelude::*;

use vmm_memory::snapshot::SnapshotState;
use vmm_memory::snapshot::mirror::Mirrored;

use super::*;
use crate::state::{
    BackendBlob, ClockState, ExceptionEvent, ExceptionStage, InterruptEvent, IoApicState, LocalApicState,
    Msr, PitState, RunState, XsaveArea,
};

/// A state of which nothing is as by default.
fn cpu() -> CpuState {
    let mut state = CpuState::at_reset();
    state.general.r15 = 0x1515;
    state.system.dr = [1, 2, 3, 4];
    state.system.cs.dpl = 3;
    let mut bytes = XsaveArea::at_reset().bytes().to_vec();
    bytes.resize(1000, 7);
    state.xsave = XsaveArea::from_bytes(bytes).unwrap();
    state.msrs = vec![Msr { index: 0x10, value: 5 }, Msr { index: 0xc000_0082, value: u64::MAX }];
    let mut apic = LocalApicState::default();
    apic.registers[63] = 63;
    state.local_apic = Some(apic);
    let exception = ExceptionEvent {
        stage: ExceptionStage::Pending,
        payload: Some(8),
        ..ExceptionEvent::injected(14, Some(2))
    };
    state.events.exception = Some(exception);
    state.events.interrupt = Some(InterruptEvent::new(0x20, true));
    state.events.nmi.masked = true;
    state.events.intr = true;
    state.run_state = RunState::WaitForSipi;
    state.backend = Some(BackendBlob { backend: "kvm".to_owned(), version: 3, data: vec![1, 2, 3] });
    state
}

fn vm() -> VmState {
    let mut io_apic = IoApicState { base: 0xfec0_0000, ..IoApicState::default() };
    io_apic.redirection[23] = 5;
    let mut pit = PitState::default();
    pit.channels[2].count_load_time = -9;
    VmState {
        io_apic: Some(io_apic),
        pics: Some(Default::default()),
        pit: Some(pit),
        clock: Some(ClockState { guest_ns: 1 << 40, tsc_khz: 2_000_000 }),
        backend: None,
    }
}

#[test]
fn states_come_back() {
    for state in [cpu(), CpuState::default()] {
        assert_eq!(CpuState::decode(&state.encode(1).unwrap(), 1).unwrap(), state);
    }
    for state in [vm(), VmState::default()] {
        assert_eq!(VmState::decode(&state.encode(1).unwrap(), 1).unwrap(), state);
    }
}

#[test]
fn configurations_come_back_as_they_were_resolved() {
    use crate::cpuid::{CpuModel, CpuidEntry};
    use crate::hypervisor::{ClockConfig, InterruptMode};
    let entries = vec![
        CpuidEntry::new(0, None, [1, 2, 3, 4]),
        CpuidEntry::new(4, Some(0), [1, 1, 1, 1]),
        CpuidEntry::new(4, Some(1), [2, 2, 2, 2]),
    ];
    let config = |cpu| {
        VmConfig::new(cpu)
            .vcpus(3)
            .interrupts(InterruptMode::LocalApic)
            .clock(ClockConfig::host_at_khz(1_000_000))
    };
    let exact = config(CpuModel::Exact(CpuidTable::new(entries.clone())));
    let read = VmConfig::decode(&exact.encode(1).unwrap(), 1).unwrap();
    assert_eq!(format!("{read:?}"), format!("{exact:?}"));
    let problem = VmConfig::decode(&config(CpuModel::Host).encode(1).unwrap(), 1).unwrap_err().to_string();
    assert!(problem.starts_with("cpu: the model was that of the host it was saved on"), "{problem}");
    let reversed = entries.into_iter().rev().map(|entry| entry.mirror()).collect();
    assert_eq!(CpuidTable::from_mirror(reversed).unwrap_err().to_string(), "its leaves do not ascend");
}

/// As many as a state can have take no longer to refuse than to read.
#[test]
fn leaves_that_do_not_ascend_are_refused_at_once() {
    use crate::cpuid::CpuidEntry;
    let refused = |entries: &[CpuidEntry]| {
        let mirror = entries.iter().map(Mirrored::mirror).collect();
        let problem = CpuidTable::from_mirror(mirror).unwrap_err().to_string();
        assert_eq!(problem, "its leaves do not ascend");
    };
    let entry = |leaf, subleaf| CpuidEntry::new(leaf, subleaf, [1; 4]);
    // So many that sorting them in by moving others takes minutes.
    let most = 300_000;
    refused(&(0..most).rev().map(|leaf| entry(leaf, None)).collect::<Vec<_>>());
    // A leaf that has subleaves and then none, over and over, behind many others.
    let others = (0..most / 2).map(|leaf| entry(leaf, None));
    let turns = (0..most / 2).map(|turn| entry(most, (turn % 2 == 0).then_some(0)));
    refused(&others.chain(turns).collect::<Vec<_>>());
    for pair in [
        [entry(4, Some(1)), entry(4, Some(1))],
        [entry(4, None), entry(4, Some(0))],
        [entry(4, Some(0)), entry(4, None)],
        [entry(4, None), entry(4, None)],
        [entry(4, None), entry(3, Some(7))],
    ] {
        refused(&pair);
    }
}

#[test]
fn what_is_too_short_or_too_long_is_refused() {
    let (cpu, vm) = (cpu().encode(1).unwrap(), vm().encode(1).unwrap());
    for len in 0..cpu.len() {
        assert!(CpuState::decode(&cpu[..len], 1).is_err(), "{len} of {}", cpu.len());
    }
    for len in 0..vm.len() {
        assert!(VmState::decode(&vm[..len], 1).is_err(), "{len} of {}", vm.len());
    }
    for bytes in [[&*cpu, &[0]].concat(), [&*vm, &[0]].concat()] {
        let problems = [CpuState::decode(&bytes, 1).map(drop), VmState::decode(&bytes, 1).map(drop)];
        assert!(
            problems
                .iter()
                .any(|problem| problem.as_ref().unwrap_err().to_string() == "1 bytes follow its end")
        );
    }
}

#[test]
fn values_that_are_none_are_named() {
    let problem = |change: fn(&mut <CpuState as Mirrored>::Mirror)| {
        let mut mirror = cpu().mirror();
        change(&mut mirror);
        CpuState::from_mirror(mirror).unwrap_err().to_string()
    };
    for (problem, expected) in [
        (problem(|cpu| cpu.run_state = 9), "run_state: 9 is none of [0, 1, 2, 3]"),
        (
            problem(|cpu| cpu.xsave.truncate(500)),
            "xsave: 500 bytes; an area in standard format has 576 to 16384",
        ),
        (
            problem(|cpu| cpu.local_apic.as_mut().unwrap().registers.truncate(63)),
            "local_apic: registers: there are 63; 64 are expected",
        ),
        (
            problem(|cpu| cpu.events.exception.as_mut().unwrap().stage = 2),
            "events: exception: stage: 2 is none of [0, 1]",
        ),
    ] {
        assert_eq!(problem, expected);
    }
}

/// Bytes of this version are kept, and stay readable. `VMM_WRITE_SNAPSHOTS=1` writes those of a new version.
#[test]
fn states_of_releases_before_are_read() {
    fn check<S: SnapshotState + PartialEq + std::fmt::Debug>(name: &str, state: &S) {
        let path = format!("{}/tests/snapshots/{name}.v1", env!("CARGO_MANIFEST_DIR"));
        if std::env::var_os("VMM_WRITE_SNAPSHOTS").is_some() {
            std::fs::write(&path, state.encode(1).unwrap()).unwrap();
        }
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(&S::decode(&bytes, 1).unwrap(), state, "{name}");
        assert_eq!(state.encode(1).unwrap(), bytes, "{name}");
    }
    check("cpu", &cpu());
    check("vm", &vm());
    let entries = vec![crate::cpuid::CpuidEntry::new(0, None, [1, 2, 3, 4])];
    check("cpuid", &CpuidTable::new(entries));
}

proptest! {
    /// Whatever the bytes are: a state or an error, and a state is what its bytes say.
    #[test]
    fn bytes_that_are_changed_are_a_state_or_an_error(at in any::<proptest::sample::Index>(), bits in 1_u8..) {
        let mut bytes = cpu().encode(1).unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= bits;
        if let Ok(state) = CpuState::decode(&bytes, 1) {
            prop_assert_eq!(state.encode(1).unwrap(), bytes);
        }
    }
}
