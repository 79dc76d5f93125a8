//! A port's transmit queue: the driver's buffers go to the writer of the port.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::port::{PortCore, Taken};
use super::shared::Shared;
use super::tx_queue;
use crate::interrupt::lock;
use crate::virtio::device::{DeviceMemory, Progress, Worker};
use crate::virtio::metrics::Activity;
use crate::virtio::queue::{Chain, QueueError, Virtqueue};

/// Bytes that a writer is given at most at once.
const PIECE: usize = 4096;

/// How often a writer is called before other queues have their turn.
const PIECES: u32 = 64;

pub(super) struct OutputWorker<M: DeviceMemory> {
    id: u32,
    queue: Virtqueue<M>,
    shared: Arc<Shared>,
    sending: Option<Sending>,
    /// How much was written of the chain with that head, which was in flight when the device was saved.
    begun: Option<(u16, u64)>,
    /// Bytes of it that were read and are still to be written.
    piece: Vec<u8>,
}

/// A buffer of the guest that is on its way. It holds no memory, for a writer that is full may stay so for long.
struct Sending {
    chain: Chain<()>,
    head: u16,
    /// Bytes of it.
    len: u64,
    /// Whose output it is: not that of a port which is there later.
    port: Option<Arc<PortCore>>,
    /// Bytes of it that were read.
    read: u64,
    begun_ns: u64,
}

/// How far things got.
enum Step {
    On,
    NoMore,
    WriterIsFull,
}

impl<M: DeviceMemory> OutputWorker<M> {
    /// `begun` is how much was written of which chain, before the device was saved.
    pub(super) fn new(id: u32, queue: Virtqueue<M>, shared: Arc<Shared>, begun: Option<(u16, u64)>) -> Self {
        let begun = begun.filter(|_| queue.left_in_flight() > 0);
        Self { id, queue, shared, sending: None, begun, piece: Vec::new() }
    }

    fn step(&mut self) -> Result<Step, QueueError> {
        let memory = self.queue.memory();
        if self.sending.is_none() {
            let Some(chain) = self.queue.pop(&*memory)? else { return Ok(Step::NoMore) };
            let (head, len) = (chain.head(), chain.readable_len());
            let (port, begun_ns) = (self.port(), self.shared.now_ns());
            let read = self.begun.take().filter(|(of, _)| *of == head).map_or(0, |(_, written)| written);
            self.sending = Some(Sending { chain: chain.in_memory(()), head, len, port, read, begun_ns });
        }
        let Some(sending) = &mut self.sending else { return Ok(Step::NoMore) };
        if self.piece.is_empty() {
            let left = sending.len.saturating_sub(sending.read);
            self.piece.resize(usize::try_from(left).unwrap_or(PIECE).min(PIECE), 0);
            let chain = sending.chain.clone().in_memory(&*memory);
            let read = chain.read_some(sending.read, &mut self.piece);
            self.piece.truncate(read);
            sending.read += read as u64;
            if read == 0 {
                // The end, or what is in no RAM.
                return self.finish();
            }
        }
        let Some(port) = sending.port.clone() else { return self.finish() };
        match port.output(&self.piece) {
            Taken::Bytes(taken) => {
                self.piece.drain(..taken);
                Ok(Step::On)
            }
            Taken::Later => Ok(Step::WriterIsFull),
            Taken::Never => self.finish(),
        }
    }

    /// Gives the buffer back, whatever is left of it.
    fn finish(&mut self) -> Result<Step, QueueError> {
        let Some(head) = self.give_up() else { return Ok(Step::NoMore) };
        self.queue.complete(head, 0)?;
        Ok(Step::On)
    }

    /// Forgets the buffer, and counts what was not written of it.
    fn give_up(&mut self) -> Option<u16> {
        let Sending { head, len, port, read, begun_ns, .. } = self.sending.take()?;
        let left = len.saturating_sub(read) + self.piece.len() as u64;
        self.piece.clear();
        self.shared.ended(Activity::Write, len.saturating_sub(left), left == 0, begun_ns);
        match port {
            Some(port) => port.discarded_output(left),
            None => {
                self.shared.counters.output_discarded.fetch_add(left, Ordering::Relaxed);
            }
        }
        Some(head)
    }

    fn port(&self) -> Option<Arc<PortCore>> {
        self.shared.port(self.id)
    }
}

impl<M: DeviceMemory> Worker for OutputWorker<M> {
    fn queues(&self) -> Vec<u16> {
        vec![tx_queue(self.id)]
    }

    fn process(&mut self) -> Result<Progress, QueueError> {
        self.queue.decline_doorbells()?;
        for _ in 0..PIECES {
            match self.step()? {
                Step::On => {}
                Step::NoMore => {
                    if let Some(port) = self.port() {
                        port.flush();
                    }
                    return self.queue.rest();
                }
                // No doorbell of the guest is worth anything now.
                Step::WriterIsFull => {
                    self.queue.interrupt()?;
                    return Ok(Progress::Idle);
                }
            }
        }
        self.queue.rest().map(|_| Progress::More)
    }

    fn pause(&mut self) -> Result<(), QueueError> {
        let written =
            |sending: &Sending| (sending.head, sending.read.saturating_sub(self.piece.len() as u64));
        if let Some(slot) = self.shared.slot(self.id) {
            // One that has not come again yet is where it was.
            lock(slot).sent = self.sending.as_ref().map(written).or(self.begun);
        }
        Ok(())
    }

    fn stop(&mut self) {
        self.give_up();
    }
}
