//! Faults of the guest kernel that are none by the guest's own tables, and are put right where they are found.
//!
//! - An entry without the user bit: everything runs in ring 3, so entries get the bit when they are stored through the ABI.
//!   One that the guest stored itself gets it here.
//! - A store to a page table, which guests map read-only because Xen wants it so, and which Xen then emulates. Here
//!   nothing depends on it, so the mapping becomes writable, and later stores cost nothing. Changes made that way are
//!   those that need no look by the ABI: taking away rights, clearing.

use super::abi::PAGE_SIZE;
use super::abi::mmu::entry;
use super::engine::Engine;
use super::memory::{Access, frame_of};
use super::trap::{PF_RESERVED, PF_WRITE};
use super::vcpu_abi::VcpuAbi;
use crate::error::Result;
use vmm_memory::vm_memory::GuestAddress;

impl VcpuAbi {
    /// Looks for such a cause. Returns whether something was changed, so that the guest should try again.
    pub(crate) fn repair(&mut self, engine: &mut dyn Engine, error_code: u32, address: u64) -> Result<bool> {
        const KERNEL_HALF: u64 = 1 << 63;
        let domain = &self.domain;
        let root = engine.kernel_root().0 / PAGE_SIZE;
        let walk = domain.memory.walk(root, address);
        if walk.leaf().is_none() || error_code & PF_RESERVED != 0 {
            return Ok(false);
        }
        let mut changed = false;
        let store = error_code & PF_WRITE != 0 && walk.rights == Access::Read && address & KERNEL_HALF != 0;
        for (depth, (gpa, value)) in (1..).zip(walk.entries()) {
            let mut new = *value;
            if new & entry::USER == 0 {
                new |= entry::USER;
            }
            // Upper levels of the kernel's half are writable, so it is the last entry that takes the right away.
            if store && depth == 4 && domain.tables.level(frame_of(new)) != 0 {
                new |= entry::WRITABLE;
            }
            if new != *value {
                engine.write_entry_keeping(GuestAddress(*gpa), new, entry::ACCESSED_DIRTY)?;
                changed = true;
            }
        }
        if changed {
            engine.flush_page(address);
        }
        Ok(changed)
    }
}
