//! KVM's shadows of the guest's page tables, and how they are made to follow what software has stored.
//!
//! Without two-dimensional paging, KVM write-protects the tables that it has shadows of and so sees the guest's stores. Those of
//! software go past that: an entry that the guest takes back would still translate. KVM drops every shadow of a virtual machine
//! when any of its memory slots goes (and no interface names fewer), so a slot of one page comes and goes where the guest can
//! have no memory. Other vCPUs run on and build theirs anew.

use std::sync::{Arc, Mutex, PoisonError};

use vmm_memory::vm_memory::{GuestAddress, GuestMemoryRegion as _};
use vmm_memory::{GuestRam, GuestRegion, PAGE_SIZE, RegionConfig};

use crate::error::{Error, Result};
use crate::kvm::vm::VmInner;
use crate::kvm::{NAME, host, sys};

/// The page behind the slot that comes and goes, made when it is first needed.
#[derive(Debug, Default)]
pub(in crate::kvm) struct SparePage(Mutex<Option<Arc<GuestRegion>>>);

impl VmInner {
    /// Has KVM drop all shadows of page tables.
    pub(in crate::kvm) fn drop_shadows(&self, spare: &SparePage) -> Result<()> {
        // For as long as this takes, no region takes the slot or the address.
        let slots = self.slots();
        let mut spare = spare.0.lock().unwrap_or_else(PoisonError::into_inner);
        let end = slots.iter().next_back().map_or(0, |(start, slot)| start.saturating_add(slot.region.len()));
        let gpa = GuestAddress(end.next_multiple_of(PAGE_SIZE));
        let region = match spare.take().filter(|region| region.start_addr() == gpa) {
            Some(region) => region,
            None => page_at(gpa)?,
        };
        let number = self.free_slot(&slots)?;
        for size in [PAGE_SIZE, 0] {
            sys::set_memory_slot(&self.fd, number, &region, size, 0)
                .map_err(|errno| host("KVM_SET_USER_MEMORY_REGION", errno))?;
        }
        *spare = Some(region);
        Ok(())
    }
}

fn page_at(gpa: GuestAddress) -> Result<Arc<GuestRegion>> {
    let failed = |source| Error::Backend { backend: NAME, source };
    let ram = GuestRam::builder()
        .region(RegionConfig::new(gpa, PAGE_SIZE))
        .build()
        .map_err(|error| failed(Box::new(error)))?;
    ram.regions().into_iter().next().ok_or_else(|| failed("memory without a region".into()))
}
