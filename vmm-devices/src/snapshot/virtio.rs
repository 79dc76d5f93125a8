//! States of virtio devices, on both transports.

use smallvec::SmallVec;
use versionize::{VersionMap, Versionize, VersionizeError, VersionizeResult};
use versionize_derive::Versionize;
use vmm_memory::snapshot::StateError;

use super::mirror::{Mirror, mirror, states};
use super::pci::{Config, Msix};
use crate::net::{MacAddr, MacTable, RxFilter, VLANS};
use crate::virtio::balloon::BalloonState;
use crate::virtio::block::BlockState;
use crate::virtio::console::{ConsolePlaceState, ConsolePortState, ConsoleState, ConsoleTold};
use crate::virtio::net::NetState;
use crate::virtio::{DeviceState, VirtioMmioState, VirtioPciState, VirtioState, VirtqueueState};

states! {
    VirtioMmioState: Mmio,
    VirtioPciState: Pci,
}

#[derive(Versionize)]
struct Mmio {
    interrupt_status: u8,
    device: Virtio,
}

mirror!(struct Mmio = VirtioMmioState { interrupt_status, device });

#[derive(Versionize)]
struct Pci {
    config: Config,
    msix: Msix,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    isr: u8,
    device: Virtio,
}

mirror!(struct Pci = VirtioPciState { config, msix, config_vector, queue_vectors, isr, device });

#[derive(Versionize)]
struct Virtio {
    device_type: u16,
    status: u8,
    features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u16,
    config_generation: u32,
    config: Vec<u8>,
    queues: Vec<Queue>,
    device: Device,
}

mirror!(struct Virtio = VirtioState {
    device_type, status, features, device_features_select, driver_features_select, queue_select, config_generation, config, queues,
    device,
});

#[derive(Versionize)]
struct Queue {
    max_size: u16,
    size: u16,
    ready: bool,
    descriptors: u64,
    available: u64,
    used: u64,
    next_available: u16,
    next_used: u16,
    told: u16,
    in_flight: Vec<u16>,
}

mirror!(struct Queue = VirtqueueState {
    max_size, size, ready, descriptors, available, used, next_available, next_used, told, in_flight,
});

/// Another kind of device comes behind the others: which it is, is its place here.
#[derive(Versionize)]
enum Device {
    Stateless,
    Other(Vec<u8>),
    Block(Block),
    Console(Console),
    Net(Net),
    Balloon(Balloon),
}

mirror!(enum Device = DeviceState {
    Stateless, Other(bytes), Block(state), Console(state), Net(state), Balloon(state),
});

type Serial = [u8; 20];

#[derive(Versionize)]
struct Block {
    sectors: u64,
    block_size: u32,
    read_only: bool,
    serial: Serial,
    writeback: Option<bool>,
}

mirror!(struct Block = BlockState { sectors, block_size, read_only, serial, writeback });

#[derive(Versionize)]
struct Console {
    listening: bool,
    places: Vec<Place>,
}

mirror!(struct Console = ConsoleState { listening, places });

#[derive(Versionize)]
struct Place {
    port: Option<Port>,
    told: Told,
    sent: Option<(u16, u64)>,
}

mirror!(struct Place = ConsolePlaceState { port, told, sent });

#[derive(Versionize)]
struct Port {
    console: bool,
    name: Option<String>,
    size: Option<(u16, u16)>,
    guest_open: bool,
    input: Vec<u8>,
}

mirror!(struct Port = ConsolePortState { console, name, size, guest_open, input });

#[derive(Versionize)]
struct Told {
    removal_due: bool,
    added: bool,
    ready: bool,
    console_due: bool,
    size_due: bool,
    name_due: bool,
    open: bool,
    blinked: bool,
}

mirror!(struct Told = ConsoleTold {
    removal_due, added, ready, console_due, size_due, name_due, open, blinked,
});

#[derive(Versionize)]
struct Net {
    mac: Mac,
    mtu: Option<u16>,
    filter: Filter,
    offloads: u64,
    pairs: u16,
    announce: bool,
}

mirror!(struct Net = NetState { mac, mtu, filter, offloads, pairs, announce });

#[derive(Versionize)]
struct Filter {
    mac: Mac,
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    unicast: Option<Macs>,
    multicast: Option<Macs>,
    vlans: Option<Vlans>,
}

mirror!(struct Filter = RxFilter {
    mac, promiscuous, all_multicast, all_unicast, no_multicast, no_unicast, no_broadcast, unicast, multicast, vlans,
});

#[derive(Versionize)]
struct Mac {
    bytes: MacBytes,
}

type MacBytes = [u8; 6];

impl Mirror<MacAddr> for Mac {
    fn of(MacAddr(bytes): &MacAddr) -> Self {
        Self { bytes: *bytes }
    }

    fn back(self) -> Result<MacAddr, StateError> {
        Ok(MacAddr(self.bytes))
    }
}

#[derive(Versionize)]
struct Macs {
    table: Vec<Mac>,
}

impl Mirror<MacTable> for Macs {
    fn of(table: &MacTable) -> Self {
        Self { table: table.iter().map(Mac::of).collect() }
    }

    fn back(self) -> Result<MacTable, StateError> {
        self.table.into_iter().map(Mac::back).collect::<Result<SmallVec<_>, _>>()
    }
}

/// A bit for each VLAN.
type Words = [u64; VLANS as usize / 64];

#[derive(Versionize)]
struct Vlans {
    words: Box<Words>,
}

impl Mirror<Box<Words>> for Vlans {
    fn of(words: &Box<Words>) -> Self {
        Self { words: words.clone() }
    }

    fn back(self) -> Result<Box<Words>, StateError> {
        Ok(self.words)
    }
}

#[derive(Versionize)]
struct Balloon {
    target: u32,
    actual: u32,
    poison: u32,
    requested: bool,
}

mirror!(struct Balloon = BalloonState { target, actual, poison, requested });
