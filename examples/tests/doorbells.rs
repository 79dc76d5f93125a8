//! A virtio device whose doorbell the kernel rings: the guest's write does not come to the monitor, and an event loop
//! serves the device meanwhile. Where a backend has no such doorbells, the same guest rings by the bus.

// The lint spares test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::io;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use vmm_cpu::state::{GeneralRegisters, Segment, SystemRegisters};
use vmm_cpu::{
    CpuModel, Doorbell, DoorbellAddress, Halt, Notifier, VcpuHandle, VcpuIo, VmConfig, open_backend,
};
use vmm_devices::testkit::{Driver as _, DriverQueue, MmioDriver};
use vmm_devices::virtio::{EventLoop, Rng, VirtioMmio};
use vmm_devices::{BusDevice, BusRange, MmioBus};
use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};
use vmm_memory::{GuestRam, RegionConfig};

/// Where the device is, within reach of real mode.
const DEVICE: u64 = 0xd_0000;
const CODE: u64 = 0x7000;

/// Rings for queue 0, and says so: `mov dword [0x50], 0; out 0xf4, al; jmp` to the beginning.
const RING: [u8; 13] = [0x66, 0xc7, 0x06, 0x50, 0, 0, 0, 0, 0, 0xe6, 0xf4, 0xeb, 0xf3];

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

/// How many of the guest's `rings` came to the monitor.
fn stores(backend: &str, rings: u32) -> Option<u32> {
    let hypervisor = match open_backend(backend) {
        Ok(hypervisor) => hypervisor,
        Err(error) => {
            println!("doorbells: skipped on {backend}: {error}");
            return None;
        }
    };
    let ram = GuestRam::builder().region(RegionConfig::new(GuestAddress(0), 0x8_0000)).build().unwrap();
    ram.memory().write_slice(&RING, GuestAddress(CODE)).unwrap();
    let vm = hypervisor.create_vm(&VmConfig::new(CpuModel::Host)).unwrap();
    vm.map_ram(&ram).unwrap();

    let event_loop = EventLoop::new(|| 0).unwrap().spawn("virtio").unwrap();
    let (interrupt, interrupts) = channel();
    let line = move |level: bool| {
        if level {
            interrupt.send(()).unwrap();
        }
    };
    let mut device = VirtioMmio::builder(Rng::new(io::repeat(7)), ram.address_space(), line)
        .executor(event_loop.executor())
        .build()
        .unwrap();
    if let Some(doorbells) = vm.doorbells() {
        for found in device.notifiers().unwrap() {
            let address = DoorbellAddress::Mmio(GuestAddress(DEVICE + found.offset));
            let doorbell = Doorbell::new(address, found.width).matching(found.value);
            let notifier = Notifier::from(found.fd.try_clone().unwrap());
            doorbells.attach_doorbell(&doorbell, &notifier).unwrap();
        }
    }
    let device: Arc<dyn BusDevice> = Arc::new(Mutex::new(device));
    let bus = Arc::new(MmioBus::new());
    bus.insert("rng", BusRange::new(DEVICE, 0x200), Arc::clone(&device)).unwrap();

    let mut vcpu = vm.create_vcpu(0).unwrap();
    let mut system = SystemRegisters::at_reset();
    (system.cs, system.ds) = (Segment::real_mode(0, true), Segment::real_mode(0xd000, false));
    vcpu.set_system_registers(&system).unwrap();
    vcpu.set_registers(&GeneralRegisters { rip: CODE, ..GeneralRegisters::at_reset() }).unwrap();
    let mut io = Io { bus, vcpu: vcpu.handle(), stores: 0 };

    let driver = MmioDriver::new(device);
    let memory = ram.address_space();
    // Across resets of the device the doorbell stays attached.
    for _ in 0..2 {
        let mut queue = DriverQueue::new(memory.clone(), 0x1000, 16).unwrap();
        driver.start(0, &[(0, &queue)]).unwrap();
        for _ in 0..rings / 2 {
            queue.chain().writable(0x4000, 16).submit().unwrap();
            assert_eq!(vcpu.run(&mut io).unwrap(), Halt::Interrupted);
            let mut used = None;
            while used.is_none() {
                interrupts.recv().unwrap();
                driver.acknowledge(1);
                used = queue.take_used().unwrap();
            }
            assert_eq!(used.map(|(_, written)| written), Some(16));
        }
        driver.set_status(0);
    }
    let mut bytes = [0; 16];
    memory.memory().read_slice(&mut bytes, GuestAddress(0x4000)).unwrap();
    assert_eq!(bytes, [7; 16]);
    Some(io.stores)
}

#[test]
fn kvm_rings_without_the_monitor() {
    if let Some(stores) = stores("kvm", 200) {
        assert_eq!(stores, 0);
    }
}

#[test]
fn the_translator_rings_by_the_bus() {
    assert_eq!(stores("translate", 200), Some(200));
}
