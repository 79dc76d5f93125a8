//! Memory that another process made, and descriptors for processes that are to read only.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags, SealFlags};
use vm_memory::GuestAddress;

use super::{Access, Memfd, SharedMapping, SharedMemory};
use crate::MemoryError;
use crate::error::Seal;
use crate::region::check_range;

/// Shared memory as a peer handed it over, to be mapped as far as the descriptor allows. Unlike [`SharedMemory`] it may be a
/// descriptor for reading, while others write.
#[derive(Debug)]
pub struct PeerMemory {
    memfd: Memfd,
    most: Access,
}

impl PeerMemory {
    /// Takes on a memfd whose size is sealed (`F_SEAL_SHRINK` and `F_SEAL_GROW`).
    ///
    /// # Errors
    /// [`MemoryError::NotMemfd`], [`MemoryError::MissingSeals`], [`MemoryError::DescriptorAccess`] if it is not open for reading,
    /// and the size errors of [`SharedMemory::create`].
    pub fn from_fd(fd: OwnedFd) -> Result<Self, MemoryError> {
        let (memfd, seals) = Memfd::from_fd(fd, &[Seal::Shrink, Seal::Grow])?;
        Self::new(memfd, seals)
    }

    /// Takes on any regular file, whose size the peer can change at any moment.
    ///
    /// **A peer that truncates it ends this process by SIGBUS** at the next access beyond the new end, by the guest or by the
    /// monitor. This is for peers that are trusted as the monitor itself is, such as a server of QEMU's, which shares files that
    /// carry no seals.
    ///
    /// # Errors
    /// [`MemoryError::NotMemfd`] if it is no regular file, [`MemoryError::DescriptorAccess`] if it is not open for reading, and the
    /// size errors of [`SharedMemory::create`].
    pub fn from_unsealed_fd(fd: OwnedFd) -> Result<Self, MemoryError> {
        let failed = |source| MemoryError::File { operation: "fstat", size: 0, source };
        let found = rustix::fs::fstat(&fd).map_err(|error| failed(error.into()))?;
        if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file");
            return Err(MemoryError::NotMemfd { source });
        }
        // Not a memfd, perhaps, and then without seals.
        let seals = rustix::fs::fcntl_get_seals(&fd).unwrap_or(SealFlags::empty());
        let file = File::from(fd);
        let size = file.metadata().map_err(failed)?.len();
        check_range(GuestAddress(0), size)?;
        Self::new(Memfd { file: Arc::new(file), size }, seals)
    }

    fn new(memfd: Memfd, seals: SealFlags) -> Result<Self, MemoryError> {
        let flags =
            rustix::fs::fcntl_getfl(&memfd.file).map_err(|error| memfd.failed("fcntl(F_GETFL)", error))?;
        let sealed = seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE);
        // A path descriptor says that it is open for reading and is not.
        let most = match flags & OFlags::RWMODE {
            _ if flags.contains(OFlags::PATH) => return Err(MemoryError::DescriptorAccess),
            OFlags::RDWR if !sealed => Access::ReadWrite,
            OFlags::RDWR | OFlags::RDONLY => Access::ReadOnly,
            _ => return Err(MemoryError::DescriptorAccess),
        };
        Ok(Self { memfd, most })
    }

    /// Size in bytes; that of an unsealed file when it was taken on.
    pub fn size(&self) -> u64 {
        self.memfd.size
    }

    /// The most that it can be mapped for.
    pub fn access(&self) -> Access {
        self.most
    }

    /// Maps the memory as a region at `gpa`. Each call makes a mapping of its own.
    ///
    /// # Errors
    /// [`MemoryError::DescriptorAccess`] for more than [`access`](Self::access), those of a range where no region can be, and
    /// [`MemoryError::Map`].
    pub fn map(&self, gpa: GuestAddress, access: Access) -> Result<SharedMapping, MemoryError> {
        if access == Access::ReadWrite && self.most == Access::ReadOnly {
            return Err(MemoryError::DescriptorAccess);
        }
        self.memfd.map(gpa, access)
    }
}

impl AsFd for PeerMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.memfd.file.as_fd()
    }
}

impl SharedMemory {
    /// A descriptor of the same memory for a process that is to read and nothing else: the kernel refuses to map it for writing,
    /// and to make a mapping of it writable. Others go on writing, which [`into_read_only`](Self::into_read_only) ends.
    ///
    /// The memory becomes the owner's alone (mode 0600), so that a process of another user cannot open it anew for writing by way
    /// of `/proc`. One of the same user, or root, can: to be safe from those, seal it.
    ///
    /// # Errors
    /// [`MemoryError::File`]: without `/proc`, or if the process has no descriptor left.
    pub fn try_clone_read_only_fd(&self) -> Result<OwnedFd, MemoryError> {
        let memfd = &self.memfd;
        rustix::fs::fchmod(&memfd.file, Mode::RUSR | Mode::WUSR)
            .map_err(|error| memfd.failed("fchmod", error))?;
        let path = format!("/proc/self/fd/{}", memfd.file.as_raw_fd());
        rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|error| memfd.failed("open for reading", error))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use vm_memory::{Bytes as _, MemoryRegionAddress};

    use super::*;
    use crate::PAGE_SIZE;
    use crate::backing::create_memfd;

    const GPA: GuestAddress = GuestAddress(0x1_0000_0000);

    #[test]
    fn a_descriptor_for_reading_reads_what_others_write_and_no_more() {
        let memory = SharedMemory::create("reader", PAGE_SIZE).unwrap();
        let writer = memory.map(GPA, Access::ReadWrite).unwrap();
        let peer = PeerMemory::from_fd(memory.try_clone_read_only_fd().unwrap()).unwrap();
        assert_eq!((peer.size(), peer.access()), (PAGE_SIZE, Access::ReadOnly));
        assert!(matches!(peer.map(GPA, Access::ReadWrite), Err(MemoryError::DescriptorAccess)));
        let reader = peer.map(GPA, Access::ReadOnly).unwrap();
        writer.region().write_obj(42_u64, MemoryRegionAddress(8)).unwrap();
        assert_eq!(reader.region().read_obj::<u64>(MemoryRegionAddress(8)).unwrap(), 42);
        // Nor by write(2), nor by changing what may be done with it.
        File::from(peer.as_fd().try_clone_to_owned().unwrap()).write_all(b"x").unwrap_err();
        assert!(crate::is_read_only(reader.region()));
        let mode = rustix::fs::fstat(&memory).unwrap().st_mode & 0o777;
        assert_eq!(mode, 0o600, "nobody else opens it anew");
    }

    #[test]
    fn what_is_not_sealed_is_taken_on_only_if_that_is_said() {
        let open = || OwnedFd::from(create_memfd("open", PAGE_SIZE, None, SealFlags::empty()).unwrap());
        assert!(matches!(PeerMemory::from_fd(open()), Err(MemoryError::MissingSeals { .. })));
        let peer = PeerMemory::from_unsealed_fd(open()).unwrap();
        assert_eq!(peer.access(), Access::ReadWrite);
        peer.map(GPA, Access::ReadWrite).unwrap();
        let shrink = create_memfd("shrink", PAGE_SIZE, None, SealFlags::SHRINK).unwrap();
        assert!(PeerMemory::from_fd(shrink.into()).is_err());
        let sealed = SealFlags::SHRINK | SealFlags::GROW | SealFlags::FUTURE_WRITE;
        let sealed =
            PeerMemory::from_fd(create_memfd("sealed", PAGE_SIZE, None, sealed).unwrap().into()).unwrap();
        assert_eq!(sealed.access(), Access::ReadOnly);
    }

    #[test]
    fn what_is_no_memory_is_refused() {
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(PeerMemory::from_fd(socket.try_clone().unwrap().into()).is_err());
        assert!(matches!(PeerMemory::from_unsealed_fd(socket.into()), Err(MemoryError::NotMemfd { .. })));
        let file = tempfile::tempfile().unwrap();
        assert!(matches!(
            PeerMemory::from_unsealed_fd(file.try_clone().unwrap().into()),
            Err(MemoryError::ZeroSize { .. })
        ));
        file.set_len(100).unwrap();
        assert!(matches!(PeerMemory::from_unsealed_fd(file.into()), Err(MemoryError::Unaligned { .. })));
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().set_len(PAGE_SIZE).unwrap();
        for flags in [OFlags::WRONLY, OFlags::PATH] {
            let fd = rustix::fs::open(named.path(), flags | OFlags::CLOEXEC, Mode::empty()).unwrap();
            assert!(PeerMemory::from_unsealed_fd(fd).is_err(), "{flags:?}");
        }
    }
}
