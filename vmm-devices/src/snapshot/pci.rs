//! States of PCI: what a guest can change of functions and of the bridge.

use vmm_memory::snapshot::mirror::{VersionMap, Versionize, VersionizeResult};
use vmm_memory::{snapshot_mirror, snapshot_states};

use super::DeviceStates;
use crate::ivshmem::IvshmemState;
use crate::pci::{ConfigState, HostBridgeState, MsixEntry, MsixState};

snapshot_states!(DeviceStates: ConfigState, MsixState, HostBridgeState, IvshmemState);

snapshot_mirror!(Config of ConfigState { ids: u32, registers: Vec<(u16, u32)> });

snapshot_mirror!(Msix of MsixState { entries: Vec<MsixEntry> });

snapshot_mirror!(Vector of MsixEntry { address: u64, data: u32, masked: bool, pending: bool });

snapshot_mirror!(Bridge of HostBridgeState { config_address: u32, config: ConfigState });

snapshot_mirror!(Ivshmem of IvshmemState {
    position: u16, mask: u32, status: u32, config: ConfigState, msix: Option<MsixState>,
});
