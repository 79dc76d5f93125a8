//! Raw disk images and the host's block devices.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, OFlags, SeekFrom};
use vmm_memory::vm_memory::VolatileSlice;

use super::backend::{Backend, BlockSizes, write_zeroes_by_hand};
use crate::vectored;

/// A file, or a block device, each of whose bytes is one of the disk. No format is looked for: an image of another one is a disk
/// with that file's bytes.
///
/// The host's cache is between guest and file: a driver's buffers lie anywhere, which `O_DIRECT` does not take. A flush of the driver
/// reaches the medium (`fdatasync`).
#[derive(Debug)]
pub struct RawFile {
    file: File,
    read_only: bool,
    blocks: BlockSizes,
}

/// Why a file cannot be a disk.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RawFileError {
    /// It cannot be opened.
    #[error("{path}: cannot be opened for {access}: {source}", path = path.display())]
    Open {
        /// Which one.
        path: PathBuf,
        /// Reading, or reading and writing.
        access: &'static str,
        /// What the host says.
        source: io::Error,
    },
    /// It is a directory, a pipe, a terminal, or the like.
    #[error("a disk is a regular file or a block device, and this is neither")]
    Kind,
    /// Whatever is written goes to its end.
    #[error(
        "the file is open for appending (O_APPEND), where a disk is written at any place; open it without"
    )]
    Append,
    /// Buffers would have to be aligned, and a driver's are not.
    #[error(
        "the file is open past the host's cache (O_DIRECT), which takes aligned buffers alone, and a driver's lie anywhere; open it without"
    )]
    Direct,
    /// Asking about it failed.
    #[error("the host does not say what the file is")]
    Host(#[from] io::Error),
}

impl RawFile {
    /// Opens `path`, without the right to write if `read_only`.
    ///
    /// # Errors
    /// If that cannot be done, or it is neither a regular file nor a block device. Pipes and terminals are not waited for.
    pub fn open(path: impl AsRef<Path>, read_only: bool) -> Result<Self, RawFileError> {
        let path = path.as_ref();
        let mut options = OpenOptions::new();
        options.read(true).write(!read_only).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
        let file = options.open(path).map_err(|source| {
            let access = if read_only { "reading" } else { "reading and writing" };
            RawFileError::Open { path: path.to_owned(), access, source }
        })?;
        // It was for pipes; io_uring would heed it at files too.
        let flags = rustix::fs::fcntl_getfl(&file).map_err(io::Error::from)?;
        rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK).map_err(io::Error::from)?;
        Self::new(file, read_only)
    }

    /// Takes a file that is open, for reading, and for writing unless `read_only`.
    ///
    /// # Errors
    /// If it is neither a regular file nor a block device, or open for appending or past the host's cache.
    pub fn new(file: File, read_only: bool) -> Result<Self, RawFileError> {
        let metadata = file.metadata()?;
        let flags = rustix::fs::fcntl_getfl(&file).map_err(io::Error::from)?;
        if flags.contains(OFlags::APPEND) {
            return Err(RawFileError::Append);
        }
        if flags.contains(OFlags::DIRECT) {
            return Err(RawFileError::Direct);
        }
        let device = metadata.file_type().is_block_device();
        let blocks = if device {
            let logical = rustix::fs::ioctl_blksszget(&file).map_err(io::Error::from)?;
            let physical = rustix::fs::ioctl_blkpbszget(&file).map_err(io::Error::from)?;
            BlockSizes { logical, physical, optimal: 0 }
        } else if metadata.is_file() {
            // What the file system reads and writes at once.
            let physical = u32::try_from(metadata.blksize()).ok().filter(|size| size.is_power_of_two());
            let physical = physical.unwrap_or(4096).clamp(512, 1 << 16);
            BlockSizes { logical: 512, physical, optimal: 0 }
        } else {
            return Err(RawFileError::Kind);
        };
        Ok(Self { file, read_only, blocks })
    }

    /// The file.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Space without contents, in a file or on a device.
    const HOLE: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
    /// Zeros that keep their space.
    const ZEROS: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);
}

impl Backend for RawFile {
    fn size(&self) -> io::Result<u64> {
        // Positions are given with each access, so the file's own is nobody's. Files are asked as devices are: what asks for
        // metadata may look for a path, which a monitor that is confined may not.
        Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?)
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn block_sizes(&self) -> BlockSizes {
        self.blocks
    }

    fn read_at(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
        vectored::read_at(self.file(), buffers, offset)
    }

    fn write_at(&self, buffers: &[VolatileSlice<'_>], offset: u64, durable: bool) -> io::Result<usize> {
        vectored::write_at(self.file(), buffers, offset, durable)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(rustix::fs::fdatasync(&self.file)?)
    }

    fn can_discard(&self) -> bool {
        !self.read_only
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        allocate(&self.file, Self::HOLE, offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let flags = if unmap { Self::HOLE } else { Self::ZEROS };
        match allocate(&self.file, flags, offset, len) {
            // Not every file system can.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                write_zeroes_by_hand(self, offset, len)
            }
            result => result,
        }
    }
}

fn allocate(file: &File, flags: FallocateFlags, offset: u64, len: u64) -> io::Result<()> {
    // The host takes no range of 0 bytes.
    if len == 0 {
        return Ok(());
    }
    loop {
        match rustix::fs::fallocate(file, flags, offset, len) {
            Err(rustix::io::Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}
