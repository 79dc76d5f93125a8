//! The region and address-space types that every crate of the family shares, and how a region is made.
//!
//! They are plain `vm-memory` types with one bitmap type chosen, so a [`GuestMemoryMap`] goes
//! wherever `virtio-queue`, `vhost` or `linux-loader` ask for a `GuestMemory`.

use std::num::NonZeroUsize;
use std::sync::Arc;

use rustix::fs::SealFlags;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion};

use crate::MemoryError;
use crate::advice::advise_huge_pages;
use crate::backing::{Backing, SIZE_SEALS, create_memfd};
use crate::guest_memfd::GuestMemfdRange;
use crate::huge::{HugePageSize, map_flags, page_size_of_file, page_size_of_flags};
use crate::layout::{GPA_LIMIT, MAX_RAM};
use crate::mempolicy;
use crate::numa::NumaPolicy;
use crate::prefault::prefault;

/// Guest page size in bytes: the granule of mapping and of dirty tracking (Intel SDM 3A 5.1).
pub const PAGE_SIZE: u64 = 4096;

const BITMAP_PAGE: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// Pages written through `vm-memory`, one bit per [`PAGE_SIZE`]; `None` where tracking is off.
pub type DirtyBitmap = Option<AtomicBitmap>;

/// One contiguous range of guest-physical addresses backed by one host mapping.
///
/// Held in an [`Arc`]: the host mapping lives until the last holder (the guest
/// memory map, a virtual machine that maps it, a device that uses it) lets go.
pub type GuestRegion = GuestRegionMmap<DirtyBitmap>;

/// An immutable snapshot of a guest's physical address space.
pub type GuestMemoryMap = GuestMemoryMmap<DirtyBitmap>;

/// Whether the host mapping of `region` refuses writes.
///
/// `vm-memory` does not check this: a write through such a region kills the process with SIGSEGV. That
/// is why [`GuestRam`](crate::GuestRam) never shows one to devices. A virtual machine maps it into the
/// guest read-only.
pub fn is_read_only(region: &GuestRegion) -> bool {
    region.prot() & libc::PROT_WRITE == 0
}

/// What a region is to be: where, how long, of what, and how it may be used.
///
/// ```
/// use vmm_memory::{Backing, GuestRam, RegionConfig, vm_memory::GuestAddress};
///
/// let region = RegionConfig::new(GuestAddress(1 << 32), 16 << 20).backing(Backing::Memfd).track_dirty(true);
/// let ram = GuestRam::builder().region(region).build()?;
/// assert_eq!(ram.size(), 16 << 20);
/// # Ok::<(), vmm_memory::MemoryError>(())
/// ```
#[derive(Clone, Debug)]
pub struct RegionConfig {
    gpa: GuestAddress,
    size: u64,
    backing: Backing,
    track_dirty: Option<bool>,
    read_only: bool,
    huge_pages: bool,
    numa: Option<NumaPolicy>,
    guest_memfd: Option<GuestMemfdRange>,
}

impl RegionConfig {
    /// A writable region of `size` bytes of anonymous memory at `gpa`; both multiples of [`PAGE_SIZE`].
    pub fn new(gpa: GuestAddress, size: u64) -> Self {
        Self {
            gpa,
            size,
            backing: Backing::Anonymous,
            track_dirty: None,
            read_only: false,
            huge_pages: true,
            numa: None,
            guest_memfd: None,
        }
    }

    /// What the region is made of.
    pub fn backing(mut self, backing: Backing) -> Self {
        self.backing = backing;
        self
    }

    /// Whether writes of devices are recorded; unless said here, as the [`GuestRam`](crate::GuestRam) that
    /// the region joins was built. A read-only region has nothing to record.
    pub fn track_dirty(mut self, track: bool) -> Self {
        self.track_dirty = Some(track);
        self
    }

    /// Maps the region without write permission on the host, for ROM images and the like.
    ///
    /// Neither guest nor devices can change it, and devices do not see it at all: see
    /// [`GuestRam`](crate::GuestRam). Its contents come from the backing: the file, or the memfd behind
    /// `GuestMemoryRegion::file_offset`. Anonymous memory then reads as zero.
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Whether the host is asked to back anonymous memory with transparent huge pages (`MADV_HUGEPAGE`), which it is unless
    /// said here: fewer faults and a better use of TLBs, for memory that becomes resident 2 MiB at a time. With `false` it
    /// is asked not to (`MADV_NOHUGEPAGE`). It is advice; the host's own setting may rule both out.
    pub fn huge_pages(mut self, wanted: bool) -> Self {
        self.huge_pages = wanted;
        self
    }

    /// On which of the host's NUMA nodes the memory is to be. Huge pages that are bound to nodes become resident at once,
    /// since the host's promise of a page is not one of a page on these nodes.
    pub fn numa(mut self, policy: NumaPolicy) -> Self {
        self.numa = Some(policy);
        self
    }

    /// Gives the region a private half in a guest_memfd, beside what it is made of on the host, which is then the shared
    /// half: see [`GuestMemfd`](crate::GuestMemfd). The virtual machine that made the file maps the two.
    pub fn guest_memfd(mut self, range: GuestMemfdRange) -> Self {
        self.guest_memfd = Some(range);
        self
    }

    /// Whether mapping it makes a memfd for it, or whether it is the guest's alone otherwise.
    pub(crate) fn has_own_memfd(&self) -> bool {
        matches!(self.backing, Backing::Memfd | Backing::HugeTlbMemfd { .. } | Backing::GuestMemfd(_))
    }

    /// The guest_memfd that the region has a half in, or that it is made of.
    pub(crate) fn guest_memfd_range(&self) -> Option<&GuestMemfdRange> {
        match &self.backing {
            Backing::GuestMemfd(range) => Some(range),
            _ => self.guest_memfd.as_ref(),
        }
    }

    /// Checks the configuration and maps the region.
    pub(crate) fn map(&self, track_by_default: bool) -> Result<Arc<GuestRegion>, MemoryError> {
        check_range(self.gpa, self.size)?;
        let gpa = self.gpa.0;
        if let Some(range) = self.guest_memfd_range() {
            range.check(gpa, self.size)?;
        }
        if let Some(policy) = &self.numa {
            policy.check()?;
            self.check_policy()?;
        }
        let bytes = self.bytes()?;
        let advisable = matches!(bytes, Bytes::Anonymous);
        let track = !self.read_only && self.track_dirty.unwrap_or(track_by_default);
        let region = map_region(self.gpa, self.size, bytes, self.read_only, track)?;
        if let Some(policy) = &self.numa {
            self.place(&region, policy)?;
        }
        if advisable {
            advise_huge_pages(&region, self.huge_pages).map_err(|error| MemoryError::Map {
                gpa,
                size: self.size,
                source: MmapRegionError::Mmap(error.into()),
            })?;
        }
        Ok(region)
    }

    fn bytes(&self) -> Result<Bytes, MemoryError> {
        let seals = SIZE_SEALS | SealFlags::SEAL;
        Ok(match &self.backing {
            Backing::Anonymous => Bytes::Anonymous,
            Backing::Memfd => {
                Bytes::File(FileOffset::new(create_memfd("guest-ram", self.size, None, seals)?, 0))
            }
            Backing::HugeTlb { page_size } => {
                self.check_pages(page_size.bytes())?;
                Bytes::Huge(*page_size)
            }
            Backing::HugeTlbMemfd { page_size } => {
                self.check_pages(page_size.bytes())?;
                Bytes::File(FileOffset::new(
                    create_memfd("guest-ram", self.size, Some(*page_size), seals)?,
                    0,
                ))
            }
            Backing::GuestMemfd(range) if range.memfd.is_mappable() => {
                Bytes::File(FileOffset::from_arc(Arc::clone(range.memfd.file()), range.offset))
            }
            Backing::GuestMemfd(_) => return Err(MemoryError::NotMappable { gpa: self.gpa.0 }),
            Backing::File { file, offset } => {
                self.check_file(file, *offset)?;
                Bytes::File(FileOffset::from_arc(Arc::clone(file), *offset))
            }
            Backing::CopyOnWrite { file, offset } => {
                self.check_file(file, *offset)?;
                Bytes::Private(FileOffset::from_arc(Arc::clone(file), *offset))
            }
        })
    }

    fn check_pages(&self, align: u64) -> Result<(), MemoryError> {
        let (gpa, size) = (self.gpa.0, self.size);
        if gpa.is_multiple_of(align) && size.is_multiple_of(align) {
            return Ok(());
        }
        Err(MemoryError::Unaligned { gpa, size, align })
    }

    /// Memory of files that are no memory of their own belongs to the page cache, which asks no mapping.
    fn check_policy(&self) -> Result<(), MemoryError> {
        let what = match &self.backing {
            Backing::File { file, .. } if rustix::fs::fcntl_get_seals(file).is_err() => "a file",
            Backing::GuestMemfd(_) => "a guest_memfd",
            _ => return Ok(()),
        };
        Err(MemoryError::NumaBacking { gpa: self.gpa.0, what })
    }

    /// Says where the pages are to be, before anything touches them.
    fn place(&self, region: &Arc<GuestRegion>, policy: &NumaPolicy) -> Result<(), MemoryError> {
        let (gpa, size, nodes) = (self.gpa.0, self.size, policy.nodes());
        mempolicy::apply(region, policy).map_err(|source| MemoryError::Numa {
            gpa,
            size,
            nodes: nodes.clone(),
            source,
        })?;
        let (Backing::HugeTlb { page_size } | Backing::HugeTlbMemfd { page_size }, NumaPolicy::Bind(_)) =
            (&self.backing, policy)
        else {
            return Ok(());
        };
        let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        prefault(&[Arc::clone(region)], threads).map_err(|error| {
            let (needed, free) = (size / page_size.bytes(), page_size.free_on(nodes));
            if needed <= free {
                return error;
            }
            let (page_size, nodes) = (*page_size, nodes.clone());
            MemoryError::HugePagesOnNodes { gpa, size, page_size, needed, nodes, free }
        })
    }

    fn check_file(&self, file: &std::fs::File, offset: u64) -> Result<(), MemoryError> {
        let (gpa, size) = (self.gpa.0, self.size);
        let align = page_size_of_file(file);
        if !offset.is_multiple_of(align) {
            return Err(MemoryError::UnalignedOffset { gpa, offset, align });
        }
        if align != PAGE_SIZE {
            self.check_pages(align)?;
        }
        let file_size =
            file.metadata().map_err(|source| MemoryError::File { operation: "fstat", size, source })?.len();
        match offset.checked_add(size) {
            Some(end) if end <= file_size => Ok(()),
            _ => Err(MemoryError::FileTooShort { gpa, offset, size, file_size }),
        }
    }
}

/// What is mapped.
#[derive(Debug)]
pub(crate) enum Bytes {
    /// Private memory, zero.
    Anonymous,
    /// The same, of huge pages.
    Huge(HugePageSize),
    /// Part of a file.
    File(FileOffset),
    /// The same, whose pages are private once they are written.
    Private(FileOffset),
}

/// Size in bytes of the host's pages that a region is made of: [`PAGE_SIZE`], or that of the huge pages of a pool. Giving
/// memory back and mapping parts of it elsewhere work in these. Transparent huge pages, which the host makes and splits as it
/// likes, do not count.
pub fn host_page_size(region: &GuestRegion) -> u64 {
    // What was mapped here says so. For others the host has to be asked, which a confined process may not do.
    match (page_size_of_flags(region.flags()), region.is_hugetlbfs(), region.file_offset()) {
        (Some(size), _, _) => size,
        (None, None | Some(true), Some(file)) => page_size_of_file(file.file()),
        _ => PAGE_SIZE,
    }
}

/// Maps `size` bytes, a size that [`check_range`] accepts.
pub(crate) fn map_region(
    gpa: GuestAddress,
    size: u64,
    bytes: Bytes,
    read_only: bool,
    track_dirty: bool,
) -> Result<Arc<GuestRegion>, MemoryError> {
    let failed = |source| MemoryError::Map { gpa: gpa.0, size, source };
    let length = usize::try_from(size).map_err(|_| MemoryError::TooLarge {
        gpa: gpa.0,
        size,
        present: 0,
        max: MAX_RAM,
    })?;
    let bitmap = track_dirty.then(|| AtomicBitmap::new(length, BITMAP_PAGE));
    let prot = if read_only { libc::PROT_READ } else { libc::PROT_READ | libc::PROT_WRITE };
    // Huge pages are taken now. Without that, a guest that touches one more than there are would end the monitor by SIGBUS.
    let (flags, file, huge) = match bytes {
        Bytes::Anonymous => (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, None, None),
        Bytes::Huge(page_size) => {
            (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | page_size.map_flag(), None, Some(page_size))
        }
        Bytes::Private(file) => (libc::MAP_PRIVATE | libc::MAP_NORESERVE, Some(file), None),
        Bytes::File(file) => match page_size_of_file(file.file()) {
            PAGE_SIZE => (libc::MAP_SHARED | libc::MAP_NORESERVE, Some(file), None),
            other => {
                let huge = HugePageSize::ALL.into_iter().find(|size| size.bytes() == other);
                (libc::MAP_SHARED | map_flags(other), Some(file), huge)
            }
        },
    };
    let mut builder = MmapRegionBuilder::new_with_bitmap(length, bitmap)
        .with_mmap_prot(prot)
        .with_mmap_flags(flags)
        .with_hugetlbfs(page_size_of_flags(flags).is_some());
    if let Some(file) = file {
        builder = builder.with_file_offset(file);
    }
    let mapping: MmapRegion<DirtyBitmap> = builder.build().map_err(|error| match (error, huge) {
        (MmapRegionError::Mmap(error), Some(page_size)) if error.raw_os_error() == Some(libc::ENOMEM) => {
            page_size.shortage(gpa.0, size)
        }
        (MmapRegionError::Mmap(error), Some(page_size))
            if error.raw_os_error() == Some(libc::EINVAL) && page_size.pool().is_none() =>
        {
            page_size.unknown()
        }
        (error, _) => failed(error),
    })?;
    let region =
        GuestRegion::new(mapping, gpa).ok_or_else(|| failed(MmapRegionError::InvalidOffsetLength))?;
    Ok(Arc::new(region))
}

/// Whether a region may be at `gpa` with `size` bytes, other regions aside.
pub(crate) fn check_range(gpa: GuestAddress, size: u64) -> Result<(), MemoryError> {
    let gpa = gpa.0;
    if size == 0 {
        return Err(MemoryError::ZeroSize { gpa, min: PAGE_SIZE });
    }
    if !gpa.is_multiple_of(PAGE_SIZE) || !size.is_multiple_of(PAGE_SIZE) {
        return Err(MemoryError::Unaligned { gpa, size, align: PAGE_SIZE });
    }
    if gpa.checked_add(size).is_none_or(|end| end > GPA_LIMIT) {
        return Err(MemoryError::BeyondAddressSpace { gpa, size, limit: GPA_LIMIT });
    }
    if size > MAX_RAM {
        return Err(MemoryError::TooLarge { gpa, size, present: 0, max: MAX_RAM });
    }
    Ok(())
}

/// Whether a region made elsewhere keeps the rules that this crate's own regions keep.
pub(crate) fn check_region(region: &GuestRegion) -> Result<(), MemoryError> {
    let (gpa, size) = (region.start_addr(), region.len());
    check_range(gpa, size)?;
    let pages = size / PAGE_SIZE;
    match MmapRegion::bitmap(region) {
        Some(bitmap) if bitmap.len() as u64 != pages => Err(MemoryError::BitmapGranule {
            gpa: gpa.0,
            bits: bitmap.len() as u64,
            pages,
            page_size: PAGE_SIZE,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests;
