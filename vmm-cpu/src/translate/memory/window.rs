//! The address window: guest pages at host addresses of their own, so that the host's MMU translates what a program
//! accesses, and tells by a fault what has no translation.
//!
//! A linear address is cut into regions of 4 GiB. Those that a program uses have each a slot of the window, and
//! [`Frame::regions`](super::frame::Frame) says for each region what is to be added to an address in it. Where nothing is
//! mapped, which is all of slot 0, to which all other regions lead, the host faults, and the interpreter executes the
//! instruction. So an access through the window ends in the window or in no address of a process at all, whatever address
//! the guest makes up: bits 63 to 48 stay in the sum, which is not canonical unless they are zero, and the other bits select
//! the region.
//!
//! The pages of an address space stay mapped while others are in use. When it is used again, each is compared with
//! the page tables, as if the processor had looked all of them up anew; those that changed, or whose accessed or dirty bits
//! were cleared, go.
//!
//! While an address space is in use, what can be accessed is what the page tables said then or later, as in a TLB of any
//! size. That of a processor of limited size forgets some by itself, and looks up again what is accessed next: that shows in
//! accessed bits, which is why where instructions are counted the window forgets what the TLB does.
//!
//! Faults and mappings cost microseconds, a thousand times what a lookup in the TLB does. [`Window::take_cost`] says how many
//! there were.

use std::collections::BTreeSet;
use std::io;
use std::time::Duration;

use rustc_hash::FxHashSet;

use super::budget::Share;
use super::frame::REGIONS;
use super::reserve::{Reserve, Rights};
use super::space::{CHANGE, CHECK, FAULT, MAPPING, Mapped, Space};
use super::{PAGE, PAGE_MASK};

/// Bytes of a region.
const REGION: u64 = 1 << 32;

/// How far from an address whose region was looked up an access may begin or end.
pub(crate) const NEAR: usize = 1 << 12;

/// Bytes that stay free in front of each region and behind it, which is more.
const GUARD: u64 = 1 << 20;

/// Bytes from slot to slot.
const STRIDE: u64 = REGION + 2 * GUARD;

/// Bytes of addresses that one of the host's page tables is for.
const TABLE: u64 = 1 << 21;

/// Slots, with the one that nothing is ever mapped in.
const SLOTS: u32 = 64;

/// Address spaces whose pages stay mapped.
const SPACES: usize = 4;

/// First address that no program of the guest has.
const END: u64 = 1 << 47;

/// Pages of which most must still hold, or the address space is another program's.
const TELLING: usize = 8;

/// See the module.
#[derive(Debug)]
pub(crate) struct Window {
    reserve: Reserve,
    free: Vec<u32>,
    spaces: Vec<Space>,
    /// The pages can be accessed of `spaces[0]`.
    active: bool,
    /// Where each guest-physical page is mapped: that, CR3, linear page.
    places: BTreeSet<(u64, u64, u64)>,
    /// Which parts of which slot had a page since nothing was mapped in the slot: the host has a page table for each, which
    /// it keeps until then.
    tables: FxHashSet<(u32, u64)>,
    /// Pages that may be mapped, and parts that may have had one.
    limit: usize,
    share: Share,
    /// Counts uses of spaces.
    clock: u64,
    /// Nothing can be accessed that the TLB has not, so that accessed and dirty bits are set at the very instruction at which
    /// they are without a window.
    exact: bool,
    /// What it has cost since that was last asked.
    cost: Duration,
    /// Pages may be parts of large ones.
    large: bool,
    pub(crate) figures: Figures,
}

/// What the window did.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Figures {
    pub(crate) mapped: u64,
    pub(crate) unmapped: u64,
    pub(crate) activations: u64,
}

impl Window {
    /// A window of at most `limit` pages, to which all regions in `regions` lead from now on.
    ///
    /// # Errors
    /// Those of the operating system, where there is no room for it.
    pub(crate) fn new(limit: usize, exact: bool, regions: &mut [u64; REGIONS]) -> io::Result<Self> {
        let this = Self {
            reserve: Reserve::new(u64::from(SLOTS) * STRIDE)?,
            free: (1..SLOTS).collect(),
            spaces: Vec::new(),
            active: false,
            places: BTreeSet::new(),
            tables: FxHashSet::default(),
            limit,
            share: Share::of_process(),
            clock: 0,
            exact,
            cost: Duration::ZERO,
            large: false,
            figures: Figures::default(),
        };
        for (region, addend) in (0..=u16::MAX).zip(regions.iter_mut()) {
            *addend = this.addend(region, 0);
        }
        Ok(this)
    }

    /// Whether pages can be accessed.
    pub(crate) fn is_active(&self) -> bool {
        self.active
    }

    fn addend(&self, region: u16, slot: u32) -> u64 {
        (self.reserve.address() + place(slot, 0)).wrapping_sub(u64::from(region) << 32)
    }

    /// Makes the pages of the address space with that CR3 accessible as far as `find` says that they are what they were:
    /// where a linear page leads to, for writing or not, and the size of the page that it is part of now. Whether the space is
    /// a new one or most of what was known of it still holds; if not, it is forgotten.
    pub(crate) fn activate(
        &mut self,
        root: u64,
        regions: &mut [u64; REGIONS],
        mut find: impl FnMut(u64, bool) -> Option<(u64, u64)>,
    ) -> bool {
        self.suspend(regions);
        self.figures.activations += 1;
        self.clock += 1;
        let at = match self.spaces.iter().position(|space| space.root == root) {
            Some(at) => at,
            None => {
                if self.spaces.len() >= SPACES {
                    let oldest = (0..).zip(&self.spaces).min_by_key(|(_, space)| space.used);
                    if let Some((oldest, _)) = oldest {
                        self.remove(oldest);
                    }
                }
                self.spaces.push(Space::new(root));
                self.spaces.len() - 1
            }
        };
        self.spaces.swap(0, at);
        let Some(space) = self.spaces.first_mut() else { return false };
        space.used = self.clock;
        let count = space.pages.len();
        self.cost += CHANGE + CHECK * u32::try_from(count).unwrap_or(u32::MAX);
        let mut large = self.large;
        let mut is_stale = |va: u64, page: &Mapped| match find(va, page.writable) {
            Some((gpa, size)) if gpa == page.gpa => {
                large |= size > PAGE;
                false
            }
            _ => true,
        };
        let pages = space.pages.iter();
        let stale: Vec<u64> = pages.filter(|(va, page)| is_stale(**va, page)).map(|(va, _)| *va).collect();
        if count > TELLING && stale.len() > count / 2 {
            self.remove(0);
            return false;
        }
        (self.active, self.large) = (true, large);
        for va in stale {
            self.forget_page(va);
        }
        for (region, slot) in self.spaces.first().map(|space| space.slots.clone()).unwrap_or_default() {
            self.set_region(region, slot, regions);
        }
        true
    }

    /// Notes that an access has faulted.
    pub(crate) fn note_fault(&mut self) {
        self.cost += FAULT;
    }

    /// What it has cost since this was last asked.
    pub(crate) fn take_cost(&mut self) -> Duration {
        std::mem::take(&mut self.cost)
    }

    fn set_region(&self, region: u16, slot: u32, regions: &mut [u64; REGIONS]) {
        if let Some(addend) = regions.get_mut(usize::from(region)) {
            *addend = self.addend(region, slot);
        }
    }

    /// Makes no page accessible.
    pub(crate) fn suspend(&mut self, regions: &mut [u64; REGIONS]) {
        if !std::mem::take(&mut self.active) {
            return;
        }
        for (region, _) in self.spaces.first().map(|space| space.slots.clone()).unwrap_or_default() {
            self.set_region(region, 0, regions);
        }
        if self.exact {
            // The TLB keeps nothing for later either.
            self.remove(0);
        }
    }

    /// Makes the page at `va` accessible in the space in use: guest-physical page `gpa`, which is at `host` and part of a
    /// page of `size` bytes.
    ///
    /// # Errors
    /// Those of the operating system. Guest memory that is private to its mapping cannot be mapped a second time.
    pub(crate) fn map(
        &mut self,
        va: u64,
        gpa: u64,
        host: u64,
        writable: bool,
        size: u64,
        regions: &mut [u64; REGIONS],
    ) -> io::Result<()> {
        self.large |= size > PAGE;
        let va = va & PAGE_MASK;
        if !self.active || va >= END {
            return Ok(());
        }
        if self.places.len() >= self.limit || self.tables.len() >= self.limit {
            self.start_over(regions);
        }
        let Ok(region) = u16::try_from(va >> 32) else { return Ok(()) };
        let Some(slot) = self.slot(region, regions) else { return Ok(()) };
        self.set_region(region, slot, regions);
        let at = place(slot, va);
        let Some(space) = self.spaces.first_mut() else { return Ok(()) };
        let known = space.pages.get(&va).copied();
        if known.is_none_or(|known| known.gpa != gpa) {
            if known.is_some() {
                self.forget_page(va);
            }
            if self.figures.mapped == 0 {
                Reserve::probe(host)?;
            }
            if !self.share.set(self.places.len() + 1) {
                // Others have all that there are.
                return Ok(());
            }
            self.tables.insert((slot, at / TABLE));
            self.reserve.duplicate(host, at)?;
            if !writable {
                self.reserve.protect(at, PAGE, Rights::Read)?;
            }
            self.figures.mapped += 1;
            self.cost += MAPPING;
            let root = self.spaces.first().map_or(0, |space| space.root);
            self.places.insert((gpa, root, va));
        } else if known.is_some_and(|known| known.writable != writable) {
            let rights = if writable { Rights::ReadWrite } else { Rights::Read };
            self.reserve.protect(at, PAGE, rights)?;
        }
        if let Some(space) = self.spaces.first_mut() {
            space.pages.insert(va, Mapped { gpa, writable });
        }
        Ok(())
    }

    /// The slot of a region in the space in use. If none is free, all others lose theirs.
    fn slot(&mut self, region: u16, regions: &mut [u64; REGIONS]) -> Option<u32> {
        if let Some(slot) = self.spaces.first().and_then(|space| space.slot(region)) {
            return Some(slot);
        }
        if self.free.is_empty() {
            self.start_over(regions);
        }
        let slot = self.free.pop()?;
        self.spaces.first_mut()?.slots.push((region, slot));
        Some(slot)
    }

    /// Makes all of the page at `va`, whatever its size, inaccessible in the space in use.
    pub(crate) fn flush_page(&mut self, va: u64, regions: &mut [u64; REGIONS]) {
        if self.large && va < END {
            self.suspend(regions);
        } else {
            self.forget_page(va);
        }
    }

    /// The TLB has just learnt that the page at `va` is `gpa`, and forgotten that at `evicted` for it: in the space in use,
    /// nothing else is accessible there any more.
    pub(crate) fn follow(&mut self, va: u64, gpa: u64, evicted: u64) {
        if self.exact && evicted != va {
            self.forget_page(evicted);
        }
        let known = self.spaces.first().filter(|_| self.active).and_then(|space| space.pages.get(&va));
        if known.is_some_and(|known| known.gpa != gpa) {
            self.forget_page(va);
        }
    }

    /// Makes the 4 KiB at `va` inaccessible in the space in use.
    pub(crate) fn forget_page(&mut self, va: u64) {
        let va = va & PAGE_MASK;
        if !self.active {
            return;
        }
        let Some(space) = self.spaces.first_mut() else { return };
        let Some(page) = space.pages.remove(&va) else { return };
        let Some(slot) = space.slot_at(va) else { return };
        let root = space.root;
        self.places.remove(&(page.gpa, root, va));
        self.figures.unmapped += 1;
        self.vacate_page(root, slot, va);
    }

    /// Unmaps a page that a space does not list any more. Where the host lacks the memory to cut it out of what is mapped
    /// around it, all of its slot goes.
    fn vacate_page(&mut self, root: u64, slot: u32, va: u64) {
        if self.reserve.vacate(place(slot, va), PAGE) {
            return;
        }
        self.empty_slot(slot);
        let Some(space) = self.spaces.iter_mut().find(|space| space.root == root) else { return };
        for (va, page) in space.pages.extract_if(|other, _| *other >> 32 == va >> 32) {
            self.places.remove(&(page.gpa, root, va));
            self.figures.unmapped += 1;
        }
    }

    /// Makes a guest-physical page read-only wherever it is mapped.
    pub(crate) fn protect(&mut self, gpa: u64) {
        let mut failed = Vec::new();
        for (_, root, va) in self.places.range((gpa, 0, 0)..=(gpa, u64::MAX, u64::MAX)) {
            let space = self.spaces.iter_mut().find(|space| space.root == *root);
            let Some(space) = space else { continue };
            let Some((slot, page)) = space.slot_at(*va).zip(space.pages.get_mut(va)) else { continue };
            let was_writable = std::mem::take(&mut page.writable);
            if was_writable && self.reserve.protect(place(slot, *va), PAGE, Rights::Read).is_err() {
                space.pages.remove(va);
                failed.push((*root, slot, *va));
            }
        }
        for (root, slot, va) in failed {
            self.places.remove(&(gpa, root, va));
            self.figures.unmapped += 1;
            self.vacate_page(root, slot, va);
        }
    }

    /// Forgets all pages of all address spaces.
    pub(crate) fn clear(&mut self, regions: &mut [u64; REGIONS]) {
        self.suspend(regions);
        while !self.spaces.is_empty() {
            self.remove(self.spaces.len() - 1);
        }
        self.large = false;
    }

    /// Unmaps all pages; the space in use stays that.
    fn start_over(&mut self, regions: &mut [u64; REGIONS]) {
        while self.spaces.len() > 1 {
            self.remove(self.spaces.len() - 1);
        }
        let slots = self.spaces.first_mut().map(|space| std::mem::take(&mut space.slots)).unwrap_or_default();
        for (region, slot) in slots {
            self.set_region(region, 0, regions);
            self.free_slot(slot);
        }
        if let Some(space) = self.spaces.first_mut() {
            self.figures.unmapped += space.pages.len() as u64;
            space.pages.clear();
        }
        self.places.clear();
        self.share.set(0);
    }

    fn free_slot(&mut self, slot: u32) {
        self.empty_slot(slot);
        self.free.push(slot);
    }

    /// Unmaps all pages of a slot. If the host refused that, the guest would keep pages that it has no right to: then the
    /// process ends.
    fn empty_slot(&mut self, slot: u32) {
        if !self.reserve.vacate(u64::from(slot) * STRIDE, STRIDE) {
            let error = io::Error::last_os_error();
            tracing::error!(%error, "pages of the address window cannot be unmapped");
            std::process::abort();
        }
        self.tables.retain(|(of, _)| *of != slot);
    }

    fn remove(&mut self, at: usize) {
        let space = self.spaces.swap_remove(at);
        for (_, slot) in space.slots {
            self.free_slot(slot);
        }
        for (va, page) in space.pages {
            self.figures.unmapped += 1;
            self.places.remove(&(page.gpa, space.root, va));
        }
        self.share.set(self.places.len());
    }
}

/// Where in the reserve slot `slot` has what is at `va`.
fn place(slot: u32, va: u64) -> u64 {
    u64::from(slot) * STRIDE + GUARD + va % REGION
}

#[cfg(test)]
#[path = "window_tests.rs"]
mod tests;
