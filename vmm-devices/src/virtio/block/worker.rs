//! Serves one queue of a block device.

use std::io;
use std::ops::Deref;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vmm_memory::vm_memory::GuestAddressSpace;

use super::Shared;
use super::backend::{IoQueue, Job, JobEnd};
use super::buffers::{Buffers, mark_written, slices, with_slices};
use super::config::{ID_BYTES, SECTOR};
use super::request::{Request, Status, Task, Terms};
use crate::virtio::device::{DeviceMemory, Progress, Worker};
use crate::virtio::metrics::Ended;
use crate::virtio::queue::{Chain, QueueError, Virtqueue};
use crate::virtio::rate::Throttled;

/// Bytes that are moved before others have their turn.
const SHARE: u64 = 8 << 20;

type Guard<M> = <M as GuestAddressSpace>::T;

/// What this driver may do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Agreed {
    pub(super) flush: bool,
    pub(super) discard: bool,
    pub(super) write_zeroes: bool,
}

/// A request that the device has taken, and keeps.
struct Taken<M: DeviceMemory> {
    chain: Chain<Guard<M>>,
    request: Request,
    begun_ns: u64,
}

pub(super) struct BlockWorker<M: DeviceMemory> {
    queue: Virtqueue<M>,
    shared: Arc<Shared>,
    agreed: Agreed,
    io: Option<Box<dyn IoQueue>>,
    /// By head, what `io` has.
    under_way: Vec<Option<Taken<M>>>,
    ended: Vec<JobEnd>,
    /// What waits for a rate limit, and until when. Nothing behind it is taken.
    waiting: Option<(Taken<M>, u64)>,
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
        Self { queue, shared, agreed, io, under_way, ended: Vec::new(), waiting: None }
    }

    /// What holds for the requests of one call. The disk is asked once how large it is, so that none goes beyond
    /// the end of a file that has become smaller.
    fn terms(&self) -> Terms {
        let shared = &*self.shared;
        let promised = shared.sectors.load(Ordering::SeqCst).saturating_mul(SECTOR);
        Terms {
            end: promised.min(shared.disk.size().unwrap_or(0)),
            read_only: shared.read_only,
            durable: !self.agreed.flush || !shared.writeback.load(Ordering::SeqCst),
            discard: self.agreed.discard,
            write_zeroes: self.agreed.write_zeroes,
        }
    }

    /// Gives back what has ended.
    fn reap(&mut self) -> Result<(), QueueError> {
        let Some(io) = &mut self.io else { return Ok(()) };
        io.reap(&mut self.ended);
        for JobEnd { tag, result } in self.ended.drain(..) {
            let taken = self.under_way.get_mut(usize::from(tag)).and_then(Option::take);
            let Some(Taken { chain, request, begun_ns }) = taken else { continue };
            mark_written(&chain, request.area);
            finish(&mut self.queue, &self.shared, &chain, &request, status(result), begun_ns)?;
        }
        Ok(())
    }

    /// Does a request, or begins it.
    fn execute<T>(
        &mut self,
        chain: Chain<T>,
        request: Request,
        begun_ns: u64,
        hold: impl FnOnce() -> Guard<M>,
    ) -> Result<(), QueueError>
    where
        T: Deref<Target = M::M>,
    {
        let status = match request.task {
            Task::Fail(status) => status,
            Task::GetId => match chain.write(0, &self.shared.serial) {
                Ok(ID_BYTES) => Status::Ok,
                _ => Status::IoError,
            },
            Task::Disk(operation) => match &mut self.io {
                Some(_) if slices(&chain, request.area).is_none() => Status::IoError,
                Some(io) => {
                    let (tag, chain) = (chain.head(), chain.in_memory(hold()));
                    let buffers = Buffers::new(chain.clone(), request.area);
                    // A head is in flight once, so the place is free.
                    if let Some(place) = self.under_way.get_mut(usize::from(tag)) {
                        *place = Some(Taken { chain, request, begun_ns });
                        io.submit(Job { tag, operation, buffers });
                    }
                    return Ok(());
                }
                None => {
                    // Nothing is done with buffers that are not in RAM.
                    with_slices(&chain, request.area, |slices| operation.run(&*self.shared.disk, slices))
                        .map_or(Status::IoError, status)
                }
            },
        };
        finish(&mut self.queue, &self.shared, &chain, &request, status, begun_ns)
    }

    /// Whether a request has to wait.
    fn admit(&self, request: &Request) -> Result<(), Throttled> {
        self.shared.rate.as_ref().map_or(Ok(()), |rate| rate.admit(request.cost))
    }

    /// Takes requests, until there are no more, one has to wait, or it is the turn of others.
    fn serve(&mut self) -> Result<Next, QueueError> {
        let (shared, memory) = (Arc::clone(&self.shared), self.queue.memory());
        let terms = self.terms();
        let mut left = SHARE;
        if let Some((taken, _)) = self.waiting.take() {
            if let Err(Throttled { until_ns }) = self.admit(&taken.request) {
                self.waiting = Some((taken, until_ns));
                return Ok(Next::Wait);
            }
            let Taken { chain, request, begun_ns } = taken;
            // The disk may have become smaller meanwhile.
            let request = request.within(&terms);
            left = left.saturating_sub(request.cost);
            self.execute(chain, request, begun_ns, || memory.clone())?;
        }
        for _ in 0..self.queue.size() {
            let Some(chain) = self.queue.pop(&*memory)? else { return Ok(Next::Empty) };
            let begun_ns = shared.now_ns();
            let request = Request::read(&chain, &terms);
            if let Err(Throttled { until_ns }) = self.admit(&request) {
                if let Some(metrics) = &shared.metrics {
                    metrics.sink.throttled();
                }
                let chain = chain.in_memory(memory.clone());
                self.waiting = Some((Taken { chain, request, begun_ns }, until_ns));
                return Ok(Next::Wait);
            }
            self.execute(chain, request, begun_ns, || memory.clone())?;
            left = left.saturating_sub(request.cost);
            if left == 0 {
                break;
            }
        }
        Ok(Next::Others)
    }
}

/// Why no more requests are taken.
enum Next {
    Empty,
    Wait,
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
        self.reap()?;
        self.queue.decline_doorbells()?;
        let next = self.serve();
        if let Some(io) = &mut self.io {
            io.kick();
        }
        let next = next?;
        // What the host had at hand has ended already.
        self.reap()?;
        let more = self.queue.rest()?;
        Ok(match next {
            Next::Empty => more,
            Next::Wait => Progress::Idle,
            Next::Others => Progress::More,
        })
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        self.io.iter().filter_map(|io| io.source()).collect()
    }

    fn deadline(&self) -> Option<u64> {
        self.waiting.as_ref().map(|(_, until_ns)| *until_ns)
    }

    fn stop(&mut self) {
        if let Some(io) = &mut self.io {
            io.cancel();
        }
        self.under_way.iter_mut().for_each(|taken| *taken = None);
        (self.waiting, self.ended) = (None, Vec::new());
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
