//! A virtio device whose doorbell the kernel rings: the guest's write does not come to the monitor, and an event loop
//! serves the device meanwhile. Where a backend has no such doorbells, the same guest rings by the bus.

// The lint spares test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::io;
use std::sync::{Arc, Mutex};

use vmm_cpu::state::{GeneralRegisters, Segment, SystemRegisters};
use vmm_cpu::{CpuModel, Halt, VcpuHandle, VcpuIo, Vm, VmConfig, open_backend};
use vmm_devices::pci::{HostBridge, PciLayout};
use vmm_devices::testkit::{Driver, DriverQueue, MmioDriver, PciDriver};
use vmm_devices::virtio::{EventLoop, Executor, Rng, VirtioMmio, VirtioPci};
use vmm_devices::{BusDevice, BusRange, MmioBus};
use vmm_examples::virtio::KernelDoorbells;
use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};
use vmm_memory::{GuestRam, RegionConfig};

/// Where the device on the bus without PCI is.
const DEVICE: u64 = 0xd_0000;
const CODE: u64 = 0x7000;

/// Rings for queue 0, and says so: `mov dword [0x50], 0; out 0xf4, al; jmp` to the beginning.
const RING_MMIO: &[u8] = &[0x66, 0xc7, 0x06, 0x50, 0, 0, 0, 0, 0, 0xe6, 0xf4, 0xeb, 0xf3];
/// The same with `mov word [0x3000], 0`, which is where a function's doorbells are in its BAR.
const RING_PCI: &[u8] = &[0xc7, 0x06, 0x00, 0x30, 0, 0, 0xe6, 0xf4, 0xeb, 0xf6];

struct Io {
    bus: Arc<MmioBus>,
    vcpu: Arc<dyn VcpuHandle>,
    stores: u32,
}

impl VcpuIo for Io {
    fn pio_write(&mut self, _port: u16, _size: usize, _data: &[u8]) {
        self.vcpu.kick();
    }

    fn mmio_write(&mut self, gpa: GuestAddress, data: &[u8]) {
        self.stores += 1;
        self.bus.write(gpa, data);
    }
}

/// A device that is on the bus, and where the guest rings for its queue.
struct Device<D> {
    driver: D,
    /// What the guest's data segment begins with.
    base: u64,
    code: &'static [u8],
}

type Build<D> = fn(&dyn Vm, &GuestRam, Arc<dyn Executor>, &Arc<MmioBus>) -> Device<D>;

fn mmio_device(
    vm: &dyn Vm,
    ram: &GuestRam,
    executor: Arc<dyn Executor>,
    bus: &Arc<MmioBus>,
) -> Device<MmioDriver> {
    let rng = Rng::new(io::repeat(7));
    let mut builder = VirtioMmio::builder(rng, ram.address_space(), |_: bool| {}).executor(executor);
    if let Some(doorbells) = vm.doorbells() {
        builder = builder.doorbells(GuestAddress(DEVICE), KernelDoorbells(doorbells));
    }
    let device: Arc<dyn BusDevice> = Arc::new(Mutex::new(builder.build().unwrap()));
    bus.insert("rng", BusRange::new(DEVICE, 0x200), Arc::clone(&device)).unwrap();
    Device { driver: MmioDriver::new(device), base: DEVICE, code: RING_MMIO }
}

fn pci_device(
    vm: &dyn Vm,
    ram: &GuestRam,
    executor: Arc<dyn Executor>,
    bus: &Arc<MmioBus>,
) -> Device<PciDriver> {
    let layout = PciLayout::default();
    let bridge = HostBridge::new(layout, bus, &Arc::default()).unwrap();
    let rng = Rng::new(io::repeat(7));
    let mut builder = VirtioPci::builder(rng, ram.address_space(), |_: u64, _: u32| {}).executor(executor);
    if let Some(doorbells) = vm.doorbells() {
        builder = builder.doorbells(KernelDoorbells(doorbells));
    }
    let function = Arc::new(Mutex::new(builder.build().unwrap()));
    let address = bridge.add(function.clone()).unwrap();
    let config = layout.ecam_range().base + (u64::from(address.device()) << 15);
    // The guest's firmware: memory decoding and bus master, then somewhere else.
    assert!(bus.write(GuestAddress(config + 4), &6_u16.to_le_bytes()));
    let mut bar = [0; 4];
    assert!(bus.read(GuestAddress(config + 0x10), &mut bar));
    let base = (u32::from_le_bytes(bar) & !0xf) + 0x10_0000;
    assert!(bus.write(GuestAddress(config + 0x10), &base.to_le_bytes()));
    let driver = PciDriver::new(function).unwrap();
    Device { driver, base: base.into(), code: RING_PCI }
}

/// How many of the guest's `rings` came to the monitor.
fn stores<D: Driver>(backend: &str, rings: u32, device: Build<D>) -> Option<u32> {
    let hypervisor = match open_backend(backend) {
        Ok(hypervisor) => hypervisor,
        Err(error) => {
            println!("doorbells: skipped on {backend}: {error}");
            return None;
        }
    };
    let ram = GuestRam::builder().region(RegionConfig::new(GuestAddress(0), 0x8_0000)).build().unwrap();
    let vm = hypervisor.create_vm(&VmConfig::new(CpuModel::Host)).unwrap();
    vm.map_ram(&ram).unwrap();
    let event_loop = EventLoop::new(|| 0).unwrap().spawn("virtio").unwrap();
    let bus = Arc::new(MmioBus::new());
    let device = device(&*vm, &ram, event_loop.executor(), &bus);
    let memory = ram.address_space();
    memory.memory().write_slice(device.code, GuestAddress(CODE)).unwrap();

    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut system = SystemRegisters::at_reset();
    (system.cs, system.ds) = (Segment::real_mode(0, true), Segment::real_mode(0, false));
    // As firmware does for what lies above the first MiB.
    system.ds.base = device.base;
    vcpu.set_system_registers(&system).unwrap();
    vcpu.set_registers(&GeneralRegisters { rip: CODE, ..GeneralRegisters::at_reset() }).unwrap();
    let mut io = Io { bus, vcpu: vcpu.handle(), stores: 0 };

    // Across resets of the device the doorbell stays attached.
    for _ in 0..2 {
        let mut queue = DriverQueue::new(memory.clone(), 0x1000, 16).unwrap();
        device.driver.start(0, &[(0, &queue)]).unwrap();
        for _ in 0..rings / 2 {
            queue.chain().writable(0x4000, 16).submit().unwrap();
            assert_eq!(vcpu.run(&mut io).unwrap(), Halt::Interrupted);
            let mut used = None;
            while used.is_none() {
                std::thread::yield_now();
                used = queue.take_used().unwrap();
            }
            assert_eq!(used.map(|(_, written)| written), Some(16));
        }
        device.driver.set_status(0);
    }
    let mut bytes = [0; 16];
    memory.memory().read_slice(&mut bytes, GuestAddress(0x4000)).unwrap();
    assert_eq!(bytes, [7; 16]);
    Some(io.stores)
}

#[test]
fn kvm_rings_without_the_monitor() {
    // `None` where there is no KVM.
    assert_eq!(stores("kvm", 200, mmio_device).unwrap_or(0), 0, "on the bus");
    assert_eq!(stores("kvm", 200, pci_device).unwrap_or(0), 0, "in the BAR of a function");
}

#[test]
fn the_translator_rings_by_the_bus() {
    assert_eq!(stores("translate", 200, mmio_device), Some(200));
    assert_eq!(stores("translate", 200, pci_device), Some(200));
}
