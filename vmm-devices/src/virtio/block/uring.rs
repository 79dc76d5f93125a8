//! Files by io_uring: the kernel does requests while others are made, without a thread for each.

#![allow(unsafe_code, reason = "io_uring takes buffers by address, for as long as the kernel has them")]

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::squeue::Entry;
use io_uring::{IoUring, Probe, opcode, types};
use rustix::fs::FallocateFlags;
use vmm_memory::vm_memory::VolatileSlice;

use super::backend::{Backend, BlockSizes, IoQueue, Job, JobEnd, Operation, Waker, behind};
use super::pool::{Pooled, ThreadPool};
use super::raw::RawFile;

/// What a ring holds at most; further requests wait here.
const MOST: u16 = 256;
/// Vectors of one submission (IOV_MAX).
const VECTORS: usize = 1024;
/// How often the kernel is asked again that has no memory for a submission.
const TRIES: u32 = 1000;

/// A [`RawFile`] whose requests are done by io_uring, or by a pool of threads where the kernel does not grant a ring: it is too
/// old, or io_uring is forbidden.
///
/// Requests that have ended make [`Worker::sources`](crate::virtio::Worker::sources) readable: the executor must look at them.
/// [`Inline`](crate::virtio::Inline) does not; there, [`Pooled`] is what to use.
#[derive(Debug)]
pub struct UringFile {
    file: Arc<RawFile>,
    fallback: Arc<ThreadPool>,
    allowed: bool,
}

impl UringFile {
    /// Does the requests to `file`, with `fallback` where there is no io_uring.
    pub fn new(file: RawFile, fallback: Arc<ThreadPool>) -> Self {
        Self { file: Arc::new(file), fallback, allowed: Self::is_available() }
    }

    /// Whether the kernel grants rings, with the operations that are needed here, to this process.
    pub fn is_available() -> bool {
        new_ring(1).is_ok()
    }

    /// The same file, as if the kernel granted no rings.
    #[cfg(test)]
    pub(super) fn forbidden(mut self) -> Self {
        self.allowed = false;
        self
    }
}

fn new_ring(entries: u16) -> io::Result<IoUring> {
    let ring = IoUring::builder().dontfork().setup_clamp().build(entries.into())?;
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe)?;
    let needed = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE, opcode::Fallocate::CODE];
    if ring.params().is_feature_nodrop() && needed.into_iter().all(|code| probe.is_supported(code)) {
        return Ok(ring);
    }
    Err(io::ErrorKind::Unsupported.into())
}

impl Backend for UringFile {
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn is_read_only(&self) -> bool {
        self.file.is_read_only()
    }

    fn block_sizes(&self) -> BlockSizes {
        self.file.block_sizes()
    }

    fn read_at(&self, buffers: &[VolatileSlice<'_>], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffers, offset)
    }

    fn write_at(&self, buffers: &[VolatileSlice<'_>], offset: u64, durable: bool) -> io::Result<usize> {
        self.file.write_at(buffers, offset, durable)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.flush()
    }

    fn can_discard(&self) -> bool {
        self.file.can_discard()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.file.write_zeroes(offset, len, unmap)
    }

    fn queue(self: Arc<Self>, depth: u16, waker: Waker) -> io::Result<Option<Box<dyn IoQueue>>> {
        let ring =
            if self.allowed { new_ring(depth.min(MOST)) } else { Err(io::ErrorKind::Unsupported.into()) };
        match ring {
            Ok(ring) => Ok(Some(Box::new(UringQueue::new(ring, Arc::clone(&self.file))))),
            // Granted to others, maybe, or before: there is a way without.
            Err(_) => {
                let file: Arc<dyn Backend> = Arc::<RawFile>::clone(&self.file);
                Arc::new(Pooled::new(file, Arc::clone(&self.fallback))).queue(depth, waker)
            }
        }
    }
}

/// Addresses that the kernel has.
struct Vectors(Vec<libc::iovec>);

// SAFETY: the addresses are of guest memory, which any thread may use by way of volatile accesses, as VolatileSlice is Send.
unsafe impl Send for Vectors {}

/// A job that the kernel has.
struct UnderWay {
    job: Job,
    vectors: Vectors,
    /// Bytes that were moved so far.
    done: usize,
    /// Zeros are written, and now brought to stable storage.
    flushing: bool,
}

impl UnderWay {
    fn total(&self) -> io::Result<usize> {
        Ok(self.job.buffers.slices()?.iter().map(VolatileSlice::len).sum())
    }

    /// What is to be done next. The vectors are no others until that has ended.
    fn entry(&mut self, file: types::Fd) -> io::Result<Entry> {
        let datasync = || opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build();
        let allocate = |flags: FallocateFlags, offset, len| {
            // The kernel has the flags in the same bits.
            let mode = i32::try_from(flags.bits()).unwrap_or(i32::MAX);
            opcode::Fallocate::new(file, len).offset(offset).mode(mode).build()
        };
        Ok(match self.job.operation {
            _ if self.flushing => datasync(),
            Operation::Flush => datasync(),
            Operation::Discard { offset, len } => allocate(RawFile::HOLE, offset, len),
            Operation::WriteZeroes { offset, len, unmap: true, .. } => allocate(RawFile::HOLE, offset, len),
            Operation::WriteZeroes { offset, len, .. } => allocate(RawFile::ZEROS, offset, len),
            Operation::Read { offset } => {
                let (address, count) = self.fill_vectors()?;
                let offset = offset.saturating_add(self.done as u64);
                opcode::Readv::new(file, address, count).offset(offset).build()
            }
            Operation::Write { offset, durable } => {
                let (address, count) = self.fill_vectors()?;
                let offset = offset.saturating_add(self.done as u64);
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                opcode::Writev::new(file, address, count).offset(offset).rw_flags(flags).build()
            }
        })
    }

    /// The vectors of what is left to move.
    fn fill_vectors(&mut self) -> io::Result<(*const libc::iovec, u32)> {
        let slices = self.job.buffers.slices()?;
        let vector = |slice: VolatileSlice<'_>| libc::iovec {
            iov_base: slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: slice.len(),
        };
        self.vectors.0 = behind(&slices, self.done).into_iter().take(VECTORS).map(vector).collect();
        Ok((self.vectors.0.as_ptr(), u32::try_from(self.vectors.0.len()).unwrap_or(0)))
    }
}

/// What follows when the kernel has done a step.
enum Step {
    Again,
    Ended(io::Result<()>),
}

impl UnderWay {
    fn after(&mut self, result: i32, file: &RawFile) -> Step {
        let error = io::Error::from_raw_os_error(result.wrapping_neg());
        match (self.job.operation, usize::try_from(result)) {
            // A file that was opened not to block, or no zeros in this file system: as without a ring.
            (_, Err(_)) if error.kind() == io::ErrorKind::WouldBlock => Step::Ended(self.job.run(file)),
            (Operation::WriteZeroes { .. }, Err(_)) if error.kind() == io::ErrorKind::Unsupported => {
                Step::Ended(self.job.run(file))
            }
            (_, Err(_)) if error.kind() == io::ErrorKind::Interrupted => Step::Again,
            (_, Err(_)) => Step::Ended(Err(error)),
            (Operation::Read { .. } | Operation::Write { .. }, Ok(moved)) => {
                self.done = self.done.saturating_add(moved);
                match self.total() {
                    Ok(total) if self.done >= total => Step::Ended(Ok(())),
                    Ok(_) if moved == 0 => Step::Ended(Err(io::ErrorKind::UnexpectedEof.into())),
                    Ok(_) => Step::Again,
                    Err(error) => Step::Ended(Err(error)),
                }
            }
            (Operation::WriteZeroes { durable: true, .. }, Ok(_)) if !self.flushing => {
                self.flushing = true;
                Step::Again
            }
            (_, Ok(_)) => Step::Ended(Ok(())),
        }
    }
}

struct UringQueue {
    ring: IoUring,
    file: Arc<RawFile>,
    /// By the number that the kernel knows them by. It has each until its completion was seen.
    under_way: Vec<Option<Box<UnderWay>>>,
    free: Vec<usize>,
    /// To be begun, or to go on.
    waiting: VecDeque<Box<UnderWay>>,
    ended: Vec<JobEnd>,
    /// The ring has entries that the kernel was not told of.
    pushed: bool,
}

impl fmt::Debug for UringQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UringQueue").field("file", &self.file).finish_non_exhaustive()
    }
}

impl UringQueue {
    fn new(ring: IoUring, file: Arc<RawFile>) -> Self {
        // Never more than there are entries, so that none is too many for either ring.
        let places = usize::try_from(ring.params().sq_entries()).unwrap_or(1);
        let (waiting, ended) = (VecDeque::new(), Vec::new());
        let under_way = (0..places).map(|_| None).collect();
        Self { ring, file, under_way, free: (0..places).collect(), waiting, ended, pushed: false }
    }

    fn is_busy(&self) -> bool {
        self.free.len() < self.under_way.len()
    }

    fn end(&mut self, tag: u16, result: io::Result<()>) {
        self.ended.push(JobEnd { tag, result });
    }

    /// Puts what waits on the ring.
    fn push(&mut self) {
        let file = types::Fd(self.file.file().as_raw_fd());
        while let Some(index) = self.free.pop_if(|_| !self.waiting.is_empty()) {
            let (Some(mut job), Some(place)) = (self.waiting.pop_front(), self.under_way.get_mut(index))
            else {
                break;
            };
            let entry = job.entry(file).map(|entry| entry.user_data(index as u64));
            let job = place.insert(job);
            let refused = match entry {
                // SAFETY: the file is open as long as `self.file` is there. The vectors, and the memory that they name, which
                // `job.buffers` keeps mapped, stay where they are in their boxes until the completion was seen:
                // `under_way` is emptied there alone, and left undropped if it cannot be.
                Ok(entry) => match unsafe { self.ring.submission().push(&entry) } {
                    Ok(()) => {
                        self.pushed = true;
                        continue;
                    }
                    Err(_) => io::ErrorKind::QuotaExceeded.into(),
                },
                Err(error) => error,
            };
            // The kernel never had it.
            let tag = job.job.tag;
            *place = None;
            self.free.push(index);
            self.end(tag, Err(refused));
        }
    }

    /// Tells the kernel of what is on the ring.
    fn submit(&mut self) {
        for _ in 0..TRIES {
            match self.ring.submit() {
                Ok(_) => {
                    self.pushed = !self.ring.submission().is_empty();
                    if !self.pushed {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // No memory for now. The next call tries again.
                Err(_) => std::thread::yield_now(),
            }
        }
    }

    /// Takes back what the kernel has done with, and how it went.
    fn completions(&mut self) -> Vec<(Box<UnderWay>, i32)> {
        let mut done = Vec::new();
        for completion in self.ring.completion() {
            let index = usize::try_from(completion.user_data()).unwrap_or(usize::MAX);
            if let Some(job) = self.under_way.get_mut(index).and_then(Option::take) {
                self.free.push(index);
                done.push((job, completion.result()));
            }
        }
        done
    }
}

impl IoQueue for UringQueue {
    fn submit(&mut self, job: Job) {
        // The kernel takes no range of 0 bytes.
        let empty = matches!(
            job.operation,
            Operation::Discard { len: 0, .. } | Operation::WriteZeroes { len: 0, .. }
        );
        let job = Box::new(UnderWay { job, vectors: Vectors(Vec::new()), done: 0, flushing: false });
        match (job.job.operation, job.total()) {
            (Operation::Read { .. } | Operation::Write { .. }, Ok(0)) => self.end(job.job.tag, Ok(())),
            _ if empty => self.end(job.job.tag, Ok(())),
            _ => self.waiting.push_back(job),
        }
    }

    fn kick(&mut self) {
        self.push();
        if self.pushed {
            self.submit();
        }
    }

    fn reap(&mut self, ended: &mut Vec<JobEnd>) {
        for (mut job, result) in self.completions() {
            match job.after(result, &self.file) {
                Step::Again => self.waiting.push_front(job),
                Step::Ended(result) => self.end(job.job.tag, result),
            }
        }
        // What goes on, and what had no place on the ring before.
        self.kick();
        ended.append(&mut self.ended);
    }

    fn cancel(&mut self) {
        self.waiting.clear();
        let mut tries = 0;
        while self.is_busy() && tries < TRIES {
            drop(self.completions());
            if !self.is_busy() {
                break;
            }
            match self.ring.submit_and_wait(1) {
                Ok(_) => tries = 0,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => {
                    tries += 1;
                    std::thread::yield_now();
                }
            }
        }
        if self.is_busy() {
            // A kernel that does not say that it is done may still use them. Their places stay taken.
            self.under_way.iter_mut().filter_map(Option::take).for_each(std::mem::forget);
        }
        self.ended.clear();
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        // SAFETY: the ring's descriptor is open as long as the ring is there, which is borrowed.
        Some(unsafe { BorrowedFd::borrow_raw(self.ring.as_raw_fd()) })
    }
}

impl Drop for UringQueue {
    fn drop(&mut self) {
        self.cancel();
    }
}
