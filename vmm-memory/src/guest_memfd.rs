//! guest_memfd: guest memory that belongs to one virtual machine, and that the monitor cannot reach unless the virtual
//! machine lets it.
//!
//! Such a file is made by the backend that runs the virtual machine (`vmm_cpu::GuestMemfds`), which is why nothing here
//! creates one. Two uses of it:
//!
//! * A region of two halves: the **shared** half is memory of the usual kinds, which monitor and devices see; the **private**
//!   half is part of a guest_memfd and has no mapping on the host at all. The guest decides page by page which of the two it
//!   has at an address ([`RegionConfig::guest_memfd`](crate::RegionConfig::guest_memfd)).
//! * A region that is all guest_memfd, of the kind that can be mapped
//!   ([`Backing::GuestMemfd`](crate::Backing::GuestMemfd)).
//!
//! # Threat model
//! Private memory is private to the guest *against the monitor*: what a guest that broke out of a device could read and
//! write. `vm-memory` shows devices the shared half only; a private page has other contents.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::{MemoryError, PAGE_SIZE};

/// A guest_memfd. Its size is fixed: no holder of the descriptor can truncate it.
#[derive(Debug)]
pub struct GuestMemfd {
    file: Arc<File>,
    size: u64,
    mappable: bool,
}

impl GuestMemfd {
    /// Takes on what a backend has made. `mappable`: made so that the host can map all of it and its pages are shared until
    /// the guest says otherwise.
    ///
    /// # Errors
    /// [`MemoryError::File`] if the host does not tell its size.
    pub fn new(fd: OwnedFd, mappable: bool) -> Result<Self, MemoryError> {
        let file = File::from(fd);
        let size = file
            .metadata()
            .map_err(|source| MemoryError::File { operation: "fstat", size: 0, source })?
            .len();
        Ok(Self { file: Arc::new(file), size, mappable })
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Whether the host can map it.
    pub fn is_mappable(&self) -> bool {
        self.mappable
    }

    /// The file, for the backend that made it.
    pub fn file(&self) -> &Arc<File> {
        &self.file
    }

    pub(crate) fn punch(&self, offset: u64, size: u64) -> Result<(), Errno> {
        rustix::fs::fallocate(
            &self.file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            size,
        )
    }
}

/// Where in a guest_memfd a region lies.
#[derive(Clone, Debug)]
pub struct GuestMemfdRange {
    /// The file.
    pub memfd: Arc<GuestMemfd>,
    /// Where in it the region begins, in bytes: a multiple of [`PAGE_SIZE`].
    pub offset: u64,
}

impl GuestMemfdRange {
    /// A region that begins at `offset` of `memfd`.
    pub fn new(memfd: Arc<GuestMemfd>, offset: u64) -> Self {
        Self { memfd, offset }
    }

    /// Whether a region of `size` bytes at `gpa` fits.
    pub(crate) fn check(&self, gpa: u64, size: u64) -> Result<(), MemoryError> {
        let (offset, file_size) = (self.offset, self.memfd.size);
        if !offset.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::UnalignedOffset { gpa, offset, align: PAGE_SIZE });
        }
        match offset.checked_add(size) {
            Some(end) if end <= file_size => Ok(()),
            _ => Err(MemoryError::FileTooShort { gpa, offset, size, file_size }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use rustix::fs::SealFlags;
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::backing::{SIZE_SEALS, create_memfd};
    use crate::{Backing, GuestRam, RegionConfig};

    const SIZE: u64 = 16 * PAGE_SIZE;

    /// A memfd that stands for one of a virtual machine: what is looked at here is the same for both.
    fn stand_in(mappable: bool) -> Arc<GuestMemfd> {
        let file = create_memfd("stand-in", SIZE, None, SIZE_SEALS | SealFlags::SEAL).unwrap();
        Arc::new(GuestMemfd::new(file.into(), mappable).unwrap())
    }

    fn blocks(memfd: &GuestMemfd) -> u64 {
        memfd.file().metadata().unwrap().blocks() * 512 / PAGE_SIZE
    }

    #[test]
    fn a_region_lies_within_the_file() {
        let map = |offset, size| {
            let range = GuestMemfdRange::new(stand_in(true), offset);
            let both = [
                RegionConfig::new(GuestAddress(0), size).backing(Backing::GuestMemfd(range.clone())),
                RegionConfig::new(GuestAddress(0), size).guest_memfd(range),
            ];
            both.map(|config| {
                GuestRam::builder()
                    .region(config)
                    .build()
                    .map(|ram| ram.guest_memfd(GuestAddress(0)).unwrap().offset)
            })
        };
        for result in map(PAGE_SIZE, SIZE - PAGE_SIZE) {
            assert_eq!(result.unwrap(), PAGE_SIZE);
        }
        for result in map(PAGE_SIZE, SIZE).into_iter().chain(map(!0xfff, PAGE_SIZE)) {
            assert!(matches!(result, Err(MemoryError::FileTooShort { file_size: SIZE, .. })), "{result:?}");
        }
        for result in map(1, PAGE_SIZE) {
            assert!(matches!(result, Err(MemoryError::UnalignedOffset { offset: 1, .. })), "{result:?}");
        }
    }

    #[test]
    fn private_memory_is_no_regions_only_half() {
        let range = GuestMemfdRange::new(stand_in(false), 0);
        let config = RegionConfig::new(GuestAddress(0), SIZE).backing(Backing::GuestMemfd(range));
        let error = GuestRam::builder().region(config).build().unwrap_err();
        assert!(matches!(error, MemoryError::NotMappable { gpa: 0 }), "{error}");
    }

    #[test]
    fn both_halves_go_back_to_the_host() {
        let memfd = stand_in(false);
        let range = GuestMemfdRange::new(Arc::clone(&memfd), 4 * PAGE_SIZE);
        let config = RegionConfig::new(GuestAddress(0), 8 * PAGE_SIZE).guest_memfd(range);
        let ram = GuestRam::builder().region(config).build().unwrap();
        memfd.file().write_all_at(&[7; 16 * 4096], 0).unwrap();
        ram.memory().write_slice(&[7; 8 * 4096], GuestAddress(0)).unwrap();
        ram.discard(GuestAddress(PAGE_SIZE), 2 * PAGE_SIZE).unwrap();
        assert_eq!(blocks(&memfd), 14);
        let mut byte = [1];
        for (page, expected) in [(4, 7), (5, 0), (6, 0), (7, 7)] {
            memfd.file().read_exact_at(&mut byte, page * PAGE_SIZE).unwrap();
            assert_eq!(byte, [expected], "private page {page}");
            let shared: u8 = ram.memory().read_obj(GuestAddress((page - 4) * PAGE_SIZE)).unwrap();
            assert_eq!(shared, expected, "shared page {page}");
        }
    }

    #[test]
    fn ram_above_the_hole_takes_the_bytes_that_follow() {
        let size = (3 << 30) + (1 << 20);
        let file = create_memfd("stand-in", size, None, SIZE_SEALS).unwrap();
        let range = GuestMemfdRange::new(Arc::new(GuestMemfd::new(file.into(), true).unwrap()), 0);
        let ram = GuestRam::builder().ram(size).backing(Backing::GuestMemfd(range)).build().unwrap();
        assert_eq!(ram.guest_memfd(GuestAddress(1 << 32)).unwrap().offset, 3 << 30);
        ram.discard(GuestAddress(1 << 32), PAGE_SIZE).unwrap();
    }
}
