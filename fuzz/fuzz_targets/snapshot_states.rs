//! States that somebody else has written: the bytes of one that was saved, changed, or any bytes. What they decode to is restored into a new
//! device, virtual processor, machine or domain. Who refuses it is as before; who takes it over goes on, can be saved, and what it saves
//! is taken over again.
#![no_main]

use std::sync::{Arc, Mutex, OnceLock};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmm_cpu::state::{CpuState, VmState};
use vmm_cpu::xen_pv::{DomainDevices, EventSink, XenPvHypervisor, XenPvVm};
use vmm_cpu::{CpuModel, Hypervisor, InterruptMode, Vm, VmConfig, open_backend};
use vmm_devices::channel::{AllowAll, DoorbellRing, Gatekeeper, Party, RegionMap, VmIdentity};
use vmm_devices::ivshmem::{Hub, Ivshmem, Region};
use vmm_devices::pci::{HostBridge, PciLayout};
use vmm_devices::snapshot::SnapshotState;
use vmm_devices::testkit::{
    Driver, DriverQueue, LineRecorder, Memory, MmioDriver, PciDriver, TestFrame, guest_memory,
};
use vmm_devices::virtio::{VirtioMmio, VirtioMmioState, VirtioPci, VirtioPciState};
use vmm_devices::{ManualClock, MmioBus, PioBus};
use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};
use vmm_memory::{Access, GuestRam, RegionConfig, SharedMemory};

// The tests of vmm-devices use the rest.
#[allow(dead_code)]
#[path = "../../vmm-devices/tests/support/machine.rs"]
mod machine;
mod threads;
#[allow(dead_code)]
#[path = "../../vmm-devices/tests/support/virtio.rs"]
mod virtio;

use machine::{Action, Machine};
use virtio::{Kind, Outside, RINGS, Transport};

#[derive(Arbitrary, Debug)]
struct Input {
    what: What,
    /// The oldest version, not the newest.
    oldest: bool,
    bytes: Change,
    /// What a device meets that has taken the state over.
    next: Vec<Next>,
}

#[derive(Arbitrary, Clone, Copy, Debug)]
enum What {
    Uart,
    Pit,
    Rtc,
    I8042,
    PowerManagement,
    IoApic,
    Pic,
    HostBridge,
    Ivshmem,
    Virtio(Kind, Transport),
    Config,
    Cpuid,
    Vm,
    Cpu,
    Domain,
    DomainCpu,
}

/// Bytes of a state.
#[derive(Arbitrary, Debug)]
enum Change {
    /// Those of one that was saved, some of which are others.
    Some {
        changes: Vec<(u16, u8)>,
        inserted: Option<(u16, Vec<u8>)>,
        removed: Option<(u16, u8)>,
    },
    All(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
enum Next {
    In { port: u8, size: u8 },
    Out { port: u8, size: u8, value: u32 },
    Pass { ns: u32 },
    Line { irq: u8, asserted: bool },
    Acknowledge,
    Doorbell { queue: u8 },
    Configure { at: u8, value: u32 },
}

impl Change {
    fn of(&self, saved: Vec<u8>) -> Vec<u8> {
        let (changes, inserted, removed) = match self {
            Self::Some { changes, inserted, removed } => (changes, inserted, removed),
            Self::All(bytes) => return bytes.clone(),
        };
        let mut bytes = saved;
        for (at, value) in changes {
            let at = usize::from(*at) % bytes.len();
            bytes[at] = *value;
        }
        if let Some((at, more)) = inserted {
            let at = usize::from(*at) % bytes.len();
            bytes.splice(at..at, more.iter().copied());
        }
        if let Some((at, count)) = removed {
            let at = usize::from(*at) % bytes.len();
            let end = bytes.len().min(at + usize::from(*count));
            bytes.drain(at..end);
        }
        bytes
    }
}

impl Input {
    /// What comes out of the bytes of `saved` after they were changed.
    fn state<S: SnapshotState>(&self, saved: &S) -> Option<S> {
        let version = if self.oldest { S::FORMAT.oldest } else { S::FORMAT.newest };
        let bytes = self.bytes.of(saved.encode(version).ok()?);
        let state = S::decode(&bytes, version).ok()?;
        let again = state.encode(version).expect("it came from that version");
        assert!(again == bytes, "a state that other bytes say");
        Some(state)
    }
}

/// A device that is restored where it is.
macro_rules! restored {
    ($input:expr, $device:expr) => {{
        #[allow(unused_mut, reason = "some are restored by reference")]
        let mut device = $device;
        let before = device.state();
        let Some(state) = $input.state(&before) else { return };
        match device.restore(&state) {
            Ok(()) => {
                let taken = device.state();
                device.restore(&taken).expect("its own");
                assert_eq!(device.state(), taken);
            }
            Err(_) => assert_eq!(device.state(), before),
        }
    }};
}

fn platform(input: &Input) {
    let (machine, ports) = (Machine::new(), Machine::ports());
    match input.what {
        What::Uart => restored!(input, machine.uart.lock().unwrap()),
        What::Pit => restored!(input, machine.pit.lock().unwrap()),
        What::Rtc => restored!(input, machine.rtc.lock().unwrap()),
        What::I8042 => restored!(input, machine.i8042.lock().unwrap()),
        What::PowerManagement => restored!(input, machine.pm.lock().unwrap()),
        What::IoApic => restored!(input, &machine.io_apic),
        _ => restored!(input, &machine.pic),
    }
    for next in &input.next {
        let port = |port: u8| ports[usize::from(port) % ports.len()];
        machine.perform(&match *next {
            Next::In { port: number, size } => Action::In { port: port(number), size: size % 5, count: 1 },
            Next::Out { port: number, size, value } => {
                Action::Out { port: port(number), size: size % 5, value }
            }
            Next::Pass { ns } => Action::Pass { ns: ns.into() },
            Next::Line { irq, asserted } => Action::Line { irq, asserted },
            Next::Acknowledge => Action::Acknowledge,
            Next::Doorbell { queue } => Action::EndOfInterrupt { vector: queue },
            Next::Configure { at, value } => {
                let offset = Machine::BEFORE_IO_APIC as u16 + u16::from(at);
                Action::Store { offset, size: 4, value: value.into() }
            }
        });
    }
    machine.perform(&Action::SaveAndRestore);
}

fn bridge(input: &Input) {
    let (mmio, pio): (Arc<MmioBus>, Arc<PioBus>) = Default::default();
    restored!(input, HostBridge::new(PciLayout::default(), &mmio, &pio).unwrap());
}

fn shared_memory(input: &Input) {
    let region = Region::new("r", SharedMemory::create("r", 0x4000).unwrap()).unwrap();
    let hub = Hub::new(region, 2).unwrap();
    let (gatekeeper, vm) = (Gatekeeper::new(AllowAll), Party::Vm(VmIdentity::new(1, 1)));
    let map = RegionMap { region: "r".into(), access: Access::ReadWrite };
    let map = gatekeeper.open(vm.clone(), None, map).unwrap();
    let ring = gatekeeper.open(vm, None, DoorbellRing { region: "r".into() }).unwrap();
    let member = hub.join(map, Some(ring)).unwrap();
    restored!(input, Ivshmem::builder(member, |_: u64, _: u32| {}).build().unwrap());
}

/// Bytes of guest memory.
const MEMORY: u64 = 0x4_0000;

/// A transport with a device, to be restored.
trait Bus: Sized {
    type State: SnapshotState + Clone + PartialEq + std::fmt::Debug + Send + Sync + 'static;

    fn new(kind: Kind, memory: Memory) -> (Arc<Mutex<Self>>, Outside);
    fn driver(device: &Arc<Mutex<Self>>) -> Box<dyn Driver>;
    fn pause(&mut self);
    fn resume(&mut self);
    fn save(&self) -> Self::State;
    fn restore(&mut self, state: &Self::State) -> bool;
}

macro_rules! bus {
    ($transport:ident, $state:ident, $line:expr, $driver:expr) => {
        impl Bus for $transport<Memory> {
            type State = $state;

            fn new(kind: Kind, memory: Memory) -> (Arc<Mutex<Self>>, Outside) {
                let (device, outside) = virtio::device(kind, &Arc::new(ManualClock::new(0)));
                (Arc::new(Mutex::new($transport::new(device, memory, $line).unwrap())), outside)
            }

            fn driver(device: &Arc<Mutex<Self>>) -> Box<dyn Driver> {
                Box::new($driver(device.clone()))
            }

            fn pause(&mut self) {
                self.pause();
            }

            fn resume(&mut self) {
                self.resume().unwrap();
            }

            fn save(&self) -> $state {
                self.save().unwrap()
            }

            fn restore(&mut self, state: &$state) -> bool {
                self.restore(state).is_ok()
            }
        }
    };
}

bus!(VirtioMmio, VirtioMmioState, LineRecorder::default(), MmioDriver::new);
bus!(VirtioPci, VirtioPciState, |_: u64, _: u32| {}, |device| PciDriver::new(device).unwrap());

/// A device at work, with what its queues lie in.
fn at_work<B: Bus>(kind: Kind) -> (B::State, Vec<u8>) {
    let memory = guest_memory(MEMORY).unwrap();
    let (device, outside) = B::new(kind, memory.clone());
    let driver = B::driver(&device);
    let count = (0..8).filter(|queue| driver.queue_max_size(*queue) > 0).count() as u64;
    let mut queues: Vec<_> =
        (0..count).map(|queue| DriverQueue::new(memory.clone(), RINGS * (queue + 1), 16).unwrap()).collect();
    // All but VIRTIO_F_EVENT_IDX.
    let features = driver.device_features() & !(1 << 29);
    driver.start(features, &(0..).zip(&queues).collect::<Vec<_>>()).unwrap();
    for (index, queue) in (0..).zip(&mut queues) {
        queue.chain().readable(0x2_0000, 16).writable(0x2_1000, 600).submit().unwrap();
        driver.notify(index);
    }
    match &outside {
        Outside::Net { network, .. } => {
            queues[0].chain().writable(0x2_2000, 600).submit().unwrap();
            driver.notify(0);
            network.give(TestFrame::new(vec![2; 3000]));
        }
        Outside::Console { port, .. } => assert!(port.enqueue(b"input") > 0),
        _ => {}
    }
    let mut device = device.lock().unwrap();
    device.pause();
    let mut bytes = vec![0; MEMORY as usize];
    memory.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    (device.save(), bytes)
}

fn restored_virtio<B: Bus>(input: &Input, kind: Kind, saved: &(B::State, Vec<u8>)) {
    let (saved, bytes) = saved;
    let Some(state) = input.state(saved) else { return };
    let memory = guest_memory(MEMORY).unwrap();
    memory.memory().write_slice(bytes, GuestAddress(0)).unwrap();
    let (device, outside) = B::new(kind, memory.clone());
    let before = device.lock().unwrap().save();
    if !device.lock().unwrap().restore(&state) {
        assert_eq!(device.lock().unwrap().save(), before);
        return;
    }
    let again = |state: &B::State| {
        let (other, _outside) = B::new(kind, memory.clone());
        assert!(other.lock().unwrap().restore(state), "what it has saved it does not take: {state:?}");
    };
    again(&device.lock().unwrap().save());
    device.lock().unwrap().resume();
    let driver = B::driver(&device);
    for next in &input.next {
        match *next {
            Next::Doorbell { queue } => driver.notify(queue.into()),
            Next::Configure { at, value } => driver.write_config(at.into(), &value.to_le_bytes()),
            Next::In { port, .. } => driver.read_config(port.into(), &mut [0; 4]),
            Next::Pass { .. } => {
                device.lock().unwrap().pause();
                device.lock().unwrap().resume();
            }
            Next::Line { asserted, .. } => match &outside {
                Outside::Net { handle, .. } => handle.set_link(asserted),
                Outside::Console { port, .. } => drop(port.enqueue(b"more")),
                Outside::Balloon { handle, .. } => drop(handle.request_statistics()),
                _ => {}
            },
            Next::Acknowledge => driver.set_status(0),
            Next::Out { .. } => {}
        }
    }
    device.lock().unwrap().pause();
    again(&device.lock().unwrap().save());
}

fn virtio_device(input: &Input, kind: Kind, transport: Transport) {
    const KINDS: usize = 6;
    type Saved<B> = [OnceLock<(<B as Bus>::State, Vec<u8>)>; KINDS];
    static MMIO: Saved<VirtioMmio<Memory>> = [const { OnceLock::new() }; KINDS];
    static PCI: Saved<VirtioPci<Memory>> = [const { OnceLock::new() }; KINDS];
    match transport {
        Transport::Mmio => {
            let saved = MMIO[kind as usize].get_or_init(|| at_work::<VirtioMmio<Memory>>(kind));
            restored_virtio::<VirtioMmio<Memory>>(input, kind, saved);
        }
        Transport::Pci => {
            let saved = PCI[kind as usize].get_or_init(|| at_work::<VirtioPci<Memory>>(kind));
            restored_virtio::<VirtioPci<Memory>>(input, kind, saved);
        }
    }
}

fn hypervisor() -> &'static Arc<dyn Hypervisor> {
    static HYPERVISOR: OnceLock<Arc<dyn Hypervisor>> = OnceLock::new();
    HYPERVISOR.get_or_init(|| Arc::from(open_backend("translate").unwrap()))
}

fn config() -> VmConfig {
    VmConfig::new(CpuModel::Host).interrupts(InterruptMode::LocalApic)
}

fn ram(size: u64) -> GuestRam {
    GuestRam::builder().region(RegionConfig::new(GuestAddress(0), size)).build().unwrap()
}

fn machine_of(config: &VmConfig, state: &VmState) -> Option<Arc<dyn Vm>> {
    hypervisor().restore_vm(config, state).ok()
}

fn processor(input: &Input) {
    let new = || hypervisor().create_vm(&config()).unwrap();
    match input.what {
        What::Config => {
            let resolved = config().resolve(&**hypervisor(), &*new()).unwrap();
            let Some(config) = input.state(&resolved) else { return };
            if let Ok(vm) = hypervisor().create_vm(&config) {
                let saved = vm.create_vcpu(0).unwrap().save().unwrap();
                let again = hypervisor().restore_vm(&config, &vm.save().unwrap()).expect("its own");
                again.restore_vcpu(0, &saved).expect("its own");
            }
        }
        What::Cpuid => {
            let Some(table) = input.state(hypervisor().supported_cpuid()) else { return };
            let model = CpuModel::Exact(table);
            if let Ok(resolved) = model.resolve(hypervisor().supported_cpuid()) {
                let vm = hypervisor().create_vm(&VmConfig::new(CpuModel::Exact(resolved)));
                drop(vm.expect("one that was resolved"));
            }
        }
        What::Vm => {
            let Some(state) = input.state(&new().save().unwrap()) else { return };
            if let Some(vm) = machine_of(&config(), &state) {
                machine_of(&config(), &vm.save().unwrap()).expect("its own");
            }
        }
        _ => {
            let vm = new();
            let mut vcpu = vm.create_vcpu(0).unwrap();
            let Some(state) = input.state(&vcpu.save().unwrap()) else { return };
            if vcpu.restore(&state).is_ok() {
                let taken = vcpu.save().unwrap();
                new().restore_vcpu(0, &taken).expect("its own");
            }
        }
    }
}

/// Of a domain: its bytes, and the frame of its console.
const RAM: u64 = 4 << 20;
const CONSOLE: u64 = 0x90;

fn domains() -> &'static XenPvHypervisor {
    static DOMAINS: OnceLock<XenPvHypervisor> = OnceLock::new();
    DOMAINS.get_or_init(|| XenPvHypervisor::new(Arc::clone(hypervisor())).unwrap())
}

fn domain_of(state: &VmState) -> vmm_cpu::Result<Arc<XenPvVm>> {
    let config = VmConfig::new(CpuModel::Host).vcpus(2);
    domains().restore_domain(&config, &ram(RAM), DomainDevices::default(), state)
}

#[derive(Debug)]
struct Deaf;

impl EventSink for Deaf {
    fn notify(&self) {}
}

/// A domain that is about to boot, and its first virtual processor.
fn saved_domain() -> &'static (VmState, CpuState) {
    static SAVED: OnceLock<(VmState, CpuState)> = OnceLock::new();
    SAVED.get_or_init(|| {
        let config = VmConfig::new(CpuModel::Host).vcpus(2);
        let vm = domains().create_domain(&config, &ram(RAM), DomainDevices::default()).unwrap();
        let domain = vm.domain().unwrap();
        domain.identity_m2p().unwrap();
        domain.attach_console(CONSOLE).unwrap();
        domain.console_input(b"hello");
        vm.events().unwrap().allocate(0, Arc::new(Deaf)).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        (vm.save().unwrap(), vcpu.save().unwrap())
    })
}

fn domain(input: &Input) {
    let (vm, cpu) = saved_domain();
    if let What::Domain = input.what {
        let Some(state) = input.state(vm) else { return };
        let Ok(vm) = domain_of(&state) else { return };
        let events = vm.events().unwrap();
        for next in &input.next {
            match *next {
                Next::Doorbell { queue } => events.raise(queue.into()),
                Next::Configure { at, value } => drop(events.connect(value % 16, at.into(), Arc::new(Deaf))),
                Next::Line { irq, .. } => drop(events.close(irq.into())),
                Next::In { .. } => vm.domain().unwrap().console_input(b"more"),
                _ => {}
            }
        }
        domain_of(&vm.save().unwrap()).expect("its own");
        return;
    }
    let Some(state) = input.state(cpu) else { return };
    if let Ok(mut vcpu) = domain_of(vm).unwrap().restore_vcpu(0, &state) {
        let taken = vcpu.save().unwrap();
        domain_of(vm).unwrap().restore_vcpu(0, &taken).expect("its own");
    }
}

fuzz_target!(|input: Input| {
    match input.what {
        What::HostBridge => bridge(&input),
        What::Ivshmem => shared_memory(&input),
        What::Virtio(kind, transport) => threads::settled(|| virtio_device(&input, kind, transport)),
        What::Config | What::Cpuid | What::Vm | What::Cpu => processor(&input),
        What::Domain | What::DomainCpu => domain(&input),
        _ => platform(&input),
    }
});
