//! The guest's memory as substitutes see it: a map that follows the engine's, and the pages that they have written.

use std::sync::Arc;

use vmm_memory::vm_memory::GuestAddress;
use vmm_memory::{GuestRegion, PageBitmap};

use crate::cpuid::CpuidTable;
use crate::error::Result;
use crate::hypervisor::{ClockSource, InterruptMode};
use crate::state::SystemRegisters;
use crate::translate::clock::Clock;
use crate::translate::hypervisor::TranslateOptions;
use crate::translate::vm::{Shared, TranslateVm};
use crate::vm::{GuestAccess, Vm as _};

/// CR4 bits whose paging software does not know (Intel SDM 3A 2.5).
const CR4_UNKNOWN: [(u64, &str); 3] = [
    (1 << 12, "5-level paging"),
    (1 << 23, "shadow stacks or branch tracking"),
    (1 << 24, "protection keys of supervisor pages"),
];

/// Says what of the mode software does not know.
pub(super) fn check_mode(system: &SystemRegisters) -> std::result::Result<(), String> {
    match CR4_UNKNOWN.iter().find(|(bit, _)| system.cr4 & bit != 0) {
        Some((_, what)) => Err(format!("software has no {what} (CR4 is {:#x})", system.cr4)),
        None => Ok(()),
    }
}

/// What the substitutes of one virtual machine share.
#[derive(Debug)]
pub(crate) struct SubstituteVm(TranslateVm);

impl SubstituteVm {
    /// Of a virtual machine of up to that many vCPUs whose CPUID is that.
    pub(crate) fn new(cpuid: CpuidTable, max_vcpus: u32) -> Self {
        let clock = Clock::new(None, ClockSource::Host);
        let options = TranslateOptions::default().translate_after(None);
        Self(TranslateVm(Arc::new(Shared::new(cpuid, InterruptMode::External, max_vcpus, clock, options))))
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        &self.0.0
    }

    /// Adds a region. Substitutes see it from their next instruction on.
    ///
    /// # Errors
    /// As [`Vm::map_memory`](crate::Vm::map_memory).
    pub(crate) fn map_memory(&self, region: Arc<GuestRegion>, access: GuestAccess) -> Result<()> {
        self.0.map_memory(region, access)
    }

    /// Takes a region away, and comes back when no substitute uses it any more.
    ///
    /// # Errors
    /// As [`Vm::unmap_memory`](crate::Vm::unmap_memory).
    pub(crate) fn unmap_memory(&self, gpa: GuestAddress) -> Result<()> {
        self.0.unmap_memory(gpa).map(drop)
    }

    /// Starts or stops noting the pages of a region that substitutes write.
    ///
    /// # Errors
    /// As [`GuestDirtyLog`](crate::GuestDirtyLog).
    pub(crate) fn log_writes(&self, gpa: GuestAddress, on: bool) -> Result<()> {
        match self.0.dirty_log() {
            Some(log) if on => log.start(gpa),
            Some(log) => log.stop(gpa),
            None => Ok(()),
        }
    }

    /// Adds the pages that were written since this was last asked.
    ///
    /// # Errors
    /// As [`DirtyLog::harvest`](vmm_memory::DirtyLog::harvest).
    pub(crate) fn harvest(
        &self,
        region: &GuestRegion,
        into: &mut PageBitmap,
    ) -> std::result::Result<(), Box<dyn std::error::Error + Send + Sync>> {
        self.0.dirty_log().map_or(Ok(()), |log| log.harvest(region, into))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_that_software_lacks_are_named() {
        let system = SystemRegisters { cr4: 1 << 5 | 1 << 12, ..SystemRegisters::default() };
        assert!(check_mode(&system).unwrap_err().contains("5-level paging (CR4 is 0x1020)"));
        assert!(check_mode(&SystemRegisters { cr4: 1 << 5 | 1 << 17, ..system }).is_ok());
    }
}
