//! Files by io_uring: the kernel does requests while others are made, without a thread for each.

#![allow(unsafe_code, reason = "io_uring takes buffers by address, for as long as the kernel has them")]

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;

use io_uring::squeue::Entry;
use io_uring::{IoUring, Probe, opcode, types};

use super::backend::{Backend, ConcurrentDisk, IoQueue, Job, JobEnd, Operation, Waker, behind};
use super::pool::{Pooled, ThreadPool};
use super::raw::RawFile;
use crate::vectored::{Vectors, vectors};
use crate::virtio::device::Progress;

/// What a ring holds at most; further requests wait here.
const MOST: u16 = 256;
/// How often the kernel is asked again for the end of what it has, if it says that it cannot wait.
const TRIES: u32 = 1000;

/// A [`RawFile`] whose reads, writes and flushes are done by io_uring. What else there is, and all where the kernel does not grant a
/// ring (it is too old, or io_uring is forbidden), is done by a pool of threads.
///
/// Requests that have ended make [`Worker::sources`](crate::virtio::Worker::sources) readable: the executor must look at them.
/// [`Inline`](crate::virtio::Inline) does not; there, [`Pooled`] is what to use.
#[derive(Debug)]
pub struct UringFile {
    file: Arc<RawFile>,
    pooled: Pooled,
    allowed: bool,
}

impl UringFile {
    /// Does the requests to `file`, with `pool` for what io_uring is not used for.
    pub fn new(file: RawFile, pool: Arc<ThreadPool>) -> Self {
        let file = Arc::new(file);
        let disk: Arc<dyn Backend> = Arc::<RawFile>::clone(&file);
        Self { file, pooled: Pooled::new(disk, pool), allowed: Self::is_available() }
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
    let needed = [opcode::Readv::CODE, opcode::Writev::CODE, opcode::Fsync::CODE];
    if ring.params().is_feature_nodrop() && needed.into_iter().all(|code| probe.is_supported(code)) {
        return Ok(ring);
    }
    Err(io::ErrorKind::Unsupported.into())
}

impl ConcurrentDisk for UringFile {
    fn disk(&self) -> Arc<dyn Backend> {
        self.pooled.disk()
    }

    fn queue(&self, depth: u16, waker: Waker) -> io::Result<Box<dyn IoQueue>> {
        let pooled = self.pooled.queue(depth, waker)?;
        if !self.allowed {
            return Ok(pooled);
        }
        Ok(match new_ring(depth.min(MOST)) {
            Ok(ring) => Box::new(UringQueue::new(ring, Arc::clone(&self.file), pooled)),
            // Granted to others, maybe, or before: there is a way without.
            Err(_) => pooled,
        })
    }
}

/// Addresses that the kernel has.
struct Addresses(Vectors);

// SAFETY: they are of guest memory, which any thread may use by way of volatile accesses, as VolatileSlice is Send.
unsafe impl Send for Addresses {}

/// A job that the kernel has.
struct UnderWay {
    job: Job,
    addresses: Addresses,
    /// Bytes that were moved so far.
    done: usize,
}

impl UnderWay {
    /// What is to be done next. The addresses are no others until that has ended.
    fn entry(&mut self, file: types::Fd) -> io::Result<Entry> {
        let at = |offset: u64| offset.saturating_add(self.done as u64);
        Ok(match self.job.operation {
            Operation::Flush => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
            Operation::Read { offset } => {
                let offset = at(offset);
                let (address, count) = self.fill()?;
                opcode::Readv::new(file, address, count).offset(offset).build()
            }
            Operation::Write { offset, durable } => {
                let offset = at(offset);
                let (address, count) = self.fill()?;
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                opcode::Writev::new(file, address, count).offset(offset).rw_flags(flags).build()
            }
            // The pool has those.
            Operation::Discard { .. } | Operation::WriteZeroes { .. } => {
                return Err(io::ErrorKind::Unsupported.into());
            }
        })
    }

    /// The addresses of what is left to move.
    fn fill(&mut self) -> io::Result<(*const libc::iovec, u32)> {
        let slices = self.job.buffers.slices()?;
        let left = if self.done == 0 { vectors(&slices) } else { vectors(&behind(&slices, self.done)) };
        let Addresses(kept) = &mut self.addresses;
        *kept = left;
        Ok((kept.as_ptr(), u32::try_from(kept.len()).unwrap_or(0)))
    }

    /// What follows when the kernel has done a step.
    fn after(&mut self, result: i32) -> Step {
        let Ok(moved) = usize::try_from(result) else {
            let error = io::Error::from_raw_os_error(result.wrapping_neg());
            return match error.kind() {
                io::ErrorKind::Interrupted => Step::Again,
                // A file that was opened not to block: threads can wait for it.
                io::ErrorKind::WouldBlock => Step::Pool,
                _ => Step::Ended(Err(error)),
            };
        };
        self.done = self.done.saturating_add(moved);
        if self.done >= self.job.buffers.len() {
            Step::Ended(Ok(()))
        } else if moved == 0 {
            Step::Ended(Err(io::ErrorKind::UnexpectedEof.into()))
        } else {
            Step::Again
        }
    }
}

enum Step {
    Again,
    Pool,
    Ended(io::Result<()>),
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
    /// The ring has entries that the kernel has not taken.
    pushed: bool,
    /// Does what the ring does not.
    pooled: Box<dyn IoQueue>,
}

impl fmt::Debug for UringQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UringQueue").field("file", &self.file).finish_non_exhaustive()
    }
}

impl UringQueue {
    fn new(ring: IoUring, file: Arc<RawFile>, pooled: Box<dyn IoQueue>) -> Self {
        // Never more than there are entries, so that none is too many for either ring.
        let places = usize::try_from(ring.params().sq_entries()).unwrap_or(1);
        let (waiting, ended) = (VecDeque::new(), Vec::new());
        let under_way = (0..places).map(|_| None).collect();
        Self { ring, file, under_way, free: (0..places).collect(), waiting, ended, pushed: false, pooled }
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
                // SAFETY: the file is open as long as `self.file` is there. The addresses, and the memory that they name, which
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
        match job.operation {
            Operation::Discard { .. } | Operation::WriteZeroes { .. } => self.pooled.submit(job),
            Operation::Read { .. } | Operation::Write { .. } if job.buffers.is_empty() => {
                self.end(job.tag, Ok(()));
            }
            _ => self.waiting.push_back(Box::new(UnderWay {
                job,
                addresses: Addresses(Vectors::new()),
                done: 0,
            })),
        }
    }

    fn kick(&mut self) {
        self.pooled.kick();
        self.push();
        if self.pushed {
            // Without memory, or interrupted, it takes some of them or none.
            let (Ok(_) | Err(_)) = self.ring.submit();
            self.pushed = !self.ring.submission().is_empty();
        }
    }

    fn reap(&mut self, ended: &mut Vec<JobEnd>) -> Progress {
        for (mut job, result) in self.completions() {
            match job.after(result) {
                Step::Again => self.waiting.push_front(job),
                Step::Pool => self.pooled.submit(job.job),
                Step::Ended(result) => self.end(job.job.tag, result),
            }
        }
        // What goes on, and what had no place on the ring before.
        self.kick();
        ended.append(&mut self.ended);
        let progress = self.pooled.reap(ended);
        // Nothing else brings the kernel to take the rest.
        if self.pushed { Progress::More } else { progress }
    }

    fn drain(&mut self) {
        self.pooled.drain();
        self.kick();
        if self.is_busy() {
            // One that cannot wait now is asked again: who drains looks whether anything has ended.
            if self.ring.submit_and_wait(1).is_err() {
                std::thread::yield_now();
            }
            self.pushed = !self.ring.submission().is_empty();
        }
    }

    fn cancel(&mut self) {
        self.waiting.clear();
        self.pooled.cancel();
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

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;

    use super::*;
    use crate::testkit::{DriverQueue, LinkRecorder, guest_memory};
    use crate::virtio::Virtqueue;
    use crate::virtio::block::buffers::{Area, Buffers};

    /// A ring that is not enabled yet stands for a kernel that has no memory.
    #[test]
    fn what_the_kernel_does_not_take_is_offered_again() {
        if !UringFile::is_available() {
            println!("skipped: no io_uring");
            return;
        }
        let memory = guest_memory(1 << 20).unwrap();
        let mut driver = DriverQueue::new(memory.clone(), 0x1000, 4).unwrap();
        let link = Arc::new(LinkRecorder::default());
        let mut queue = Virtqueue::new(driver.device_side().unwrap(), 0, memory, link).unwrap();
        driver.chain().readable(0x8000, 16).submit().unwrap();
        let chain = queue.pop(queue.memory()).unwrap().unwrap();
        let job = Job { tag: 3, operation: Operation::Flush, buffers: Buffers::new(chain, Area::None) };

        let file = RawFile::new(tempfile::tempfile().unwrap(), false).unwrap();
        let disk = UringFile::new(file, ThreadPool::new(NonZeroUsize::MIN).unwrap());
        let pooled = disk.pooled.queue(4, Arc::new(|| ())).unwrap();
        let ring = IoUring::builder().setup_r_disabled().build(4).unwrap();
        let mut queue = UringQueue::new(ring, Arc::clone(&disk.file), pooled);
        let mut ended = Vec::new();
        queue.submit(job);
        queue.kick();
        for _ in 0..3 {
            assert_eq!(queue.reap(&mut ended), Progress::More);
        }
        assert!(ended.is_empty());
        queue.ring.submitter().register_enable_rings().unwrap();
        while ended.is_empty() {
            assert_eq!(queue.reap(&mut ended), Progress::Idle);
        }
        assert!(matches!(ended[..], [JobEnd { tag: 3, result: Ok(()) }]));
    }
}
