//! Serves one queue of a block device.

use std::io;
use std::ops::Deref;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vmm_memory::vm_memory::GuestAddressSpace;

use super::Shared;
use super::backend::{IoQueue, Job, JobEnd};
use super::buffers::{Buffers, mark_written, with_slices};
use super::config::ID_BYTES;
use super::request::{Agreed, Request, Status, Task, Terms};
use crate::virtio::device::{DeviceMemory, Progress, Worker};
use crate::virtio::metrics::Ended;
use crate::virtio::queue::{Chain, QueueError, Virtqueue};
use crate::virtio::rate::Throttled;

/// Bytes that are moved before others have their turn, or what takes as long.
const SHARE: u64 = 8 << 20;

/// Segments of what is under way, from which on no more is taken until some has ended: each chain may have as many as the queue can have
/// descriptors, and is remembered meanwhile.
const MOST_SEGMENTS: usize = 1 << 16;

type Guard<M> = <M as GuestAddressSpace>::T;

/// A request that the device has taken, and keeps.
struct Taken<M: DeviceMemory> {
    chain: Chain<Guard<M>>,
    request: Request,
    begun_ns: u64,
    /// How often the disk had become smaller before.
    shrinks: u64,
}

pub(super) struct BlockWorker<M: DeviceMemory> {
    queue: Virtqueue<M>,
    shared: Arc<Shared>,
    agreed: Agreed,
    io: Option<Box<dyn IoQueue>>,
    /// By head, what `io` has.
    under_way: Vec<Option<Taken<M>>>,
    /// All their segments.
    segments: usize,
    ended: Vec<JobEnd>,
    /// What waits for a rate limit. Nothing behind it is taken.
    waiting: Option<(Taken<M>, Throttled)>,
    /// How often the disk had become smaller when the oldest request was let in that may be under way, as others were told; `None` after
    /// a stop.
    shrinks: Option<u64>,
}

impl<M: DeviceMemory> BlockWorker<M> {
    pub(super) fn new(
        queue: Virtqueue<M>,
        shared: Arc<Shared>,
        agreed: Agreed,
        io: Option<Box<dyn IoQueue>>,
    ) -> Self {
        let places = if io.is_some() { queue.size().into() } else { 0 };
        let under_way = (0..places).map(|_| None).collect();
        let shrinks = shared.shrinks.count();
        shared.shrinks.tell(queue.index(), Some(shrinks));
        let (ended, waiting) = (Vec::new(), None);
        Self { queue, shared, agreed, io, under_way, segments: 0, ended, waiting, shrinks: Some(shrinks) }
    }

    /// Tells who waits for it that no request is left that was let in when the disk was larger than at the last of so many times.
    fn settle(&mut self, shrinks: u64) {
        if self.shrinks.is_none_or(|told| told == shrinks) {
            return;
        }
        let oldest = self.under_way.iter().flatten().map(|taken| taken.shrinks).min().unwrap_or(shrinks);
        if self.shrinks.replace(oldest) != Some(oldest) {
            self.shared.shrinks.tell(self.queue.index(), Some(oldest));
        }
    }

    /// Gives back what has ended.
    fn reap(&mut self) -> Result<Progress, QueueError> {
        let Some(io) = &mut self.io else { return Ok(Progress::Idle) };
        let progress = io.reap(&mut self.ended);
        for JobEnd { tag, result } in self.ended.drain(..) {
            let taken = self.under_way.get_mut(usize::from(tag)).and_then(Option::take);
            let Some(Taken { chain, request, begun_ns, .. }) = taken else { continue };
            self.segments = self.segments.saturating_sub(chain.segments());
            mark_written(&chain, request.area);
            finish(&mut self.queue, &self.shared, &chain, &request, status(result), begun_ns)?;
        }
        Ok(progress)
    }

    /// Does a request, or begins it.
    fn execute<T>(
        &mut self,
        chain: &Chain<T>,
        request: &Request,
        (begun_ns, shrinks): (u64, u64),
        hold: impl FnOnce() -> Guard<M>,
    ) -> Result<(), QueueError>
    where
        T: Deref<Target = M::M> + Clone,
    {
        let status = match &request.task {
            Task::Fail(status) => *status,
            Task::GetId => match chain.write(0, &self.shared.serial) {
                Ok(ID_BYTES) => Status::Ok,
                _ => Status::IoError,
            },
            Task::Disk(operation) => match &mut self.io {
                Some(io) => {
                    let (tag, chain) = (chain.head(), chain.clone().in_memory(hold()));
                    let buffers = Buffers::new(chain.clone(), request.area);
                    // A head is in flight once, so the place is free.
                    if let Some(place) = self.under_way.get_mut(usize::from(tag)) {
                        self.segments += chain.segments();
                        *place = Some(Taken { chain, request: *request, begun_ns, shrinks });
                        io.submit(Job { tag, operation: *operation, buffers });
                    }
                    return Ok(());
                }
                None => {
                    // Nothing is done with buffers that are not in RAM.
                    with_slices(chain, &request.area, |slices| operation.run(&*self.shared.disk, slices))
                        .map_or(Status::IoError, status)
                }
            },
        };
        finish(&mut self.queue, &self.shared, chain, request, status, begun_ns)
    }

    /// Whether some have to end before more are taken.
    fn is_full(&self) -> bool {
        self.segments >= MOST_SEGMENTS
    }

    /// Takes requests, until there are no more, one has to wait, or it is the turn of others.
    fn serve(&mut self, shrinks: u64) -> Result<Next, QueueError> {
        let (shared, memory) = (Arc::clone(&self.shared), self.queue.memory());
        let mut terms = Terms::new(&shared, self.agreed);
        let mut left = SHARE;
        if let Some((taken, throttled)) = self.waiting.take() {
            if let Err(throttled) = throttled.retry() {
                self.waiting = Some((taken, throttled));
                return Ok(Next::Wait);
            }
            let Taken { chain, request, begun_ns, .. } = taken;
            // The disk may have become smaller meanwhile.
            let request = request.within(&mut terms);
            left = left.saturating_sub(request.effort());
            self.execute(&chain, &request, (begun_ns, shrinks), || memory.clone())?;
        }
        while left > 0 {
            if self.is_full() {
                return Ok(Next::Full);
            }
            let popped = self.queue.pop(&*memory);
            // It stays where it is: moving it about takes as long as reading it.
            let chain = match &popped {
                Ok(Some(chain)) => chain,
                Ok(None) => return Ok(Next::Empty),
                Err(_) => return popped.map(|_| Next::Empty),
            };
            let begun_ns = shared.now_ns();
            let request = Request::read(chain, &mut terms);
            if let Err(throttled) = shared.rate.as_ref().map_or(Ok(()), |rate| rate.admit(request.cost)) {
                if let Some(metrics) = &shared.metrics {
                    metrics.sink.throttled();
                }
                let chain = chain.clone().in_memory(memory.clone());
                self.waiting = Some((Taken { chain, request, begun_ns, shrinks }, throttled));
                return Ok(Next::Wait);
            }
            self.execute(chain, &request, (begun_ns, shrinks), || memory.clone())?;
            left = left.saturating_sub(request.effort());
        }
        Ok(Next::Others)
    }
}

/// Why no more requests are taken.
enum Next {
    Empty,
    Wait,
    /// It goes on when some have ended.
    Full,
    Others,
}

fn status(result: io::Result<()>) -> Status {
    match result {
        Ok(()) => Status::Ok,
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Status::Unsupported,
        Err(_) => Status::IoError,
    }
}

/// Tells the driver how a request has ended.
fn finish<M: DeviceMemory, T: Deref<Target = M::M>>(
    queue: &mut Virtqueue<M>,
    shared: &Shared,
    chain: &Chain<T>,
    request: &Request,
    status: Status,
    begun_ns: u64,
) -> Result<(), QueueError> {
    let told = request.status_at.is_some_and(|at| chain.write(at, &[status as u8]).is_ok_and(|len| len == 1));
    // A driver that cannot be told how it went is told that nothing was written.
    let written = if told { u32::try_from(request.written(status)).unwrap_or(u32::MAX) } else { 0 };
    if let Some(metrics) = &shared.metrics {
        metrics.sink.ended(Ended {
            activity: request.activity,
            bytes: request.moved(status),
            succeeded: told && status == Status::Ok,
            latency_ns: metrics.clock.now_ns().saturating_sub(begun_ns),
        });
    }
    queue.complete_in(chain.memory(), chain.head(), written)
}

impl<M: DeviceMemory> Worker for BlockWorker<M> {
    fn queues(&self) -> Vec<u16> {
        vec![self.queue.index()]
    }

    fn process(&mut self) -> Result<Progress, QueueError> {
        let shrinks = self.shared.shrinks.count();
        let (Progress::Idle | Progress::More) = self.reap()?;
        self.queue.decline_doorbells()?;
        let next = self.serve(shrinks);
        if let Some(io) = &mut self.io {
            io.kick();
        }
        let next = next?;
        // What the host had at hand has ended already.
        let progress = self.reap()?;
        self.settle(shrinks);
        let more = self.queue.rest()?;
        Ok(match next {
            Next::Empty if more == Progress::More => Progress::More,
            Next::Full if !self.is_full() => Progress::More,
            Next::Empty | Next::Wait | Next::Full => progress,
            Next::Others => Progress::More,
        })
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        self.io.iter().filter_map(|io| io.source()).collect()
    }

    fn deadline(&self) -> Option<u64> {
        self.waiting.as_ref().map(|(_, throttled)| throttled.until_ns())
    }

    /// What the disk has is waited for. A request that waits for a limit has not begun.
    fn pause(&mut self) -> Result<(), QueueError> {
        let shrinks = self.shared.shrinks.count();
        while self.under_way.iter().any(Option::is_some) {
            if let Some(io) = &mut self.io {
                io.drain();
            }
            let (Progress::Idle | Progress::More) = self.reap()?;
        }
        self.settle(shrinks);
        self.queue.interrupt()
    }

    fn stop(&mut self) {
        if let Some(io) = &mut self.io {
            io.cancel();
        }
        // What has ended, or was cancelled, may have been written to all the same.
        for Taken { chain, request, .. } in self.under_way.iter_mut().filter_map(Option::take) {
            mark_written(&chain, request.area);
        }
        (self.waiting, self.ended, self.segments) = (None, Vec::new(), 0);
        if self.shrinks.take().is_some() {
            self.shared.shrinks.tell(self.queue.index(), None);
        }
    }
}

impl<M: DeviceMemory> Drop for BlockWorker<M> {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A disk's name as drivers get it: padded with zeros, and without one at the end if it is that long (5.2.6.1).
pub(super) fn serial(name: &[u8]) -> [u8; ID_BYTES] {
    let mut serial = [0; ID_BYTES];
    serial.iter_mut().zip(name).for_each(|(place, byte)| *place = *byte);
    serial
}
