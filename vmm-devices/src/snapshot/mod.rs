//! The states of this crate's devices in snapshots: each is a [`SnapshotState`] of the family "vmm-devices" (feature `snapshot`).
//!
//! | module | holds |
//! |---|---|
//! | `mirror` | how a state becomes a structure that `versionize` can write, and back |
//! | `platform` | states of the platform's devices |
//! | `pci` | states of PCI: configuration spaces, MSI-X, the host bridge, shared memory |
//! | `virtio` | states of virtio devices, on MMIO and PCI |
//!
//! All that knows of `versionize` is in here. It writes plain data without tags or lengths, and takes an unknown version for the newest
//! one: versions and lengths are looked at around it. A field that is added gets `#[version(start = N)]` in the mirror of its
//! structure, `FORMAT` the version N, and `versions` says which structure it was; where a state says something that an older version
//! has no field for, `ser_fn` refuses to write it in that one, as the tests show.
//!
//! # Threat model
//! Bytes come from a file that anybody may have written. Whatever they are, they become an error or a state; lists are no longer than
//! the bytes that are there. What a state says is checked where a device takes it over.

mod mirror;
mod pci;
mod platform;
mod virtio;

use versionize::VersionMap;
pub use vmm_memory::snapshot::{SnapshotState, StateFormat};

/// The version of all states.
const FORMAT: StateFormat = StateFormat { name: "vmm-devices", newest: 1, oldest: 1 };

/// Which version each structure has in each version of [`FORMAT`].
fn versions() -> VersionMap {
    VersionMap::new()
}

#[cfg(test)]
mod tests;
