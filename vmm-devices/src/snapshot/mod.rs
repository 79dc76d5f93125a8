//! The states of this crate's devices in snapshots: each is a [`SnapshotState`] of the family "vmm-devices" (feature `snapshot`).
//!
//! | module | holds |
//! |---|---|
//! | `platform` | states of the platform's devices |
//! | `pci` | states of PCI: configuration spaces, MSI-X, the host bridge, shared memory |
//! | `virtio` | states of virtio devices, on MMIO and PCI |
//!
//! All that knows how states become bytes is in here and in [`vmm_memory::snapshot::mirror`], which this is written with. A field that is added
//! gets `#[version(start = N)]` in the mirror of its structure, [`Family::FORMAT`] the version N, and [`Family::versions`] says which structure
//! it was; where a state says something that an older version has no field for, `ser_fn` refuses to write it in that one.
//!
//! | version | has beside the one before |
//! |---|---|
//! | 1 | |
//! | 2 | frames that wait in a network device ([`NetState::waiting`](crate::virtio::net::NetState::waiting)) |
//!
//! # Threat model
//! Bytes come from a file that anybody may have written. Whatever they are, they become an error or a state; lists are no longer than
//! the bytes that are there. What a state says is checked where a device takes it over.

mod pci;
mod platform;
mod virtio;

use vmm_memory::snapshot::mirror::{Family, VersionMap, Versionize as _};
pub use vmm_memory::snapshot::{SnapshotState, StateFormat};

/// The states of this crate.
struct DeviceStates;

impl Family for DeviceStates {
    const FORMAT: StateFormat = StateFormat { name: "vmm-devices", newest: 2, oldest: 1 };

    fn versions() -> VersionMap {
        let mut versions = VersionMap::new();
        versions.new_version().set_type_version(virtio::Net::type_id(), 2);
        versions
    }
}

#[cfg(test)]
mod tests;
