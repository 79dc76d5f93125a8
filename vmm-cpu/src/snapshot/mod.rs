//! The states of this crate in bytes, for snapshots ([`vmm_memory::snapshot`]): [`CpuState`], [`VmState`], and the [`VmConfig`] that the machine was
//! created from, since CPUID and the rate of the time-stamp counter have to be what the guest has seen.
//!
//! ```no_run
//! use vmm_cpu::state::{CpuState, VmState};
//! use vmm_cpu::{CpuModel, InterruptMode, VmConfig, open_backend};
//! use vmm_memory::GuestRam;
//! use vmm_memory::snapshot::{RamOptions, Snapshot, SnapshotWriter};
//!
//! # let (ram, hypervisor) = (GuestRam::builder().ram(64 << 20).build()?, open_backend("translate")?);
//! let config = VmConfig::new(CpuModel::Host).interrupts(InterruptMode::LocalApic);
//! let vm = hypervisor.create_vm(&config)?;
//! let mut vcpu = vm.create_vcpu(0)?;
//! // ... The guest has run, and is paused.
//! let mut writer = SnapshotWriter::create("vm.snapshot")?;
//! writer.put("vm/config", &config.resolve(&*hypervisor, &*vm)?)?;
//! writer.put("vm", &vm.save()?)?;
//! writer.put("cpu/0", &vcpu.save()?)?;
//! writer.put_ram(&ram, &RamOptions::new())?;
//! writer.finish()?;
//!
//! // In another process, maybe with another backend.
//! let snapshot = Snapshot::open("vm.snapshot")?;
//! let config: VmConfig = snapshot.get("vm/config")?;
//! let (state, cpu): (VmState, CpuState) = (snapshot.get("vm")?, snapshot.get("cpu/0")?);
//! snapshot.finish()?;
//! let ram = snapshot.map_ram(false, &RamOptions::new())?;
//! let vm = hypervisor.restore_vm(&config, &state)?;
//! vm.map_ram(&ram)?;
//! let vcpu = vm.restore_vcpu(0, &cpu)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! What is decoded is plain data. Whether a processor can be in such a state is checked by the backend that takes it over.

mod config;
mod cpu;
mod vm;
#[cfg(feature = "xen-pv")]
mod xen_pv;

use vmm_memory::snapshot::StateFormat;
use vmm_memory::snapshot::mirror::{Family, VersionMap};
use vmm_memory::snapshot_states;

use crate::cpuid::CpuidTable;
use crate::hypervisor::VmConfig;
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

snapshot_states!(CpuStates: CpuState, VmState, VmConfig, CpuidTable);

#[cfg(test)]
mod tests;
