//! What a domain consists of, part by part, without an engine.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vmm_memory::vm_memory::{Bytes as _, GuestAddress};
use vmm_memory::{GuestRam, RegionConfig};
use zerocopy::{FromZeros as _, IntoBytes as _};

use crate::cpuid::{CpuidEntry, CpuidTable, Feature};
use crate::error::Error;
use crate::hypervisor::VmConfig;
use crate::state::VmState;
use crate::xen_pv::abi::event::{AllocUnbound, BindInterdomain, BindVirq, Pair, evtchnop, status};
use crate::xen_pv::abi::grant::{GrantEntry, gtf};
use crate::xen_pv::abi::mmu::mmuext;
use crate::xen_pv::abi::sched::ShutdownReason;
use crate::xen_pv::abi::vcpu::{TimeInfo, VcpuGuestContext, vcpuop};
use crate::xen_pv::abi::{PAGE_SIZE, domid, nr, shared_info, virq, vm_assist};
use crate::xen_pv::console::ConsoleSource;
use crate::xen_pv::domain::{Domain, DomainConfig};
use crate::xen_pv::engine::{Engine as _, Layout};
use crate::xen_pv::gate::{EventSink, Gate};
use crate::xen_pv::saved::{DomainState, PortKind, check_config, from_blob, to_blob};
use crate::xen_pv::test_support::{Counter, FREE, Guest, L4, Printed, RAM, TSC_KHZ};
use crate::xen_pv::vcpu_abi::{Action, VcpuAbi};

/// Frame of the console's ring.
const RING: u64 = FREE + 8;

fn table(ecx: u32) -> CpuidTable {
    crate::xen_pv::pv_cpuid(&CpuidTable::new(vec![CpuidEntry::new(1, None, [1, 2, ecx, 4])]))
}

fn config(ram: &GuestRam, layout: Layout) -> DomainConfig {
    let mut config = DomainConfig::new(ram.clone(), layout, TSC_KHZ);
    config.vcpus = 2;
    config.cpuid = table(u32::MAX);
    config
}

/// A guest with one of everything.
pub(super) fn furnished() -> Guest {
    let mut guest = Guest::new();
    guest.domain.attach_console(RING).unwrap();
    guest.domain.console_input(&[b'x'; 1500]);
    let backend = guest.domain.events().allocate(domid::BACKEND, Arc::new(Counter::default())).unwrap();
    guest.domain.events().raise(backend);
    let free = guest.domain.events().allocate(domid::BACKEND, Arc::new(Counter::default())).unwrap();
    let at = guest.put(&BindVirq { virq: virq::TIMER, vcpu: 1, port: 0 });
    guest.call(nr::EVENT_CHANNEL_OP, &[evtchnop::BIND_VIRQ, at]).unwrap();
    let at = guest.put(&BindVirq { virq: 2, vcpu: 0, port: 0 });
    guest.call(nr::EVENT_CHANNEL_OP, &[evtchnop::BIND_VIRQ, at]).unwrap();
    let global = guest.get::<BindVirq>(at).port;
    let at = guest.put(&Pair { first: global, second: 1 });
    guest.call(nr::EVENT_CHANNEL_OP, &[evtchnop::BIND_VCPU, at]).unwrap();
    let at = guest.put(&Pair { first: 1, second: 0 });
    guest.call(nr::EVENT_CHANNEL_OP, &[evtchnop::BIND_IPI, at]).unwrap();
    for remote_dom in [domid::BACKEND, domid::SELF] {
        let at = guest.put(&AllocUnbound { dom: domid::SELF, remote_dom, port: 0 });
        guest.call(nr::EVENT_CHANNEL_OP, &[evtchnop::ALLOC_UNBOUND, at]).unwrap();
        let remote_port = guest.get::<AllocUnbound>(at).port;
        if remote_dom == domid::SELF {
            let at = guest.put(&BindInterdomain { remote_dom, remote_port, ..Default::default() });
            guest.call(nr::EVENT_CHANNEL_OP, &[evtchnop::BIND_INTERDOMAIN, at]).unwrap();
        }
    }
    guest.domain.close_port(free).unwrap();
    guest.domain.grants.grow(3);
    let (first, _) = guest.domain.memory.grant_frames();
    let entry = GrantEntry { flags: gtf::PERMIT_ACCESS, domid: domid::BACKEND, frame: 0x333 };
    guest.domain.memory.write(first * PAGE_SIZE + 8 * 9, entry.as_bytes()).unwrap();
    let mut context = VcpuGuestContext::new_zeroed();
    context.ctrlreg[3] = L4 * PAGE_SIZE;
    context.user_regs.rip = 0x1234;
    let at = guest.put(&context);
    guest.call(nr::VCPU_OP, &[vcpuop::INITIALISE, 1, at]).unwrap();
    guest.call(nr::VCPU_OP, &[vcpuop::UP, 1]).unwrap();
    guest.call(nr::VM_ASSIST, &[vm_assist::ENABLE, vm_assist::RUNSTATE_UPDATE_FLAG]).unwrap();
    let op = crate::xen_pv::abi::mmu::MmuextOp { cmd: mmuext::PIN_L1_TABLE, pad: 0, arg1: FREE + 9, arg2: 0 };
    let at = guest.put(&op);
    guest.call(nr::MMUEXT_OP, &[at, 1, 0, domid::SELF.into()]).unwrap();
    guest
}

pub(super) fn state(guest: &Guest) -> DomainState {
    from_blob(guest.domain.save(false, None).unwrap().backend.as_ref()).unwrap()
}

/// The same memory, as it would be read from a file, for another domain.
pub(super) fn copied(guest: &Guest) -> (GuestRam, Layout) {
    let layout = Layout::new(RAM).unwrap();
    let ram =
        GuestRam::builder().region(RegionConfig::new(GuestAddress(0), layout.private().0)).build().unwrap();
    let mut bytes = vec![0; usize::try_from(RAM).unwrap()];
    guest.engine.ram.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    ram.memory().write_slice(&bytes, GuestAddress(0)).unwrap();
    (ram, layout)
}

pub(super) fn restored(
    (ram, layout): &(GuestRam, Layout),
    state: &DomainState,
    change: impl FnOnce(&mut DomainConfig),
) -> crate::Result<Arc<Domain>> {
    let mut config = config(ram, *layout);
    change(&mut config);
    Domain::restore(config, false, state)
}

#[test]
fn a_restored_domain_is_saved_as_the_same() {
    let guest = furnished();
    let saved = state(&guest);
    for kind in
        [PortKind::Free, PortKind::Unbound, PortKind::Backend, PortKind::Loop, PortKind::Virq, PortKind::Ipi]
    {
        assert!(saved.ports.iter().skip(1).any(|port| port.kind == kind), "{kind:?}: {:?}", saved.ports);
    }
    assert!(saved.console.input.len() == 1500 - 1024, "{}", saved.console.input.len());
    assert!(saved.marks.iter().any(|run| run.first == FREE + 9 && run.mark == 0x81), "{:?}", saved.marks);
    assert!(saved.processors[1].up && saved.processors[1].start.is_some());
    let memory = copied(&guest);
    let domain = restored(&memory, &saved, |_| {}).unwrap();
    let again: DomainState = from_blob(domain.save(false, None).unwrap().backend.as_ref()).unwrap();
    assert!(again == saved, "{again:#?}\n{saved:#?}");
    // Frames that it shares with the ABI, and the table.
    let page = domain.memory.shared_info();
    for offset in (0..0x1000 * 4).step_by(8) {
        let (old, new) = (guest.domain.memory.load(page + offset), domain.memory.load(page + offset));
        assert_eq!(old, new, "{offset:#x}");
    }
    let mut entry = [0; 8];
    domain.memory.read_m2p(8 * 77, &mut entry).unwrap();
    assert_eq!(u64::from_le_bytes(entry), 77);
    assert_eq!(domain.tables.level(L4), 4);
}

#[test]
fn events_find_their_way_again() {
    let guest = furnished();
    let saved = state(&guest);
    let memory = copied(&guest);
    let domain = restored(&memory, &saved, |_| {}).unwrap();
    let backend = (1..)
        .zip(saved.ports.iter().skip(1))
        .find(|(number, port)| port.kind == PortKind::Backend && Some(*number) != saved.console.port)
        .unwrap()
        .0;
    let pending = |domain: &Domain, port| domain.is_pending(port).unwrap();
    assert!(pending(&domain, backend), "as before");
    domain.clear_pending(backend);
    // The guest sends while nobody is there, and is saved once more.
    domain.send(backend).unwrap();
    let saved: DomainState = from_blob(domain.save(false, None).unwrap().backend.as_ref()).unwrap();
    assert!(saved.ports[backend as usize].sent);
    let domain = restored(&memory, &saved, |_| {}).unwrap();
    let sink = Arc::new(Counter::default());
    assert!(domain.events().connect(backend, 7, sink.clone()).is_err(), "another domain");
    domain.events().connect(backend, domid::BACKEND, sink.clone()).unwrap();
    assert_eq!(sink.0.load(Ordering::SeqCst), 1, "what was sent meanwhile");
    assert!(pending(&domain, backend), "and the guest looks too");
    domain.send(backend).unwrap();
    assert_eq!(sink.0.load(Ordering::SeqCst), 2);
    assert!(domain.events().connect(backend, domid::BACKEND, sink).is_err(), "once");
    // VIRQ_TIMER of the second virtual processor.
    domain.raise_virq(1, virq::TIMER);
    let virq = saved.ports.iter().position(|port| port.kind == PortKind::Virq && port.other == virq::TIMER);
    assert!(pending(&domain, u32::try_from(virq.unwrap()).unwrap()));
    let ipi = saved.ports.iter().position(|port| port.kind == PortKind::Ipi).unwrap();
    assert_eq!(domain.ports.status(u32::try_from(ipi).unwrap()).unwrap().status, status::IPI);
}

#[derive(Debug)]
struct Open(Arc<Counter>);

impl Gate for Open {
    fn may_reach(&self, _: u16) -> bool {
        true
    }

    fn bind(&self, domid: u16, port: u32) -> Option<Arc<dyn EventSink>> {
        let sink: Arc<dyn EventSink> = Arc::<Counter>::clone(&self.0);
        ((domid, port) == (5, 77)).then_some(sink)
    }
}

#[test]
fn the_gate_is_asked_again() {
    let mut guest = Guest::with(|config| config.gate = Box::new(Open(Arc::default())));
    let at = guest.put(&BindInterdomain { remote_dom: 5, remote_port: 77, ..Default::default() });
    guest.call(nr::EVENT_CHANNEL_OP, &[evtchnop::BIND_INTERDOMAIN, at]).unwrap();
    let port = guest.get::<BindInterdomain>(at).local_port;
    let (saved, memory) = (state(&guest), copied(&guest));
    assert_eq!(saved.ports[port as usize].kind, PortKind::Bound);
    let counter = Arc::new(Counter::default());
    let gate = Box::new(Open(Arc::clone(&counter)));
    let domain = restored(&memory, &saved, |config| config.gate = gate).unwrap();
    domain.send(port).unwrap();
    assert_eq!(counter.0.load(Ordering::SeqCst), 1);
    // One that refuses leaves the port without another end.
    let domain = restored(&memory, &saved, |_| {}).unwrap();
    domain.send(port).unwrap();
    assert_eq!(domain.ports.status(port).unwrap().status, status::INTERDOMAIN);
    assert_eq!(counter.0.load(Ordering::SeqCst), 1);
}

#[test]
fn the_console_goes_on() {
    let guest = furnished();
    let page = RING * PAGE_SIZE;
    // Output that the guest had not told of yet.
    guest.domain.memory.write(page + 1024, b"abc").unwrap();
    guest.domain.memory.store_u32(page + 3084, 3).unwrap();
    let (saved, memory) = (state(&guest), copied(&guest));
    let printed = Printed::default();
    let sink = Box::new(printed.clone());
    let domain = restored(&memory, &saved, |config| config.console = sink).unwrap();
    assert_eq!(printed.by(ConsoleSource::Ring), b"abc");
    // The guest takes what is in the ring, and finds the rest there.
    domain.memory.store_u32(page + 3072, 1024).unwrap();
    domain.send(saved.console.port.unwrap()).unwrap();
    assert_eq!(domain.memory.load_u32(page + 3076).unwrap(), 1500);
    assert!(domain.attach_console(RING).is_err(), "it has one");
}

/// It has given its console up, by one call or another, and may have something else under that number.
#[test]
fn a_guest_that_has_closed_its_console_is_saved() {
    for all in [false, true] {
        let mut guest = furnished();
        let port = state(&guest).console.port.unwrap();
        if all {
            let at = guest.put(&domid::SELF);
            guest.call(nr::EVENT_CHANNEL_OP, &[evtchnop::RESET, at]).unwrap();
        } else {
            guest.domain.close_port(port).unwrap();
        }
        let (saved, memory) = (state(&guest), copied(&guest));
        assert_eq!((saved.console.port, saved.console.ring), (None, Some(RING)));
        let domain = restored(&memory, &saved, |_| {}).unwrap();
        assert_eq!(domain.ports.status(port).unwrap().status, status::CLOSED);
        // Another back end's, of which the console knows nothing.
        let sink = Arc::new(Counter::default());
        assert_eq!(guest.domain.events().allocate(domid::BACKEND, sink.clone()).unwrap(), port);
        guest.domain.clear_pending(port);
        let page = RING * PAGE_SIZE;
        guest.domain.memory.store_u32(page + 3072, 1024).unwrap();
        guest.domain.console_input(b"more");
        assert!(!guest.domain.is_pending(port).unwrap());
        let (saved, memory) = (state(&guest), copied(&guest));
        let domain = restored(&memory, &saved, |_| {}).unwrap();
        domain.events().connect(port, domid::BACKEND, sink.clone()).unwrap();
        domain.send(port).unwrap();
        assert_eq!(sink.0.load(Ordering::SeqCst), 1);
    }
}

#[test]
fn grants_that_nobody_uses_any_more_are_the_guests_again() {
    let guest = furnished();
    let used = guest.domain.use_grant(9, domid::BACKEND, true).unwrap();
    let (saved, memory) = (state(&guest), copied(&guest));
    drop(used);
    let domain = restored(&memory, &saved, |_| {}).unwrap();
    let (first, _) = domain.memory.grant_frames();
    let flags = |domain: &Domain| domain.memory.load(first * PAGE_SIZE + 72).unwrap() & 0xffff;
    assert_eq!(flags(&domain), u64::from(gtf::PERMIT_ACCESS));
    let again = domain.use_grant(9, domid::BACKEND, true).unwrap();
    assert_eq!(again.address(), GuestAddress(0x333 * PAGE_SIZE));
    assert_ne!(flags(&domain), u64::from(gtf::PERMIT_ACCESS));
    assert_eq!(domain.grants.frames(), 3);
}

#[test]
fn time_goes_on_and_its_information_is_another_version() {
    let mut guest = furnished();
    let area = guest.put(&TimeInfo::default());
    let at = guest.put(&area);
    guest.call(nr::VCPU_OP, &[vcpuop::REGISTER_VCPU_TIME_MEMORY_AREA, 0, at]).unwrap();
    guest.pass(7_000_000_000);
    let before = guest.domain.clock.stands_at(guest.engine.time_stamp().unwrap());
    let (saved, memory) = (state(&guest), copied(&guest));
    // A machine whose counter runs three times as fast, and stands somewhere else.
    let domain = restored(&memory, &saved, |config| config.tsc_khz = 3 * TSC_KHZ).unwrap();
    domain.clock.go_on_from(before);
    let mut vcpu = VcpuAbi::new(Arc::clone(&domain), 1).unwrap();
    guest.engine.ram = memory.0.clone();
    guest.engine.tsc.store(123, Ordering::SeqCst);
    let place = domain.memory.legacy_info(0) + shared_info::TIME;
    let info = |gpa: u64| {
        let mut info = TimeInfo::default();
        domain.memory.read(gpa, info.as_mut_bytes()).unwrap();
        info
    };
    let (old, old_wall) = (info(place), wall_clock(&domain));
    assert_eq!(vcpu.before_entry(&mut guest.engine).unwrap(), Action::Continue);
    // That of the other virtual processor too, which did not run yet: programs read it from there.
    for new in [info(place), info(area - crate::xen_pv::test_support::DIRECT)] {
        assert!(new.version != old.version && new.version % 2 == 0, "{old:?}, {new:?}");
        assert_eq!((new.tsc_timestamp, new.system_time), (123, before));
        assert_eq!(new.tsc_to_system_mul, domain.clock.info(0).tsc_to_system_mul);
    }
    assert!((999_999..=1_000_000).contains(&(domain.clock.system_time(123 + 3_000_000) - before)));
    let wall = wall_clock(&domain);
    assert_ne!(wall.0, old_wall.0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let guests = wall.1 + Duration::from_nanos(before);
    assert!(guests <= now && now - guests < Duration::from_secs(60), "{guests:?}, {now:?}");
}

/// Version and wall-clock time of system time 0.
fn wall_clock(domain: &Domain) -> (u32, Duration) {
    let page = domain.memory.shared_info();
    let word = |offset| domain.memory.load_u32(page + offset).unwrap();
    let seconds = u64::from(word(shared_info::WC_SEC_HI)) << 32 | u64::from(word(shared_info::WC_SEC));
    (word(shared_info::WC_VERSION), Duration::new(seconds, word(shared_info::WC_NSEC)))
}

/// The element that is refused.
fn refused(change: impl FnOnce(&mut DomainState)) -> &'static str {
    let guest = furnished();
    let (mut saved, memory) = (state(&guest), copied(&guest));
    change(&mut saved);
    match restored(&memory, &saved, |_| {}) {
        Err(Error::InvalidState { element, problem }) => {
            println!("{element}: {problem}");
            element
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_no_domain_can_be_is_named() {
    let port = |kind: PortKind, other: u32| {
        move |state: &mut DomainState| {
            let free = state.ports.iter().skip(1).position(|port| port.kind == PortKind::Free).unwrap() + 1;
            (state.ports[free].kind, state.ports[free].other) = (kind, other);
        }
    };
    assert_eq!(refused(|state| state.ram += PAGE_SIZE), "backend.ram");
    assert_eq!(refused(|state| state.compatibility_mode = true), "backend.compatibility_mode");
    assert_eq!(refused(|state| state.assists = 1 << 3), "backend.assists");
    assert_eq!(refused(|state| state.shutdown = Some(5)), "backend.shutdown");
    assert_eq!(refused(|state| state.shutdown_code = Some(255)), "backend.shutdown_code");
    assert_eq!(refused(|state| state.cpuid = avx()), "backend.cpuid");
    assert_eq!(refused(|state| state.console.ring = Some(RAM / PAGE_SIZE)), "backend.console.ring");
    assert_eq!(refused(|state| state.console.port = Some(9999)), "backend.console.port");
    assert_eq!(refused(|state| state.console.input = vec![0; 70_000]), "backend.console.input");
    assert_eq!(refused(|state| state.ports[0].kind = PortKind::Ipi), "backend.ports");
    assert_eq!(refused(|state| state.ports[1].vcpu = 2), "backend.ports");
    assert_eq!(refused(|state| state.ports.resize(5000, state.ports[0])), "backend.ports");
    assert_eq!(refused(port(PortKind::Virq, virq::COUNT)), "backend.ports");
    assert_eq!(refused(port(PortKind::Virq, 2)), "backend.ports", "a second one");
    assert_eq!(refused(port(PortKind::Loop, 1)), "backend.ports");
    assert_eq!(refused(port(PortKind::Loop, u32::MAX)), "backend.ports");
    assert_eq!(refused(|state| state.grant_frames = 33), "backend.grant_frames");
    assert_eq!(refused(|state| state.grant_frames = 0), "backend.grant_frames");
    for change in [
        |state: &mut DomainState| state.processors.truncate(1),
        |state: &mut DomainState| state.processors[0].initialised = false,
        |state: &mut DomainState| state.processors[1].initialised = false,
        |state: &mut DomainState| state.processors[0].info += 8,
        |state: &mut DomainState| {
            (state.processors[0].info_registered, state.processors[0].info) = (true, RAM);
        },
        |state: &mut DomainState| {
            (state.processors[0].info_registered, state.processors[0].info) = (true, 0x1fc8);
        },
        |state: &mut DomainState| state.processors[1].runstate.state = 4,
        |state: &mut DomainState| state.processors[1].start.as_mut().unwrap().truncate(100),
        |state: &mut DomainState| {
            let mut start = VcpuGuestContext::new_zeroed();
            start.ctrlreg[3] = RAM;
            state.processors[1].start = Some(start.as_bytes().to_vec());
        },
        |state: &mut DomainState| {
            let mut start = VcpuGuestContext::new_zeroed();
            start.traps[255].address = 1 << 63;
            state.processors[1].start = Some(start.as_bytes().to_vec());
        },
    ] {
        assert_eq!(refused(change), "backend.processors");
    }
    assert_eq!(refused(|state| state.shared[0].bytes.truncate(1)), "backend.shared");
    assert_eq!(refused(|state| state.shared[0].index = 33), "backend.shared");
    assert_eq!(refused(|state| state.marks[0].mark = 5), "backend.marks");
    assert_eq!(refused(|state| state.marks[0].mark = 0x41), "backend.marks", "the engine's");
    assert_eq!(refused(|state| state.marks[0].count = RAM), "backend.marks");
    assert_eq!(refused(|state| state.marks.swap(0, 1)), "backend.marks");
    assert_eq!(refused(|state| state.m2p[0].count = 0), "backend.m2p");
    assert_eq!(refused(|state| state.m2p[0].first = u64::MAX), "backend.m2p");
}

fn avx() -> CpuidTable {
    let mut entry = CpuidEntry::new(7, Some(0), [0; 4]);
    entry.ebx = Feature::AVX2.mask();
    CpuidTable::new(vec![CpuidEntry::new(0, None, [7, 0, 0, 0]), entry])
}

/// The parts of the extended state lie elsewhere on processors of another vendor.
#[test]
fn the_extended_state_has_to_lie_where_it_did() {
    let with_state = |offset: u32| {
        let mut table = table(u32::MAX);
        table.set(CpuidEntry::new(0xd, Some(5), [0x40, offset, 0, 0]));
        table
    };
    let guest = furnished();
    let (mut saved, memory) = (state(&guest), copied(&guest));
    saved.cpuid = with_state(1088);
    assert!(restored(&memory, &saved, |config| config.cpuid = with_state(1088)).is_ok());
    let error = restored(&memory, &saved, |config| config.cpuid = with_state(832)).unwrap_err();
    assert!(matches!(error, Error::InvalidState { element: "backend.cpuid", .. }), "{error}");
}

#[test]
fn a_shut_down_domain_stays_so() {
    let guest = furnished();
    guest.domain.latch_shutdown(3);
    guest.domain.shut_down(ShutdownReason::PowerOff);
    let (saved, memory) = (state(&guest), copied(&guest));
    let domain = restored(&memory, &saved, |_| {}).unwrap();
    assert_eq!(domain.shutdown_reason(), Some(ShutdownReason::Crash), "as it was latched");
}

#[test]
fn states_of_others_are_refused() {
    let guest = furnished();
    let state = guest.domain.save(false, None).unwrap();
    let config = VmConfig::new(crate::CpuModel::Host).vcpus(2);
    assert!(check_config(&config, &state).is_ok());
    let element = |config: &VmConfig, state: &VmState| match check_config(config, state) {
        Err(Error::InvalidState { element, .. }) => element,
        other => panic!("{other:?}"),
    };
    assert_eq!(element(&config.clone().vcpus(3), &state), "backend.processors");
    assert_eq!(element(&config, &VmState::default()), "backend");
    let mut other = state.clone();
    other.backend.as_mut().unwrap().backend = "kvm".to_owned();
    assert_eq!(element(&config, &other), "backend");
    other = state.clone();
    other.backend.as_mut().unwrap().version = 2;
    assert_eq!(element(&config, &other), "backend");
    other = state.clone();
    other.backend = Some(to_blob(&super::super::VcpuState::default_for_tests()).unwrap());
    assert_eq!(element(&config, &other), "backend", "one of a virtual processor");
    other = state;
    other.pics = Some(Default::default());
    assert_eq!(element(&config, &other), "pics");
}
