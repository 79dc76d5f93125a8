//! Roots, entries, and what the processor caches of them.

use std::sync::atomic::{AtomicU64, Ordering};

use vmm_memory::PAGE_SIZE;
use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, VolatileMemory as _};

use super::context::canonical;
use super::{Ring3, memory_error};
use crate::error::{Error, Result};
use crate::xen_pv::engine::private::{self, M2P_SLOT, XEN_M2P_SLOT};
use crate::xen_pv::engine::shim::{SHIM_SLOT, WINDOW_SLOT};
use crate::xen_pv::engine::{GuestMode, Mmu, PRIVATE_SLOT};

/// Single pages that are flushed one by one; for more all are.
const MAX_PAGES: usize = 8;

/// Translations that are to be forgotten.
#[derive(Debug)]
pub(super) enum Flush {
    Pages(Vec<u64>),
    All,
}

impl Flush {
    pub(super) const NOTHING: Self = Self::Pages(Vec::new());
}

impl Ring3 {
    /// Makes the root that the mode wants the processor's, and forgets translations.
    pub(super) fn load_root(&mut self, root: GuestAddress) -> Result<()> {
        let wanted = self.signals.flush_wanted();
        let other = wanted.is_some();
        if self.system.cr3 != root.0 {
            // The load forgets everything, since there are no global pages.
            self.system.cr3 = root.0;
            self.flush = Flush::NOTHING;
            if self.store_in_guest {
                // Not so where tables are shadowed and the VMM loads the register.
                self.operate(private::VA_FLUSH_ALL, [0; 3])?;
            }
        } else {
            match std::mem::replace(&mut self.flush, Flush::NOTHING) {
                Flush::All => self.operate(private::VA_FLUSH_ALL, [0; 3])?,
                Flush::Pages(_) if other => self.operate(private::VA_FLUSH_ALL, [0; 3])?,
                Flush::Pages(pages) => {
                    for page in pages {
                        self.operate(private::VA_FLUSH_PAGE, [page, 0, 0])?;
                    }
                }
            }
        }
        if let Some(wanted) = wanted {
            self.signals.flushed(wanted);
        }
        Ok(())
    }

    /// Executes an operation on the domain's RAM, which the engine's own root shows at its guest-physical address.
    fn operate_on_ram(&mut self, rip: u64, arguments: [u64; 3]) -> Result<()> {
        let loaded = std::mem::replace(&mut self.system.cr3, self.private.own_root());
        let done = self.operate(rip, arguments);
        self.system.cr3 = loaded;
        done
    }

    fn check_entry(&self, gpa: GuestAddress) -> Result<()> {
        let ram = self.private.layout().ram();
        if !gpa.0.is_multiple_of(8) || gpa.0 > ram - 8 {
            let allowed = format!("a multiple of 8 below {ram:#x}");
            return Err(Error::invalid(
                "address of a page-table entry",
                format_args!("{:#x}", gpa.0),
                allowed,
            ));
        }
        Ok(())
    }

    pub(super) fn check_root(&self, gpa: GuestAddress) -> Result<()> {
        if !gpa.0.is_multiple_of(PAGE_SIZE) {
            return Err(Error::invalid(
                "page-table root",
                format_args!("{:#x}", gpa.0),
                "a multiple of 4096",
            ));
        }
        self.check_entry(gpa)
    }
}

impl Mmu for Ring3 {
    fn write_entry(&mut self, gpa: GuestAddress, value: u64) -> Result<()> {
        self.check_entry(gpa)?;
        if self.store_in_guest {
            return self.operate_on_ram(private::VA_STORE, [gpa.0, value, 0]);
        }
        self.ram.memory().store(value, gpa, Ordering::SeqCst).map_err(memory_error)
    }

    fn write_entry_keeping(&mut self, gpa: GuestAddress, value: u64, keep: u64) -> Result<()> {
        self.check_entry(gpa)?;
        if self.store_in_guest {
            return self.operate_on_ram(private::VA_STORE_KEEPING, [gpa.0, value, keep]);
        }
        let memory = self.ram.memory();
        let slice = memory.get_slice(gpa, size_of::<u64>()).map_err(memory_error)?;
        let entry = slice.get_atomic_ref::<AtomicU64>(0).map_err(|error| memory_error(error.into()))?;
        let old = entry.swap(value, Ordering::SeqCst);
        entry.fetch_or(old & keep, Ordering::SeqCst);
        Ok(())
    }

    fn prepare_root(&mut self, gpa: GuestAddress, mode: GuestMode) -> Result<()> {
        self.check_root(gpa)?;
        let slot = |slot: usize| GuestAddress(gpa.0 + slot as u64 * 8);
        self.write_entry(slot(PRIVATE_SLOT), self.private.private_entry())?;
        let m2p = if mode == GuestMode::Kernel { self.private.m2p_entry() } else { 0 };
        self.write_entry(slot(M2P_SLOT), m2p)?;
        // Who shadows page tables has things of its own in Xen's slot, and shows nothing there.
        let where_xen_has_it = if self.store_in_guest { 0 } else { m2p };
        self.write_entry(slot(XEN_M2P_SLOT), where_xen_has_it)?;
        if let Some(shim) = self.private.shim() {
            let (own, window) = match mode {
                GuestMode::Kernel => (shim.kernel_entry(), shim.window_entry()),
                GuestMode::User => (shim.user_entry(), 0),
            };
            self.write_entry(slot(SHIM_SLOT), own)?;
            self.write_entry(slot(WINDOW_SLOT), window)?;
        }
        Ok(())
    }

    fn set_kernel_root(&mut self, gpa: GuestAddress) -> Result<()> {
        self.check_root(gpa)?;
        self.kernel_root = gpa;
        self.flush_all();
        Ok(())
    }

    fn set_user_root(&mut self, gpa: Option<GuestAddress>) -> Result<()> {
        if let Some(gpa) = gpa {
            self.check_root(gpa)?;
        }
        self.user_root = gpa;
        self.flush_all();
        Ok(())
    }

    fn kernel_root(&self) -> GuestAddress {
        self.kernel_root
    }

    fn user_root(&self) -> Option<GuestAddress> {
        self.user_root
    }

    fn flush_all(&mut self) {
        self.flush = Flush::All;
    }

    fn flush_page(&mut self, va: u64) {
        match &mut self.flush {
            Flush::Pages(pages) if pages.len() < MAX_PAGES => pages.push(canonical(va)),
            flush => *flush = Flush::All,
        }
    }
}
