//! What a request through the block device costs beside the least that it can cost.
//!
//! The device, with a disk in memory, and a bare loop on `virtio-queue` that reads the same headers, checks the same ranges,
//! moves the same bytes and writes the same status, serve the same requests from the same rings in the same memory, in turn. Each
//! batch is half writes and half reads. The driver's side is not timed.
//!
//!     cargo bench -p vmm-devices --features testkit --bench block_request [-- ROUNDS]
//!
//! The last line is the ratio of both, for 4 KiB requests: the median over rounds.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a program that measures")]

use std::error::Error;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use virtio_queue::{Queue, QueueOwnedT as _, QueueT as _};
use vmm_devices::testkit::{DriverQueue, Memory, guest_memory};
use vmm_devices::virtio::block::{Block, MemoryDisk};
use vmm_devices::virtio::{
    Activation, Doorbells, DriverLink, Progress, VirtioDevice as _, Virtqueue, Worker, feature,
};
use vmm_devices::vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};

const RINGS: u64 = 0x1000;
const HEADERS: u64 = 0x10000;
const STATUSES: u64 = 0x20000;
const DATA: u64 = 0x10_0000;
const DISK: usize = 8 << 20;
const BATCH: u64 = 32;
const QUEUE: u16 = 128;

fn main() {
    // Cargo calls it with arguments of its own.
    let rounds = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(4001);
    let memory = guest_memory(16 << 20).unwrap();
    let small = measure(&memory, 512, rounds);
    let large = measure(&memory, 4096, rounds);
    println!("512 B: ratio {small:.3}");
    println!("4 KiB: ratio {large:.3}");
    println!("ratio: {large:.3}");
}

/// The median ratio for requests of `len` bytes.
fn measure(memory: &Memory, len: u32, rounds: usize) -> f64 {
    let mut device = DeviceSide::new(memory);
    let mut bare = BareSide::new(memory);
    let mut times = Vec::with_capacity(rounds);
    for round in 0..rounds + rounds / 10 {
        let spent = if round % 2 == 0 {
            let device = device.serve(memory, len);
            [device, bare.serve(memory, len)]
        } else {
            let bare = bare.serve(memory, len);
            [device.serve(memory, len), bare]
        };
        // The first ones warm up.
        if round >= rounds / 10 {
            times.push(spent);
        }
    }
    for (side, name) in ["device", "bare loop"].into_iter().enumerate() {
        let each = median(times.iter().map(|times| times[side])) / BATCH as f64;
        println!("{len} B, {name}: {each:.1} ns a request");
    }
    median(times.iter().map(|[device, bare]| device / bare))
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Makes a batch available: writes and reads of the same sectors, at sectors that differ.
fn submit(queue: &mut DriverQueue<Memory>, memory: &Memory, len: u32) {
    for i in 0..BATCH {
        let (header_at, status_at) = (HEADERS + 16 * i, STATUSES + i);
        let (kind, sector) = (u32::from(i % 2 == 0), i / 2 * 16);
        let header = [u64::from(kind), sector];
        memory.memory().write_obj(header, GuestAddress(header_at)).unwrap();
        let (data, chain) = (DATA + i * 0x1000, queue.chain().readable(header_at, 16));
        let chain = if kind == 1 { chain.readable(data, len) } else { chain.writable(data, len) };
        chain.writable(status_at, 1).submit().unwrap();
    }
}

/// All were served, and well.
fn check(queue: &mut DriverQueue<Memory>, memory: &Memory, len: u32) {
    for i in 0..BATCH {
        let (_, used) = queue.take_used().unwrap().unwrap();
        assert_eq!(used, if i % 2 == 0 { 1 } else { len + 1 });
        let status: u8 = memory.memory().read_obj(GuestAddress(STATUSES + i)).unwrap();
        assert_eq!(status, 0);
    }
}

struct NoDriver;

impl DriverLink for NoDriver {
    fn used(&self, queue: u16) {
        black_box(queue);
    }
    fn config_changed(&self) {}
    fn needs_reset(&self, why: &dyn Error) {
        panic!("{why}");
    }
}

struct DeviceSide {
    queue: DriverQueue<Memory>,
    worker: Box<dyn Worker>,
}

impl DeviceSide {
    fn new(memory: &Memory) -> Self {
        let queue = DriverQueue::new(memory.clone(), RINGS, QUEUE).unwrap();
        let link = Arc::new(NoDriver);
        let mut own = queue.device_side().unwrap();
        own.set_event_idx(false);
        let own = Virtqueue::new(own, 0, memory.clone(), link.clone()).unwrap();
        let mut block = Block::builder(Arc::new(MemoryDisk::new(DISK as u64))).build().unwrap();
        let features = feature::VERSION_1 | vmm_devices::virtio::block::feature::FLUSH;
        let doorbells = Arc::new(Doorbells::new(1));
        let activation = Activation { features, queues: vec![Some(own)], link, doorbells };
        let worker = block.activate(activation).unwrap().remove(0);
        Self { queue, worker }
    }

    fn serve(&mut self, memory: &Memory, len: u32) -> f64 {
        submit(&mut self.queue, memory, len);
        let begun = Instant::now();
        assert_eq!(self.worker.process().unwrap(), Progress::Idle);
        let spent = begun.elapsed();
        check(&mut self.queue, memory, len);
        spent.as_secs_f64() * 1e9
    }
}

struct BareSide {
    queue: DriverQueue<Memory>,
    own: Queue,
    disk: Vec<u8>,
}

impl BareSide {
    fn new(memory: &Memory) -> Self {
        // Rings of its own, behind those of the device and of the same shape.
        let queue = DriverQueue::new(memory.clone(), RINGS + 0x4000, QUEUE).unwrap();
        let own = queue.device_side().unwrap();
        Self { queue, own, disk: vec![0; DISK] }
    }

    fn serve(&mut self, memory: &Memory, len: u32) -> f64 {
        submit(&mut self.queue, memory, len);
        let begun = Instant::now();
        self.requests(memory);
        let spent = begun.elapsed();
        check(&mut self.queue, memory, len);
        spent.as_secs_f64() * 1e9
    }

    fn requests(&mut self, memory: &Memory) {
        let memory = memory.memory();
        let memory = &*memory;
        self.own.disable_notification(memory).unwrap();
        while let Some(mut chain) = self.own.iter(memory).unwrap().next() {
            let head = chain.head_index();
            let (header, data, status) =
                (chain.next().unwrap(), chain.next().unwrap(), chain.next().unwrap());
            assert!(!header.is_write_only() && header.len() == 16 && status.is_write_only());
            let [kind, sector]: [u64; 2] = memory.read_obj(header.addr()).unwrap();
            let start = usize::try_from(sector).unwrap().checked_mul(512).unwrap();
            let end = start.checked_add(usize::try_from(data.len()).unwrap()).unwrap();
            let bytes = self.disk.get_mut(start..end).unwrap();
            let written = match kind & 0xffff_ffff {
                0 => {
                    memory.write_slice(bytes, data.addr()).unwrap();
                    data.len() + 1
                }
                1 => {
                    memory.read_slice(bytes, data.addr()).unwrap();
                    1
                }
                other => panic!("a request of type {other}"),
            };
            memory.write_obj(0u8, status.addr()).unwrap();
            self.own.add_used(memory, head, written).unwrap();
        }
        if self.own.needs_notification(memory).unwrap() {
            black_box(&self.own);
        }
        assert!(!self.own.enable_notification(memory).unwrap());
    }
}
