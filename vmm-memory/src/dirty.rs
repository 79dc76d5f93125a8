//! Which pages of a guest's RAM were written since one last asked: for live migration and incremental
//! snapshots.
//!
//! Two kinds of writers are recorded. Devices write through `vm-memory`, which marks the region's own
//! bitmap ([`GuestRamBuilder::track_dirty`](crate::GuestRamBuilder::track_dirty)), as
//! [`GuestRam::discard`](crate::GuestRam::discard) does for what it makes zero. Guest code is
//! recorded by the backend that runs it, which offers a [`DirtyLog`]. A [`DirtyTracker`] joins them.
//!
//! # Order of writing, marking, harvesting and copying
//! The one who harvests copies the reported pages *afterwards*. Which order a writer must keep follows:
//!
//! * `vm-memory` **writes, then marks**. If the harvest takes the mark, the write came before it and
//!   the copy has it (both sides use sequentially consistent operations). If the mark comes after the
//!   harvest, the next harvest reports the page, whatever the copy caught of the write. To mark first
//!   and then write would be wrong: harvest and copy could both happen in between, and nothing would
//!   tell of the write any more.
//! * Hardware **marks, then writes**, as one step for the virtual processor that does it. A backend
//!   makes that safe by flushing: see [`DirtyLog::harvest`].
//!
//! So every page written is in this harvest or in a later one. The *last* harvest, after which nobody
//! asks again, is complete only if no writer is between writing and marking: pause the virtual
//! processors and wait until the devices are idle, then harvest.
//!
//! Writes that neither party sees are in no harvest: those through raw host pointers (use the bitmap's
//! `mark_dirty` after them), those by another process that maps the memory (vhost-user back ends keep a
//! log of their own, which fits a [`DirtyLog`]), and those to shared memory by its other users.

use std::error::Error;
use std::fmt::Debug;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{GuestAddress, GuestMemoryRegion, MmapRegion};

use crate::page_bitmap::PageBitmap;
use crate::region::{GuestRegion, is_read_only};
use crate::{GuestRam, MemoryError, PAGE_SIZE};

/// A record of guest writes that a backend keeps: KVM's dirty log, a translator's write-protection, a
/// vhost-user log.
pub trait DirtyLog: Send + Sync + Debug {
    /// Adds to `into` the pages of `region` that this log knows to have been written since its last harvest,
    /// and forgets them.
    ///
    /// For those who implement it:
    /// * Taking and forgetting are one step as seen by the guest: a page written meanwhile is reported now or
    ///   stays recorded. With one bit a page that is an atomic swap of each word.
    /// * Where the mark is made before the write (a write-protection fault, a dirty bit of a page
    ///   table), a write after the return of this function must leave a new mark. That takes restoring
    ///   the protection and flushing the TLBs of all virtual processors before returning;
    ///   `KVM_GET_DIRTY_LOG` does so.
    /// * `into` may already hold pages, which stay. A page too many is allowed, a page too few never.
    /// * A region that the backend does not map has no pages to report: that is `Ok`. Regions come and
    ///   go, and the tracker may ask for one that is already, or not yet, unmapped.
    /// * The same region is asked for by one thread at a time. The function must not use the tracker that
    ///   calls it.
    ///
    /// # Errors
    /// Whatever keeps the log from being read. Pages that were forgotten by then must be in `into`: the
    /// tracker keeps them.
    fn harvest(
        &self,
        region: &GuestRegion,
        into: &mut PageBitmap,
    ) -> Result<(), Box<dyn Error + Send + Sync>>;
}

/// Collects the pages written since the last harvest from the devices' bitmaps and from all logs.
///
/// Harvesting takes the marks away, so a guest's RAM has one tracker at a time. The order of the steps
/// that the result relies on is set out in the documentation of [this module](self).
///
/// ```
/// use vmm_memory::vm_memory::{Bytes, GuestAddress};
/// use vmm_memory::{DirtyTracker, GuestRam};
///
/// let ram = GuestRam::builder().ram(1 << 20).track_dirty(true).build()?;
/// let tracker = DirtyTracker::new(&ram);
/// ram.memory().write_slice(&[1; 0x1800], GuestAddress(0x5000))?;
/// let dirty = tracker.harvest()?;
/// assert_eq!(dirty.ranges().collect::<Vec<_>>(), [(GuestAddress(0x5000), 0x2000)]);
/// assert!(tracker.harvest()?.is_empty());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct DirtyTracker {
    ram: GuestRam,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    logs: Vec<Arc<dyn DirtyLog>>,
    /// The regions as of the last harvest.
    regions: Vec<Tracked>,
}

#[derive(Debug)]
struct Tracked {
    /// The region's insertion into the RAM: one removed and inserted again is another.
    id: u64,
    region: Arc<GuestRegion>,
    /// Pages taken from a source and not yet given out.
    pending: PageBitmap,
}

impl Tracked {
    fn new(id: u64, region: Arc<GuestRegion>) -> Self {
        let pending = PageBitmap::for_region(&region);
        Self { id, region, pending }
    }
}

impl DirtyTracker {
    /// A tracker of `ram` without logs.
    ///
    /// It reports what changes from now on, and pages marked earlier once. Make it before the first
    /// full copy of RAM.
    pub fn new(ram: &GuestRam) -> Self {
        let regions =
            ram.numbered_regions().into_iter().map(|(id, region)| Tracked::new(id, region)).collect();
        Self { ram: ram.clone(), state: Mutex::new(State { logs: Vec::new(), regions }) }
    }

    /// Adds a log to ask at every harvest.
    pub fn add_log(&self, log: Arc<dyn DirtyLog>) {
        self.state().logs.push(log);
    }

    /// Takes the pages written since the last harvest.
    ///
    /// Copy the pages after this returns. A page written meanwhile is in this result or in that of a
    /// later harvest, or both; the last harvest is complete once virtual processors and devices are
    /// paused.
    ///
    /// A region inserted since the last harvest is reported whole, since nobody can have a copy of it.
    /// Pages of a region that was removed are dropped.
    ///
    /// Takes time in proportion to the size of the RAM: about a word for each 64 pages.
    ///
    /// # Errors
    /// [`MemoryError::DirtyLog`] if a log fails. Pages already taken, from that log and all others, are kept
    /// and come with the next harvest that succeeds.
    pub fn harvest(&self) -> Result<DirtyPages, MemoryError> {
        let mut state = self.state();
        let State { logs, regions } = &mut *state;
        follow(regions, self.ram.numbered_regions());

        // A source's pages go straight to `pending`, so that no error or panic on the way can lose them.
        for tracked in regions.iter_mut() {
            if let Some(bitmap) = MmapRegion::bitmap(&tracked.region) {
                tracked.pending.or_words(&bitmap.get_and_reset());
            }
            for log in logs.iter() {
                log.harvest(&tracked.region, &mut tracked.pending)
                    .map_err(|source| MemoryError::DirtyLog { gpa: tracked.region.start_addr().0, source })?;
            }
        }

        let mut pages = DirtyPages::default();
        for tracked in regions {
            let gpa = tracked.region.start_addr();
            if MmapRegion::bitmap(&tracked.region).is_none() && !is_read_only(&tracked.region) {
                pages.untracked.push(gpa);
            }
            if !tracked.pending.is_empty() {
                let empty = PageBitmap::for_region(&tracked.region);
                pages.regions.push((gpa, std::mem::replace(&mut tracked.pending, empty)));
            }
        }
        Ok(pages)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A log that panicked has left its pages in `pending`, which is valid at any time.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Brings `tracked` in line with the regions that the RAM has now; both ascend by address.
fn follow(tracked: &mut Vec<Tracked>, present: Vec<(u64, Arc<GuestRegion>)>) {
    let unchanged = tracked.iter().map(|old| old.id).eq(present.iter().map(|(id, _)| *id));
    if unchanged {
        return;
    }
    let mut old = std::mem::take(tracked).into_iter().peekable();
    for (id, region) in present {
        while old.next_if(|old| old.region.start_addr() < region.start_addr()).is_some() {}
        let kept = old.next_if(|old| old.id == id);
        tracked.push(kept.unwrap_or_else(|| {
            let mut new = Tracked::new(id, region);
            new.pending.set_range(0..new.pending.pages());
            new
        }));
    }
}

/// The pages that one harvest reports.
#[derive(Clone, Debug, Default)]
pub struct DirtyPages {
    /// Regions with a page to report, ascending by base address.
    regions: Vec<(GuestAddress, PageBitmap)>,
    untracked: Vec<GuestAddress>,
}

impl DirtyPages {
    /// The pages as ranges `(first address, length in bytes)`, ascending.
    ///
    /// A range is as long as it can be within its region; it never spans two, so that it lies in one host
    /// mapping.
    pub fn ranges(&self) -> impl Iterator<Item = (GuestAddress, u64)> + '_ {
        self.regions.iter().flat_map(|(base, bitmap)| {
            bitmap.ranges().map(|pages| {
                let start = GuestAddress(base.0 + pages.start * PAGE_SIZE);
                (start, (pages.end - pages.start) * PAGE_SIZE)
            })
        })
    }

    /// The regions that have pages to report, ascending, each with its base address.
    pub fn regions(&self) -> impl Iterator<Item = (GuestAddress, &PageBitmap)> + '_ {
        self.regions.iter().map(|(base, bitmap)| (*base, bitmap))
    }

    /// Number of pages.
    pub fn page_count(&self) -> u64 {
        self.regions.iter().map(|(_, bitmap)| bitmap.count()).sum()
    }

    /// Whether there is no page.
    pub fn is_empty(&self) -> bool {
        self.regions.iter().all(|(_, bitmap)| bitmap.is_empty())
    }

    /// Whether the page that holds `gpa` is among the pages.
    pub fn contains(&self, gpa: GuestAddress) -> bool {
        let after = self.regions.partition_point(|(base, _)| *base <= gpa);
        after
            .checked_sub(1)
            .and_then(|index| self.regions.get(index))
            .is_some_and(|(base, bitmap)| bitmap.contains((gpa.0 - base.0) / PAGE_SIZE))
    }

    /// Base addresses of the writable regions whose writes by devices nobody recorded: they were mapped
    /// without [`track_dirty`](crate::RegionConfig::track_dirty). Of these just the logs were asked, so
    /// a copy of RAM that must be complete has to copy them whole.
    pub fn untracked_regions(&self) -> &[GuestAddress] {
        &self.untracked
    }
}

#[cfg(test)]
mod tests;
