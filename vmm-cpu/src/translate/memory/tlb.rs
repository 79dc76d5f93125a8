//! The software TLB: from linear pages to host pages.
//!
//! An entry serves one kind of access rights, since its tags hold the mode of whoever filled it. Tags are compared with
//! the page of an access's last byte, so that one comparison also finds accesses which cross into the next page.
//!
//! What it holds is the outcome of the guest's accesses and flushes alone: that stores are to be noticed, or that whoever
//! runs blocks looks anew, takes nothing out. So it shows in no accessed bit and in no stale translation when that happens.
//!
//! The pointers in it are sound because the TLB owns the memory map that they point into, and drops them whenever it
//! takes another map.
#![allow(unsafe_code, reason = "entries are host addresses of guest memory")]

use std::fmt;
use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::host::{HostWord, Order};
use super::map::MemoryMap;
use super::walk::{Access, Translation};
use super::{PAGE, PAGE_MASK};

const ENTRIES: usize = 2048;

/// No access has this tag: the low bits are not those of a mode.
const INVALID: u64 = u64::MAX;

const GLOBAL: u64 = 1 << 0;
/// Writes are allowed, noticed or not.
const WRITABLE: u64 = 1 << 1;
/// Binary logarithm of the size of the page, from this bit of an entry's `kind`.
const SIZE: u32 = 8;
/// That of the smallest.
const SMALL: u32 = PAGE.trailing_zeros();

/// Pages of code that are kept.
const FETCHED: usize = 4096;

/// Whose rights an access has. In tags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Reach {
    /// Privilege level 3.
    User = 0,
    /// Privilege levels 0 to 2 and SMAP in force.
    Supervisor = 1,
    /// Privilege levels 0 to 2 and no SMAP, or lifted by RFLAGS.AC.
    SupervisorAll = 2,
    /// Privilege level 3 with alignment checks, which nothing in the TLB has passed: it keeps no data of this one.
    UserAligned = 3,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Entry {
    /// Page and [`Reach`] if reads are allowed.
    read: u64,
    /// Page and [`Reach`] if writes are allowed and nothing has to be noted about them.
    write: u64,
    /// Host address of the page less its linear address.
    addend: u64,
    /// Flags.
    kind: u64,
}

const EMPTY: Entry = Entry { read: INVALID, write: INVALID, addend: 0, kind: 0 };

/// See the module.
pub(crate) struct Tlb {
    entries: Box<[Entry; ENTRIES]>,
    /// Guest-physical page of each entry.
    gpas: Box<[u64; ENTRIES]>,
    /// Pages that instructions were fetched from, by tag. All that whoever runs blocks remembers in this generation is
    /// among them, so it does not matter when that is looked up here.
    fetched: FxHashMap<u64, u64>,
    map: Arc<MemoryMap>,
    reach: u64,
    /// Indices of entries that are not global.
    local: Vec<u16>,
    /// There may be entries of pages larger than 4 KiB.
    large: bool,
    /// Changes whenever an entry may have gone: whoever remembers a translation elsewhere compares.
    generation: u64,
}

impl fmt::Debug for Tlb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tlb").field("generation", &self.generation).finish_non_exhaustive()
    }
}

impl Tlb {
    pub(crate) fn new(map: Arc<MemoryMap>) -> Self {
        Self {
            entries: Box::new([EMPTY; ENTRIES]),
            gpas: Box::new([0; ENTRIES]),
            fetched: FxHashMap::default(),
            map,
            reach: Reach::SupervisorAll as u64,
            local: Vec::with_capacity(ENTRIES),
            large: false,
            generation: 1,
        }
    }

    pub(crate) fn map(&self) -> &Arc<MemoryMap> {
        &self.map
    }

    /// Takes another memory map and forgets all translations.
    pub(crate) fn set_map(&mut self, map: Arc<MemoryMap>) {
        self.flush_all();
        self.map = map;
    }

    pub(crate) fn set_reach(&mut self, reach: Reach) {
        self.reach = reach as u64;
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// Makes whoever remembers a translation look again.
    pub(crate) fn forget_lookups(&mut self) {
        self.generation += 1;
    }

    #[allow(clippy::cast_possible_truncation, reason = "the low bits select")]
    fn index(va: u64) -> usize {
        (va / PAGE) as usize % ENTRIES
    }

    #[allow(clippy::indexing_slicing, reason = "the index is reduced to the length")]
    #[inline(always)]
    fn entry(&self, va: u64) -> &Entry {
        &self.entries[Self::index(va)]
    }

    #[inline(always)]
    fn tag<W: HostWord>(&self, va: u64) -> u64 {
        va.wrapping_add(W::BYTES as u64 - 1) & PAGE_MASK | self.reach
    }

    /// The translation of the page of `va`, if it is here and allows `access`.
    pub(crate) fn translation(&self, va: u64, access: Access) -> Option<Translation> {
        let tag = va & PAGE_MASK | self.reach;
        let found = Translation {
            gpa: 0,
            readable: true,
            writable: false,
            executable: false,
            global: false,
            size: PAGE,
        };
        if access == Access::Execute {
            let gpa = *self.fetched.get(&tag)?;
            return Some(Translation { gpa, executable: true, ..found });
        }
        let entry = self.entry(va);
        let writable = entry.kind & WRITABLE != 0;
        if entry.read != tag || access == Access::Write && !writable {
            return None;
        }
        let gpa = self.gpas.get(Self::index(va)).copied()?;
        let (global, size) = (entry.kind & GLOBAL != 0, 1 << (entry.kind >> SIZE & 63));
        Some(Translation { gpa, writable, global, size, ..found })
    }

    /// Remembers the translation of an instruction fetch.
    pub(crate) fn fetched(&mut self, va: u64, gpa: u64) {
        if self.fetched.len() >= FETCHED {
            self.fetched.clear();
            self.generation += 1;
        }
        self.fetched.insert(va & PAGE_MASK | self.reach, gpa);
    }

    /// Reads guest memory if the TLB has its page.
    #[inline(always)]
    pub(crate) fn load<W: HostWord>(&self, va: u64) -> Option<W> {
        let entry = self.entry(va);
        if entry.read != self.tag::<W>(va) {
            return None;
        }
        let address = host_pointer(va.wrapping_add(entry.addend));
        // SAFETY: a valid entry says that the whole access lies in a page of a region, which `self.map` keeps mapped.
        Some(unsafe { W::load(address) })
    }

    /// Writes guest memory if the TLB has its page for that; whether it did.
    #[inline(always)]
    pub(crate) fn store<W: HostWord>(&self, va: u64, value: W) -> bool {
        let entry = self.entry(va);
        if entry.write != self.tag::<W>(va) {
            return false;
        }
        let address = host_pointer(va.wrapping_add(entry.addend));
        // SAFETY: as for `load`; the entry says that the region is writable.
        unsafe { W::store(address, value) };
        true
    }

    /// Replaces `old` by `new` atomically if the TLB has the page for writing; `None` if not, or if the access is not
    /// aligned.
    #[inline(always)]
    pub(crate) fn compare_exchange<W: HostWord>(&self, va: u64, old: W, new: W) -> Option<Result<W, W>> {
        let entry = self.entry(va);
        if entry.write != self.tag::<W>(va) || va & (W::BYTES as u64 - 1) != 0 {
            return None;
        }
        let address = host_pointer(va.wrapping_add(entry.addend));
        // SAFETY: as for `store`; aligned, since host and guest pages are.
        Some(unsafe { W::compare_exchange(address, old, new) })
    }

    /// Host pages of `len` bytes from `va` within one page: copies out if reads are allowed.
    pub(crate) fn load_bytes(&self, va: u64, bytes: &mut [u8], order: Order) -> bool {
        let entry = self.entry(va);
        let last = va.wrapping_add((bytes.len() as u64).saturating_sub(1));
        if entry.read != (last & PAGE_MASK | self.reach) || bytes.len() as u64 > PAGE {
            return false;
        }
        let address = host_pointer(va.wrapping_add(entry.addend));
        // SAFETY: as for `load`: first and last byte lie in the entry's page.
        unsafe { super::host::copy_from(address, bytes, order) };
        true
    }

    /// Copies in if writes are allowed.
    pub(crate) fn store_bytes(&self, va: u64, bytes: &[u8], order: Order) -> bool {
        let entry = self.entry(va);
        let last = va.wrapping_add((bytes.len() as u64).saturating_sub(1));
        if entry.write != (last & PAGE_MASK | self.reach) || bytes.len() as u64 > PAGE {
            return false;
        }
        let address = host_pointer(va.wrapping_add(entry.addend));
        // SAFETY: as for `store`: first and last byte lie in the entry's page.
        unsafe { super::host::copy_to(address, bytes, order) };
        true
    }

    /// Remembers a translation, if it leads to RAM. `writes` says whether stores may go unnoticed.
    pub(crate) fn fill(&mut self, va: u64, translation: &Translation, writes: bool) {
        if self.reach == Reach::UserAligned as u64 {
            return;
        }
        let Some(slot) = self.map.slot(translation.gpa) else { return };
        let Some((host, room)) = slot.host(translation.gpa) else { return };
        if room < PAGE {
            return;
        }
        let writable = translation.writable && slot.is_writable();
        let writes = writes && writable;
        let page = va & PAGE_MASK;
        let tag = page | self.reach;
        let size = translation.size.trailing_zeros();
        let entry = Entry {
            read: if translation.readable { tag } else { INVALID },
            write: if writes { tag } else { INVALID },
            addend: (host.expose_provenance() as u64).wrapping_sub(page),
            kind: u64::from(size) << SIZE
                | if translation.global { GLOBAL } else { 0 }
                | if writable { WRITABLE } else { 0 },
        };
        self.large |= size > SMALL;
        let index = Self::index(va);
        if let Some(gpa) = self.gpas.get_mut(index) {
            *gpa = translation.gpa;
        }
        let replaced = self.entries.get_mut(index).map(|slot| std::mem::replace(slot, entry));
        let was_local = replaced.is_some_and(|old| old.read != INVALID && old.kind & GLOBAL == 0);
        if !translation.global && !was_local {
            if self.local.len() >= ENTRIES {
                self.collect_local();
            }
            self.local.extend(u16::try_from(index));
        }
    }

    /// Rebuilds the list of entries that are not global, which grew by replaced ones.
    fn collect_local(&mut self) {
        self.local.clear();
        let local = self.entries.iter().zip(0_u16..);
        self.local.extend(
            local
                .filter(|(entry, _)| entry.read != INVALID && entry.kind & GLOBAL == 0)
                .map(|(_, index)| index),
        );
    }

    /// Forgets everything.
    pub(crate) fn flush_all(&mut self) {
        self.entries.fill(EMPTY);
        self.local.clear();
        self.large = false;
        self.fetched.clear();
        self.generation += 1;
    }

    /// Forgets what is not global.
    pub(crate) fn flush_local(&mut self) {
        for index in self.local.drain(..) {
            if let Some(entry) = self.entries.get_mut(usize::from(index))
                && entry.kind & GLOBAL == 0
            {
                *entry = EMPTY;
            }
        }
        self.fetched.clear();
        self.generation += 1;
    }

    /// Forgets the page of `va`, whatever its size.
    pub(crate) fn flush_page(&mut self, va: u64) {
        self.fetched.clear();
        self.generation += 1;
        if self.large {
            // Other parts of a large page can be anywhere.
            for entry in self.entries.iter_mut() {
                let size = entry.kind >> SIZE & 63;
                if size > u64::from(SMALL) && entry.read >> size == va >> size {
                    *entry = EMPTY;
                }
            }
        }
        if let Some(entry) = self.entries.get_mut(Self::index(va)) {
            *entry = EMPTY;
        }
    }

    /// Lets stores to a page of RAM be noticed again.
    pub(crate) fn watch_stores(&mut self, gpa: u64) {
        let Some((host, _)) = self.map.slot(gpa).and_then(|slot| slot.host(gpa & PAGE_MASK)) else { return };
        let host = host.addr() as u64;
        for entry in self.entries.iter_mut() {
            if entry.write != INVALID && (entry.write & PAGE_MASK).wrapping_add(entry.addend) == host {
                entry.write = INVALID;
            }
        }
    }

    /// Lets all stores be noticed again.
    pub(crate) fn watch_all_stores(&mut self) {
        for entry in self.entries.iter_mut() {
            entry.write = INVALID;
        }
    }
}

#[allow(clippy::cast_possible_truncation, reason = "an address of this host")]
#[inline(always)]
fn host_pointer(address: u64) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut(address as usize)
}

#[cfg(test)]
#[path = "tlb_tests.rs"]
mod tests;
