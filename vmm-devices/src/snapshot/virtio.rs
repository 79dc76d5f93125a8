//! States of virtio devices, on both transports.

use vmm_memory::snapshot::StateError;
use vmm_memory::snapshot::mirror::{Mirrored, VersionMap, Versionize, VersionizeError, VersionizeResult};
use vmm_memory::{snapshot_mirror, snapshot_states};

use super::DeviceStates;
use crate::net::{HEADER, MacAddr, MacTable, RxFilter, VLANS};
use crate::pci::{ConfigState, MsixState};
use crate::virtio::balloon::BalloonState;
use crate::virtio::block::BlockState;
use crate::virtio::console::{ConsolePlaceState, ConsolePortState, ConsoleState, ConsoleTold};
use crate::virtio::net::{NetFrameState, NetState};
use crate::virtio::{DeviceState, VirtioMmioState, VirtioPciState, VirtioState, VirtqueueState};

snapshot_states!(DeviceStates: VirtioMmioState, VirtioPciState);

snapshot_mirror!(Mmio of VirtioMmioState { interrupt_status: u8, device: VirtioState });

snapshot_mirror!(Pci of VirtioPciState {
    config: ConfigState, msix: MsixState, config_vector: u16, queue_vectors: Vec<u16>, isr: u8, device: VirtioState,
});

snapshot_mirror!(Virtio of VirtioState {
    device_type: u16,
    status: u8,
    features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u16,
    config_generation: u32,
    config: Vec<u8>,
    queues: Vec<VirtqueueState>,
    device: DeviceState,
});

snapshot_mirror!(Queue of VirtqueueState {
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
});

snapshot_mirror!(Device of enum DeviceState {
    Stateless = 0,
    Other(other: Vec<u8>) = 1,
    Block(block: BlockState) = 2,
    Console(console: ConsoleState) = 3,
    Net(net: NetState) = 4,
    Balloon(balloon: BalloonState) = 5,
});

snapshot_mirror!(Block of BlockState {
    sectors: u64, block_size: u32, read_only: bool, serial: [u8; 20], writeback: Option<bool>,
});

snapshot_mirror!(Console of ConsoleState { listening: bool, places: Vec<ConsolePlaceState> });

snapshot_mirror!(Place of ConsolePlaceState {
    port: Option<ConsolePortState>, told: ConsoleTold, sent: Option<(u16, u64)>,
});

snapshot_mirror!(Port of ConsolePortState {
    console: bool, name: Option<String>, size: Option<(u16, u16)>, guest_open: bool, input: Vec<u8>,
});

snapshot_mirror!(Told of ConsoleTold {
    removal_due: bool,
    added: bool,
    ready: bool,
    console_due: bool,
    size_due: bool,
    name_due: bool,
    open: bool,
    blinked: bool,
});

snapshot_mirror!(Net of NetState {
    mac: MacAddr,
    mtu: Option<u16>,
    filter: RxFilter,
    offloads: u64,
    pairs: u16,
    announce: bool,
    #[version(start = 2, ser_fn = "has_no_frames")]
    waiting: Vec<NetFrameState>,
});

impl Net {
    /// A frame that was taken from its network is nowhere else.
    fn has_no_frames(&mut self, version: u16) -> VersionizeResult<()> {
        let Some(Frame { pair, bytes, .. }) = self.waiting.first() else { return Ok(()) };
        let len = bytes.len();
        Err(VersionizeError::Semantic(format!(
            "version {version} has no frames that wait, and one of {len} bytes waits for buffers or a rate of pair {pair}"
        )))
    }
}

snapshot_mirror!(Frame of NetFrameState { pair: u16, header: [u8; HEADER], bytes: Vec<u8> });

impl Mirrored for MacAddr {
    type Mirror = <[u8; 6] as Mirrored>::Mirror;

    fn mirror(&self) -> Self::Mirror {
        self.0.mirror()
    }

    fn from_mirror(mirror: Self::Mirror) -> Result<Self, StateError> {
        Mirrored::from_mirror(mirror).map(Self)
    }
}

snapshot_mirror!(Filter of RxFilter {
    mac: MacAddr,
    promiscuous: bool,
    all_multicast: bool,
    all_unicast: bool,
    no_multicast: bool,
    no_unicast: bool,
    no_broadcast: bool,
    unicast: Option<MacTable>,
    multicast: Option<MacTable>,
    // A bit for each VLAN.
    vlans: Option<Box<[u64; VLANS as usize / 64]>>,
});

snapshot_mirror!(Balloon of BalloonState { target: u32, actual: u32, poison: u32, requested: bool });
