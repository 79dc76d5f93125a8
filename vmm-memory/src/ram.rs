//! A guest's RAM: a set of regions that can change while the guest runs.
//!
//! The monitor owns it; devices hold the address space it publishes and take a snapshot per request, so
//! adding or removing a region never waits for a device. Guest-controlled addresses reach the
//! snapshots through `vm-memory`, which checks each against the regions of that snapshot.

use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryLoadGuard, GuestMemoryRegion,
};

use crate::backing::Backing;
use crate::discard::Discardable;
use crate::guest_memfd::GuestMemfdRange;
use crate::layout::{MAX_RAM, x86_ram_ranges};
use crate::numa::NumaPolicy;
use crate::region::{GuestMemoryMap, GuestRegion, RegionConfig, check_region, is_read_only};
use crate::{MemoryError, discard, prefault};

/// A guest's RAM. A clone is another handle to the same RAM.
///
/// # Read-only regions and devices
/// `vm-memory` checks the bounds of an access and not whether the mapping permits it: a device that writes
/// into a read-only mapping, as a guest can ask it to, would kill the monitor with SIGSEGV. So read-only
/// regions are in [`regions`](Self::regions), from which a virtual machine maps them, and not in
/// [`memory`](Self::memory) and [`address_space`](Self::address_space). A device's access there, read or
/// write, fails as one to an address without RAM does.
///
/// ```
/// use vmm_memory::GuestRam;
/// use vmm_memory::vm_memory::{Bytes, GuestAddress};
///
/// let ram = GuestRam::builder().ram(64 << 20).build()?;
/// ram.memory().write_obj(0xF4u8, GuestAddress(0x7C00))?;
/// assert_eq!(ram.regions().len(), 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct GuestRam {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    /// The writable ones of `table`, as devices see them.
    space: GuestMemoryAtomic<GuestMemoryMap>,
    table: Mutex<RegionTable>,
    track_dirty: bool,
}

impl GuestRam {
    /// Begins the description of a guest's RAM.
    pub fn builder() -> GuestRamBuilder {
        GuestRamBuilder::default()
    }

    /// The writable regions as they are now. A later change does not affect the snapshot, and the
    /// snapshot keeps the mappings it has alive: take one per request and do not store it.
    pub fn memory(&self) -> GuestMemoryLoadGuard<GuestMemoryMap> {
        self.inner.space.memory()
    }

    /// The writable regions as a device holds them: its `memory()` is always the present snapshot.
    ///
    /// The map in it is this object's to replace. One that someone else stores is overwritten by the
    /// next change of a region.
    pub fn address_space(&self) -> GuestMemoryAtomic<GuestMemoryMap> {
        self.inner.space.clone()
    }

    /// All regions, read-only ones too, ascending by address: what a virtual machine maps.
    pub fn regions(&self) -> Vec<Arc<GuestRegion>> {
        self.table().entries.iter().map(|entry| Arc::clone(&entry.region)).collect()
    }

    /// Where the region that starts at `gpa` lies in a guest_memfd: its private half, or all of it. For the virtual machine
    /// that maps it.
    pub fn guest_memfd(&self, gpa: GuestAddress) -> Option<GuestMemfdRange> {
        self.table().entries.iter().find(|entry| entry.region.start_addr() == gpa)?.guest_memfd.clone()
    }

    /// Sum of the sizes of all regions, in bytes.
    pub fn size(&self) -> u64 {
        self.table().size()
    }

    /// Maps a region and adds it. The virtual machine has to map it into the guest as well.
    ///
    /// # Errors
    /// Those of a configuration that cannot be mapped, and those of [`insert`](Self::insert).
    pub fn add_region(&self, config: RegionConfig) -> Result<Arc<GuestRegion>, MemoryError> {
        let region = config.map(self.inner.track_dirty)?;
        self.insert_with(Arc::clone(&region), config.has_own_memfd(), config.guest_memfd_range())?;
        Ok(region)
    }

    /// Adds a region that exists, such as that of a [`SharedMapping`](crate::SharedMapping).
    ///
    /// One region must not be inserted into the RAM of two guests if either is tracked: they would
    /// share a dirty bitmap. Map the memory once for each.
    ///
    /// # Errors
    /// [`MemoryError::Overlap`] and [`MemoryError::SharedHostMapping`] name the region in the way,
    /// [`MemoryError::TooLarge`] the limit [`MAX_RAM`]; [`MemoryError::ZeroSize`],
    /// [`MemoryError::Unaligned`], [`MemoryError::BeyondAddressSpace`] and
    /// [`MemoryError::BitmapGranule`] are about the region itself.
    pub fn insert(&self, region: Arc<GuestRegion>) -> Result<(), MemoryError> {
        self.insert_with(region, false, None)
    }

    fn insert_with(
        &self,
        region: Arc<GuestRegion>,
        own_memfd: bool,
        guest_memfd: Option<&GuestMemfdRange>,
    ) -> Result<(), MemoryError> {
        let mut table = self.table();
        let at = table.insert(region, own_memfd, guest_memfd)?;
        self.publish(&table).inspect_err(|_| {
            table.entries.remove(at);
        })
    }

    /// Removes the region that starts at `gpa` and returns it.
    ///
    /// The mapping lives until the last holder drops the region. Unmap it from the virtual machine
    /// first: a guest would go on using memory that devices no longer see.
    ///
    /// # Errors
    /// [`MemoryError::NoRegion`] if no region starts there.
    pub fn remove_region(&self, gpa: GuestAddress) -> Result<Arc<GuestRegion>, MemoryError> {
        let mut table = self.table();
        let at = table
            .entries
            .binary_search_by_key(&gpa, |entry| entry.region.start_addr())
            .map_err(|_| MemoryError::NoRegion { gpa: gpa.0 })?;
        let entry = table.entries.remove(at);
        if let Err(error) = self.publish(&table) {
            table.entries.insert(at, entry);
            return Err(error);
        }
        Ok(entry.region)
    }

    /// Makes every page of every region resident, so that no access waits for the host to find memory.
    ///
    /// Contents are kept, also against concurrent writes, and nothing becomes dirty. Works on at most
    /// `threads` threads, and never on more than 64, the calling one included.
    ///
    /// # Errors
    /// [`MemoryError::Prefault`] with the first part that failed; others may have become resident.
    pub fn prefault(&self, threads: NonZeroUsize) -> Result<(), MemoryError> {
        prefault::prefault(&self.regions(), threads)
    }

    /// Gives the host memory of `len` bytes at `gpa` back, both multiples of [`PAGE_SIZE`](crate::PAGE_SIZE): for balloons, and
    /// for whatever else knows that nobody needs the contents. The range then reads as zero and takes host memory again
    /// page by page, as it is touched. It may span regions that touch.
    ///
    /// Of huge pages of a pool, whole ones go back; what the range has of others is made zero and stays. One that is touched
    /// again comes from the pool anew, which has to have one then. A private half in a guest_memfd goes with the shared one.
    ///
    /// Works on anonymous memory (`MADV_DONTNEED`) and on the memfd of a region of this RAM's own
    /// ([`Backing::Memfd`], `FALLOC_FL_PUNCH_HOLE`, for all who map it). Discarded pages are dirty, since their contents are
    /// other ones: marked afterwards, as [`dirty`](crate::dirty) has it. Virtual machines see it at once.
    ///
    /// A part of a transparent huge page leaves the guest at once; the host has the memory when it splits the huge page, and
    /// `khugepaged` may fill the gap again. Whole 2 MiB that are aligned do not have that. A host device that has pinned the
    /// pages keeps them, and sees other ones than the guest from then on: do not combine the two.
    ///
    /// # Errors
    /// [`MemoryError::Unaligned`], [`MemoryError::NoRam`], and [`MemoryError::NotDiscardable`] for read-only regions, for files,
    /// and for shared memory that was [inserted](Self::insert): nothing was discarded then. [`MemoryError::Discard`] if the host
    /// refuses.
    pub fn discard(&self, gpa: GuestAddress, len: u64) -> Result<(), MemoryError> {
        let parts = discard::parts(gpa.0, len, self.table().entries.iter().map(Entry::as_discardable))?;
        parts.iter().try_for_each(discard::Part::discard)
    }

    /// All regions with the number of their insertion: a region removed and inserted again has another.
    pub(crate) fn numbered_regions(&self) -> Vec<(u64, Arc<GuestRegion>)> {
        self.table().entries.iter().map(|entry| (entry.id, Arc::clone(&entry.region))).collect()
    }

    fn table(&self) -> MutexGuard<'_, RegionTable> {
        // The table is valid between any two statements that change it, so a panic elsewhere does not
        // spoil it.
        self.inner.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes the writable regions. Called with the table locked, so maps appear in the order of the
    /// changes.
    fn publish(&self, table: &RegionTable) -> Result<(), MemoryError> {
        let map = table.writable_map()?;
        self.inner.space.lock().unwrap_or_else(PoisonError::into_inner).replace(map);
        Ok(())
    }
}

#[derive(Debug, Default)]
struct RegionTable {
    /// Ascending by address, disjoint.
    entries: Vec<Entry>,
    next_id: u64,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    region: Arc<GuestRegion>,
    /// Behind it is a memfd that was made for it. Nobody else maps it but to share the guest's memory with it.
    own_memfd: bool,
    guest_memfd: Option<GuestMemfdRange>,
}

impl Entry {
    fn as_discardable(&self) -> Discardable<'_> {
        let guest_memfd = self.guest_memfd.as_ref();
        Discardable { region: &self.region, own_memfd: self.own_memfd, guest_memfd }
    }
}

impl RegionTable {
    fn size(&self) -> u64 {
        self.entries.iter().map(|entry| entry.region.len()).sum()
    }

    /// Adds a region and returns its index.
    fn insert(
        &mut self,
        region: Arc<GuestRegion>,
        own_memfd: bool,
        guest_memfd: Option<&GuestMemfdRange>,
    ) -> Result<usize, MemoryError> {
        check_region(&region)?;
        let (gpa, size) = (region.start_addr().0, region.len());
        let present = self.size();
        if present + size > MAX_RAM {
            return Err(MemoryError::TooLarge { gpa, size, present, max: MAX_RAM });
        }
        let at = self.entries.partition_point(|entry| entry.region.start_addr().0 < gpa);
        let below = at.checked_sub(1).and_then(|below| self.entries.get(below));
        for other in [below, self.entries.get(at)].into_iter().flatten() {
            let (other_gpa, other_size) = (other.region.start_addr().0, other.region.len());
            if gpa < other_gpa + other_size && other_gpa < gpa + size {
                return Err(MemoryError::Overlap { gpa, size, other_gpa, other_size });
            }
        }
        if let Some(other) = self.entries.iter().find(|other| share_host_memory(&other.region, &region)) {
            return Err(MemoryError::SharedHostMapping { gpa, other_gpa: other.region.start_addr().0 });
        }
        self.entries
            .insert(at, Entry { id: self.next_id, region, own_memfd, guest_memfd: guest_memfd.cloned() });
        self.next_id += 1;
        Ok(at)
    }

    fn writable_map(&self) -> Result<GuestMemoryMap, MemoryError> {
        let writable: Vec<_> = self
            .entries
            .iter()
            .filter(|entry| !is_read_only(&entry.region))
            .map(|entry| Arc::clone(&entry.region))
            .collect();
        if writable.is_empty() {
            return Ok(GuestMemoryMap::new());
        }
        Ok(GuestMemoryMap::from_arc_regions(writable)?)
    }
}

fn share_host_memory(one: &GuestRegion, other: &GuestRegion) -> bool {
    let (a, b) = (one.as_ptr().addr(), other.as_ptr().addr());
    a < b.saturating_add(other.size()) && b < a.saturating_add(one.size())
}

/// Describes a guest's RAM: see [`GuestRam::builder`].
#[derive(Clone, Debug, Default)]
pub struct GuestRamBuilder {
    ram: Option<u64>,
    backing: Backing,
    regions: Vec<RegionConfig>,
    track_dirty: bool,
    prefault: Option<NonZeroUsize>,
    numa: Option<NumaPolicy>,
}

impl GuestRamBuilder {
    /// Lays out `bytes` of RAM around the 32-bit hole of an x86 machine
    /// ([`x86_ram_ranges`]). Said twice, the last holds.
    pub fn ram(mut self, bytes: u64) -> Self {
        self.ram = Some(bytes);
        self
    }

    /// What the RAM laid out by [`ram`](Self::ram) is made of; anonymous memory unless said.
    ///
    /// Of a file, the RAM above the hole takes the bytes that follow those of the RAM below it.
    pub fn backing(mut self, backing: Backing) -> Self {
        self.backing = backing;
        self
    }

    /// On which of the host's NUMA nodes the RAM laid out by [`ram`](Self::ram) is to be.
    pub fn numa(mut self, policy: NumaPolicy) -> Self {
        self.numa = Some(policy);
        self
    }

    /// Adds a region, beside the RAM laid out or instead of it. May be called any number of times.
    pub fn region(mut self, region: RegionConfig) -> Self {
        self.regions.push(region);
        self
    }

    /// Whether writes of devices are recorded, for regions that do not say themselves; off unless said.
    /// Costs one bit of host memory a page and an atomic operation a page written.
    pub fn track_dirty(mut self, track: bool) -> Self {
        self.track_dirty = track;
        self
    }

    /// Makes all pages resident while building: see [`GuestRam::prefault`].
    pub fn prefault(mut self, threads: NonZeroUsize) -> Self {
        self.prefault = Some(threads);
        self
    }

    /// Maps everything. RAM without any region is allowed: regions can be added later.
    ///
    /// # Errors
    /// Those of [`x86_ram_ranges`], of [`GuestRam::add_region`] and of [`GuestRam::prefault`].
    pub fn build(self) -> Result<GuestRam, MemoryError> {
        let mut table = RegionTable::default();
        for config in self.layout()?.iter().chain(&self.regions) {
            let region = config.map(self.track_dirty)?;
            table.insert(region, config.has_own_memfd(), config.guest_memfd_range())?;
        }
        let space = GuestMemoryAtomic::new(table.writable_map()?);
        let inner = Inner { space, table: Mutex::new(table), track_dirty: self.track_dirty };
        let ram = GuestRam { inner: Arc::new(inner) };
        if let Some(threads) = self.prefault {
            ram.prefault(threads)?;
        }
        Ok(ram)
    }

    fn layout(&self) -> Result<Vec<RegionConfig>, MemoryError> {
        let Some(bytes) = self.ram else { return Ok(Vec::new()) };
        let mut configs = Vec::new();
        let mut before = 0;
        for (gpa, size) in x86_ram_ranges(bytes)? {
            let mut backing = self.backing.clone();
            if let Backing::File { offset, .. }
            | Backing::CopyOnWrite { offset, .. }
            | Backing::GuestMemfd(GuestMemfdRange { offset, .. }) = &mut backing
            {
                // One that would overflow is too large for any file, which mapping refuses.
                *offset = offset.saturating_add(before);
            }
            let mut config = RegionConfig::new(gpa, size).backing(backing);
            if let Some(policy) = &self.numa {
                config = config.numa(policy.clone());
            }
            configs.push(config);
            before += size;
        }
        Ok(configs)
    }
}

#[cfg(test)]
mod tests;
