//! The software TLB: from linear pages to host pages.
//!
//! Each kind of access rights has a table of its own. An entry's tags are compared with the page of an access's last byte,
//! so that one comparison also finds accesses which cross into the next page. The tables lie in the [`Frame`], where
//! translated code finds them, too.
//!
//! What it holds is the outcome of the guest's accesses and flushes alone: that stores are to be noticed, or that whoever
//! runs blocks looks anew, takes nothing out. So it shows in no accessed bit and in no stale translation when that happens.
//!
//! The pointers in it are sound because the TLB owns the memory map that they point into, and drops them whenever it
//! takes another map.
#![allow(unsafe_code, reason = "entries are host addresses of guest memory")]

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use rustc_hash::FxHashMap;

use super::frame::{ENTRIES, Entry, Frame, nothing_at};
use super::host::{HostWord, Order};
use super::map::MemoryMap;
use super::walk::{Access, Paging, Translation, peek};
use super::window::{Figures, Window};
use super::{PAGE, PAGE_MASK};
use crate::translate::segment::low8;

const GLOBAL: u64 = 1 << 0;
/// Writes are allowed, noticed or not.
const WRITABLE: u64 = 1 << 1;
/// There is a translation.
const PRESENT: u64 = 1 << 2;
/// Binary logarithm of the size of the page, six bits from this one of an entry's `kind`.
const SIZE: u32 = 3;
/// That of the smallest.
const SMALL: u32 = PAGE.trailing_zeros();

/// Pages of code that are kept.
const FETCHED: usize = 4096;

/// Entries that are listed as not global.
const LOCAL: usize = 2 * ENTRIES;

/// Whose rights an access has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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

/// A page that instructions were fetched from.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Fetched {
    pub(crate) gpa: u64,
    pub(crate) global: bool,
    /// Binary logarithm of the size of the page that the page tables have there.
    pub(crate) size: u32,
}

/// Translations of instruction fetches that hold no more.
#[derive(Clone, Debug, Default)]
pub(crate) struct Forgotten {
    /// Of all pages.
    pub(crate) all: bool,
    /// Of those that are not global.
    pub(crate) local: bool,
    /// Of single pages, whatever their size.
    pub(crate) pages: Vec<u64>,
}

impl Forgotten {
    /// Pages that are listed one by one.
    const LISTED: usize = 64;

    fn is_empty(&self) -> bool {
        !self.all && !self.local && self.pages.is_empty()
    }

    fn add(&mut self, va: u64) {
        if self.pages.len() < Self::LISTED {
            self.pages.push(va);
        } else {
            self.all = true;
        }
    }
}

/// See the module.
pub(crate) struct Tlb {
    frame: Box<Frame>,
    /// Pages that instructions were fetched from, by tag. All that whoever runs blocks remembers in this generation is
    /// among them, so it does not matter when that is looked up here.
    fetched: FxHashMap<u64, Fetched>,
    /// Those that are global.
    fetched_global: FxHashMap<u64, Fetched>,
    /// What was forgotten of them since somebody asked.
    forgotten: Forgotten,
    map: Arc<MemoryMap>,
    reach: Reach,
    /// Entries that are not global: table and index.
    local: Vec<(u8, u16)>,
    /// There may be entries of pages larger than 4 KiB.
    large: bool,
    /// Changes whenever an entry may have gone: whoever remembers a translation elsewhere compares.
    generation: u64,
    /// How often an entry was filled.
    pub(crate) fills: u64,
    /// What was invalidated since another engine that runs programs heard of it, where there is one.
    pub(crate) invalidated: Option<Invalidated>,
    window: Option<Window>,
    /// This host cannot map guest memory into the window.
    no_window: bool,
}

/// Pages that are kept apart in [`Invalidated`].
const MAX_INVALIDATED: usize = 64;

/// Translations that the guest wants to be forgotten.
#[derive(Debug, Default)]
pub(crate) struct Invalidated {
    pub(crate) pages: Vec<u64>,
    pub(crate) all: bool,
}

impl Invalidated {
    fn add(&mut self, va: u64) {
        if self.pages.len() < MAX_INVALIDATED {
            self.pages.push(va);
        } else {
            self.all = true;
        }
    }
}

impl fmt::Debug for Tlb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tlb").field("generation", &self.generation).finish_non_exhaustive()
    }
}

impl Tlb {
    pub(crate) fn new(map: Arc<MemoryMap>) -> Self {
        Self {
            frame: Frame::new(),
            fetched: FxHashMap::default(),
            fetched_global: FxHashMap::default(),
            forgotten: Forgotten::default(),
            map,
            reach: Reach::SupervisorAll,
            local: Vec::with_capacity(LOCAL),
            large: false,
            generation: 1,
            fills: 0,
            invalidated: None,
            window: None,
            no_window: false,
        }
    }

    pub(crate) fn frame(&mut self) -> &mut Frame {
        &mut self.frame
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
        self.reach = reach;
    }

    pub(crate) fn generation(&self) -> u64 {
        self.generation
    }

    /// Makes whoever remembers a translation look again.
    pub(crate) fn forget_lookups(&mut self) {
        self.forgotten.all = true;
        self.generation += 1;
    }

    /// Whether translations of instruction fetches hold no more of which nobody heard.
    pub(crate) fn has_forgotten(&self) -> bool {
        !self.forgotten.is_empty()
    }

    /// Those.
    pub(crate) fn take_forgotten(&mut self) -> Forgotten {
        std::mem::take(&mut self.forgotten)
    }

    #[inline(always)]
    fn entry(&self, va: u64) -> &Entry {
        self.frame.entry(self.reach, va)
    }

    /// The page of the last byte of an access.
    #[inline(always)]
    fn tag<W: HostWord>(va: u64) -> u64 {
        va.wrapping_add(W::BYTES as u64 - 1) & PAGE_MASK
    }

    /// Key of a page that instructions are fetched from.
    fn fetch_tag(&self, va: u64) -> u64 {
        va & PAGE_MASK | self.reach as u64
    }

    /// The translation of the page of `va`, if it is here and allows `access`.
    pub(crate) fn translation(&self, va: u64, access: Access) -> Option<Translation> {
        let found = Translation {
            gpa: 0,
            readable: true,
            writable: false,
            executable: false,
            global: false,
            size: PAGE,
        };
        if access == Access::Execute {
            let Fetched { gpa, global, size } = self.fetch_translation(va)?;
            return Some(Translation { gpa, executable: true, global, size: 1 << (size & 63), ..found });
        }
        let entry = self.entry(va);
        let writable = entry.kind & WRITABLE != 0;
        if entry.read != va & PAGE_MASK || access == Access::Write && !writable {
            return None;
        }
        let gpa = entry.kind & PAGE_MASK;
        let (global, size) = (entry.kind & GLOBAL != 0, 1 << size_of(entry));
        Some(Translation { gpa, writable, global, size, ..found })
    }

    /// The page that instructions at `va` were fetched from.
    pub(crate) fn fetch_translation(&self, va: u64) -> Option<Fetched> {
        let tag = self.fetch_tag(va);
        self.fetched_global.get(&tag).or_else(|| self.fetched.get(&tag)).copied()
    }

    /// Remembers the translation of an instruction fetch.
    pub(crate) fn fetched(&mut self, va: u64, translation: &Translation) {
        if self.fetched.len() + self.fetched_global.len() >= FETCHED {
            self.forget_fetched();
        }
        let size = translation.size.trailing_zeros();
        self.large |= size > SMALL;
        let fetched = Fetched { gpa: translation.gpa, global: translation.global, size };
        let tag = self.fetch_tag(va);
        let pages = if fetched.global { &mut self.fetched_global } else { &mut self.fetched };
        pages.insert(tag, fetched);
    }

    fn forget_fetched(&mut self) {
        self.fetched.clear();
        self.fetched_global.clear();
        self.forget_lookups();
    }

    /// Reads guest memory if the TLB has its page.
    #[inline(always)]
    pub(crate) fn load<W: HostWord>(&self, va: u64) -> Option<W> {
        let entry = self.entry(va);
        if entry.read != Self::tag::<W>(va) {
            return None;
        }
        let address = host_pointer(entry, va);
        // SAFETY: a valid entry says that the whole access lies in a page of a region, which `self.map` keeps mapped.
        Some(unsafe { W::load(address) })
    }

    /// Writes guest memory if the TLB has its page for that; whether it did.
    #[inline(always)]
    pub(crate) fn store<W: HostWord>(&self, va: u64, value: W) -> bool {
        let entry = self.entry(va);
        if entry.write != Self::tag::<W>(va) {
            return false;
        }
        let address = host_pointer(entry, va);
        // SAFETY: as for `load`; the entry says that the region is writable.
        unsafe { W::store(address, value) };
        true
    }

    /// Replaces `old` by `new` atomically if the TLB has the page for writing; `None` if not, or if the access is not
    /// aligned.
    #[inline(always)]
    pub(crate) fn compare_exchange<W: HostWord>(&self, va: u64, old: W, new: W) -> Option<Result<W, W>> {
        let entry = self.entry(va);
        if entry.write != Self::tag::<W>(va) || va & (W::BYTES as u64 - 1) != 0 {
            return None;
        }
        let address = host_pointer(entry, va);
        // SAFETY: as for `store`; aligned, since host and guest pages are.
        Some(unsafe { W::compare_exchange(address, old, new) })
    }

    /// Host pages of `len` bytes from `va` within one page: copies out if reads are allowed.
    pub(crate) fn load_bytes(&self, va: u64, bytes: &mut [u8], order: Order) -> bool {
        let entry = self.entry(va);
        let last = va.wrapping_add((bytes.len() as u64).saturating_sub(1));
        if entry.read != last & PAGE_MASK || bytes.len() as u64 > PAGE {
            return false;
        }
        let address = host_pointer(entry, va);
        // SAFETY: as for `load`: first and last byte lie in the entry's page.
        unsafe { super::host::copy_from(address, bytes, order) };
        true
    }

    /// Copies in if writes are allowed.
    pub(crate) fn store_bytes(&self, va: u64, bytes: &[u8], order: Order) -> bool {
        let entry = self.entry(va);
        let last = va.wrapping_add((bytes.len() as u64).saturating_sub(1));
        if entry.write != last & PAGE_MASK || bytes.len() as u64 > PAGE {
            return false;
        }
        let address = host_pointer(entry, va);
        // SAFETY: as for `store`: first and last byte lie in the entry's page.
        unsafe { super::host::copy_to(address, bytes, order) };
        true
    }

    /// Where the host has the byte at `va`, if the TLB has its page for reading or writing.
    pub(crate) fn host_address(&self, va: u64, write: bool) -> Option<u64> {
        let entry = self.entry(va);
        let tag = if write { entry.write } else { entry.read };
        (tag == va & PAGE_MASK).then_some(entry.host | va & !PAGE_MASK)
    }

    /// Remembers a translation, if it leads to RAM. `writes` says whether stores may go unnoticed.
    pub(crate) fn fill(&mut self, va: u64, translation: &Translation, writes: bool) {
        if self.reach == Reach::UserAligned {
            return;
        }
        let Some(slot) = self.map.slot(translation.gpa) else { return };
        let Some((host, room)) = slot.host(translation.gpa) else { return };
        if room < PAGE {
            return;
        }
        let writable = translation.writable && slot.is_writable();
        let writes = writes && writable;
        let (page, index) = (va & PAGE_MASK, Frame::index(va));
        let size = translation.size.trailing_zeros();
        let global = if translation.global { GLOBAL } else { 0 };
        let kind = translation.gpa & PAGE_MASK
            | u64::from(size) << SIZE
            | if writable { WRITABLE } else { 0 }
            | global
            | PRESENT;
        let entry = Entry {
            read: if translation.readable { page } else { nothing_at(index) },
            write: if writes { page } else { nothing_at(index) },
            host: host.expose_provenance() as u64,
            kind,
        };
        self.large |= size > SMALL;
        self.fills += 1;
        let old = std::mem::replace(self.frame.entry_mut(self.reach, va), entry);
        if let (Reach::User, Some(window)) = (self.reach, &mut self.window) {
            window.follow(page, translation.gpa & PAGE_MASK, old.read);
        }
        let was_local = old.kind & (PRESENT | GLOBAL) == PRESENT;
        if !translation.global && !was_local {
            if self.local.len() >= LOCAL {
                self.collect_local();
            }
            self.local.extend(u16::try_from(index).map(|index| (self.reach as u8, index)));
        }
    }

    /// Rebuilds the list of entries that are not global, which grew by replaced ones.
    fn collect_local(&mut self) {
        self.local.clear();
        for reach in [Reach::User, Reach::Supervisor, Reach::SupervisorAll] {
            let table = self.frame.table_mut(reach as u8).iter().zip(0_u16..);
            let local = table.filter(|(entry, _)| entry.kind & (PRESENT | GLOBAL) == PRESENT);
            self.local.extend(local.map(|(_, index)| (reach as u8, index)));
        }
    }

    /// Whether user programs may access memory through the address window.
    #[inline(always)]
    pub(crate) fn has_window(&self) -> bool {
        self.window.as_ref().is_some_and(Window::is_active)
    }

    /// Gives the user program in the address space of `paging` a window of at most `limit` pages, `exact` as in [`Window`]; `false` if that was
    /// another program's, which is nothing to go on. Where the host has no room for a window, there is none.
    pub(crate) fn open_window(&mut self, paging: &Paging, limit: usize, exact: bool) -> bool {
        if self.no_window {
            return true;
        }
        let regions = &mut self.frame.regions;
        let window = match &mut self.window {
            Some(window) => window,
            None => match Window::new(limit, exact, regions) {
                Ok(window) => self.window.insert(window),
                Err(error) => {
                    tracing::debug!(%error, "no address window");
                    self.no_window = true;
                    return true;
                }
            },
        };
        let map = &self.map;
        window.activate(paging.cr3, regions, |va, writes| {
            let access = if writes { Access::Write } else { Access::Read };
            let Translation { gpa, size, .. } = peek(map, paging, va, access)?;
            let slot = map.slot(gpa)?;
            (!writes || slot.is_writable() && !slot.must_notice_stores(gpa)).then_some((gpa, size))
        })
    }

    /// Takes the window from the program that has one, until it is opened again.
    pub(crate) fn close_window(&mut self) {
        if let Some(window) = &mut self.window {
            window.suspend(&mut self.frame.regions);
        }
    }

    /// What the window has cost since this was last asked.
    pub(crate) fn take_window_cost(&mut self) -> Duration {
        self.window.as_mut().map_or(Duration::ZERO, Window::take_cost)
    }

    /// Notes that an access through the window has faulted.
    pub(crate) fn note_window_fault(&mut self) {
        if let Some(window) = &mut self.window {
            window.note_fault();
        }
    }

    /// Lets the window have the pages of `len` bytes at `va` as far as the TLB has them.
    pub(crate) fn extend_window(&mut self, va: u64, len: u64) {
        let Some(window) = &mut self.window else { return };
        let regions = &mut self.frame.regions;
        let last = va.wrapping_add(len.saturating_sub(1));
        for va in [va & PAGE_MASK, last & PAGE_MASK] {
            // Not borrowed from the frame as a whole.
            let entry = self.frame.tables.first().and_then(|table| table.get(Frame::index(va)));
            let Some(entry) = entry.filter(|entry| entry.read == va) else { continue };
            let (gpa, writable) = (entry.kind & PAGE_MASK, entry.write == va);
            let size = 1 << size_of(entry);
            // Of huge pages of the host, nothing smaller can be mapped.
            let mapped = if self.map.slot(gpa).is_some_and(|slot| slot.small_pages) {
                window.map(va, gpa, entry.host, writable, size, regions)
            } else {
                Err(std::io::ErrorKind::Unsupported.into())
            };
            if let Err(error) = mapped {
                tracing::debug!(%error, "guest memory cannot be mapped into the address window");
                window.clear(regions);
                self.no_window = true;
                return;
            }
        }
    }

    /// What the window did.
    pub(crate) fn window_figures(&self) -> Figures {
        self.window.as_ref().map(|window| window.figures).unwrap_or_default()
    }

    /// Forgets everything.
    pub(crate) fn flush_all(&mut self) {
        if let Some(invalidated) = &mut self.invalidated {
            invalidated.all = true;
        }
        if let Some(window) = &mut self.window {
            window.clear(&mut self.frame.regions);
        }
        self.frame.clear();
        self.local.clear();
        self.large = false;
        self.forget_fetched();
    }

    /// Forgets what is not global.
    pub(crate) fn flush_local(&mut self) {
        if let Some(invalidated) = &mut self.invalidated {
            invalidated.all = true;
        }
        if let Some(window) = &mut self.window {
            window.suspend(&mut self.frame.regions);
        }
        for (table, index) in self.local.drain(..) {
            let index = usize::from(index);
            if let Some(entry) = self.frame.table_mut(table).get_mut(index)
                && entry.kind & GLOBAL == 0
            {
                *entry = Entry::nothing(index);
            }
        }
        self.fetched.clear();
        self.forgotten.local = true;
        self.generation += 1;
    }

    /// Forgets the page of `va`, whatever its size.
    pub(crate) fn flush_page(&mut self, va: u64) {
        if let Some(invalidated) = &mut self.invalidated {
            invalidated.add(va);
        }
        if let Some(window) = &mut self.window {
            window.flush_page(va, &mut self.frame.regions);
        }
        self.forgotten.add(va);
        self.generation += 1;
        if self.large {
            let is_other = |tag: &u64, page: &mut Fetched| (*tag & PAGE_MASK) >> page.size != va >> page.size;
            self.fetched.retain(is_other);
            self.fetched_global.retain(is_other);

            // Other parts of a large page can be anywhere.
            for (index, entry) in self.frame.entries_mut() {
                let size = size_of(entry);
                if size > SMALL && entry.read >> size == va >> size {
                    *entry = Entry::nothing(index);
                }
            }
        }
        self.forget_entries(va);
        for reach in [Reach::User, Reach::Supervisor, Reach::SupervisorAll, Reach::UserAligned] {
            let tag = va & PAGE_MASK | reach as u64;
            self.fetched.remove(&tag);
            self.fetched_global.remove(&tag);
        }
    }

    /// Forgets what is known of `va` for data, as a page fault there makes a processor do (Intel SDM 3A 5.10.4.1): a kernel
    /// that gives the program another page then need not invalidate the one of before.
    pub(crate) fn forget_data(&mut self, va: u64) {
        if let Some(window) = &mut self.window {
            window.forget_page(va);
        }
        self.forget_entries(va);
    }

    /// Forgets the entries for the 4 KiB at `va`, and no other that is in their place.
    fn forget_entries(&mut self, va: u64) {
        for reach in [Reach::User, Reach::Supervisor, Reach::SupervisorAll] {
            let entry = self.frame.entry_mut(reach, va);
            if entry.read == va & PAGE_MASK || entry.write == va & PAGE_MASK {
                *entry = Entry::nothing(Frame::index(va));
            }
        }
    }

    /// Lets stores to a page of RAM be noticed again.
    pub(crate) fn watch_stores(&mut self, gpa: u64) {
        let gpa = gpa & PAGE_MASK;
        if let Some(window) = &mut self.window {
            window.protect(gpa);
        }
        for (index, entry) in self.frame.entries_mut() {
            if entry.kind & PAGE_MASK == gpa {
                entry.write = nothing_at(index);
            }
        }
    }

    /// Lets all stores be noticed again.
    pub(crate) fn watch_all_stores(&mut self) {
        if let Some(window) = &mut self.window {
            window.suspend(&mut self.frame.regions);
        }
        for (index, entry) in self.frame.entries_mut() {
            entry.write = nothing_at(index);
        }
    }
}

/// Binary logarithm of the size of an entry's page.
fn size_of(entry: &Entry) -> u32 {
    low8(entry.kind >> SIZE & 63).into()
}

/// Where `va` lies in the entry's page.
#[allow(clippy::cast_possible_truncation, reason = "an address of this host")]
#[inline(always)]
fn host_pointer(entry: &Entry, va: u64) -> *mut u8 {
    std::ptr::with_exposed_provenance_mut((entry.host | va & !PAGE_MASK) as usize)
}

#[cfg(test)]
#[path = "tlb_tests.rs"]
mod tests;
