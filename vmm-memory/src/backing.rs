//! What the bytes of a region are made of, and the sealed memfd that several modules create.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};

use crate::MemoryError;
use crate::guest_memfd::GuestMemfdRange;
use crate::huge::HugePageSize;

/// The host memory behind a region. Every kind but huge pages is sparse: a page costs host memory once it is touched.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub enum Backing {
    /// Private anonymous memory: nobody else can map it, and it has no file descriptor.
    #[default]
    Anonymous,

    /// A memfd of the region's own, mapped shared, for vhost-user and other processes that map guest
    /// RAM through its descriptor (`GuestMemoryRegion::file_offset`).
    ///
    /// Its size is sealed (`F_SEAL_SHRINK`, `F_SEAL_GROW`, `F_SEAL_SEAL`), so no holder of the descriptor can
    /// truncate it and make the monitor die of SIGBUS.
    Memfd,

    /// Private memory of the host's pool of huge pages (`MAP_HUGETLB`): fewer faults and a better use of TLBs, for certain.
    ///
    /// The pool gives all pages when the region is mapped, or an error says how to make it larger; so no access can find it
    /// empty later. Base and size of the region are multiples of the page size. A part of a page does not go back to the host:
    /// see [`GuestRam::discard`](crate::GuestRam::discard).
    HugeTlb {
        /// Size of the pages.
        page_size: HugePageSize,
    },

    /// A memfd of the region's own as with [`Backing::Memfd`], made of huge pages (`MFD_HUGETLB`) as with
    /// [`Backing::HugeTlb`].
    HugeTlbMemfd {
        /// Size of the pages.
        page_size: HugePageSize,
    },

    /// Part of a guest_memfd that the host can map, mapped shared.
    GuestMemfd(GuestMemfdRange),

    /// Part of a regular file or memfd, mapped shared: writes reach the file.
    ///
    /// The file must be long enough when the region is mapped, and nobody may shorten it while the
    /// mapping lives: an access beyond its new end raises SIGBUS. Where others can open the file, seal
    /// it (memfd) or use another backing.
    File {
        /// The file, open for writing unless the region is read-only.
        file: Arc<File>,
        /// Where in the file the region begins, in bytes: a multiple of the page size.
        offset: u64,
    },

    /// Part of a regular file or memfd, mapped private: pages are the file's, shared with all who map it so, until they are written, and
    /// the region's own from then on. The file stays as it is.
    ///
    /// Nobody may change or shorten the file while the mapping lives: pages that were not written follow it, and an access
    /// beyond its new end raises SIGBUS. The guest's memory is not in the file, so nobody else can map it through that.
    CopyOnWrite {
        /// The file, open for reading; not of huge pages.
        file: Arc<File>,
        /// Where in the file the region begins, in bytes: a multiple of the page size.
        offset: u64,
    },
}

/// Seals that fix the size of a memfd: what makes it safe to map.
pub(crate) const SIZE_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// A new memfd of `size` bytes (all zero), carrying `seals`. It is never executable where the host can
/// enforce that. One of huge pages has a size that is a multiple of theirs, and takes them when it is mapped.
pub(crate) fn create_memfd(
    name: &str,
    size: u64,
    huge: Option<HugePageSize>,
    seals: SealFlags,
) -> Result<File, MemoryError> {
    let failed = |operation| {
        move |error: rustix::io::Errno| MemoryError::File { operation, size, source: io::Error::from(error) }
    };
    if let Some(page_size) = huge
        && page_size.pool().is_none()
    {
        return Err(page_size.unknown());
    }
    let kind = huge.map_or(MemfdFlags::empty(), HugePageSize::memfd_flags);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | kind;
    let fd: OwnedFd = match rustix::fs::memfd_create(name, flags | MemfdFlags::NOEXEC_SEAL) {
        // Linux before 6.3 does not know the flag.
        Err(rustix::io::Errno::INVAL) => rustix::fs::memfd_create(name, flags),
        other => other,
    }
    .map_err(failed("memfd_create"))?;
    rustix::fs::ftruncate(&fd, size).map_err(failed("ftruncate"))?;
    add_seals(&fd, seals).map_err(failed("fcntl(F_ADD_SEALS)"))?;
    Ok(File::from(fd))
}

/// Adds `seals`, `F_SEAL_SEAL` after the others: it forbids adding any.
pub(crate) fn add_seals(fd: impl AsFd, seals: SealFlags) -> rustix::io::Result<()> {
    let first = seals - SealFlags::SEAL;
    if !first.is_empty() {
        rustix::fs::fcntl_add_seals(&fd, first)?;
    }
    if seals.contains(SealFlags::SEAL) {
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SEAL)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PAGE_SIZE;

    #[test]
    fn size_of_a_sealed_memfd_is_fixed() {
        let file = create_memfd("test", PAGE_SIZE, None, SIZE_SEALS | SealFlags::SEAL).unwrap();
        assert_eq!(file.metadata().unwrap().len(), PAGE_SIZE);
        for size in [0, 2 * PAGE_SIZE] {
            let error = file.set_len(size).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        }
        let more = rustix::fs::fcntl_add_seals(&file, SealFlags::WRITE);
        assert_eq!(more, Err(rustix::io::Errno::PERM));
    }

    #[test]
    fn impossible_memfd_is_an_error() {
        let error = create_memfd(&"x".repeat(300), PAGE_SIZE, None, SIZE_SEALS).unwrap_err();
        assert!(matches!(error, MemoryError::File { operation: "memfd_create", .. }), "{error}");
        let error = create_memfd("test", u64::MAX, None, SIZE_SEALS).unwrap_err();
        assert!(matches!(error, MemoryError::File { operation: "ftruncate", .. }), "{error}");
    }
}
