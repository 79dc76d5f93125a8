//! Roots, entries, and what the processor caches of them.

use std::sync::atomic::{AtomicU64, Ordering};

use vmm_memory::PAGE_SIZE;
use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, VolatileMemory as _};

use super::context::canonical;
use super::{Ring3, memory_error};
use crate::error::{Error, Result};
use crate::state::GeneralRegisters;
use crate::xen_pv::engine::private::{self, M2P_SLOT, XEN_M2P_SLOT};
use crate::xen_pv::engine::shim::{SHIM_SLOT, WINDOW_SLOT};
use crate::xen_pv::engine::{GuestMode, Mmu, PRIVATE_SLOT};

/// Single pages that are flushed one by one; for more all are.
const MAX_PAGES: usize = 8;

/// Entries that wait to be shown.
const MAX_STORED: usize = 8 * private::MAX_TOUCHED;

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
        let moves = self.system.cr3 != root.0;
        let pages = match std::mem::replace(&mut self.flush, Flush::NOTHING) {
            Flush::Pages(pages) if !moves && wanted.is_none() => Some(pages),
            _ => None,
        };
        // A load forgets everything, since there are no global pages; not so where tables are shadowed and the VMM loads
        // the register.
        let reload = pages.is_none() && (self.store_in_guest || !moves);
        self.show_stored(reload.then_some(root.0))?;
        self.system.cr3 = root.0;
        for rax in pages.into_iter().flatten() {
            self.operate(private::VA_FLUSH_PAGE, GeneralRegisters { rax, ..GeneralRegisters::default() })?;
        }
        if let Some(wanted) = wanted {
            self.signals.flushed(wanted);
        }
        Ok(())
    }

    /// Forgets all translations of the root that is loaded.
    pub(super) fn reload_root(&mut self) -> Result<()> {
        self.show_stored(Some(self.system.cr3))
    }

    /// Shows entries that were stored to who shadows tables, by way of the engine's own root, where the domain's RAM is at its
    /// guest-physical address. Then loads `root` if there is one.
    fn show_stored(&mut self, root: Option<u64>) -> Result<()> {
        let loaded = self.system.cr3;
        let stored = std::mem::take(&mut self.stored);
        let mut left = stored.chunks(private::MAX_TOUCHED).peekable();
        if let Some(root) = root
            && stored.is_empty()
        {
            self.system.cr3 = root;
            self.operate(
                private::VA_LOAD_ROOT,
                GeneralRegisters { rbp: root, ..GeneralRegisters::default() },
            )?;
        }
        while let Some(entries) = left.next() {
            let own = self.private.own_root();
            self.system.cr3 = own;
            let rbp = root.filter(|_| left.peek().is_none()).unwrap_or(own);
            let mut registers = GeneralRegisters { rbp, ..GeneralRegisters::default() };
            for (register, gpa) in private::touched(&mut registers).into_iter().rev().zip(entries) {
                *register = *gpa;
            }
            self.operate(private::touch(entries.len()), registers)?;
        }
        self.system.cr3 = loaded;
        Ok(())
    }

    fn note_stored(&mut self, gpa: GuestAddress) -> Result<()> {
        if !self.store_in_guest || self.stored.last() == Some(&gpa.0) {
            return Ok(());
        }
        self.stored.push(gpa.0);
        if self.stored.len() < MAX_STORED { Ok(()) } else { self.show_stored(None) }
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
        self.ram.memory().store(value, gpa, Ordering::SeqCst).map_err(memory_error)?;
        self.note_stored(gpa)
    }

    fn write_entry_keeping(&mut self, gpa: GuestAddress, value: u64, keep: u64) -> Result<()> {
        self.check_entry(gpa)?;
        let memory = self.ram.memory();
        let slice = memory.get_slice(gpa, size_of::<u64>()).map_err(memory_error)?;
        let entry = slice.get_atomic_ref::<AtomicU64>(0).map_err(|error| memory_error(error.into()))?;
        let old = entry.swap(value, Ordering::SeqCst);
        entry.fetch_or(old & keep, Ordering::SeqCst);
        self.note_stored(gpa)
    }

    fn publish_entries(&mut self) -> Result<()> {
        self.show_stored(None)
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
