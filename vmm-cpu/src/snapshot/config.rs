//! What a virtual machine was created from.

use vmm_memory::snapshot::StateError;
use vmm_memory::snapshot::mirror::{Mirrored, VersionMap, Versionize, VersionizeResult};
use vmm_memory::{snapshot_mirror, snapshot_numbered};

use crate::cpuid::{CpuModel, CpuidEntry, CpuidTable};
use crate::hypervisor::{ClockConfig, ClockSource, InterruptMode, VmConfig};

snapshot_mirror!(Config of VmConfig {
    cpu: CpuModel,
    max_vcpus: u32,
    interrupts: InterruptMode,
    legacy_timer: bool,
    clock: ClockConfig,
});

snapshot_mirror!(Clock of ClockConfig { tsc_khz: Option<u32>, source: ClockSource });

snapshot_mirror!(Entry of CpuidEntry { leaf: u32, subleaf: Option<u32>, eax: u32, ebx: u32, ecx: u32, edx: u32 });

snapshot_numbered!(InterruptMode { External = 0, LocalApic = 1, Platform = 2 });
snapshot_numbered!(ClockSource { Host = 0, Deterministic = 1, HostTsc = 2 });

/// No table for a model that depends on the host; [`VmConfig::resolve`] leaves none.
impl Mirrored for CpuModel {
    type Mirror = Option<<CpuidTable as Mirrored>::Mirror>;

    fn mirror(&self) -> Self::Mirror {
        match self {
            Self::Exact(table) => Some(table.mirror()),
            _ => None,
        }
    }

    fn from_mirror(mirror: Self::Mirror) -> Result<Self, StateError> {
        let table = mirror
            .ok_or("the model was that of the host it was saved on (`VmConfig::resolve` says what it was)")?;
        CpuidTable::from_mirror(table).map(Self::Exact)
    }
}

impl Mirrored for CpuidTable {
    type Mirror = Vec<<CpuidEntry as Mirrored>::Mirror>;

    fn mirror(&self) -> Self::Mirror {
        self.entries().iter().map(Mirrored::mirror).collect()
    }

    fn from_mirror(mirror: Self::Mirror) -> Result<Self, StateError> {
        let entries: Vec<CpuidEntry> = Mirrored::from_mirror(mirror)?;
        // Before there is a table, which puts each to its place and takes its time for those that are in no order.
        let ascends = |pair: &[CpuidEntry]| match pair {
            [one, next] if one.leaf == next.leaf => one.subleaf.is_some() && one.subleaf < next.subleaf,
            [one, next] => one.leaf < next.leaf,
            _ => true,
        };
        if entries.windows(2).all(ascends) {
            Ok(Self::new(entries))
        } else {
            Err("its leaves do not ascend".into())
        }
    }
}
