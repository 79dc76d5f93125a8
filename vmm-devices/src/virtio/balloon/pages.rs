//! Inflating, deflating and reporting: numbers of pages, or ranges of them, become runs of RAM that go to [`MemoryRelease`].

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::Arc;

use vmm_memory::vm_memory::{GuestAddress, GuestMemory, GuestMemoryBackend as _, GuestMemoryRegion as _};

use super::handle::{Shared, count};
use super::{MemoryRelease, PAGE};
use crate::virtio::metrics::Activity;
use crate::virtio::{Chain, DeviceMemory, Progress, QueueError, Virtqueue, Worker};

/// What a call of a worker may cost, in pages: 64 MiB of memory in one run, or some 500 pages that lie apart.
const BUDGET: u64 = 16 << 10;
/// What the host takes to release anything, compared with one page.
const RELEASE: u64 = 32;
/// What a chain takes, compared with one page.
const REQUEST: u64 = 16;
/// Page numbers that are read, and put in order, at a time.
const BLOCK: usize = 1024;
const NUMBER: usize = size_of::<u32>();

/// What a queue says of pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Inflate,
    Deflate,
    /// Free pages, as buffers; with VIRTIO_BALLOON_F_PAGE_POISON or without.
    Report {
        poison: bool,
    },
}

/// Serves one queue that is about pages.
pub(super) struct PageWorker<M: DeviceMemory> {
    queue: Virtqueue<M>,
    pages: Pages,
    /// A request that took more than one call may.
    current: Option<Request<()>>,
    numbers: Vec<u32>,
}

impl<M: DeviceMemory> PageWorker<M> {
    pub(super) fn new(
        queue: Virtqueue<M>,
        kind: Kind,
        release: &Arc<dyn MemoryRelease>,
        shared: &Arc<Shared>,
    ) -> Self {
        let pages = Pages { kind, release: Arc::clone(release), shared: Arc::clone(shared) };
        Self { queue, pages, current: None, numbers: Vec::new() }
    }
}

impl<M: DeviceMemory> Worker for PageWorker<M> {
    fn queues(&self) -> Vec<u16> {
        vec![self.queue.index()]
    }

    fn process(&mut self) -> Result<Progress, QueueError> {
        let memory = self.queue.memory();
        self.queue.decline_doorbells()?;
        let mut budget = BUDGET;
        loop {
            let mut request = match self.current.take() {
                Some(request) => request.in_memory(&*memory),
                None => match self.queue.pop(&*memory)? {
                    Some(chain) => Request::new(chain, self.pages.shared.now_ns()),
                    None => return self.queue.rest(),
                },
            };
            budget = budget.saturating_sub(REQUEST);
            if self.pages.go_on(&*memory, &mut request, &mut self.numbers, &mut budget) {
                self.pages.ended(&request);
                self.queue.complete(request.chain.head(), 0)?;
            } else {
                self.current = Some(request.in_memory(()));
            }
            if budget == 0 {
                return self.queue.rest().map(|_| Progress::More);
            }
        }
    }

    fn stop(&mut self) {
        self.current = None;
    }
}

/// A chain, and how far one has come with it.
struct Request<T> {
    chain: Chain<T>,
    /// Of page numbers, the byte that is read next; of reports, the buffer.
    next: u64,
    /// Numbers of pages that were read and are still to be dealt with, the next ones last.
    runs: Vec<Range<u64>>,
    begun_ns: u64,
    /// Bytes that changed hands, and whether something went wrong.
    bytes: u64,
    failed: bool,
}

impl<T> Request<T> {
    fn new(chain: Chain<T>, begun_ns: u64) -> Self {
        Self { chain, next: 0, runs: Vec::new(), begun_ns, bytes: 0, failed: false }
    }

    fn in_memory<U>(self, memory: U) -> Request<U> {
        let Self { chain, next, runs, begun_ns, bytes, failed } = self;
        Request { chain: chain.in_memory(memory), next, runs, begun_ns, bytes, failed }
    }
}

struct Pages {
    kind: Kind,
    release: Arc<dyn MemoryRelease>,
    shared: Arc<Shared>,
}

impl Pages {
    fn ended<T>(&self, request: &Request<T>) {
        count(&self.shared.counters.requests, 1);
        let activity = match self.kind {
            Kind::Inflate | Kind::Report { .. } => Activity::Write,
            Kind::Deflate => Activity::Read,
        };
        self.shared.ended(activity, request.bytes, !request.failed, request.begun_ns);
    }

    /// Deals with as much of `request` as `budget` allows; whether that is all of it.
    fn go_on<G: GuestMemory>(
        &self,
        memory: &G,
        request: &mut Request<&G>,
        numbers: &mut Vec<u32>,
        budget: &mut u64,
    ) -> bool {
        while *budget > 0 {
            if let Some(run) = request.runs.pop() {
                let rest = self.release_some(memory, request, run, budget);
                request.runs.extend(rest);
                continue;
            }
            let more = match self.kind {
                Kind::Inflate | Kind::Deflate => self.read_numbers(request, numbers, budget),
                Kind::Report { .. } => self.read_report(request, budget),
            };
            if !more {
                return true;
            }
        }
        false
    }

    /// Reads numbers and makes runs of them, whatever their order, each page once; whether there were any.
    fn read_numbers<G: GuestMemory>(
        &self,
        request: &mut Request<&G>,
        numbers: &mut Vec<u32>,
        budget: &mut u64,
    ) -> bool {
        let mut bytes = [0; BLOCK * NUMBER];
        let Ok(len) = request.chain.read(request.next, &mut bytes) else {
            count(&self.shared.counters.unreadable, 1);
            request.failed = true;
            return false;
        };
        request.next += len as u64;
        let (words, _) = bytes.get(..len).unwrap_or_default().as_chunks::<NUMBER>();
        *budget = budget.saturating_sub(words.len() as u64);
        numbers.clear();
        numbers.extend(words.iter().map(|word| u32::from_le_bytes(*word)));
        numbers.sort_unstable_by_key(|number| Reverse(*number));
        for page in numbers.iter().map(|number| u64::from(*number)) {
            match request.runs.last_mut() {
                Some(run) if run.start == page => {}
                Some(run) if run.start == page + 1 => run.start = page,
                _ => request.runs.push(page..page + 1),
            }
        }
        !words.is_empty()
    }

    /// Takes the next buffer of a report; whether there was one.
    fn read_report<G: GuestMemory>(&self, request: &mut Request<&G>, budget: &mut u64) -> bool {
        let next = usize::try_from(request.next).unwrap_or(usize::MAX);
        let Some((gpa, len)) = request.chain.writable().nth(next) else { return false };
        request.next += 1;
        *budget = budget.saturating_sub(1);
        let end = gpa.0.saturating_add(len.into());
        let whole = gpa.0.div_ceil(PAGE)..end / PAGE;
        let touched = if len == 0 { 0 } else { end.div_ceil(PAGE) - gpa.0 / PAGE };
        count(&self.shared.counters.skipped, touched - len_of(&whole));
        request.runs.extend(Some(whole).filter(|whole| !whole.is_empty()));
        true
    }

    /// Releases the first part of `run` that is RAM, as much of it as `budget` allows; what is left.
    fn release_some<G: GuestMemory>(
        &self,
        memory: &G,
        request: &mut Request<&G>,
        run: Range<u64>,
        budget: &mut u64,
    ) -> Option<Range<u64>> {
        let counters = &self.shared.counters;
        let Some(ram) = first_ram(memory, &run) else {
            count(&counters.skipped, len_of(&run));
            *budget = budget.saturating_sub(1);
            return None;
        };
        count(&counters.skipped, ram.start - run.start);
        let pages = len_of(&ram).min(*budget);
        *budget = budget.saturating_sub(RELEASE + pages);
        // RAM ends within the address space.
        let (gpa, len) = (GuestAddress(ram.start * PAGE), pages * PAGE);
        let moved = |done: std::io::Result<()>| done.map(|()| len);
        let (done, counter) = match self.kind {
            Kind::Inflate => (moved(self.release.release(gpa, len)), &counters.inflated),
            Kind::Deflate => (moved(self.release.reclaim(gpa, len)), &counters.deflated),
            // Released pages read as zero; another poison is to stay (5.5.6.7.2).
            Kind::Report { poison: true } if self.shared.poison() != 0 => (Ok(0), &counters.poisoned),
            Kind::Report { .. } => (moved(self.release.release(gpa, len)), &counters.reported),
        };
        count(if done.is_ok() { counter } else { &counters.failed }, pages);
        request.failed |= done.is_err();
        request.bytes += done.unwrap_or(0);
        Some(ram.start + pages..run.end).filter(|rest| !rest.is_empty())
    }
}

fn len_of(run: &Range<u64>) -> u64 {
    run.end.saturating_sub(run.start)
}

/// The first pages of `run` that are RAM and lie in one region. Without physical memory there is none: page numbers are no
/// addresses that an IOMMU translates.
fn first_ram<G: GuestMemory>(memory: &G, run: &Range<u64>) -> Option<Range<u64>> {
    let within = memory.physical_memory()?.iter().filter_map(|region| {
        let start = region.start_addr().0;
        let whole = start.div_ceil(PAGE)..start.saturating_add(region.len()) / PAGE;
        let part = whole.start.max(run.start)..whole.end.min(run.end);
        Some(part).filter(|part| !part.is_empty())
    });
    within.min_by_key(|part| part.start)
}
