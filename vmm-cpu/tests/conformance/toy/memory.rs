//! The toy backend's guest-physical memory with its dirty log.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, MemoryRegionAddress};
use vmm_cpu::vmm_memory::{DirtyLog, GuestRegion, PAGE_SIZE, PageBitmap};
use vmm_cpu::{Error, GuestAccess, GuestDirtyLog, Result};

/// The mapped regions by their base. A vCPU holds the lock for one access, so once the writer has it, no vCPU
/// is on its way to a region that goes.
#[derive(Debug, Default)]
pub(super) struct Memory(RwLock<BTreeMap<u64, Mapped>>);

#[derive(Debug)]
struct Mapped {
    region: Arc<GuestRegion>,
    access: GuestAccess,
    /// One bit a page, while logging.
    written: Option<Vec<AtomicU64>>,
}

impl Mapped {
    fn end(&self) -> u64 {
        self.region.start_addr().0.saturating_add(self.region.len())
    }
}

impl Memory {
    pub(super) fn map(&self, region: Arc<GuestRegion>, access: GuestAccess) -> Result<()> {
        let (gpa, len) = (region.start_addr(), region.len());
        if !gpa.0.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            let value = format!("{:#x}+{len:#x}", gpa.0);
            return Err(Error::invalid("region", value, "whole pages"));
        }
        let new = Mapped { region, access, written: None };
        let mut regions = self.write_lock();
        if let Some(other) =
            regions.values().find(|other| other.region.start_addr().0 < new.end() && gpa.0 < other.end())
        {
            let (other_gpa, other_len) = (other.region.start_addr(), other.region.len());
            return Err(Error::RegionOverlap { gpa, len, other_gpa, other_len });
        }
        regions.insert(gpa.0, new);
        Ok(())
    }

    pub(super) fn unmap(&self, gpa: GuestAddress) -> Result<Arc<GuestRegion>> {
        let mapped = self.write_lock().remove(&gpa.0).ok_or(Error::NoSuchRegion { gpa })?;
        Ok(mapped.region)
    }

    /// Fills `data`, which lies within a page; whether there is memory.
    pub(super) fn read(&self, gpa: u64, data: &mut [u8]) -> bool {
        self.at(gpa, |mapped, offset| mapped.region.read_slice(data, offset).is_ok())
    }

    /// Stores `data`, which lies within a page; whether there is memory that may be written.
    pub(super) fn write(&self, gpa: u64, data: &[u8]) -> bool {
        self.at(gpa, |mapped, offset| {
            if mapped.access != GuestAccess::ReadWrite || mapped.region.write_slice(data, offset).is_err() {
                return false;
            }
            let page = offset.0 / PAGE_SIZE;
            let word = mapped.written.as_ref().and_then(|words| words.get(usize::try_from(page / 64).ok()?));
            if let Some(word) = word {
                word.fetch_or(1 << (page % 64), Ordering::SeqCst);
            }
            true
        })
    }

    fn at(&self, gpa: u64, access: impl FnOnce(&Mapped, MemoryRegionAddress) -> bool) -> bool {
        let regions = self.read_lock();
        let below = regions.range(..=gpa).next_back().filter(|(_, mapped)| gpa < mapped.end());
        below.is_some_and(|(base, mapped)| access(mapped, MemoryRegionAddress(gpa - base)))
    }

    fn read_lock(&self) -> RwLockReadGuard<'_, BTreeMap<u64, Mapped>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write_lock(&self) -> RwLockWriteGuard<'_, BTreeMap<u64, Mapped>> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl DirtyLog for Memory {
    fn harvest(
        &self,
        region: &GuestRegion,
        into: &mut PageBitmap,
    ) -> Result<(), Box<dyn StdError + Send + Sync>> {
        let regions = self.read_lock();
        let mapped =
            regions.get(&region.start_addr().0).filter(|mapped| std::ptr::eq(&*mapped.region, region));
        if let Some(words) = mapped.and_then(|mapped| mapped.written.as_ref()) {
            let words = words.iter().map(|word| word.swap(0, Ordering::SeqCst));
            into.or_words(&words.collect::<Vec<_>>());
        }
        Ok(())
    }
}

impl GuestDirtyLog for Memory {
    fn start(&self, gpa: GuestAddress) -> Result<()> {
        let mut regions = self.write_lock();
        let mapped = regions.get_mut(&gpa.0).ok_or(Error::NoSuchRegion { gpa })?;
        let words = mapped.region.len().div_ceil(PAGE_SIZE * 64);
        mapped.written = Some((0..words).map(|_| AtomicU64::new(0)).collect());
        Ok(())
    }

    fn stop(&self, gpa: GuestAddress) -> Result<()> {
        let mut regions = self.write_lock();
        regions.get_mut(&gpa.0).ok_or(Error::NoSuchRegion { gpa })?.written = None;
        Ok(())
    }
}
