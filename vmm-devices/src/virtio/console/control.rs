//! The control queues, by which device and driver speak of ports (Virtio 1.3, 5.3.6.2).
//!
//! A driver that sends is always heard, and at once: Linux spins until it was. What it is to be told waits in the ports' places,
//! not here, so a driver that asks without end and never gives a buffer for the answers gains nothing by it.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::config::PortEvent;
use super::message;
use super::shared::Shared;
use super::{CONTROL_RX, CONTROL_TX};
use crate::interrupt::lock;
use crate::virtio::device::{DeviceMemory, Progress, Worker};
use crate::virtio::queue::{Chain, QueueError, Virtqueue};

pub(super) struct ControlWorker<M: DeviceMemory> {
    pub(super) rx: Virtqueue<M>,
    pub(super) tx: Virtqueue<M>,
    pub(super) shared: Arc<Shared>,
    /// The place that spoke last: the others come first.
    pub(super) last: u32,
    /// A buffer that was taken for a message that is no longer true. It holds no memory, for it may stay long.
    pub(super) spare: Option<Chain<()>>,
}

impl<M: DeviceMemory> Worker for ControlWorker<M> {
    fn queues(&self) -> Vec<u16> {
        vec![CONTROL_RX, CONTROL_TX]
    }

    fn process(&mut self) -> Result<Progress, QueueError> {
        let heard = self.hear()?;
        let told = self.tell()?;
        Ok(if heard && told { Progress::Idle } else { Progress::More })
    }

    fn stop(&mut self) {
        self.spare = None;
    }
}

impl<M: DeviceMemory> ControlWorker<M> {
    /// What the driver says. `false` if there is more.
    fn hear(&mut self) -> Result<bool, QueueError> {
        let memory = self.tx.memory();
        self.tx.decline_doorbells()?;
        for _ in 0..self.tx.size() {
            let Some(chain) = self.tx.pop(&*memory)? else {
                return Ok(self.tx.rest()? == Progress::Idle);
            };
            let mut bytes = [0; message::LEN];
            let understood = chain.read_some(0, &mut bytes) == bytes.len() && self.obey(bytes);
            if !understood {
                self.shared.counters.ignored.fetch_add(1, Ordering::Relaxed);
            }
            self.tx.complete(chain.head(), 0)?;
        }
        self.tx.rest().map(|_| false)
    }

    /// Whether it makes sense.
    fn obey(&self, bytes: [u8; message::LEN]) -> bool {
        let (id, event, value) = message::parse(bytes);
        let shared = &*self.shared;
        match (event, value) {
            (message::DEVICE_READY, 0 | 1) => {
                shared.listening.store(value == 1, Ordering::SeqCst);
                true
            }
            (message::PORT_READY, 0 | 1) => {
                let (ready, listening) = (value == 1, self.listening());
                let Some(port) = shared.slot(id).and_then(|slot| lock(slot).ready(ready, listening)) else {
                    return false;
                };
                if !ready {
                    port.tell(PortEvent::GuestRefused);
                }
                true
            }
            (message::PORT_OPEN, 0 | 1) => {
                let open = value == 1;
                let told = shared.slot(id).and_then(|slot| lock(slot).guest_open(open));
                let Some((port, new)) = told else { return false };
                if new {
                    port.tell_guest_open(open);
                    // What waited for that.
                    shared.ring_input(id);
                }
                true
            }
            _ => false,
        }
    }

    /// What the driver is to be told. `false` if there is more, and room for it.
    fn tell(&mut self) -> Result<bool, QueueError> {
        self.rx.decline_doorbells()?;
        for _ in 0..self.rx.size() {
            if !self.has_news() {
                self.rx.interrupt()?;
                return Ok(true);
            }
            let memory = self.rx.memory();
            let chain = match self.spare.take() {
                Some(chain) => Some(chain.in_memory(&*memory)),
                None => self.rx.pop(&*memory)?,
            };
            let Some(chain) = chain else {
                // It stays where it is until the driver has a buffer for it.
                return Ok(self.rx.rest()? == Progress::Idle);
            };
            let room = chain.writable_len();
            let mut written = 0;
            if room >= message::LEN as u64 {
                let Some(message) = self.next_message(room) else {
                    self.spare = Some(chain.in_memory(()));
                    continue;
                };
                written = chain.write_some(0, &message);
                if written < message.len() {
                    self.shared.counters.undeliverable.fetch_add(1, Ordering::Relaxed);
                }
            }
            self.rx.complete(chain.head(), u32::try_from(written).unwrap_or(0))?;
        }
        self.rx.rest().map(|_| false)
    }

    fn listening(&self) -> bool {
        self.shared.listening.load(Ordering::SeqCst)
    }

    fn has_news(&self) -> bool {
        let listening = self.listening();
        self.shared.slots().any(|(_, slot)| lock(slot).has_news(listening))
    }

    /// The next message that fits. One without its tail would say something else, so one that does not fit is not sent at all.
    fn next_message(&mut self, room: u64) -> Option<Vec<u8>> {
        let (listening, ports) = (self.listening(), self.shared.ports());
        let rows_first = self.shared.rows_first.load(Ordering::SeqCst);
        for step in 1..=ports {
            let id = (self.last + step) % ports;
            let Some(slot) = self.shared.slot(id) else { continue };
            while let Some(message) = lock(slot).next_message(id, listening, rows_first) {
                if message.len() as u64 <= room {
                    self.last = id;
                    return Some(message);
                }
                self.shared.counters.undeliverable.fetch_add(1, Ordering::Relaxed);
            }
        }
        None
    }
}
