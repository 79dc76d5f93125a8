//! What a disk is to the device: reads and writes at positions, and what else there is to a disk.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vmm_memory::vm_memory::VolatileSlice;

use super::buffers::Buffers;
use crate::virtio::device::Progress;

/// Sizes of blocks that a driver had better know, in bytes; powers of two from 512 on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockSizes {
    /// The smallest unit that can be addressed efficiently (`blk_size`).
    pub logical: u32,
    /// The smallest unit that is written without reading it first.
    pub physical: u32,
    /// The best length of a request; 0 if there is none.
    pub optimal: u32,
}

impl Default for BlockSizes {
    fn default() -> Self {
        Self { logical: 512, physical: 512, optimal: 0 }
    }
}

/// A disk. Called from several threads at once; the device has checked that what it asks for lies within the disk.
///
/// Positions and lengths are bytes. The device asks for whole sectors of 512 bytes, and continues transfers that come back
/// short. Buffers lie in the guest's memory, which changes at any moment.
pub trait Backend: Send + Sync {
    /// How large it is now. The device looks once before it serves requests that the driver has sent, and again before one fails
    /// that lies beyond.
    ///
    /// # Errors
    /// If that cannot be said, and no request can be served.
    fn size(&self) -> io::Result<u64>;

    /// Whether it cannot be written.
    fn is_read_only(&self) -> bool {
        false
    }

    /// Its blocks.
    fn block_sizes(&self) -> BlockSizes {
        BlockSizes::default()
    }

    /// Reads at `offset` into `buffers`, one after the other; how many bytes. Fewer than asked for is no error, none is the
    /// end.
    ///
    /// # Errors
    /// The request fails. [`io::ErrorKind::Interrupted`] has it tried again.
    fn read_at(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize>;

    /// Writes `buffers` at `offset`; how many bytes. If `durable`, they are on stable storage when it returns.
    ///
    /// # Errors
    /// As [`Backend::read_at`].
    fn write_at(&self, buffers: &[VolatileSlice<'_>], offset: u64, durable: bool) -> io::Result<usize>;

    /// Brings to stable storage what was written before.
    ///
    /// # Errors
    /// If that is not so.
    fn flush(&self) -> io::Result<()>;

    /// Whether [`Backend::discard`] is worth offering.
    fn can_discard(&self) -> bool {
        false
    }

    /// The driver does not need these bytes any more.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] if it cannot be done here.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let _ = (offset, len);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Makes these bytes zeros; their storage may be given back if `unmap`.
    ///
    /// # Errors
    /// The request fails.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let _ = unmap;
        write_zeroes_by_hand(self, offset, len)
    }
}

/// A disk on which requests go on while others are made.
pub trait ConcurrentDisk: Send + Sync {
    /// The disk itself, of which the device asks what it is like.
    fn disk(&self) -> Arc<dyn Backend>;

    /// A way to it for one queue of the device, with at most `depth` requests under way. It calls `waker`, from any thread, when
    /// some have ended, unless they make its [`IoQueue::source`] readable.
    ///
    /// # Errors
    /// If the host refuses; the device does not start.
    fn queue(&self, depth: u16, waker: Waker) -> io::Result<Box<dyn IoQueue>>;
}

/// Says that requests have ended.
pub type Waker = Arc<dyn Fn() + Send + Sync>;

/// Zeros for a disk that knows no better.
pub(super) fn write_zeroes_by_hand<B: Backend + ?Sized>(disk: &B, offset: u64, len: u64) -> io::Result<()> {
    const PIECE: usize = 64 << 10;
    let mut zeros = vec![0; usize::try_from(len).unwrap_or(PIECE).min(PIECE)];
    let mut done = 0;
    while done < len {
        let piece = usize::try_from(len - done).unwrap_or(PIECE).min(PIECE);
        let piece = zeros.get_mut(..piece).unwrap_or_default();
        let written = piece.len();
        transfer(&[VolatileSlice::from(piece)], offset + done, |slices, at| {
            disk.write_at(slices, at, false)
        })?;
        done += written as u64;
    }
    Ok(())
}

/// What one request asks of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fills its buffers.
    Read {
        /// From this byte on.
        offset: u64,
    },
    /// Writes its buffers.
    Write {
        /// From this byte on.
        offset: u64,
        /// It has ended when it is on stable storage.
        durable: bool,
    },
    /// [`Backend::flush`].
    Flush,
    /// [`Backend::discard`].
    Discard {
        /// From this byte on.
        offset: u64,
        /// So many.
        len: u64,
    },
    /// [`Backend::write_zeroes`].
    WriteZeroes {
        /// From this byte on.
        offset: u64,
        /// So many.
        len: u64,
        /// Their storage may be given back.
        unmap: bool,
        /// It has ended when it is on stable storage.
        durable: bool,
    },
}

impl Operation {
    /// Does it, in full, on the calling thread.
    ///
    /// # Errors
    /// Those of `disk`; [`io::ErrorKind::UnexpectedEof`] where it ends early.
    pub fn run(&self, disk: &(impl Backend + ?Sized), buffers: &[VolatileSlice<'_>]) -> io::Result<()> {
        match *self {
            Self::Read { offset } => transfer(buffers, offset, |slices, at| disk.read_at(slices, at)),
            Self::Write { offset, durable } => {
                transfer(buffers, offset, |slices, at| disk.write_at(slices, at, durable))
            }
            Self::Flush => disk.flush(),
            Self::Discard { offset, len } => disk.discard(offset, len),
            Self::WriteZeroes { offset, len, unmap, durable } => {
                disk.write_zeroes(offset, len, unmap)?;
                if durable { disk.flush() } else { Ok(()) }
            }
        }
    }
}

/// Calls `step` until all of `buffers` is transferred.
fn transfer(
    buffers: &[VolatileSlice<'_>],
    offset: u64,
    mut step: impl FnMut(&[VolatileSlice<'_>], u64) -> io::Result<usize>,
) -> io::Result<()> {
    let total: usize = buffers.iter().map(VolatileSlice::len).sum();
    let (mut done, mut rest) = (0, None);
    while done < total {
        match step(rest.as_deref().unwrap_or(buffers), offset.saturating_add(done as u64)) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(len) => done = done.saturating_add(len),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        if done < total {
            rest = Some(behind(buffers, done));
        }
    }
    Ok(())
}

/// What lies behind the first `skip` bytes of `buffers`.
pub(super) fn behind<'a>(buffers: &[VolatileSlice<'a>], mut skip: usize) -> Vec<VolatileSlice<'a>> {
    let mut rest = Vec::with_capacity(buffers.len());
    for slice in buffers {
        let within = skip.min(slice.len());
        skip -= within;
        // Within its length, so there is no error.
        rest.extend(slice.offset(within).ok().filter(|slice| !slice.is_empty()));
    }
    rest
}

/// A request on its way to a disk. It owns its buffers: the guest's memory stays mapped as long as it is there.
#[derive(Debug)]
pub struct Job {
    /// By which the device knows it.
    pub tag: u16,
    /// What is to be done.
    pub operation: Operation,
    /// With what; empty where the operation has no data.
    pub buffers: Buffers,
}

impl Job {
    /// Does it on the calling thread.
    ///
    /// # Errors
    /// As [`Operation::run`].
    pub fn run(&self, disk: &(impl Backend + ?Sized)) -> io::Result<()> {
        self.operation.run(disk, &self.buffers.slices()?)
    }
}

/// A job that has ended.
#[derive(Debug)]
pub struct JobEnd {
    /// Its tag.
    pub tag: u16,
    /// Whether it was done in full.
    pub result: io::Result<()>,
}

/// Requests that go on by themselves. It belongs to one queue of a device, and is called by one thread at a time. Dropping it
/// is as [`IoQueue::cancel`].
pub trait IoQueue: Send + fmt::Debug {
    /// Begins a request, now or at the next [`IoQueue::kick`]. The order in which requests are done is not said.
    fn submit(&mut self, job: Job);

    /// All that was submitted is to begin.
    fn kick(&mut self) {}

    /// Adds the requests that have ended since the last call to `ended`. Nothing of theirs is touched any more. It is called after
    /// each [`IoQueue::kick`], and when there is news; soon again if it says [`Progress::More`], because the host could not take
    /// all that is to begin.
    fn reap(&mut self, ended: &mut Vec<JobEnd>) -> Progress;

    /// Waits until something has ended that [`IoQueue::reap`] tells, all of it at best, or nothing is under way. What was submitted begins
    /// before.
    fn drain(&mut self);

    /// Ends what goes on: what has not begun does not begin, what has is waited for. When it returns no buffer is touched any more,
    /// and nothing is written to the disk.
    fn cancel(&mut self);

    /// Readable when requests have ended for which it does not call its waker.
    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
