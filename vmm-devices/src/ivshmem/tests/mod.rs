//! Devices on buses of their own, and what a guest does there.

#![allow(clippy::cast_possible_truncation, reason = "addresses, positions and counts are small here")]

mod flaws;
mod hostile_clients;
mod hostile_servers;
mod memory;
mod processes;
mod random;
mod registers;
mod rights;

use std::error::Error;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestMemoryRegion as _, MemoryRegionAddress};
use vmm_memory::{Access, GuestRegion, SharedMemory};

use super::*;
use crate::channel::{AllowAll, DoorbellRing, Gatekeeper, Grant, Party, RegionMap, VmIdentity};
use crate::interrupt::lock;
use crate::interrupt::testing::Recorder;
use crate::pci::{HostBridge, PciLayout};
use crate::{MmioBus, PioBus};

const SIZE: u64 = 0x4000;
const COMMAND: u64 = 4;
/// Memory decoding and bus master.
const DECODE: u16 = 6;

fn region(name: &str) -> Region {
    Region::new(name, SharedMemory::create(name, SIZE).unwrap()).unwrap()
}

fn vm(uuid: u128) -> Party {
    Party::Vm(VmIdentity::new(uuid, 1))
}

/// Both rights to a region.
fn rights(gatekeeper: &Gatekeeper, name: &str, access: Access) -> (Grant<RegionMap>, Grant<DoorbellRing>) {
    let region: Arc<str> = name.into();
    let map = RegionMap { region: Arc::clone(&region), access };
    (
        gatekeeper.open(vm(1), None, map).unwrap(),
        gatekeeper.open(vm(1), None, DoorbellRing { region }).unwrap(),
    )
}

fn join(hub: &Hub) -> Member {
    let (map, ring) = rights(&Gatekeeper::new(AllowAll), hub.region().name(), Access::ReadWrite);
    hub.join(map, Some(ring)).unwrap()
}

/// A region, and what the guest may do with it.
type Seen = (Arc<GuestRegion>, Access);

/// A virtual machine as far as memory goes: what it was told, and the regions that its guest sees.
#[derive(Clone, Default)]
struct Guest {
    told: Recorder<String>,
    sees: Arc<Mutex<Vec<Seen>>>,
    /// Refuses to take memory away.
    stuck: Arc<Mutex<bool>>,
}

impl Guest {
    /// What a vCPU loads without the bus.
    fn load(&self, gpa: u64) -> Option<u64> {
        let sees = lock(&self.sees);
        let (region, _) = sees
            .iter()
            .find(|(region, _)| gpa >= region.start_addr().0 && gpa - region.start_addr().0 < region.len())?;
        Some(region.read_obj(MemoryRegionAddress(gpa - region.start_addr().0)).unwrap())
    }
}

impl RegionMapper for Guest {
    fn map(&mut self, region: Arc<GuestRegion>, access: Access) -> Result<(), Box<dyn Error + Send + Sync>> {
        let mut sees = lock(&self.sees);
        let (base, end) = (region.start_addr().0, region.start_addr().0 + region.len());
        let overlaps =
            |other: &GuestRegion| base < other.start_addr().0 + other.len() && other.start_addr().0 < end;
        if sees.iter().any(|(other, _)| overlaps(other)) {
            return Err("it overlaps".into());
        }
        self.told.record(format!("map {base:#x} {access:?}"));
        sees.push((region, access));
        Ok(())
    }

    fn unmap(&mut self, gpa: GuestAddress) -> Result<(), Box<dyn Error + Send + Sync>> {
        if *lock(&self.stuck) {
            return Err("a vCPU does not let go".into());
        }
        self.told.record(format!("unmap {:#x}", gpa.0));
        let mut sees = lock(&self.sees);
        let before = sees.len();
        sees.retain(|(region, _)| region.start_addr() != gpa);
        assert_eq!(sees.len() + 1, before, "unmapped what was not mapped");
        Ok(())
    }
}

/// A device on a bridge, and what comes out of it.
struct Machine {
    mmio: Arc<MmioBus>,
    bridge: HostBridge,
    function: Arc<Mutex<Ivshmem>>,
    messages: Recorder<(u64, u32)>,
    guest: Guest,
    line: Recorder<bool>,
    _pio: Arc<PioBus>,
}

impl Machine {
    fn new(member: Member) -> Self {
        Self::with(member, |builder| builder)
    }

    fn with(member: Member, more: impl FnOnce(IvshmemBuilder) -> IvshmemBuilder) -> Self {
        let (mmio, pio) = (Arc::new(MmioBus::new()), Arc::new(PioBus::new()));
        let (messages, line, guest) = (Recorder::default(), Recorder::default(), Guest::default());
        let lines: [Recorder<bool>; 4] = std::array::from_fn(|_| line.clone());
        let bridge =
            HostBridge::builder(PciLayout::default(), &mmio, &pio).interrupts(lines).build().unwrap();
        let builder = Ivshmem::builder(member, messages.clone()).mapper(guest.clone());
        let function = Arc::new(Mutex::new(more(builder).build().unwrap()));
        bridge.add(function.clone()).unwrap();
        Self { mmio, bridge, function, messages, guest, line, _pio: pio }
    }

    /// With decoding and messages allowed, and, if there are vectors, MSI-X on and vector `n` with data `0x40 + n`.
    fn ready(member: Member) -> Self {
        let machine = Self::new(member);
        machine.start();
        machine
    }

    fn start(&self) {
        self.configure(COMMAND, &DECODE.to_le_bytes());
        let vectors = lock(&self.function).member().vectors();
        for vector in 0..u64::from(vectors) {
            self.set_vector(vector, false);
        }
        self.enable_msix(vectors > 0);
    }

    fn config_at(&self) -> u64 {
        PciLayout::default().ecam.0 + (1 << 15)
    }

    fn configure(&self, offset: u64, data: &[u8]) {
        assert!(self.mmio.write(GuestAddress(self.config_at() + offset), data));
    }

    /// The first 64 bytes of configuration space, read as a guest does.
    fn header(&self) -> [u8; 64] {
        let mut header = [0; 64];
        for (at, word) in (self.config_at()..).step_by(4).zip(header.chunks_mut(4)) {
            assert!(self.mmio.read(GuestAddress(at), word));
        }
        header
    }

    fn enable_msix(&self, on: bool) {
        // The only capability.
        let mut pointer = [0];
        self.mmio.read(GuestAddress(self.config_at() + 0x34), &mut pointer);
        if pointer != [0] {
            self.configure(u64::from(pointer[0]) + 3, &[u8::from(on) << 7]);
        }
    }

    fn set_vector(&self, vector: u64, masked: bool) {
        let data = 0x40 + vector as u32;
        for (register, value) in [(0, 0xfee0_0000), (4, 0), (8, data), (12, u32::from(masked))] {
            self.write(1, vector * 16 + register, &value.to_le_bytes());
        }
    }

    fn bar(&self, bar: usize) -> u64 {
        lock(&self.function).config_space().bar_base(bar).unwrap()
    }

    fn write(&self, bar: usize, offset: u64, data: &[u8]) {
        self.mmio.write(GuestAddress(self.bar(bar) + offset), data);
    }

    fn read<const N: usize>(&self, bar: usize, offset: u64) -> [u8; N] {
        let mut data = [0xaa; N];
        self.mmio.read(GuestAddress(self.bar(bar) + offset), &mut data);
        data
    }

    fn register(&self, register: u64) -> u32 {
        u32::from_le_bytes(self.read(0, register * 4))
    }

    fn set_register(&self, register: u64, value: u32) {
        self.write(0, register * 4, &value.to_le_bytes());
    }

    fn ring(&self, peer: u16, vector: u16) {
        self.set_register(3, u32::from(peer) << 16 | u32::from(vector));
    }

    /// Vectors of which messages came.
    fn heard(&self) -> Vec<u32> {
        self.messages.take().into_iter().map(|(_, data)| data - 0x40).collect()
    }

    fn figures(&self) -> IvshmemFigures {
        lock(&self.function).figures()
    }

    fn is_open(&self) -> bool {
        lock(&self.function).member().is_open()
    }
}

impl Ivshmem {
    fn config_space(&self) -> &crate::pci::ConfigSpace {
        crate::pci::PciFunction::config(self)
    }
}

/// What `look` finds, when it finds something.
fn eventually<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "in vain: {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn holds(what: &str, mut look: impl FnMut() -> bool) {
    eventually(what, || look().then_some(()));
}
