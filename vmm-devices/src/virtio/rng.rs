//! Entropy device (Virtio 1.3, 5.4): fills the driver's buffers with random bytes.

use std::fmt;
use std::io::Read;
use std::sync::{Arc, Mutex};

use super::device::{ActivateError, Activation, DeviceMemory, DeviceType, Progress, VirtioDevice, Worker};
use super::queue::{QueueError, Virtqueue};
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
}

impl fmt::Debug for Rng {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rng").finish_non_exhaustive()
    }
}

impl Rng {
    /// A device whose bytes come from `source`, which must not block for long.
    pub fn new(source: impl Read + Send + 'static) -> Self {
        Self { source: Arc::new(Mutex::new(source)) }
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
        Ok(vec![Box::new(RngWorker { queue, source: Arc::clone(&self.source), bytes: Vec::new() })])
    }
}

struct RngWorker<M: DeviceMemory> {
    queue: Virtqueue<M>,
    source: Source,
    bytes: Vec<u8>,
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
}

impl<M: DeviceMemory> Worker for RngWorker<M> {
    fn queues(&self) -> Vec<u16> {
        vec![QUEUE]
    }

    fn process(&mut self) -> Result<Progress, QueueError> {
        let memory = self.queue.memory();
        self.queue.want_doorbell(false)?;
        for _ in 0..self.queue.size() {
            let Some(chain) = self.queue.pop(&*memory)? else {
                self.queue.interrupt()?;
                let more = self.queue.want_doorbell(true)?;
                return Ok(if more { Progress::More } else { Progress::Idle });
            };
            let room = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX).min(MAX_REQUEST);
            let bytes = self.gather(room);
            // What lies behind a buffer that is not in RAM gets nothing, and is told so.
            let written = chain.write_some(0, bytes);
            self.queue.complete(chain.head(), u32::try_from(written).unwrap_or(0))?;
        }
        self.queue.interrupt()?;
        Ok(Progress::More)
    }
}

#[cfg(test)]
mod tests;
