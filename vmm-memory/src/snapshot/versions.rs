//! The states of this crate in bytes.

use super::StateError;
use super::mirror::{self, Family, VersionMap, Versionize, VersionizeResult};
use super::ram::{RamLayout, RamRange};
use super::state::{SnapshotState, StateFormat};

struct Memory;

impl Family for Memory {
    const FORMAT: StateFormat = StateFormat { name: "vmm-memory", newest: 1, oldest: 1 };

    fn versions() -> VersionMap {
        VersionMap::new()
    }
}

crate::snapshot_mirror!(Layout of RamLayout { regions: Vec<RamRange>, packed: bool });
crate::snapshot_mirror!(Range of RamRange { gpa: u64, size: u64, read_only: bool });

impl SnapshotState for RamLayout {
    const FORMAT: StateFormat = Memory::FORMAT;

    fn encode(&self, version: u16) -> Result<Vec<u8>, StateError> {
        mirror::encode::<Memory, _>(self, version)
    }

    fn decode(bytes: &[u8], version: u16) -> Result<Self, StateError> {
        let layout: Self = mirror::decode::<Memory, _>(bytes, version)?;
        layout.check()?;
        Ok(layout)
    }
}
