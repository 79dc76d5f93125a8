//! The worker of the three queues (Virtio 1.3, 5.10.2).

use std::collections::VecDeque;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::atomic::Ordering;

use super::delivery::{Buffers, Delivered};
use super::engine::Engine;
use super::packet::{HEADER, Header, MAX_DATA, operation};
use super::shared::count;
use super::{EVENT, RX, TX};
use crate::virtio::device::{DeviceMemory, Progress, Worker};
use crate::virtio::metrics::Activity;
use crate::virtio::queue::{Chain, QueueError, Virtqueue};
use crate::virtio::rate::Throttled;

/// Packets of the guest that are heard in one call, and turns of connections.
const BATCH: usize = 256;

/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET (5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

pub(super) struct VsockWorker<M: DeviceMemory> {
    /// Ended before the queues are given back: its sockets close, of which others hear.
    engine: Option<Engine>,
    rx: Given<M>,
    tx: Virtqueue<M>,
    event: Option<Virtqueue<M>>,
    /// What has gone and is to be paid for before the next.
    rx_wait: Option<Throttled>,
    tx_wait: Option<Throttled>,
}

/// The receive queue, and buffers of it that were taken and not filled yet, each with its room for data. They hold no memory, for
/// they may stay long.
struct Given<M: DeviceMemory> {
    queue: Virtqueue<M>,
    taken: VecDeque<(Chain<()>, usize)>,
    useless: u64,
}

impl<M: DeviceMemory> VsockWorker<M> {
    pub(super) fn new(
        engine: Engine,
        rx: Virtqueue<M>,
        tx: Virtqueue<M>,
        event: Option<Virtqueue<M>>,
    ) -> Self {
        let rx = Given { queue: rx, taken: VecDeque::new(), useless: 0 };
        Self { engine: Some(engine), rx, tx, event, rx_wait: None, tx_wait: None }
    }

    /// Hears what the guest sends. `true` if there is more.
    fn hear(&mut self, engine: &mut Engine) -> Result<bool, QueueError> {
        let memory = self.tx.memory();
        for _ in 0..BATCH {
            if engine.is_congested() || !passes(&mut self.tx_wait) {
                // The doorbell of other buffers, or the deadline, leads back here.
                return Ok(false);
            }
            let Some(chain) = self.tx.pop(&*memory)? else { return Ok(false) };
            let begun = engine.setup.now();
            let mut bytes = [0; HEADER];
            let header = match chain.read(0, &mut bytes) {
                Ok(HEADER) => Header::parse(&bytes),
                _ => {
                    count(&engine.shared.counts.ignored);
                    self.tx.complete_in(&memory, chain.head(), 0)?;
                    continue;
                }
            };
            let is_data = header.op == operation::RW;
            let there = chain.readable_len().saturating_sub(HEADER as u64);
            let complete = is_data && header.len <= MAX_DATA && u64::from(header.len) <= there;
            let mut taken = false;
            engine.packet(&header, complete, |room| {
                taken = chain.read(HEADER as u64, room).is_ok_and(|read| read == room.len());
                taken
            });
            let bytes = if taken { header.len } else { 0 };
            let activity = if is_data { Activity::Write } else { Activity::Other };
            engine.setup.ended(activity, bytes, taken || !is_data, begun);
            self.tx.complete_in(&memory, chain.head(), 0)?;
            if is_data {
                self.tx_wait = admit(engine, bytes.into());
            }
        }
        Ok(true)
    }

    /// Tells the driver that it is somewhere else, and that all connections are gone.
    fn tell_reset(&mut self, engine: &mut Engine) -> Result<bool, QueueError> {
        let Some(event) = self.event.as_mut().filter(|_| engine.reset_due) else { return Ok(false) };
        let memory = event.memory();
        let Some(chain) = event.pop(&*memory)? else {
            // It stays due until the driver has a buffer for it.
            return Ok(event.rest()? == Progress::More);
        };
        let written = chain.write_some(0, &TRANSPORT_RESET.to_le_bytes());
        event.complete(chain.head(), u32::try_from(written).unwrap_or(0))?;
        event.interrupt()?;
        engine.reset_due = false;
        Ok(false)
    }

    fn serve(&mut self, engine: &mut Engine) -> Result<Progress, QueueError> {
        self.rx.queue.decline_doorbells()?;
        self.tx.decline_doorbells()?;
        let mut more = engine.look();
        more |= self.tell_reset(engine)?;
        more |= self.hear(engine)?;
        engine.flush_all();
        let wait = &mut self.rx_wait;
        let setup = std::sync::Arc::clone(&engine.setup);
        let mut pay = |went: Option<u64>| match went {
            None => passes(wait),
            Some(bytes) => {
                *wait = setup.rate.as_ref().and_then(|rate| rate.admit(bytes).err());
                if wait.is_some()
                    && let Some(metrics) = &setup.metrics
                {
                    metrics.throttled();
                }
                true
            }
        };
        let delivered = engine.deliver(&mut self.rx, BATCH, &mut pay)?;
        let useless = std::mem::take(&mut self.rx.useless);
        engine.shared.counts.undeliverable.fetch_add(useless, Ordering::Relaxed);
        match delivered {
            Delivered::More => {
                more = true;
                self.rx.queue.interrupt()?;
            }
            // Buffers are worth a doorbell now.
            Delivered::NoBuffer => more |= self.rx.queue.rest()? == Progress::More,
            Delivered::All | Delivered::Throttled => self.rx.queue.interrupt()?,
        }
        if engine.is_congested() || self.tx_wait.is_some() {
            self.tx.interrupt()?;
        } else {
            more |= self.tx.rest()? == Progress::More;
        }
        Ok(if more { Progress::More } else { Progress::Idle })
    }
}

/// Whether what went before is paid for.
fn passes(wait: &mut Option<Throttled>) -> bool {
    *wait = wait.take().and_then(|throttled| throttled.retry().err());
    wait.is_none()
}

fn admit(engine: &Engine, bytes: u64) -> Option<Throttled> {
    let throttled = engine.setup.rate.as_ref()?.admit(bytes).err()?;
    if let Some(metrics) = &engine.setup.metrics {
        metrics.throttled();
    }
    Some(throttled)
}

impl<M: DeviceMemory> Worker for VsockWorker<M> {
    fn queues(&self) -> Vec<u16> {
        vec![RX, TX, EVENT]
    }

    fn process(&mut self) -> Result<Progress, QueueError> {
        let Some(mut engine) = self.engine.take() else { return Ok(Progress::Idle) };
        let progress = self.serve(&mut engine);
        self.engine = Some(engine);
        progress
    }

    fn sources(&self) -> Vec<BorrowedFd<'_>> {
        self.engine.iter().map(|engine| engine.as_fd()).collect()
    }

    fn deadline(&self) -> Option<u64> {
        let waits = [&self.rx_wait, &self.tx_wait].into_iter().flatten().map(Throttled::until_ns);
        waits.chain(self.engine.as_ref().and_then(Engine::deadline)).min()
    }

    fn stop(&mut self) {
        self.engine = None;
        self.rx.taken.clear();
        (self.rx_wait, self.tx_wait) = (None, None);
    }
}

impl<M: DeviceMemory> Given<M> {
    /// Takes another buffer. `false` if there is none.
    fn take(&mut self) -> Result<bool, QueueError> {
        let memory = self.queue.memory();
        // No more than there are.
        for _ in 0..self.queue.size() {
            let Some(chain) = self.queue.pop(&*memory)? else { return Ok(false) };
            let room = chain.writable_len().saturating_sub(HEADER as u64).min(MAX_DATA.into());
            if room > 0 {
                self.taken.push_back((chain.in_memory(()), usize::try_from(room).unwrap_or(0)));
                return Ok(true);
            }
            self.useless += 1;
            self.queue.complete_in(&memory, chain.head(), 0)?;
        }
        Ok(false)
    }
}

impl<M: DeviceMemory> Buffers for Given<M> {
    fn next_room(&mut self) -> Result<Option<usize>, QueueError> {
        if self.taken.is_empty() && !self.take()? {
            return Ok(None);
        }
        Ok(self.taken.front().map(|(_, room)| *room))
    }

    fn room(&mut self, most: usize) -> Result<usize, QueueError> {
        let mut room = 0_usize;
        let mut index = 0;
        while room < most {
            if index == self.taken.len() && !self.take()? {
                break;
            }
            room = room.saturating_add(self.taken.get(index).map_or(0, |(_, more)| *more));
            index += 1;
        }
        Ok(room)
    }

    fn put(&mut self, header: &Header, data: &[u8]) -> Result<bool, QueueError> {
        let Some((chain, _)) = self.taken.pop_front() else { return Ok(false) };
        let memory = self.queue.memory();
        let chain = chain.in_memory(&*memory);
        let mut written = chain.write_some(0, &header.to_bytes());
        if written == HEADER {
            written += chain.write_some(HEADER as u64, data);
        }
        self.queue.complete_in(&memory, chain.head(), u32::try_from(written).unwrap_or(u32::MAX))?;
        Ok(written == HEADER + data.len())
    }
}
