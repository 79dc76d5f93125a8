//! Machines with memory in common, whose processors run: a few instructions that load from it all the time.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use vmm_cpu::state::{GeneralRegisters, Segment, SystemRegisters};
use vmm_cpu::{CpuModel, Hypervisor, Vcpu, VcpuHandle, VcpuIo, Vm, VmConfig};
use vmm_devices::channel::{RegionMap, VmIdentity};
use vmm_devices::ivshmem::{Hub, Ivshmem, Region};
use vmm_devices::pci::{HostBridge, PciFunction as _, PciLayout};
use vmm_devices::{MmioBus, PioBus};
use vmm_examples::ivshmem::Mapper;
use vmm_examples::policy::Enforcement;
use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _, MemoryRegionAddress};
use vmm_memory::{Access, GuestRam, RegionConfig, SharedMapping, SharedMemory};

const CODE: u64 = 0x7000;

/// Bytes of a region.
const SIZE: u64 = 0x1_0000;

/// `mov ax, [0x10]; cmp ax, 0xffff; jne` to the beginning, `out 0xf4, al; jmp` to the beginning: loads until all bits are ones, which memory that is
/// not there gives, says so, and goes on.
const LOADS: &[u8] = &[0xa1, 0x10, 0x00, 0x3d, 0xff, 0xff, 0x75, 0xf8, 0xe6, 0xf4, 0xeb, 0xf4];

/// What the guest's accesses come to that no memory is there for.
struct Io {
    bus: Arc<MmioBus>,
    start: Instant,
    /// Nanoseconds from the start to when the guest first said that the memory is gone; 0 as long as it has not.
    said_ns: Arc<AtomicU64>,
    /// Loads that came by the bus and gave something else than ones.
    wrong: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    vcpu: Arc<dyn VcpuHandle>,
}

impl VcpuIo for Io {
    fn pio_write(&mut self, _port: u16, _size: usize, _data: &[u8]) {
        let now = u64::try_from(self.start.elapsed().as_nanos()).unwrap();
        let (Ok(_) | Err(_)) = self.said_ns.compare_exchange(0, now, Ordering::SeqCst, Ordering::SeqCst);
        if self.stop.load(Ordering::SeqCst) {
            self.vcpu.kick();
        }
    }

    fn mmio_read(&mut self, gpa: GuestAddress, data: &mut [u8]) {
        data.fill(0xff);
        self.bus.read(gpa, data);
        if data.iter().any(|byte| *byte != 0xff) {
            self.wrong.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn mmio_write(&mut self, gpa: GuestAddress, data: &[u8]) {
        self.bus.write(gpa, data);
    }
}

/// A region that is mapped into a machine, and the host's view of it.
pub(crate) struct Mapped {
    pub(crate) name: String,
    pub(crate) device: Arc<Mutex<Ivshmem>>,
    pub(crate) memory: SharedMapping,
}

/// A machine whose processor runs.
pub(crate) struct Machine {
    pub(crate) regions: Vec<Mapped>,
    pub(crate) start: Instant,
    pub(crate) said_ns: Arc<AtomicU64>,
    pub(crate) wrong: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    vcpu: Arc<dyn VcpuHandle>,
    running: Option<JoinHandle<()>>,
    // They are in use as long as it runs.
    _vm: Arc<dyn Vm>,
    _pio: Arc<PioBus>,
}

impl Machine {
    /// One with regions of those names, which loads from the first.
    pub(crate) fn new(
        hypervisor: &dyn Hypervisor,
        enforcement: &Enforcement,
        who: VmIdentity,
        names: &[String],
    ) -> Self {
        let ram = GuestRam::builder().region(RegionConfig::new(GuestAddress(0), SIZE)).build().unwrap();
        ram.address_space().memory().write_slice(LOADS, GuestAddress(CODE)).unwrap();
        let vm = hypervisor.create_vm(&VmConfig::new(CpuModel::Host)).unwrap();
        vm.map_ram(&ram).unwrap();
        let (bus, pio) = (Arc::new(MmioBus::new()), Arc::new(PioBus::new()));
        let layout = PciLayout::default();
        let bridge = HostBridge::new(layout, &bus, &pio).unwrap();
        let mut regions = Vec::new();
        let mut first = None;
        for name in names {
            let memory = SharedMemory::create(name, SIZE).unwrap();
            let mapping = memory.map(GuestAddress(0), Access::ReadWrite).unwrap();
            let hub = Hub::new(Region::new(name.as_str(), memory).unwrap(), 1).unwrap();
            let map = RegionMap { region: Arc::clone(hub.region().name()), access: Access::ReadOnly };
            let right = enforcement.gatekeeper().open(who.into(), None, map).unwrap();
            let device = Ivshmem::builder(hub.join(right, None).unwrap(), |_: u64, _: u32| {});
            let device = Arc::new(Mutex::new(device.mapper(Mapper(Arc::clone(&vm))).build().unwrap()));
            let address = bridge.add(device.clone()).unwrap();
            // The guest's firmware has it decode.
            let config = layout.ecam_range().base + (u64::from(address.device()) << 15);
            assert!(bus.write(GuestAddress(config + 4), &[6, 0]));
            assert!(device.lock().unwrap().mapped_at().is_some());
            first.get_or_insert(device.lock().unwrap().config().bar_base(2).unwrap());
            regions.push(Mapped { name: name.clone(), device, memory: mapping });
        }
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let mut system = SystemRegisters::at_reset();
        (system.cs, system.ds) = (Segment::real_mode(0, true), Segment::real_mode(0, false));
        system.ds.base = first.unwrap();
        vcpu.set_system_registers(&system).unwrap();
        vcpu.set_registers(&GeneralRegisters { rip: CODE, ..GeneralRegisters::at_reset() }).unwrap();
        let start = Instant::now();
        let (said_ns, wrong, stop) = (Arc::default(), Arc::default(), Arc::default());
        let handle = vcpu.handle();
        let io = Io {
            bus,
            start,
            said_ns: Arc::clone(&said_ns),
            wrong: Arc::clone(&wrong),
            stop: Arc::clone(&stop),
            vcpu: Arc::clone(&handle),
        };
        let running = run(vcpu, io, Arc::clone(&stop));
        Self {
            regions,
            start,
            said_ns,
            wrong,
            stop,
            vcpu: handle,
            running: Some(running),
            _vm: vm,
            _pio: pio,
        }
    }

    /// What the host writes where the guest loads from.
    pub(crate) fn write(&self, region: usize, value: u16) {
        let memory = self.regions[region].memory.region();
        memory.write_obj(value, MemoryRegionAddress(0x10)).unwrap();
    }
}

fn run(mut vcpu: Box<dyn Vcpu>, mut io: Io, stop: Arc<AtomicBool>) -> JoinHandle<()> {
    thread::spawn(move || {
        while !stop.load(Ordering::SeqCst) {
            vcpu.run(&mut io).unwrap();
        }
    })
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.vcpu.kick();
        if let Some(running) = self.running.take() {
            // It has said what was wrong.
            let (Ok(()) | Err(_)) = running.join();
        }
    }
}
