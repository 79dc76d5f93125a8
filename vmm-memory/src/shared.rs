//! Memory that several virtual machines, or a virtual machine and another process, have in common.
//!
//! The memory is a memfd whose size is sealed before anyone else sees it, so a peer can change its
//! contents, if it was given that right, and nothing else: truncating it, which would end the other
//! side by SIGBUS, is refused by the kernel, for root too.
//!
//! | type | what its holder and those it is handed to can do |
//! |---|---|
//! | [`SharedMemory`] | map read-only or for writing |
//! | [`ReadOnlySharedMemory`] | map read-only; the kernel refuses the rest (`F_SEAL_FUTURE_WRITE`) |
//! | [`PeerMemory`] | map what a peer handed over, as far as the descriptor allows |
//!
//! # Threat model
//! The peer is hostile and may be root in its own process. A descriptor received from it is not
//! trusted: the `from_fd` constructors check the seals before anything is mapped. What a peer writes
//! into shared memory is hostile input and can change between two reads.
//!
//! [`SharedMemory::into_read_only`] binds those who get the memory *afterwards*. Whoever mapped the memory
//! before keeps that mapping, and the power to make it writable if it is read-only. So hand a descriptor
//! out after sealing.
//!
//! # Revocation
//! A region that was given to a virtual machine is revoked there first: the guest's page tables refer
//! to the host mapping. vmm-cpu has a guard for that, which unmaps the region from the guest when it is
//! dropped. Then [`GuestRam::remove_region`](crate::GuestRam::remove_region) takes it from the devices,
//! and dropping the [`SharedMapping`] unmaps it.

mod peer;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{OFlags, SealFlags};
use rustix::io::Errno;
use vm_memory::{FileOffset, GuestAddress};

use crate::MemoryError;
use crate::backing::{SIZE_SEALS, add_seals, create_memfd};
use crate::error::Seal;
use crate::huge::HugePageSize;
use crate::region::{Bytes, GuestRegion, check_range, map_region};
pub use peer::PeerMemory;

/// What a mapping of shared memory is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Access {
    /// Neither guest nor monitor can write through the mapping.
    ReadOnly,
    /// Guest and devices can write.
    ReadWrite,
}

/// Shared memory that can be written.
///
/// ```
/// use vmm_memory::{Access, GuestRam, SharedMemory, vm_memory::{Bytes, GuestAddress}};
///
/// let memory = SharedMemory::create("frames", 1 << 20)?;
/// let writer = memory.map(GuestAddress(0x1_0000_0000), Access::ReadWrite)?;
/// let memory = memory.into_read_only()?; // from here on nobody else gets to write
/// let reader = memory.map(GuestAddress(0x2_0000_0000))?;
///
/// let one = GuestRam::builder().ram(1 << 20).build()?;
/// one.insert(writer.region().clone())?;
/// let other = GuestRam::builder().ram(1 << 20).build()?;
/// other.insert(reader.region().clone())?; // for its virtual machine; its devices do not see it
/// one.memory().write_obj(7u32, GuestAddress(0x1_0000_0000))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct SharedMemory {
    memfd: Memfd,
}

impl SharedMemory {
    /// Creates `size` bytes of memory, all zero, of a size sealed for good. `name` shows in `/proc` and
    /// has at most 249 bytes.
    ///
    /// # Errors
    /// Those of a size that no region can have ([`MemoryError::ZeroSize`], [`MemoryError::Unaligned`],
    /// [`MemoryError::TooLarge`], [`MemoryError::BeyondAddressSpace`]; the address they name is 0), and
    /// [`MemoryError::File`].
    pub fn create(name: &str, size: u64) -> Result<Self, MemoryError> {
        Self::create_of(name, size, None)
    }

    /// As [`create`](Self::create), of huge pages. The host's pool gives them when the memory is first mapped.
    ///
    /// # Errors
    /// As [`create`](Self::create); the size has to be a multiple of the page size. [`MemoryError::HugePageSize`] if the host
    /// has no such pages. [`map`](Self::map) fails with [`MemoryError::HugePages`] if the pool has too few.
    pub fn create_huge(name: &str, size: u64, page_size: HugePageSize) -> Result<Self, MemoryError> {
        if !size.is_multiple_of(page_size.bytes()) {
            return Err(MemoryError::Unaligned { gpa: 0, size, align: page_size.bytes() });
        }
        Self::create_of(name, size, Some(page_size))
    }

    fn create_of(name: &str, size: u64, huge: Option<HugePageSize>) -> Result<Self, MemoryError> {
        check_range(GuestAddress(0), size)?;
        // Without F_SEAL_SEAL, which would make `into_read_only` impossible.
        let file = create_memfd(name, size, huge, SIZE_SEALS)?;
        Ok(Self { memfd: Memfd { file: Arc::new(file), size } })
    }

    /// Takes on a descriptor that another process handed over.
    ///
    /// # Errors
    /// [`MemoryError::NotMemfd`], [`MemoryError::MissingSeals`] without `F_SEAL_SHRINK` and `F_SEAL_GROW`,
    /// [`MemoryError::SealedAgainstWriting`], [`MemoryError::DescriptorAccess`] if it is not open for
    /// writing, and the size errors of [`create`](Self::create).
    pub fn from_fd(fd: OwnedFd) -> Result<Self, MemoryError> {
        let (memfd, seals) = Memfd::from_fd(fd, &[Seal::Shrink, Seal::Grow])?;
        for seal in [Seal::Write, Seal::FutureWrite] {
            if seals.contains(flag(seal)) {
                return Err(MemoryError::SealedAgainstWriting { seal });
            }
        }
        let access =
            rustix::fs::fcntl_getfl(&memfd.file).map_err(|error| memfd.failed("fcntl(F_GETFL)", error))?;
        if access & OFlags::RWMODE != OFlags::RDWR {
            return Err(MemoryError::DescriptorAccess);
        }
        Ok(Self { memfd })
    }

    /// Size in bytes, which never changes.
    pub fn size(&self) -> u64 {
        self.memfd.size
    }

    /// Maps the memory as a region at `gpa`.
    ///
    /// Each call makes a mapping of its own. Writes through it are not tracked: a peer's would not be
    /// either. A mapping with [`Access::ReadOnly`] binds this process's guest and devices, not whoever gets
    /// hold of the descriptor.
    ///
    /// # Errors
    /// Those of a range where no region can be, and [`MemoryError::Map`].
    pub fn map(&self, gpa: GuestAddress, access: Access) -> Result<SharedMapping, MemoryError> {
        self.memfd.map(gpa, access)
    }

    /// Gives up the right to write for everyone but the writable mappings that exist, which go on.
    ///
    /// Nobody can undo this. See the [module](self) on those who had the descriptor before.
    ///
    /// # Errors
    /// [`MemoryError::SealsLocked`] after [`lock_seals`](Self::lock_seals), here or by a peer;
    /// [`MemoryError::File`] where the host does not know the seal.
    pub fn into_read_only(self) -> Result<ReadOnlySharedMemory, MemoryError> {
        self.memfd.seal(Seal::FutureWrite)?;
        self.memfd.seal(Seal::Seal)?;
        Ok(ReadOnlySharedMemory { memfd: self.memfd })
    }

    /// Makes the memory writable for good: no holder of the descriptor can seal it against writing later
    /// (`F_SEAL_SEAL`). Called before handing it to a peer that must not be able to take the right away.
    ///
    /// # Errors
    /// [`MemoryError::File`].
    pub fn lock_seals(&self) -> Result<(), MemoryError> {
        self.memfd.seal(Seal::Seal)
    }

    /// A duplicate of the descriptor, to send to another process. It gives the right to write.
    ///
    /// # Errors
    /// [`MemoryError::File`], if the process has no descriptor left.
    pub fn try_clone_fd(&self) -> Result<OwnedFd, MemoryError> {
        self.memfd.try_clone_fd()
    }
}

impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memfd.file.as_fd()
    }
}

/// Shared memory that nobody can map for writing any more.
#[derive(Debug)]
pub struct ReadOnlySharedMemory {
    memfd: Memfd,
}

impl ReadOnlySharedMemory {
    /// Takes on a descriptor that another process handed over.
    ///
    /// It must carry `F_SEAL_SHRINK`, `F_SEAL_GROW` and `F_SEAL_FUTURE_WRITE` (or `F_SEAL_WRITE`, which
    /// says more). `F_SEAL_SEAL` is not asked for: seals cannot be taken off, and no further one can
    /// harm a reader.
    ///
    /// # Errors
    /// [`MemoryError::NotMemfd`], [`MemoryError::MissingSeals`], and the size errors of
    /// [`SharedMemory::create`].
    pub fn from_fd(fd: OwnedFd) -> Result<Self, MemoryError> {
        let (memfd, _) = Memfd::from_fd(fd, &[Seal::Shrink, Seal::Grow, Seal::FutureWrite])?;
        Ok(Self { memfd })
    }

    /// Size in bytes, which never changes.
    pub fn size(&self) -> u64 {
        self.memfd.size
    }

    /// Maps the memory read-only as a region at `gpa`. Each call makes a mapping of its own.
    ///
    /// # Errors
    /// Those of a range where no region can be, and [`MemoryError::Map`].
    pub fn map(&self, gpa: GuestAddress) -> Result<SharedMapping, MemoryError> {
        self.memfd.map(gpa, Access::ReadOnly)
    }

    /// A duplicate of the descriptor, to send to another process. It gives the right to read.
    ///
    /// # Errors
    /// [`MemoryError::File`], if the process has no descriptor left.
    pub fn try_clone_fd(&self) -> Result<OwnedFd, MemoryError> {
        self.memfd.try_clone_fd()
    }
}

impl AsFd for ReadOnlySharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memfd.file.as_fd()
    }
}

/// One mapping of shared memory. Dropping it unmaps, once nobody else holds the region.
///
/// Others hold the region after it was given away: a [`GuestRam`](crate::GuestRam) into which it was
/// inserted, a virtual machine that maps it, a snapshot of guest memory in a device. See
/// [Revocation](self#revocation).
///
/// Do not write through the region of a read-only mapping: the process would end by SIGSEGV. `GuestRam` keeps
/// devices from it.
#[derive(Debug)]
pub struct SharedMapping {
    region: Arc<GuestRegion>,
    access: Access,
}

impl SharedMapping {
    /// The region, to insert into a [`GuestRam`](crate::GuestRam) and to map into a virtual machine.
    pub fn region(&self) -> &Arc<GuestRegion> {
        &self.region
    }

    /// What the mapping is for.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Unmaps now, for a caller that must know that the memory is out of reach.
    ///
    /// # Errors
    /// Gives the mapping back if someone else still holds the region.
    pub fn unmap(self) -> Result<(), Self> {
        let Self { region, access } = self;
        match Arc::try_unwrap(region) {
            Ok(region) => {
                let mapping = region.get_mmap();
                // Held here and by `region`. A third holder had it from the region before.
                if Arc::strong_count(&mapping) == 2 {
                    return Ok(());
                }
                Err(Self { region: Arc::new(region), access })
            }
            Err(region) => Err(Self { region, access }),
        }
    }
}

/// A memfd whose size is sealed.
#[derive(Debug)]
struct Memfd {
    file: Arc<File>,
    size: u64,
}

impl Memfd {
    fn from_fd(fd: OwnedFd, needed: &[Seal]) -> Result<(Self, SealFlags), MemoryError> {
        // Only shmem and hugetlbfs files answer. Such a file that is no memfd is sealed against seals.
        let seals = rustix::fs::fcntl_get_seals(&fd)
            .map_err(|error| MemoryError::NotMemfd { source: io::Error::from(error) })?;
        let missing: Vec<Seal> = needed
            .iter()
            .copied()
            .filter(|&seal| {
                let also = if seal == Seal::FutureWrite { SealFlags::WRITE } else { SealFlags::empty() };
                !seals.intersects(flag(seal) | also)
            })
            .collect();
        if !missing.is_empty() {
            return Err(MemoryError::MissingSeals { missing });
        }
        // Read after the seals were seen, so that it cannot change any more.
        let file = File::from(fd);
        // By fstat and not, as the standard library does, by statx, which confined processes are refused as it can look for paths.
        let stat = rustix::fs::fstat(&file).map_err(|error| MemoryError::File {
            operation: "fstat",
            size: 0,
            source: io::Error::from(error),
        })?;
        let size = u64::try_from(stat.st_size).unwrap_or(0);
        check_range(GuestAddress(0), size)?;
        Ok((Self { file: Arc::new(file), size }, seals))
    }

    fn map(&self, gpa: GuestAddress, access: Access) -> Result<SharedMapping, MemoryError> {
        check_range(gpa, self.size)?;
        let file = FileOffset::from_arc(Arc::clone(&self.file), 0);
        let region = map_region(gpa, self.size, Bytes::File(file), access == Access::ReadOnly, false)?;
        Ok(SharedMapping { region, access })
    }

    fn seal(&self, seal: Seal) -> Result<(), MemoryError> {
        match add_seals(&self.file, flag(seal)) {
            Ok(()) => Ok(()),
            // A peer may have come first.
            Err(Errno::PERM) => match rustix::fs::fcntl_get_seals(&self.file) {
                Ok(present) if present.contains(flag(seal)) => Ok(()),
                _ => Err(MemoryError::SealsLocked { wanted: seal }),
            },
            Err(error) => Err(self.failed("fcntl(F_ADD_SEALS)", error)),
        }
    }

    fn try_clone_fd(&self) -> Result<OwnedFd, MemoryError> {
        self.file.as_fd().try_clone_to_owned().map_err(|source| MemoryError::File {
            operation: "fcntl(F_DUPFD_CLOEXEC)",
            size: self.size,
            source,
        })
    }

    fn failed(&self, operation: &'static str, error: Errno) -> MemoryError {
        MemoryError::File { operation, size: self.size, source: io::Error::from(error) }
    }
}

fn flag(seal: Seal) -> SealFlags {
    match seal {
        Seal::Seal => SealFlags::SEAL,
        Seal::Shrink => SealFlags::SHRINK,
        Seal::Grow => SealFlags::GROW,
        Seal::Write => SealFlags::WRITE,
        Seal::FutureWrite => SealFlags::FUTURE_WRITE,
    }
}

#[cfg(test)]
mod tests;
