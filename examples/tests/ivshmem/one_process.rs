//! Two virtual machines of one process at a hub, on each backend that there is: a few instructions each, which reach the memory without
//! the monitor, and ring by it.

use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vmm_cpu::state::{GeneralRegisters, Segment, SystemRegisters};
use vmm_cpu::{CpuModel, Halt, Hypervisor, Vcpu, VcpuHandle, VcpuIo, Vm, VmConfig, open_backend};
use vmm_devices::channel::{AllowAll, DoorbellRing, Gatekeeper, GrantId, Party, RegionMap, VmIdentity};
use vmm_devices::ivshmem::{Hub, Ivshmem, Region};
use vmm_devices::pci::{HostBridge, PciFunction as _, PciLayout};
use vmm_devices::{MmioBus, PioBus};
use vmm_examples::ivshmem::Mapper;
use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};
use vmm_memory::{Access, GuestRam, RegionConfig, SharedMemory};

const CODE: u64 = 0x7000;
/// No instruction takes so long, on a host that has much else to do.
const LONGEST: Duration = Duration::from_secs(60);

/// `mov word [0x10], 0x1234; mov dword es:[0x0c], 0x0001_0000; out 0xf4, al; jmp` to the beginning: writes, and rings peer 1.
const WRITER: &[u8] = &[
    0xc7, 0x06, 0x10, 0x00, 0x34, 0x12, 0x66, 0x26, 0xc7, 0x06, 0x0c, 0x00, 0x00, 0x00, 0x01, 0x00, 0xe6,
    0xf4, 0xeb, 0xec,
];
/// `mov ax, [0x10]; cmp ax, 0x1234; jne` to the beginning, `out 0xf4, al`, then `mov ax, [0x10]; cmp ax, 0xffff; jne` back to that,
/// `out 0xf4, al; jmp` to the beginning: waits for what the other one writes, and then until the memory is gone.
const READER: &[u8] = &[
    0xa1, 0x10, 0x00, 0x3d, 0x34, 0x12, 0x75, 0xf8, 0xe6, 0xf4, 0xa1, 0x10, 0x00, 0x3d, 0xff, 0xff, 0x75,
    0xf8, 0xe6, 0xf4, 0xeb, 0xea,
];

/// By whom the guest's accesses come, if they come to the monitor at all.
struct Io {
    bus: Arc<MmioBus>,
    vcpu: Arc<dyn VcpuHandle>,
    loads: u32,
    /// When the guest last said something.
    said: Instant,
}

impl VcpuIo for Io {
    fn pio_write(&mut self, _port: u16, _size: usize, _data: &[u8]) {
        self.said = Instant::now();
        self.vcpu.kick();
    }

    fn mmio_read(&mut self, gpa: GuestAddress, data: &mut [u8]) {
        self.loads += 1;
        data.fill(0xff);
        self.bus.read(gpa, data);
    }

    fn mmio_write(&mut self, gpa: GuestAddress, data: &[u8]) {
        self.bus.write(gpa, data);
    }
}

struct Machine {
    // Before the memory that it maps goes.
    vcpu: Box<dyn Vcpu>,
    io: Io,
    device: Arc<Mutex<Ivshmem>>,
    messages: Arc<Mutex<Vec<u32>>>,
    right: GrantId,
    _vm: Arc<dyn Vm>,
    _pio: Arc<PioBus>,
}

impl Machine {
    fn new(hypervisor: &dyn Hypervisor, hub: &Hub, gatekeeper: &Gatekeeper, code: &[u8]) -> Self {
        let ram = GuestRam::builder().region(RegionConfig::new(GuestAddress(0), 0x1_0000)).build().unwrap();
        ram.address_space().memory().write_slice(code, GuestAddress(CODE)).unwrap();
        let vm = hypervisor.create_vm(&VmConfig::new(CpuModel::Host)).unwrap();
        vm.map_ram(&ram).unwrap();

        let (who, region) = (Party::Vm(VmIdentity::new(1, 1)), Arc::clone(hub.region().name()));
        let map = RegionMap { region: Arc::clone(&region), access: Access::ReadWrite };
        let map = gatekeeper.open(who.clone(), None, map).unwrap();
        let ring = gatekeeper.open(who, None, DoorbellRing { region }).unwrap();
        let right = map.id();
        let messages: Arc<Mutex<Vec<u32>>> = Arc::default();
        let sent = Arc::clone(&messages);
        let device = Ivshmem::builder(hub.join(map, Some(ring)).unwrap(), move |_: u64, data: u32| {
            sent.lock().unwrap().push(data);
        });
        let device = Arc::new(Mutex::new(device.mapper(Mapper(Arc::clone(&vm))).build().unwrap()));

        let (bus, pio) = (Arc::new(MmioBus::new()), Arc::new(PioBus::new()));
        let layout = PciLayout::default();
        let bridge = HostBridge::new(layout, &bus, &pio).unwrap();
        let address = bridge.add(device.clone()).unwrap();
        let bar = |bar| device.lock().unwrap().config().bar_base(bar).unwrap();
        let config = layout.ecam_range().base + (u64::from(address.device()) << 15);
        // The guest's firmware: decoding and bus master, MSI-X, and a message for vector 0.
        assert!(bus.write(GuestAddress(config + 4), &[6, 0]));
        assert!(bus.write(GuestAddress(config + 0x43), &[0x80]));
        for (register, value) in [(0, 0xfee0_0000_u32), (8, 0x40), (12, 0)] {
            assert!(bus.write(GuestAddress(bar(1) + register), &value.to_le_bytes()));
        }

        let mut vcpu = vm.create_vcpu(0).unwrap();
        let mut system = SystemRegisters::at_reset();
        (system.cs, system.ds, system.es) =
            (Segment::real_mode(0, true), Segment::real_mode(0, false), Segment::real_mode(0, false));
        (system.ds.base, system.es.base) = (bar(2), bar(0));
        vcpu.set_system_registers(&system).unwrap();
        vcpu.set_registers(&GeneralRegisters { rip: CODE, ..GeneralRegisters::at_reset() }).unwrap();
        let io = Io { bus, vcpu: vcpu.handle(), loads: 0, said: Instant::now() };
        Self { vcpu, io, device, messages, right, _vm: vm, _pio: pio }
    }

    /// Until the guest says something; a kick ends what takes too long.
    fn run(&mut self) {
        let (done, handle) = (Arc::new(Mutex::new(false)), self.vcpu.handle());
        let watched = Arc::clone(&done);
        let begun = Instant::now();
        thread::spawn(move || {
            while !*watched.lock().unwrap() && begun.elapsed() < LONGEST {
                thread::sleep(Duration::from_millis(20));
            }
            if !*watched.lock().unwrap() {
                handle.kick();
            }
        });
        assert_eq!(self.vcpu.run(&mut self.io).unwrap(), Halt::Interrupted);
        *done.lock().unwrap() = true;
        assert!(self.io.said > begun, "the guest said nothing in {LONGEST:?}: {:?}", self.vcpu.registers());
    }
}

fn two_machines(backend: &str) {
    let hypervisor = match open_backend(backend) {
        Ok(hypervisor) => hypervisor,
        Err(error) => {
            println!("two machines: skipped on {backend}: {error}");
            return;
        }
    };
    let hub =
        Hub::new(Region::new("hub", SharedMemory::create("hub", 0x1_0000).unwrap()).unwrap(), 1).unwrap();
    let gatekeeper = Gatekeeper::new(AllowAll);
    let mut writer = Machine::new(&*hypervisor, &hub, &gatekeeper, WRITER);
    let mut reader = Machine::new(&*hypervisor, &hub, &gatekeeper, READER);
    for _ in 0..10 {
        writer.run();
    }
    assert_eq!(*reader.messages.lock().unwrap(), [0x40; 10], "a message for each ring");
    reader.run();
    assert_eq!(reader.io.loads, 0, "{backend}: loads go to the memory itself");

    // While the reader's vCPU loads all the time.
    let right = reader.right;
    let reading = thread::spawn(move || {
        reader.run();
        reader
    });
    thread::sleep(Duration::from_millis(50));
    let begun = Instant::now();
    assert!(gatekeeper.revoke(right));
    let took = begun.elapsed();
    let reader = reading.join().unwrap();
    assert!(reader.io.loads > 0, "{backend}: all ones come by the bus");
    println!(
        "{backend}: revoked in {took:?}, the guest has seen it {:?} after that began",
        reader.io.said - begun
    );
    assert!(!reader.device.lock().unwrap().member().is_open());
    writer.run();
    assert_eq!(writer.device.lock().unwrap().figures().no_peer, 1, "nobody hears the next ring");
    assert_eq!(reader.messages.lock().unwrap().len(), 10);
}

#[test]
fn two_machines_on_the_translator() {
    two_machines("translate");
}

#[test]
fn two_machines_on_kvm() {
    two_machines("kvm");
}
