//! A port's receive queue: input goes into the buffers of the driver.

use std::sync::Arc;

use super::rx_queue;
use super::shared::Shared;
use crate::virtio::device::{DeviceMemory, Progress, Worker};
use crate::virtio::metrics::Activity;
use crate::virtio::queue::{Chain, QueueError, Virtqueue};

pub(super) struct InputWorker<M: DeviceMemory> {
    pub(super) id: u32,
    pub(super) queue: Virtqueue<M>,
    pub(super) shared: Arc<Shared>,
    /// A buffer that was taken for input that was discarded meanwhile. Drivers take an empty one for the end. It holds no memory,
    /// for it may stay long.
    pub(super) spare: Option<Chain<()>>,
}

impl<M: DeviceMemory> Worker for InputWorker<M> {
    fn queues(&self) -> Vec<u16> {
        vec![rx_queue(self.id)]
    }

    fn process(&mut self) -> Result<Progress, QueueError> {
        // A buffer alone is no reason to come here.
        self.queue.decline_doorbells()?;
        for _ in 0..self.queue.size() {
            let Some(port) = self.shared.port(self.id).filter(|port| port.has_input()) else {
                self.queue.interrupt()?;
                return Ok(Progress::Idle);
            };
            let memory = self.queue.memory();
            let chain = match self.spare.take() {
                Some(chain) => Some(chain.in_memory(&*memory)),
                None => self.queue.pop(&*memory)?,
            };
            let Some(chain) = chain else { return self.queue.rest() };
            let begun_ns = self.shared.now_ns();
            match port.deliver(&chain) {
                // Below the largest capacity of a port.
                Some(written) => {
                    self.shared.ended(Activity::Read, written as u64, written > 0, begun_ns);
                    self.queue.complete(chain.head(), u32::try_from(written).unwrap_or(u32::MAX))?;
                }
                None => self.spare = Some(chain.in_memory(())),
            }
        }
        self.queue.rest().map(|_| Progress::More)
    }

    fn stop(&mut self) {
        self.spare = None;
    }
}
