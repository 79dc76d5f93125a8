//! The states of this crate in bytes, for snapshots ([`vmm_memory::snapshot`]).
//!
//! What is decoded is plain data. Whether a processor can be in such a state is checked by the backend that takes it over.

mod cpu;
mod vm;

use vmm_memory::snapshot::StateFormat;
use vmm_memory::snapshot::mirror::{Family, VersionMap};
use vmm_memory::snapshot_states;

use crate::state::{CpuState, VmState};

/// The states of this crate.
#[derive(Debug)]
pub struct CpuStates;

impl Family for CpuStates {
    const FORMAT: StateFormat = StateFormat { name: "vmm-cpu", newest: 1, oldest: 1 };

    fn versions() -> VersionMap {
        VersionMap::new()
    }
}

snapshot_states!(CpuStates: CpuState, VmState);

#[cfg(test)]
mod tests;
