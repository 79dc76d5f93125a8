//! States of PCI: what a guest can change of functions and of the bridge.

use versionize::{VersionMap, Versionize, VersionizeResult};
use versionize_derive::Versionize;

use super::mirror::{mirror, states};
use crate::ivshmem::IvshmemState;
use crate::pci::{ConfigState, HostBridgeState, MsixEntry, MsixState};

states! {
    ConfigState: Config,
    MsixState: Msix,
    HostBridgeState: Bridge,
    IvshmemState: Ivshmem,
}

#[derive(Versionize)]
pub(super) struct Config {
    ids: u32,
    registers: Vec<(u16, u32)>,
}

mirror!(struct Config = ConfigState { ids, registers });

#[derive(Versionize)]
pub(super) struct Msix {
    entries: Vec<Vector>,
}

mirror!(struct Msix = MsixState { entries });

#[derive(Versionize)]
struct Vector {
    address: u64,
    data: u32,
    masked: bool,
    pending: bool,
}

mirror!(struct Vector = MsixEntry { address, data, masked, pending });

#[derive(Versionize)]
struct Bridge {
    config_address: u32,
    config: Config,
}

mirror!(struct Bridge = HostBridgeState { config_address, config });

#[derive(Versionize)]
struct Ivshmem {
    position: u16,
    mask: u32,
    status: u32,
    config: Config,
    msix: Option<Msix>,
}

mirror!(struct Ivshmem = IvshmemState { position, mask, status, config, msix });
