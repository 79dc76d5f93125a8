//! The guest-physical address space: an immutable snapshot that a vCPU holds, and what its pages are watched for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vmm_memory::vm_memory::{GuestAddress, GuestMemoryRegion, MemoryRegionAddress};
use vmm_memory::{GuestRegion, host_page_size};

use super::code_pages::CodePages;
use super::host::{self, HostWord, Order};
use super::{PAGE, PAGE_MASK};
use crate::error::{Error, Result};
use crate::vm::GuestAccess;

/// One bit for each page of a region.
#[derive(Debug)]
pub(crate) struct Pages(Box<[AtomicU64]>);

impl Pages {
    fn new(bytes: u64) -> Self {
        let words = usize::try_from((bytes / PAGE).div_ceil(64)).unwrap_or(0);
        Self(std::iter::repeat_with(|| AtomicU64::new(0)).take(words).collect())
    }

    fn word(&self, page: u64) -> Option<&AtomicU64> {
        self.0.get(usize::try_from(page / 64).ok()?)
    }

    pub(crate) fn contains(&self, page: u64) -> bool {
        self.word(page).is_some_and(|word| word.load(Ordering::Acquire) >> (page % 64) & 1 != 0)
    }

    /// Adds a page; whether it is new.
    pub(crate) fn insert(&self, page: u64) -> bool {
        let bit = 1 << (page % 64);
        self.word(page).is_some_and(|word| word.fetch_or(bit, Ordering::SeqCst) & bit == 0)
    }

    /// Takes all out.
    pub(crate) fn take(&self) -> Vec<u64> {
        self.0.iter().map(|word| word.swap(0, Ordering::SeqCst)).collect()
    }
}

/// A mapped region.
#[derive(Clone, Debug)]
pub(crate) struct Slot {
    pub(crate) region: Arc<GuestRegion>,
    pub(crate) start: u64,
    /// First address behind it.
    pub(crate) end: u64,
    pub(crate) access: GuestAccess,
    /// Pages that decoded code comes from: stores there are looked at.
    pub(crate) code: Arc<CodePages>,
    /// Pages that the guest wrote, while that is logged.
    pub(crate) dirty: Option<Arc<Pages>>,
    /// The host can map any page of it a second time, by itself: its pages are no larger than the guest's.
    pub(crate) small_pages: bool,
}

impl Slot {
    pub(crate) fn new(region: Arc<GuestRegion>, access: GuestAccess) -> Self {
        let (start, bytes) = (region.start_addr().0, region.len());
        let code = Arc::new(CodePages::new(bytes / PAGE));
        let small_pages = host_page_size(&region) == PAGE;
        Self { region, start, end: start.saturating_add(bytes), access, code, dirty: None, small_pages }
    }

    pub(crate) fn start_log(&mut self) {
        self.dirty = Some(Arc::new(Pages::new(self.end - self.start)));
    }

    /// Page number within the region.
    pub(crate) fn page(&self, gpa: u64) -> u64 {
        gpa.wrapping_sub(self.start) / PAGE
    }

    /// Notes a store to the page of `gpa`.
    pub(crate) fn mark_dirty(&self, gpa: u64) {
        if let Some(dirty) = &self.dirty {
            dirty.insert(self.page(gpa));
        }
    }

    /// Whether stores to the page of `gpa` must be seen.
    pub(crate) fn must_notice_stores(&self, gpa: u64) -> bool {
        let page = self.page(gpa);
        self.code.is_watched(page) || self.dirty.as_ref().is_some_and(|dirty| !dirty.contains(page))
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.access == GuestAccess::ReadWrite
    }

    /// Compares and exchanges 16 aligned bytes; what was there before. `None` where the region ends.
    #[allow(unsafe_code, reason = "guest memory is reached through host addresses")]
    pub(crate) fn compare_exchange_16(&self, gpa: u64, expected: u128, new: u128) -> Option<u128> {
        let (address, room) = self.host(gpa)?;
        (room >= 16 && gpa.is_multiple_of(16) && self.is_writable()).then(|| {
            // SAFETY: the region has 16 writable bytes there, aligned since regions are aligned to pages.
            unsafe { host::compare_exchange_16(address, expected, new) }
        })
    }

    /// Host address of `gpa` and how many bytes of the region follow.
    pub(super) fn host(&self, gpa: u64) -> Option<(*mut u8, u64)> {
        let offset = gpa.checked_sub(self.start)?;
        let address = self.region.get_host_address(MemoryRegionAddress(offset)).ok()?;
        Some((address, self.end.checked_sub(gpa)?))
    }
}

/// The regions of a virtual machine, ascending.
#[derive(Clone, Debug, Default)]
pub(crate) struct MemoryMap {
    slots: Vec<Slot>,
}

impl MemoryMap {
    pub(crate) fn slots(&self) -> &[Slot] {
        &self.slots
    }

    pub(crate) fn slot_starting_at(&mut self, gpa: u64) -> Option<&mut Slot> {
        self.slots.iter_mut().find(|slot| slot.start == gpa)
    }

    /// The region that holds `gpa`.
    pub(crate) fn slot(&self, gpa: u64) -> Option<&Slot> {
        self.slots.iter().find(|slot| (slot.start..slot.end).contains(&gpa))
    }

    pub(crate) fn insert(&mut self, slot: Slot) -> Result<()> {
        if let Some(other) = self.slots.iter().find(|other| slot.start < other.end && other.start < slot.end)
        {
            return Err(Error::RegionOverlap {
                gpa: GuestAddress(slot.start),
                len: slot.end - slot.start,
                other_gpa: GuestAddress(other.start),
                other_len: other.end - other.start,
            });
        }
        let at = self.slots.partition_point(|other| other.start < slot.start);
        self.slots.insert(at, slot);
        Ok(())
    }

    pub(crate) fn remove(&mut self, gpa: u64) -> Option<Slot> {
        let at = self.slots.iter().position(|slot| slot.start == gpa)?;
        Some(self.slots.remove(at))
    }

    /// Reads a word of RAM, at once if it is aligned; `None` if there is none.
    #[allow(unsafe_code, reason = "guest memory is reached through host addresses")]
    pub(crate) fn load<W: HostWord>(&self, gpa: u64) -> Option<W> {
        let (address, room) = self.slot(gpa)?.host(gpa)?;
        (room >= W::BYTES as u64).then(|| {
            // SAFETY: the region, alive with `self`, has at least that many bytes there.
            unsafe { W::load(address) }
        })
    }

    /// Replaces an aligned word of writable RAM if it holds `old`; whether it did.
    #[allow(unsafe_code, reason = "guest memory is reached through host addresses")]
    pub(crate) fn compare_exchange<W: HostWord>(&self, gpa: u64, old: W, new: W) -> Option<bool> {
        let slot = self.slot(gpa)?;
        let (address, room) = slot.host(gpa)?;
        if !slot.is_writable() || room < W::BYTES as u64 || !gpa.is_multiple_of(W::BYTES as u64) {
            return None;
        }
        slot.mark_dirty(gpa);
        // SAFETY: the region, alive with `self`, has at least that many bytes there, writable, and regions are aligned
        // to pages on host and guest.
        Some(unsafe { W::compare_exchange(address, old, new) }.is_ok())
    }

    /// Writes a word of RAM, at once if it is aligned; whether there is any that the guest may write.
    #[allow(unsafe_code, reason = "guest memory is reached through host addresses")]
    pub(crate) fn store<W: HostWord>(&self, gpa: u64, value: W) -> bool {
        let Some(slot) = self.slot(gpa).filter(|slot| slot.is_writable()) else { return false };
        match slot.host(gpa) {
            Some((address, room)) if room >= W::BYTES as u64 => {
                slot.mark_dirty(gpa);
                // SAFETY: the region, alive with `self`, has at least that many bytes there, writable.
                unsafe { W::store(address, value) };
                true
            }
            _ => false,
        }
    }

    /// Host address of the page at `gpa`, if all of it is RAM of one region.
    pub(crate) fn host_page(&self, gpa: u64) -> Option<u64> {
        let (address, room) = self.slot(gpa)?.host(gpa & PAGE_MASK)?;
        (room >= PAGE).then(|| address.expose_provenance() as u64)
    }

    /// Reads RAM of one region; whether there is any.
    #[allow(unsafe_code, reason = "guest memory is reached through host addresses")]
    pub(crate) fn read(&self, gpa: u64, bytes: &mut [u8]) -> bool {
        match self.slot(gpa).and_then(|slot| slot.host(gpa)) {
            Some((address, room)) if room >= bytes.len() as u64 => {
                // SAFETY: the region, alive with `self`, has at least that many bytes there.
                unsafe { host::copy_from(address, bytes, Order::Ascending) };
                true
            }
            _ => false,
        }
    }

    /// Writes RAM of one region; whether there is any that the guest may write.
    #[allow(unsafe_code, reason = "guest memory is reached through host addresses")]
    pub(crate) fn write(&self, gpa: u64, bytes: &[u8]) -> bool {
        let Some(slot) = self.slot(gpa).filter(|slot| slot.is_writable()) else { return false };
        match slot.host(gpa) {
            Some((address, room)) if room >= bytes.len() as u64 => {
                slot.mark_dirty(gpa);
                // SAFETY: the region, alive with `self`, has at least that many bytes there, writable.
                unsafe { host::copy_to(address, bytes, Order::Ascending) };
                true
            }
            _ => false,
        }
    }
}
