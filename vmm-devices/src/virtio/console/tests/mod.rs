//! The device under a driver that is well-behaved, or not, over MMIO.

mod control;
mod flaws;
mod input;
mod memory;
mod model;
mod output;

use std::sync::{Arc, Mutex};

use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};

use super::*;
use crate::testkit::{Driver, DriverQueue, LineRecorder, Memory, MmioDriver, OutputRecorder, guest_memory};
use crate::virtio::VirtioMmio;

const SIZE: u64 = 1;
const MULTIPORT: u64 = 2;

/// Descriptors of each queue of the driver.
const LEN: u16 = 64;

/// Where messages to the device are put.
const OUT: u64 = 0x10_0000;
/// Where buffers for the device lie, 4 KiB for each chain, [`LEN`] of them for each queue.
const IN: u64 = 0x20_0000;
/// The end of the RAM.
const END: u64 = 8 << 20;

fn place(queue: u16, head: u64) -> u64 {
    IN + 0x1000 * (u64::from(LEN * queue) + head)
}

/// Events, as words.
#[derive(Clone, Default)]
struct Events(Arc<Mutex<Vec<String>>>);

impl Events {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl PortEvents for Events {
    fn event(&self, event: PortEvent<'_>) {
        let word = match event {
            PortEvent::OutputFailed(error) => format!("OutputFailed({:?})", error.kind()),
            other => format!("{other:?}"),
        };
        self.0.lock().unwrap().push(word);
    }
}

/// A device with its driver.
struct Guest {
    memory: Memory,
    line: LineRecorder,
    driver: MmioDriver,
    /// By index.
    queues: Vec<DriverQueue<Memory>>,
}

impl Guest {
    /// With a driver that has done nothing so far.
    fn new(console: Console) -> Self {
        let memory = guest_memory(END).unwrap();
        let line = LineRecorder::default();
        let transport = VirtioMmio::new(console, memory.clone(), line.clone()).unwrap();
        let driver = MmioDriver::new(Arc::new(Mutex::new(transport)));
        Self { memory, line, driver, queues: Vec::new() }
    }

    /// Sets up all the queues that there are, and starts the device.
    fn start(&mut self, features: u64) {
        self.driver.set_status(0);
        let count = if features & MULTIPORT == 0 { 2 } else { 64 };
        let queues = (0..count).filter(|index| self.driver.queue_max_size(*index) != 0);
        let places = queues.map(|index| 0x1000 + 0x1000 * u64::from(index));
        self.queues =
            places.map(|place| DriverQueue::new(self.memory.clone(), place, LEN).unwrap()).collect();
        let queues: Vec<_> = (0..).zip(&self.queues).collect();
        self.driver.start(features, &queues).unwrap();
    }

    /// A buffer for the device to write, not announced yet.
    fn give(&mut self, queue: u16, len: u32) -> u16 {
        let ring = &mut self.queues[usize::from(queue)];
        let place = place(queue, ring.next_head().into());
        ring.chain().writable(place, len).submit().unwrap()
    }

    /// What the device wrote into the next buffer that it gave back.
    fn taken(&mut self, queue: u16) -> Option<Vec<u8>> {
        let (head, len) = self.queues[usize::from(queue)].take_used().unwrap()?;
        let mut bytes = vec![0; usize::try_from(len).unwrap()];
        self.memory.memory().read_slice(&mut bytes, GuestAddress(place(queue, head.into()))).unwrap();
        Some(bytes)
    }

    /// Puts bytes into a buffer for the device to read, not announced yet. They stay until the next that are put.
    fn put(&mut self, queue: u16, bytes: &[u8]) -> u16 {
        self.memory.memory().write_slice(bytes, GuestAddress(OUT)).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        self.queues[usize::from(queue)].chain().readable(OUT, len).submit().unwrap()
    }

    /// Sends bytes; whether they were taken by now.
    fn send(&mut self, queue: u16, bytes: &[u8]) -> bool {
        let head = self.put(queue, bytes);
        self.driver.notify(queue);
        match self.queues[usize::from(queue)].take_used().unwrap() {
            None => false,
            Some(used) => {
                assert_eq!(used, (head.into(), 0));
                true
            }
        }
    }

    /// Says something on the control queue.
    fn say(&mut self, id: u32, event: u16, value: u16) {
        assert!(self.send(CONTROL_TX, &message::of(id, event, value)), "the device always listens");
    }

    /// Gives the device so many buffers for control messages.
    fn listen(&mut self, buffers: usize) {
        for _ in 0..buffers {
            self.give(CONTROL_RX, 4096);
        }
        self.driver.notify(CONTROL_RX);
    }

    /// The control messages that came: port, event, value, and what is behind.
    fn heard(&mut self) -> Vec<(u32, u16, u16, Vec<u8>)> {
        let messages = std::iter::from_fn(|| self.taken(CONTROL_RX));
        let split = messages.map(|mut message| {
            let rest = message.split_off(message::LEN);
            let (id, event, value) = message::parse(message.try_into().unwrap());
            (id, event, value, rest)
        });
        split.collect()
    }

    fn works(&self) -> bool {
        self.driver.status() & 0x40 == 0
    }
}

/// One console, with its driver at work.
fn single(config: impl FnOnce(PortConfig) -> PortConfig) -> (Guest, Port, OutputRecorder, Events) {
    let (screen, events) = (OutputRecorder::default(), Events::default());
    let config = config(PortConfig::console(screen.clone()).events(events.clone()));
    let (console, port) = Console::new(config).unwrap();
    let mut guest = Guest::new(console);
    guest.start(SIZE);
    (guest, port, screen, events)
}
