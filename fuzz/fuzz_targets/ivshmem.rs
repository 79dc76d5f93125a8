//! Hostile guests at memory that they have in common: registers, BARs that move, rings, revocations, devices that come and go.

#![no_main]

use std::error::Error;
use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use vmm_devices::channel::{AllowAll, DoorbellRing, Gatekeeper, GrantId, Party, RegionMap, VmIdentity};
use vmm_devices::ivshmem::{Hub, Ivshmem, Region, RegionMapper};
use vmm_devices::pci::{BarStatus, HostBridge, PciFunction, PciLayout};
use vmm_devices::vmm_memory::vm_memory::{GuestAddress, GuestMemoryRegion};
use vmm_devices::vmm_memory::{Access, GuestRegion, SharedMemory};
use vmm_devices::{MmioBus, PioBus};

#[derive(Debug, Arbitrary)]
enum Step {
    Store { who: u8, bar: u8, offset: u16, data: [u8; 8], size: u8 },
    Load { who: u8, bar: u8, offset: u16, size: u8 },
    Configure { who: u8, register: u8, value: u32 },
    Move { who: u8, place: u16 },
    Decode { who: u8, on: bool },
    Vector { who: u8, vector: u8, masked: bool },
    Ring { who: u8, peer: u8, vector: u8 },
    Revoke { who: u8, ring: bool },
    Leave { who: u8 },
    Join { who: u8, read_only: bool, rings: bool },
    Reset { who: u8 },
    SaveAndRestore { who: u8 },
}

/// What the guest sees without the bus.
#[derive(Clone, Default)]
struct Guest(Arc<Mutex<Vec<u64>>>);

impl RegionMapper for Guest {
    fn map(&mut self, region: Arc<GuestRegion>, _: Access) -> Result<(), Box<dyn Error + Send + Sync>> {
        let mut sees = self.0.lock().unwrap();
        assert!(sees.is_empty(), "twice");
        sees.push(region.start_addr().0);
        Ok(())
    }

    fn unmap(&mut self, gpa: GuestAddress) -> Result<(), Box<dyn Error + Send + Sync>> {
        assert_eq!(self.0.lock().unwrap().pop(), Some(gpa.0));
        Ok(())
    }
}

struct Machine {
    mmio: Arc<MmioBus>,
    _pio: Arc<PioBus>,
    bridge: HostBridge,
    function: Arc<Mutex<Ivshmem>>,
    guest: Guest,
    rights: (GrantId, Option<GrantId>),
}

const CONFIG: u64 = 0xe000_0000 + (1 << 15);

impl Machine {
    fn new(hub: &Hub, gatekeeper: &Gatekeeper, read_only: bool, rings: bool) -> Self {
        let (vm, region) = (Party::Vm(VmIdentity::new(1, 1)), Arc::clone(hub.region().name()));
        let access = if read_only { Access::ReadOnly } else { Access::ReadWrite };
        let map = RegionMap { region: Arc::clone(&region), access };
        let map = gatekeeper.open(vm.clone(), None, map).unwrap();
        let ring = rings.then(|| gatekeeper.open(vm, None, DoorbellRing { region }).unwrap());
        let rights = (map.id(), ring.as_ref().map(|ring| ring.id()));
        let (mmio, pio, guest) = (Arc::new(MmioBus::new()), Arc::new(PioBus::new()), Guest::default());
        let bridge = HostBridge::new(PciLayout::default(), &mmio, &pio).unwrap();
        let member = hub.join(map, ring).unwrap();
        let device = Ivshmem::builder(member, |_: u64, _: u32| {}).mapper(guest.clone()).build().unwrap();
        let function = Arc::new(Mutex::new(device));
        bridge.add(function.clone()).unwrap();
        mmio.write(GuestAddress(CONFIG + 4), &[6, 0]);
        mmio.write(GuestAddress(CONFIG + 0x43), &[0x80]);
        Self { mmio, _pio: pio, bridge, function, guest, rights }
    }

    fn bar(&self, bar: u8) -> u64 {
        self.function.lock().unwrap().config().bar_base(usize::from(bar % 3)).unwrap()
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let memory = SharedMemory::create("fuzz", 0x1000).unwrap();
    let hub = Hub::new(Region::new("fuzz", memory).unwrap(), 3).unwrap();
    let gatekeeper = Gatekeeper::new(AllowAll);
    let mut machines: Vec<Option<Machine>> =
        (0..3).map(|_| Some(Machine::new(&hub, &gatekeeper, false, true))).collect();
    for step in steps.iter().take(512) {
        let index = |who: u8| usize::from(who % 3);
        match *step {
            Step::Join { who, read_only, rings } => {
                machines[index(who)].get_or_insert_with(|| Machine::new(&hub, &gatekeeper, read_only, rings));
            }
            Step::Leave { who } => machines[index(who)] = None,
            Step::Store { who, .. }
            | Step::Load { who, .. }
            | Step::Configure { who, .. }
            | Step::Move { who, .. }
            | Step::Decode { who, .. }
            | Step::Vector { who, .. }
            | Step::Ring { who, .. }
            | Step::Revoke { who, .. }
            | Step::Reset { who }
            | Step::SaveAndRestore { who } => {
                if let Some(machine) = &machines[index(who)] {
                    perform(machine, &gatekeeper, step);
                }
            }
        }
        for machine in machines.iter().flatten() {
            let answers = machine
                .bridge
                .mappings()
                .iter()
                .any(|mapping| mapping.bar == 2 && mapping.status == BarStatus::Mapped);
            let open = machine.function.lock().unwrap().member().is_open();
            let expected: Vec<u64> = (answers && open).then(|| machine.bar(2)).into_iter().collect();
            assert_eq!(*machine.guest.0.lock().unwrap(), expected);
        }
    }
    drop(machines);
    assert!(hub.members().is_empty() && gatekeeper.open_channels().is_empty());
});

fn perform(machine: &Machine, gatekeeper: &Gatekeeper, step: &Step) {
    let at = |bar: u8, offset: u16| GuestAddress(machine.bar(bar) + u64::from(offset % 0x1008));
    match *step {
        Step::Store { bar, offset, data, size, .. } => {
            machine.mmio.write(at(bar, offset), &data[..usize::from(size % 9)]);
        }
        Step::Load { bar, offset, size, .. } => {
            machine.mmio.read(at(bar, offset), &mut [0; 8][..usize::from(size % 9)]);
        }
        Step::Configure { register, value, .. } => {
            machine.mmio.write(GuestAddress(CONFIG + u64::from(register & !3)), &value.to_le_bytes());
        }
        Step::Move { place, .. } => {
            let base = 0xe7ff_0000 + u32::from(place) * 0x400;
            machine.mmio.write(GuestAddress(CONFIG + 0x18), &base.to_le_bytes());
        }
        Step::Decode { on, .. } => {
            machine.mmio.write(GuestAddress(CONFIG + 4), &[if on { 6 } else { 0 }, 0]);
        }
        Step::Vector { vector, masked, .. } => {
            machine.mmio.write(at(1, u16::from(vector % 4) * 16 + 12), &[u8::from(masked), 0, 0, 0]);
        }
        Step::Ring { peer, vector, .. } => {
            machine.mmio.write(at(0, 12), &[vector % 5, 0, peer % 16, 0]);
        }
        Step::Revoke { ring: false, .. } => {
            gatekeeper.revoke(machine.rights.0);
        }
        Step::Revoke { ring: true, .. } => {
            machine.rights.1.map(|id| gatekeeper.revoke(id));
        }
        Step::Reset { .. } => machine.bridge.reset(),
        Step::SaveAndRestore { .. } => {
            let mut device = machine.function.lock().unwrap();
            let state = device.state();
            device.restore(&state).unwrap();
            assert_eq!(device.state(), state);
        }
        Step::Join { .. } | Step::Leave { .. } => {}
    }
}
