//! Entropy device (Virtio 1.3, 5.4): fills the driver's buffers with random bytes.

use std::fmt;
use std::io::Read;
use std::sync::{Arc, Mutex};

use super::device::{ActivateError, Activation, DeviceMemory, DeviceType, Progress, VirtioDevice, Worker};
use super::metrics::{Activity, Ended, Metrics};
use super::queue::{Chain, QueueError, Virtqueue};
use super::rate::{RateLimiter, Throttled};
use super::state::DeviceState;
use crate::clock::Clock;
use crate::error::StateError;
use crate::interrupt::lock;

const QUEUE: u16 = 0;
const SIZES: [u16; 1] = [64];

/// Bytes that one request gets at most: a driver asks again. It bounds how long a request takes.
pub const MAX_REQUEST: usize = 64 << 10;

type Source = Arc<Mutex<dyn Read + Send>>;

/// An entropy device.
///
/// The source is what the monitor chooses: the host's generator (`/dev/urandom` in a `File`), or a seeded one for runs that are
/// to be had again. One that ends or fails leaves requests with fewer bytes, or none, as the specification has it.
pub struct Rng {
    source: Source,
    limiter: Option<RateLimiter>,
    metrics: Option<Measured>,
}

/// Where figures go, and what time it is.
#[derive(Clone)]
struct Measured {
    sink: Arc<dyn Metrics>,
    clock: Arc<dyn Clock>,
}

impl fmt::Debug for Rng {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rng").field("limiter", &self.limiter).finish_non_exhaustive()
    }
}

impl Rng {
    /// A device whose bytes come from `source`, which must not block for long.
    pub fn new(source: impl Read + Send + 'static) -> Self {
        Self { source: Arc::new(Mutex::new(source)), limiter: None, metrics: None }
    }

    /// Limits requests, and the bytes that they ask for up to [`MAX_REQUEST`]: whatever the guest does, the host's generator
    /// works no harder.
    #[must_use]
    pub fn rate(mut self, limiter: RateLimiter) -> Self {
        self.limiter = Some(limiter);
        self
    }

    /// Tells `metrics` of each request, as an [`Activity::Read`], which is an error if it got less than it asked for;
    /// latencies are by `clock`.
    #[must_use]
    pub fn metrics(mut self, metrics: Arc<dyn Metrics>, clock: impl Clock + 'static) -> Self {
        self.metrics = Some(Measured { sink: metrics, clock: Arc::new(clock) });
        self
    }
}

impl<M: DeviceMemory> VirtioDevice<M> for Rng {
    fn device_type(&self) -> DeviceType {
        DeviceType::RNG
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn activate(&mut self, mut activation: Activation<M>) -> Result<Vec<Box<dyn Worker>>, ActivateError> {
        let queue = activation.take_queue(QUEUE)?;
        if let Some(limiter) = &self.limiter {
            limiter.register(&activation.doorbells);
        }
        Ok(vec![Box::new(RngWorker {
            queue,
            source: Arc::clone(&self.source),
            limiter: self.limiter.clone(),
            metrics: self.metrics.clone(),
            bytes: Vec::new(),
            waiting: None,
        })])
    }

    fn save(&self) -> Option<DeviceState> {
        Some(DeviceState::Stateless)
    }

    fn restore(&mut self, state: &DeviceState, _features: u64) -> Result<(), StateError> {
        if *state == DeviceState::Stateless { Ok(()) } else { Err(state.of_another("entropy device")) }
    }
}

struct RngWorker<M: DeviceMemory> {
    queue: Virtqueue<M>,
    source: Source,
    limiter: Option<RateLimiter>,
    metrics: Option<Measured>,
    bytes: Vec<u8>,
    /// A request that the limit holds up. It holds no memory meanwhile.
    waiting: Option<(Request<()>, Throttled)>,
}

struct Request<T> {
    chain: Chain<T>,
    begun_ns: u64,
}

impl<T> Request<T> {
    fn in_memory<U>(self, memory: U) -> Request<U> {
        Request { chain: self.chain.in_memory(memory), begun_ns: self.begun_ns }
    }
}

impl<M: DeviceMemory> RngWorker<M> {
    /// Reads up to `wanted` bytes; fewer if the source has no more.
    fn gather(&mut self, wanted: usize) -> &[u8] {
        self.bytes.resize(wanted, 0);
        let mut source = lock(&self.source);
        let mut filled = 0;
        while let Some(room) = self.bytes.get_mut(filled..).filter(|room| !room.is_empty()) {
            match source.read(room) {
                Ok(0) => break,
                Ok(read) => filled += read.min(room.len()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        self.bytes.get(..filled).unwrap_or_default()
    }

    /// The next request.
    fn next<'a>(&mut self, memory: &'a M::M) -> Result<Option<Request<&'a M::M>>, QueueError> {
        let begun_ns = self.metrics.as_ref().map_or(0, |metrics| metrics.clock.now_ns());
        let chain = self.queue.pop(memory)?;
        Ok(chain.map(|chain| Request { chain, begun_ns }))
    }

    /// What a request gets at most.
    fn room(request: &Request<&M::M>) -> usize {
        usize::try_from(request.chain.writable_len()).unwrap_or(usize::MAX).min(MAX_REQUEST)
    }

    fn fill(&mut self, request: &Request<&M::M>) -> Result<(), QueueError> {
        let room = Self::room(request);
        let bytes = self.gather(room);
        // What lies behind a buffer that is not in RAM gets nothing, and is told so.
        let written = request.chain.write_some(0, bytes);
        if let Some(Measured { sink, clock }) = &self.metrics {
            sink.ended(Ended {
                activity: Activity::Read,
                bytes: written as u64,
                succeeded: written == room,
                latency_ns: clock.now_ns().saturating_sub(request.begun_ns),
            });
        }
        self.queue.complete(request.chain.head(), u32::try_from(written).unwrap_or(0))
    }
}

impl<M: DeviceMemory> Worker for RngWorker<M> {
    fn queues(&self) -> Vec<u16> {
        vec![QUEUE]
    }

    fn process(&mut self) -> Result<Progress, QueueError> {
        let memory = self.queue.memory();
        self.queue.decline_doorbells()?;
        if let Some((request, throttled)) = self.waiting.take() {
            if let Err(throttled) = throttled.retry() {
                self.waiting = Some((request, throttled));
                return self.queue.rest().map(|_| Progress::Idle);
            }
            self.fill(&request.in_memory(&*memory))?;
        }
        for _ in 0..self.queue.size() {
            let Some(request) = self.next(&memory)? else { return self.queue.rest() };
            let cost = Self::room(&request) as u64;
            if let Err(throttled) = self.limiter.as_ref().map_or(Ok(()), |limiter| limiter.admit(cost)) {
                if let Some(metrics) = &self.metrics {
                    metrics.sink.throttled();
                }
                self.waiting = Some((request.in_memory(()), throttled));
                // What is behind it waits as well.
                return self.queue.rest().map(|_| Progress::Idle);
            }
            self.fill(&request)?;
        }
        self.queue.rest().map(|_| Progress::More)
    }

    fn deadline(&self) -> Option<u64> {
        self.waiting.as_ref().map(|(_, throttled)| throttled.until_ns())
    }

    fn stop(&mut self) {
        self.waiting = None;
    }
}

#[cfg(test)]
mod tests;
