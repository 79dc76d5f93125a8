//! Statistics that a guest tells of its memory (5.5.6.3).
//!
//! The queue is used the other way round: the driver makes a buffer available, filled with statistics, and the device keeps it
//! until it wants new ones.

use std::fmt;
use std::sync::Arc;

use super::handle::{Shared, count};
use crate::virtio::metrics::Activity;
use crate::virtio::{DeviceMemory, Progress, QueueError, Virtqueue, Worker};

/// Statistics that are taken of one buffer; the specification has 16. What comes behind is left out.
pub const MAX_STATISTICS: usize = 64;

/// Bytes of one: a tag of 16 bits, a value of 64.
const ENTRY: usize = 10;

/// Which one it is (5.5.6.4). Tags without a name here are numbers.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Statistic(pub u16);

macro_rules! statistics {
    ($($(#[$doc:meta])* $name:ident = $tag:literal,)*) => {
        impl Statistic {
            $($(#[$doc])* pub const $name: Self = Self($tag);)*

            /// Its name in the specification, without `VIRTIO_BALLOON_S_`.
            pub fn name(self) -> Option<&'static str> {
                match self.0 {
                    $($tag => Some(stringify!($name)),)*
                    _ => None,
                }
            }
        }
    };
}

statistics! {
    /// Bytes that were read from swap.
    SWAP_IN = 0,
    /// Bytes that were written to swap.
    SWAP_OUT = 1,
    /// Page faults that needed a disk.
    MAJFLT = 2,
    /// Page faults that did not.
    MINFLT = 3,
    /// Bytes that are used for nothing.
    MEMFREE = 4,
    /// Bytes that the guest has.
    MEMTOT = 5,
    /// Bytes that programs could have without swapping.
    AVAIL = 6,
    /// Bytes that could be had at once, without I/O.
    CACHES = 7,
    /// Successful allocations of a huge page.
    HTLB_PGALLOC = 8,
    /// Failed ones.
    HTLB_PGFAIL = 9,
    /// Processes that were killed for want of memory.
    OOM_KILL = 10,
    /// Allocations that had to wait.
    ALLOC_STALL = 11,
    /// Pages that were looked at for reclaim in the background.
    ASYNC_SCAN = 12,
    /// Pages that were looked at by those who wanted memory.
    DIRECT_SCAN = 13,
    /// Pages that were reclaimed in the background.
    ASYNC_RECLAIM = 14,
    /// Pages that were reclaimed by those who wanted memory.
    DIRECT_RECLAIM = 15,
}

impl fmt::Debug for Statistic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "{}", self.0),
        }
    }
}

/// What a guest told at one time, in its order: claims of a guest, which may be anything.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Statistics(Vec<(Statistic, u64)>);

impl Statistics {
    /// All of it, [`MAX_STATISTICS`] at most.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (Statistic, u64)> + '_ {
        self.0.iter().copied()
    }

    /// The value of one. Told twice, the last holds.
    pub fn get(&self, which: Statistic) -> Option<u64> {
        self.0.iter().rfind(|(found, _)| *found == which).map(|(_, value)| *value)
    }

    fn parse(bytes: &[u8]) -> Self {
        let (entries, _) = bytes.as_chunks::<ENTRY>();
        let parsed = entries.iter().map(|[t0, t1, a, b, c, d, e, f, g, h]| {
            let value = u64::from_le_bytes([*a, *b, *c, *d, *e, *f, *g, *h]);
            (Statistic(u16::from_le_bytes([*t0, *t1])), value)
        });
        Self(parsed.collect())
    }
}

impl fmt::Debug for Statistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

pub(super) struct StatisticsWorker<M: DeviceMemory> {
    queue: Virtqueue<M>,
    shared: Arc<Shared>,
    /// The buffer that is given back to ask for more.
    held: Option<u16>,
}

impl<M: DeviceMemory> StatisticsWorker<M> {
    pub(super) fn new(queue: Virtqueue<M>, shared: &Arc<Shared>) -> Self {
        Self { queue, shared: Arc::clone(shared), held: None }
    }

    /// Gives the buffer back, if there is one.
    fn give_back(&mut self) -> Result<(), QueueError> {
        let Some(head) = self.held.take() else { return Ok(()) };
        self.queue.complete(head, 0)?;
        self.queue.interrupt()
    }
}

impl<M: DeviceMemory> Worker for StatisticsWorker<M> {
    fn queues(&self) -> Vec<u16> {
        vec![self.queue.index()]
    }

    fn process(&mut self) -> Result<Progress, QueueError> {
        let memory = self.queue.memory();
        self.queue.decline_doorbells()?;
        for _ in 0..self.queue.size() {
            // A request waits for a buffer; one that is filled already is older than the request.
            if self.held.is_some() && self.shared.take_request() {
                self.give_back()?;
            }
            // What it says was heard before the device was saved.
            let was_heard = self.queue.left_in_flight() > 0;
            let Some(chain) = self.queue.pop(&*memory)? else { return self.queue.rest() };
            // A second buffer is none that the specification has; the first is let go.
            self.give_back()?;
            self.held = Some(chain.head());
            count(&self.shared.counters.requests, 1);
            let begun_ns = self.shared.now_ns();
            if was_heard {
                continue;
            }
            let mut bytes = [0; MAX_STATISTICS * ENTRY];
            let read = chain.read(0, &mut bytes);
            match &read {
                // The first buffer of all may be empty.
                Ok(len) if *len < ENTRY => {}
                Ok(len) => self.shared.deliver(Statistics::parse(bytes.get(..*len).unwrap_or_default())),
                Err(_) => count(&self.shared.counters.unreadable, 1),
            }
            let len = *read.as_ref().unwrap_or(&0) as u64;
            self.shared.ended(Activity::Other, len, read.is_ok(), begun_ns);
        }
        self.queue.rest().map(|_| Progress::More)
    }

    fn stop(&mut self) {
        self.held = None;
    }
}
