//! A state of each kind, with something in every field, and a device that takes it over.

use std::num::NonZeroU16;
use std::sync::{Arc, Mutex};

use vmm_memory::snapshot::SnapshotState;
use vmm_memory::vm_memory::GuestAddress;

use crate::clock::ManualClock;
use crate::interrupt::{Unconnected, lock};
use crate::net::{MacAddr, Offloads, RxFilter};
use crate::pci::{
    Bar, ConfigBuilder, ConfigSpace, ConfigState, HostBridge, HostBridgeState, Identity, Msix, MsixEntry,
    MsixPlace, MsixState, PciLayout,
};
use crate::platform::i8042::I8042Argument;
use crate::platform::pic::{PicChipState, PicPhase};
use crate::platform::pit::channel::{Bytes, ChannelState, Mode, Run};
use crate::platform::{
    AcpiPm, AcpiPmState, I8042, I8042State, IoApic, IoApicState, Pic, PicState, Pit, PitState, PlatformEvent,
    Rtc, RtcState, Uart16550, UartState,
};
use crate::testkit::{MsiRecorder, OutputRecorder, TestNetwork, guest_memory};
use crate::virtio::balloon::{BalloonState, MemoryRelease};
use crate::virtio::block::{Block, BlockState, MemoryDisk};
use crate::virtio::console::{
    Console, ConsolePlaceState, ConsolePortState, ConsoleState, ConsoleTold, PortConfig,
};
use crate::virtio::net::{Net, NetFrameState, NetState};
use crate::virtio::vsock::Vsock;
use crate::virtio::{
    Balloon, DeviceState, Rng, VirtioDevice, VirtioMmio, VirtioMmioState, VirtioPci, VirtioPciState,
    VirtioState, VirtqueueState,
};

type Memory = crate::testkit::Memory;

/// Something that is asked of bytes.
pub(super) type Question = Box<dyn Fn(&[u8]) -> bool>;

pub(super) struct Sample {
    pub(super) name: &'static str,
    /// Of which the bytes are.
    pub(super) version: u16,
    pub(super) bytes: Vec<u8>,
    /// Whether bytes are that state.
    pub(super) is_it: Question,
    /// Whether the newest version says the same of it.
    pub(super) comes_to_the_newest: Question,
    /// Whether a new device takes bytes over. If not, it is as it was.
    pub(super) restore: Question,
}

fn sample<S: SnapshotState + PartialEq + 'static>(
    name: &'static str,
    state: S,
    restore: impl Fn(&S) -> bool + 'static,
) -> Sample {
    sample_since(1, name, state, restore)
}

/// One that no version before can express.
fn sample_since<S: SnapshotState + PartialEq + 'static>(
    version: u16,
    name: &'static str,
    state: S,
    restore: impl Fn(&S) -> bool + 'static,
) -> Sample {
    let bytes = state.encode(version).unwrap();
    (S::FORMAT.oldest..version).for_each(|before| drop(state.encode(before).unwrap_err()));
    let is_it = move |bytes: &[u8]| S::decode(bytes, version).is_ok_and(|read| read == state);
    let comes_to_the_newest = move |bytes: &[u8]| {
        let (newest, read) = (S::FORMAT.newest, S::decode(bytes, version).unwrap());
        S::decode(&read.encode(newest).unwrap(), newest).is_ok_and(|again| again == read)
    };
    let restore = move |bytes: &[u8]| S::decode(bytes, version).is_ok_and(|read| restore(&read));
    let [is_it, comes_to_the_newest, restore]: [Question; 3] =
        [Box::new(is_it), Box::new(comes_to_the_newest), Box::new(restore)];
    Sample { name, version, bytes, is_it, comes_to_the_newest, restore }
}

/// Restores, and looks whether a device that refused is as it was.
macro_rules! restored {
    ($device:expr, $state:expr) => {{
        #[allow(unused_mut, reason = "some are restored by reference")]
        let mut device = $device;
        let before = device.state();
        let taken = device.restore($state).is_ok();
        assert!(taken || device.state() == before);
        taken
    }};
}

pub(super) fn samples() -> Vec<Sample> {
    [platform(), pci(), virtio()].into_iter().flatten().collect()
}

fn platform() -> Vec<Sample> {
    let pm = AcpiPmState { status: 0x20, enable: 0x120, control_low: 2, sleep_type: 3, timer: 0x1234_5678 };
    let i8042 = I8042State {
        output: Some(0x55),
        timeout: true,
        command: true,
        configuration: 0x47,
        argument: I8042Argument::Echo,
    };
    let mut io_apic = IoApicState { select: 0x12, id: 3, asserted: 1 << 4, ..IoApicState::default() };
    io_apic.entries[4] = 0x0100_0000_0000_8031;
    let chip = PicChipState {
        requested: 0x10,
        in_service: 0x20,
        mask: 0x43,
        asserted: 0x10,
        level_triggered: 0x10,
        vector_base: 0x30,
        top: 1,
        phase: PicPhase::Modes,
        needs_modes: true,
        read_in_service: true,
        ..PicChipState::default()
    };
    let pic = PicState {
        first: chip.clone(),
        second: PicChipState { vector_base: 0x38, special_mask: true, ..chip },
    };
    let timer = ChannelState {
        mode: Mode::RateGenerator,
        bytes: Bytes::Both,
        bcd: false,
        count: 11932,
        next_count: Some(5),
        run: Run::Since(1000),
        written_low: Some(3),
        read_high: true,
        latched_count: Some(77),
        latched_status: Some(0x34),
    };
    let speaker = ChannelState {
        mode: Mode::SquareWave,
        run: Run::Paused(3),
        count: 9,
        bcd: true,
        ..ChannelState::default()
    };
    let pit = PitState { channels: [timer, ChannelState::default(), speaker], control: 2, now: 123_456 };
    let mut rtc = Rtc::new(ManualClock::new(0), Unconnected).state();
    rtc = RtcState {
        index: 0x32,
        alarm: [1, 2, 3],
        a: 0x26,
        b: 0x82,
        c: 0x40,
        offset_ns: -5_000_000_000,
        frozen: Some([1, 2, 3, 4, 5, 6, 7, 8]),
        divider_reset: false,
        weekday_shift: 2,
        ..rtc
    };
    rtc.ram[0x40] = 9;
    let uart = UartState {
        divisor_low: 1,
        divisor_high: 2,
        interrupt_enable: 5,
        interrupt_identification: 4,
        line_control: 3,
        line_status: 0x61,
        modem_control: 8,
        modem_status: 0xb0,
        scratch: 9,
        input: b"root".to_vec(),
    };
    let events = || |_: PlatformEvent| ();
    vec![
        sample("acpi-pm", pm, move |state| {
            restored!(AcpiPm::new(ManualClock::new(5), Unconnected, events()), state)
        }),
        sample("i8042", i8042, move |state| restored!(I8042::new(events()), state)),
        sample("io-apic", io_apic, |state| restored!(IoApic::new(|_: u64, _: u32| ()), state)),
        sample("pic", pic, |state| restored!(Pic::new(Unconnected), state)),
        sample("pit", pit, |state| restored!(Pit::new(ManualClock::new(0), Unconnected), state)),
        sample("rtc", rtc, |state| restored!(Rtc::new(ManualClock::new(0), Unconnected), state)),
        sample("uart", uart, |state| restored!(Uart16550::new(Unconnected, std::io::sink()), state)),
    ]
}

fn function() -> (ConfigSpace, Msix) {
    let mut config = ConfigBuilder::new(Identity::new(0x1af4, 0x1044, [0xff, 0, 0]));
    config.bar(0, Bar::memory32(0x2000)).unwrap();
    let place = MsixPlace { bar: 0, table: 0, pending: 0x1000 };
    let msix = Msix::new(&mut config, 2, place, MsiRecorder::default()).unwrap();
    (config.build(), msix)
}

fn pci() -> Vec<Sample> {
    let (mut config, _) = function();
    config.write(4, &[6, 0]);
    config.write(0x10, &0xd000_0000_u32.to_le_bytes());
    let vector = MsixEntry { address: 0xfee0_0000, data: 0x31, masked: true, pending: true };
    let msix = MsixState { entries: vec![vector, MsixEntry { masked: false, pending: false, ..vector }] };
    let bridge = || {
        let (mmio, pio) = (Arc::default(), Arc::default());
        HostBridge::new(PciLayout::default(), &mmio, &pio).unwrap()
    };
    let mut bridge_state = bridge().state();
    bridge_state.config_address = 0x8000_0804;
    vec![
        sample("pci-config", config.state(), |state: &ConfigState| restored!(function().0, state)),
        sample("msix", msix, |state: &MsixState| {
            let (config, msix) = function();
            let before = msix.state();
            let taken = msix.restore(state, &config).is_ok();
            assert!(taken || msix.state() == before);
            taken
        }),
        sample("host-bridge", bridge_state, move |state: &HostBridgeState| restored!(bridge(), state)),
        ivshmem(),
    ]
}

fn ivshmem() -> Sample {
    use crate::channel::{AllowAll, DoorbellRing, Gatekeeper, Party, RegionMap, VmIdentity};
    use crate::ivshmem::{Hub, Ivshmem, Region};
    use vmm_memory::{Access, SharedMemory};
    let device = || {
        let region = Region::new("r", SharedMemory::create("r", 0x4000).unwrap()).unwrap();
        let hub = Hub::new(region, 2).unwrap();
        let (gatekeeper, vm) = (Gatekeeper::new(AllowAll), Party::Vm(VmIdentity::new(1, 1)));
        let map = RegionMap { region: "r".into(), access: Access::ReadWrite };
        let map = gatekeeper.open(vm.clone(), None, map).unwrap();
        let ring = gatekeeper.open(vm, None, DoorbellRing { region: "r".into() }).unwrap();
        let member = hub.join(map, Some(ring)).unwrap();
        Ivshmem::builder(member, MsiRecorder::default()).build().unwrap()
    };
    let mut state = device().state();
    (state.mask, state.status) = (1, 1);
    sample("ivshmem", state, move |state| restored!(device(), state))
}

const MAC: MacAddr = MacAddr([0x52, 0x54, 0, 0, 0, 1]);

struct Nothing;

impl MemoryRelease for Nothing {
    fn release(&self, _gpa: GuestAddress, _len: u64) -> std::io::Result<()> {
        Ok(())
    }
}

type Make = fn() -> Box<dyn VirtioDevice<Memory>>;

/// Rings at multiples of 4 KiB from 0x1000 on, of 16 descriptors each; all that they need is there if the RAM is zeros.
fn queues(sizes: &[u16], used: usize) -> Vec<VirtqueueState> {
    let queue = |(index, max_size): (usize, &u16)| {
        let at = 0x1000 * (index as u64 + 1);
        let ready = index < used;
        let descriptors = if ready { at } else { 0 };
        VirtqueueState {
            max_size: *max_size,
            size: if ready { 16 } else { *max_size },
            ready,
            descriptors,
            available: if ready { at + 0x100 } else { 0 },
            used: if ready { at + 0x200 } else { 0 },
            ..VirtqueueState::default()
        }
    };
    sizes.iter().enumerate().map(queue).collect()
}

/// A device at work, whose first queue has a chain in flight: one descriptor of zeros.
fn at_work(make: Make, features: u64, used: usize, device: DeviceState) -> VirtioState {
    let new = make();
    let mut queues = queues(new.queue_sizes(), used);
    if let Some(first) = queues.first_mut() {
        (first.next_available, first.next_used, first.told, first.in_flight) = (3, 2, 1, vec![5]);
    }
    VirtioState {
        device_type: new.device_type().0,
        status: 15,
        features: features | 1 << 32,
        device_features_select: 1,
        driver_features_select: 1,
        queue_select: 1,
        config_generation: 7,
        config: vec![1, 2, 3],
        queues,
        device,
    }
}

fn mmio(name: &'static str, make: Make, device: VirtioState) -> Sample {
    mmio_since(1, name, make, device)
}

fn mmio_since(version: u16, name: &'static str, make: Make, device: VirtioState) -> Sample {
    sample_since(
        version,
        name,
        VirtioMmioState { interrupt_status: 1, device },
        move |state: &VirtioMmioState| {
            let mut mmio = VirtioMmio::new(make(), guest_memory(0x2_0000).unwrap(), Unconnected).unwrap();
            let before = mmio.save().unwrap();
            let taken = mmio.restore(state).is_ok();
            let mut after = mmio.save().unwrap();
            // Nobody has read it so far.
            after.device.config_generation = before.device.config_generation;
            assert!(taken || after == before, "{name}");
            if taken {
                mmio.resume().unwrap();
            }
            taken
        },
    )
}

fn pci_virtio(name: &'static str, make: Make, device: VirtioState) -> Sample {
    let function = move || {
        let sink = MsiRecorder::default();
        Arc::new(Mutex::new(VirtioPci::new(make(), guest_memory(0x2_0000).unwrap(), sink).unwrap()))
    };
    let new = lock(&function()).save().unwrap();
    let queue_vectors = vec![1; new.queue_vectors.len()];
    let state = VirtioPciState { config_vector: 0, queue_vectors, isr: 2, device, ..new };
    sample(name, state, move |state: &VirtioPciState| {
        let function = function();
        let mut function = lock(&function);
        let before = function.save().unwrap();
        let taken = function.restore(state).is_ok();
        assert!(taken || function.save().unwrap() == before, "{name}");
        if taken {
            function.resume().unwrap();
        }
        taken
    })
}

fn virtio() -> Vec<Sample> {
    let rng: Make = || Box::new(Rng::new(std::io::repeat(7)));
    let block: Make =
        || Box::new(Block::builder(Arc::new(MemoryDisk::new(1 << 20))).serial("disk").build().unwrap());
    let console: Make = || {
        let (console, ports) = Console::multiport(2).unwrap();
        ports.add(1, PortConfig::channel("agent", OutputRecorder::default()).size(80, 25)).unwrap();
        Box::new(console)
    };
    let net: Make = || {
        let network = TestNetwork::new(2, Offloads::ALL, Offloads::ALL).of_mtu(1500);
        Box::new(Net::builder(Arc::new(network), MAC).pairs(NonZeroU16::new(2).unwrap()).build().unwrap())
    };
    let balloon: Make = || Box::new(Balloon::new(Nothing));
    let vsock: Make = || Box::new(Vsock::builder(3, || 0).build().unwrap());

    let mut serial = [0; 20];
    serial[..4].copy_from_slice(b"disk");
    let disk =
        BlockState { sectors: 2048, block_size: 512, read_only: false, serial, writeback: Some(false) };
    let told = ConsoleTold { added: true, ready: true, name_due: true, open: true, ..ConsoleTold::default() };
    let port = ConsolePortState {
        console: false,
        name: Some("agent".to_owned()),
        size: Some((132, 50)),
        guest_open: true,
        input: b"hello".to_vec(),
    };
    let places = vec![
        ConsolePlaceState {
            told: ConsoleTold { removal_due: true, ..ConsoleTold::default() },
            ..Default::default()
        },
        ConsolePlaceState { port: Some(port), told, sent: Some((5, 3)) },
    ];
    let ports = ConsoleState { listening: true, places };
    let mut filter = RxFilter::everything(MacAddr([0x52, 0x54, 0, 0, 0, 9]));
    filter.promiscuous = false;
    filter.unicast = Some([MacAddr([2; 6])].into_iter().collect());
    filter.multicast = None;
    filter.vlans = Some(Box::new([5; 64]));
    // GUEST_CSUM with GUEST_TSO4, of which the driver has given up the latter; STATUS, CTRL_VQ, MQ.
    let features = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 7 | 1 << 16 | 1 << 17 | 1 << 18 | 1 << 22;
    let frames = NetState {
        mac: MAC,
        mtu: Some(1500),
        filter,
        offloads: 2,
        pairs: 2,
        announce: true,
        waiting: Vec::new(),
    };
    // A checksum is left to the driver, and nothing.
    let (partial, plain) = ([1, 0, 0, 0, 0, 0, 34, 0, 16, 0, 0, 0], [0; 12]);
    let waiting = vec![
        NetFrameState { pair: 0, header: partial, bytes: (1..=90).collect() },
        NetFrameState { pair: 1, header: plain, bytes: vec![2; 14] },
    ];
    let holding = NetState { waiting, ..frames.clone() };
    let pages = BalloonState { target: 500, actual: 300, poison: 0xaa, requested: true };
    let begun =
        VirtioState { status: 3, queues: queues(&[64], 0), ..at_work(rng, 0, 1, DeviceState::Stateless) };
    vec![
        mmio("virtio-begun", rng, begun),
        mmio("virtio-rng", rng, at_work(rng, 0, 1, DeviceState::Stateless)),
        mmio("virtio-block", block, at_work(block, 1 << 9 | 1 << 11, 1, DeviceState::Block(disk.clone()))),
        mmio("virtio-console", console, at_work(console, 2, 6, DeviceState::Console(ports))),
        mmio("virtio-net", net, at_work(net, features, 5, DeviceState::Net(frames))),
        mmio_since(2, "virtio-net", net, at_work(net, features, 5, DeviceState::Net(holding))),
        mmio("virtio-balloon", balloon, at_work(balloon, 0, 2, DeviceState::Balloon(pages))),
        mmio("virtio-vsock", vsock, at_work(vsock, 1, 3, DeviceState::Stateless)),
        pci_virtio("virtio-pci", block, at_work(block, 1 << 9, 1, DeviceState::Block(disk))),
    ]
}
