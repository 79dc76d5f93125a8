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
use crate::layout::{GPA_LIMIT, MAX_RAM};

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
}

impl RegionConfig {
    /// A writable region of `size` bytes of anonymous memory at `gpa`; both multiples of [`PAGE_SIZE`].
    pub fn new(gpa: GuestAddress, size: u64) -> Self {
        Self { gpa, size, backing: Backing::Anonymous, track_dirty: None, read_only: false, huge_pages: true }
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

    /// Whether mapping it makes a memfd for it.
    pub(crate) fn has_own_memfd(&self) -> bool {
        matches!(self.backing, Backing::Memfd)
    }

    /// Checks the configuration and maps the region.
    pub(crate) fn map(&self, track_by_default: bool) -> Result<Arc<GuestRegion>, MemoryError> {
        check_range(self.gpa, self.size)?;
        let file = match &self.backing {
            Backing::Anonymous => None,
            Backing::Memfd => {
                let file = create_memfd("guest-ram", self.size, SIZE_SEALS | SealFlags::SEAL)?;
                Some(FileOffset::new(file, 0))
            }
            Backing::File { file, offset } => {
                self.check_file(file, *offset)?;
                Some(FileOffset::from_arc(Arc::clone(file), *offset))
            }
        };
        let track = !self.read_only && self.track_dirty.unwrap_or(track_by_default);
        let anonymous = file.is_none();
        let region = map_region(self.gpa, self.size, file, self.read_only, track)?;
        if anonymous {
            advise_huge_pages(&region, self.huge_pages).map_err(|error| MemoryError::Map {
                gpa: self.gpa.0,
                size: self.size,
                source: MmapRegionError::Mmap(error.into()),
            })?;
        }
        Ok(region)
    }

    fn check_file(&self, file: &std::fs::File, offset: u64) -> Result<(), MemoryError> {
        let (gpa, size) = (self.gpa.0, self.size);
        if !offset.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::UnalignedOffset { gpa, offset, align: PAGE_SIZE });
        }
        let file_size =
            file.metadata().map_err(|source| MemoryError::File { operation: "fstat", size, source })?.len();
        match offset.checked_add(size) {
            Some(end) if end <= file_size => Ok(()),
            _ => Err(MemoryError::FileTooShort { gpa, offset, size, file_size }),
        }
    }
}

/// Maps `size` bytes (a size that [`check_range`] accepts) of `file`, or of anonymous memory.
pub(crate) fn map_region(
    gpa: GuestAddress,
    size: u64,
    file: Option<FileOffset>,
    read_only: bool,
    track_dirty: bool,
) -> Result<Arc<GuestRegion>, MemoryError> {
    let failed = |source| MemoryError::Map { gpa: gpa.0, size, source };
    let bytes = usize::try_from(size).map_err(|_| MemoryError::TooLarge {
        gpa: gpa.0,
        size,
        present: 0,
        max: MAX_RAM,
    })?;
    let bitmap = track_dirty.then(|| AtomicBitmap::new(bytes, BITMAP_PAGE));
    let prot = if read_only { libc::PROT_READ } else { libc::PROT_READ | libc::PROT_WRITE };
    let sharing = if file.is_some() { libc::MAP_SHARED } else { libc::MAP_PRIVATE | libc::MAP_ANONYMOUS };
    let mut builder = MmapRegionBuilder::new_with_bitmap(bytes, bitmap)
        .with_mmap_prot(prot)
        .with_mmap_flags(sharing | libc::MAP_NORESERVE);
    if let Some(file) = file {
        builder = builder.with_file_offset(file);
    }
    let mapping: MmapRegion<DirtyBitmap> = builder.build().map_err(failed)?;
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
mod tests {
    use std::fs::File;

    use vm_memory::Bytes;

    use super::*;

    const BASE: GuestAddress = GuestAddress(0x10_0000);

    fn file_of(size: u64) -> Arc<File> {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        Arc::new(file)
    }

    #[test]
    fn ranges_that_cannot_be() {
        type Refusal = fn(&MemoryError) -> bool;
        let cases: [(u64, u64, Refusal); 9] = [
            (0x1000, 0, |e| matches!(e, MemoryError::ZeroSize { gpa: 0x1000, .. })),
            (0x1001, 0x1000, |e| matches!(e, MemoryError::Unaligned { gpa: 0x1001, size: 0x1000, .. })),
            (0x1000, 0x1001, |e| matches!(e, MemoryError::Unaligned { gpa: 0x1000, size: 0x1001, .. })),
            (0x1000, 0xfff, |e| matches!(e, MemoryError::Unaligned { .. })),
            (GPA_LIMIT, 0x1000, |e| matches!(e, MemoryError::BeyondAddressSpace { size: 0x1000, .. })),
            (GPA_LIMIT - 0x1000, 0x2000, |e| matches!(e, MemoryError::BeyondAddressSpace { .. })),
            (!0xfff, 0x1000, |e| matches!(e, MemoryError::BeyondAddressSpace { .. })),
            (0x1000, !0xfff, |e| matches!(e, MemoryError::BeyondAddressSpace { .. })),
            (0x1000, MAX_RAM + 0x1000, |e| matches!(e, MemoryError::TooLarge { .. })),
        ];
        for (gpa, size, expected) in cases {
            let error = RegionConfig::new(GuestAddress(gpa), size).map(false).unwrap_err();
            assert!(expected(&error), "{gpa:#x} {size:#x}: {error}");
            assert!(error.to_string().contains(&format!("{gpa:#x}")), "{error}");
        }
        check_range(GuestAddress(GPA_LIMIT - PAGE_SIZE), PAGE_SIZE).unwrap();
        check_range(GuestAddress(0), MAX_RAM).unwrap();
    }

    #[test]
    fn every_backing_is_zero_and_writable() {
        let file = file_of(0x5000);
        let backings =
            [Backing::Anonymous, Backing::Memfd, Backing::File { file: Arc::clone(&file), offset: 0x1000 }];
        for backing in backings {
            let region = RegionConfig::new(BASE, 0x4000).backing(backing.clone()).map(true).unwrap();
            assert_eq!((region.start_addr(), region.len()), (BASE, 0x4000));
            assert!(!is_read_only(&region));
            let last = vm_memory::MemoryRegionAddress(0x3ff8);
            assert_eq!(region.read_obj::<u64>(last).unwrap(), 0, "{backing:?}");
            region.write_obj(7u64, last).unwrap();
            assert_eq!(region.read_obj::<u64>(last).unwrap(), 7, "{backing:?}");
            assert_eq!(region.file_offset().is_some(), !matches!(backing, Backing::Anonymous));
        }
        let mut word = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(&*file, &mut word, 0x1000 + 0x3ff8).unwrap();
        assert_eq!(u64::from_ne_bytes(word), 7, "the mapping of a file is shared");
    }

    #[test]
    fn memfd_cannot_change_size() {
        let region = RegionConfig::new(BASE, 0x4000).backing(Backing::Memfd).map(false).unwrap();
        let file = region.file_offset().unwrap().file();
        assert!(file.set_len(0).is_err() && file.set_len(0x8000).is_err());
        assert_eq!(file.metadata().unwrap().len(), 0x4000);
    }

    #[test]
    fn short_file_is_refused_with_both_sizes() {
        let config = |offset| {
            RegionConfig::new(BASE, 0x3000)
                .backing(Backing::File { file: file_of(0x4000), offset })
                .map(false)
        };
        config(0x1000).unwrap();
        let error = config(0x2000).unwrap_err();
        assert!(
            matches!(error, MemoryError::FileTooShort { size: 0x3000, file_size: 0x4000, .. }),
            "{error}"
        );
        assert!(error.to_string().contains("0x3000") && error.to_string().contains("0x4000"), "{error}");
        assert!(matches!(config(!0xfff), Err(MemoryError::FileTooShort { .. })));
        assert!(matches!(config(0x10), Err(MemoryError::UnalignedOffset { offset: 0x10, .. })));
    }

    #[test]
    fn read_only_needs_no_writable_file() {
        let mut image = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut image, &[0x55; 0x1000]).unwrap();
        let file = Arc::new(File::open(image.path()).unwrap());
        let config = RegionConfig::new(BASE, 0x1000).backing(Backing::File { file, offset: 0 });
        assert!(matches!(config.clone().map(false), Err(MemoryError::Map { .. })));
        let region = config.read_only(true).track_dirty(true).map(true).unwrap();
        assert!(is_read_only(&region));
        assert!(MmapRegion::bitmap(&region).is_none());
        let byte: u8 = region.read_obj(vm_memory::MemoryRegionAddress(0xfff)).unwrap();
        assert_eq!(byte, 0x55);
    }

    #[test]
    fn dirty_bitmap_only_where_asked() {
        let tracked = |config: RegionConfig, default| {
            let region = config.map(default).unwrap();
            check_region(&region).unwrap();
            MmapRegion::bitmap(&region).is_some()
        };
        let config = RegionConfig::new(BASE, 0x1000);
        assert!(tracked(config.clone(), true) && !tracked(config.clone(), false));
        assert!(tracked(config.clone().track_dirty(true), false));
        assert!(!tracked(config.track_dirty(false), true));
    }

    #[test]
    fn foreign_region_with_another_granule_is_refused() {
        let bitmap = AtomicBitmap::new(0x4000, NonZeroUsize::new(0x2000).unwrap());
        let mapping = MmapRegionBuilder::new_with_bitmap(0x4000, Some(bitmap))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .build()
            .unwrap();
        let error = check_region(&GuestRegion::new(mapping, BASE).unwrap()).unwrap_err();
        assert!(matches!(error, MemoryError::BitmapGranule { bits: 2, pages: 4, .. }), "{error}");
    }
}
