//! Snapshots: what a virtual machine is, in a file.
//!
//! A snapshot holds RAM and any number of *states*, which devices and backends are asked for and made from: whoever can be saved implements
//! [`SnapshotState`]. This crate knows nothing of what they are. Around them is an envelope that tells what the file is, for which
//! architecture, in which version each family of states was written, and whether every byte is as it was.
//!
//! ```
//! use vmm_memory::vm_memory::{Bytes, GuestAddress};
//! use vmm_memory::snapshot::{RamOptions, Snapshot, SnapshotWriter};
//! use vmm_memory::GuestRam;
//!
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("vm.snapshot");
//! let ram = GuestRam::builder().ram(64 << 20).build()?;
//! ram.memory().write_obj(42_u64, GuestAddress(0x5000))?;
//! let mut writer = SnapshotWriter::create(&path)?;
//! // writer.put("cpu/0", &vcpu.save()?)?; ...
//! let stats = writer.put_ram(&ram, &RamOptions::new())?;
//! assert_eq!((stats.pages, stats.stored), (16384, 1));
//! writer.finish()?;
//!
//! let snapshot = Snapshot::open(&path)?;
//! // let cpu: CpuState = snapshot.get("cpu/0")?; ...
//! snapshot.finish()?; // nothing is left that this machine does not have
//! let clone = snapshot.map_ram(false, &RamOptions::new())?;
//! assert_eq!(clone.memory().read_obj::<u64>(GuestAddress(0x5000))?, 42);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! | module | holds |
//! |---|---|
//! | `format` | the bytes of the envelope |
//! | `state` | what a state is |
//! | `writer`, `reader` | a snapshot that is written, and one that is read |
//! | `ram` | RAM: sparse, packed, incremental; loaded or mapped |
//! | [`mirror`] | states in bytes, by `versionize` |
//! | `versions` | those of this crate |
//!
//! # Threat model
//! A snapshot is a file that others may have had in their hands. Whatever is in it, reading ends in a state or an error that says where the file is
//! wrong, takes memory in proportion to the file's size, and never makes a part of a machine. Digests show damage. They do not show
//! that somebody has written another file: compare [`Snapshot::digest`] with what [`SnapshotWriter::finish`] returned, kept where others cannot
//! write. States are plain data, and whoever takes them over checks them as it would a guest's registers.

mod error;
mod format;
pub mod mirror;
mod ram;
mod reader;
mod state;
mod versions;
mod writer;

use std::fmt;

pub use self::error::{SnapshotError, StateError};
pub use self::ram::{LazyRam, Progress, RamLayout, RamOptions, RamRange, RamStats};
pub use self::reader::Snapshot;
pub use self::state::{SnapshotState, StateFormat};
pub use self::writer::SnapshotWriter;

/// The BLAKE3 digest of a snapshot, which covers each of its bytes, and those of the snapshot that it is based on.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SnapshotDigest(pub [u8; 32]);

impl fmt::Display for SnapshotDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for SnapshotDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SnapshotDigest({self})")
    }
}

#[cfg(test)]
mod tests;
