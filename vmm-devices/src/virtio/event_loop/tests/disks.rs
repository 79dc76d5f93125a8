//! Disks on loops: what comes by doorbells, by a pool's threads, and by a ring of the kernel.

use std::num::{NonZeroU16, NonZeroUsize};

use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};

use super::*;
use crate::testkit::{Driver as _, DriverQueue, Memory, MmioDriver, guest_memory};
#[cfg(feature = "io-uring")]
use crate::virtio::block::UringFile;
use crate::virtio::block::{BlockBuilder, Pooled, RawFile, ThreadPool, feature};
use crate::virtio::{Block, VirtioMmio};

const QUEUES: u16 = 2;
/// Requests of each queue that are under way at a time, each with eight sectors of its own.
const REQUESTS: u64 = 16;
const BYTES: usize = 4096;

/// Where request `index` of queue `queue` has its data; header and status are before it.
fn place(queue: u16, index: u64) -> u64 {
    0x10_0000 + (u64::from(queue) * REQUESTS + index) * 0x2000 + 0x1000
}

fn pattern(queue: u16, index: u64) -> Vec<u8> {
    (0..BYTES as u64).map(|at| (u64::from(queue) * 131 + index * 31 + at / 7).to_le_bytes()[0]).collect()
}

/// Ways to a file of the size that is needed.
fn disks() -> Vec<(&'static str, BlockBuilder)> {
    let file = || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(u64::from(QUEUES) * REQUESTS * BYTES as u64).unwrap();
        RawFile::new(file, false).unwrap()
    };
    let pool = || ThreadPool::new(NonZeroUsize::new(2).unwrap()).unwrap();
    vec![
        ("one after the other", Block::builder(Arc::new(file()))),
        ("threads", Block::concurrent(Arc::new(Pooled::new(Arc::new(file()), pool())))),
        // Where the kernel grants no ring, that is threads again.
        #[cfg(feature = "io-uring")]
        ("io_uring", Block::concurrent(Arc::new(UringFile::new(file(), pool())))),
    ]
}

struct Machine {
    driver: MmioDriver,
    memory: Memory,
    queues: Vec<DriverQueue<Memory>>,
    interrupts: Receiver<()>,
}

impl Machine {
    fn new(disk: BlockBuilder, executor: Arc<dyn Executor>) -> Self {
        let memory = guest_memory(4 << 20).unwrap();
        let (interrupt, interrupts) = channel();
        let line = move |level: bool| {
            if level {
                // A test that has ended hears nothing.
                let (Ok(()) | Err(_)) = interrupt.send(());
            }
        };
        let block = disk.queues(NonZeroU16::new(QUEUES).unwrap()).build().unwrap();
        let transport = VirtioMmio::builder(block, memory.clone(), line).executor(executor).build().unwrap();
        let driver = MmioDriver::new(Arc::new(Mutex::new(transport)));
        let queues = (0..u64::from(QUEUES))
            .map(|queue| DriverQueue::new(memory.clone(), 0x1000 + 0x4000 * queue, 64).unwrap())
            .collect();
        Self { driver, memory, queues, interrupts }
    }

    fn start(&self) {
        let queues: Vec<_> = (0..).zip(&self.queues).collect();
        self.driver.start(feature::MQ | feature::FLUSH, &queues).unwrap();
    }

    /// Makes all requests of one kind on both queues at once, and waits until they have come back.
    fn all(&mut self, kind: u32) {
        let memory = self.memory.memory();
        let bytes = u32::try_from(BYTES).unwrap();
        for (queue, ring) in (0..).zip(&mut self.queues) {
            for index in 0..REQUESTS {
                let data = place(queue, index);
                let sector = (u64::from(queue) * REQUESTS + index) * (BYTES as u64 / 512);
                memory.write_obj(u64::from(kind), GuestAddress(data - 32)).unwrap();
                memory.write_obj(sector, GuestAddress(data - 24)).unwrap();
                memory.write_obj(0xee_u8, GuestAddress(data - 1)).unwrap();
                let chain = ring.chain().readable(data - 32, 16);
                let chain = if kind == 0 { chain.writable(data, bytes) } else { chain.readable(data, bytes) };
                chain.writable(data - 1, 1).submit().unwrap();
            }
            self.driver.notify(queue);
        }
        let mut left = u64::from(QUEUES) * REQUESTS;
        while left > 0 {
            self.interrupts.recv().unwrap();
            self.driver.acknowledge(self.driver.interrupt_status());
            for ring in &mut self.queues {
                while let Some((_, written)) = ring.take_used().unwrap() {
                    assert_eq!(written, if kind == 0 { bytes + 1 } else { 1 });
                    left -= 1;
                }
            }
        }
        for (queue, index) in each() {
            let status: u8 = memory.read_obj(GuestAddress(place(queue, index) - 1)).unwrap();
            assert_eq!(status, 0);
        }
    }
}

fn each() -> impl Iterator<Item = (u16, u64)> {
    (0..QUEUES).flat_map(|queue| (0..REQUESTS).map(move |index| (queue, index)))
}

#[test]
fn what_is_written_is_read_back_after_a_reset() {
    for (way, executor, _thread) in super::devices::executors().split_off(1) {
        for (name, disk) in disks() {
            println!("{way}, {name}");
            let mut machine = Machine::new(disk, Arc::clone(&executor));
            machine.start();
            for (queue, index) in each() {
                let memory = machine.memory.memory();
                memory.write_slice(&pattern(queue, index), GuestAddress(place(queue, index))).unwrap();
            }
            machine.all(1);
            machine.driver.set_status(0);
            for queue in &mut machine.queues {
                *queue = DriverQueue::new(machine.memory.clone(), queue.rings()[0], 64).unwrap();
            }
            machine.start();
            for _ in 0..20 {
                for (queue, index) in each() {
                    let place = GuestAddress(place(queue, index));
                    machine.memory.memory().write_slice(&[0xee; BYTES], place).unwrap();
                }
                machine.all(0);
                for (queue, index) in each() {
                    let mut bytes = vec![0; BYTES];
                    let place = GuestAddress(place(queue, index));
                    machine.memory.memory().read_slice(&mut bytes, place).unwrap();
                    assert!(bytes == pattern(queue, index), "queue {queue}, request {index}");
                }
            }
            machine.driver.set_status(0);
        }
    }
}
