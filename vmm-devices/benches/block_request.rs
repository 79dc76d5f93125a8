//! What a request through the block device costs beside the least that it can cost.
//!
//! The device, and a bare loop on `virtio-queue` that reads the same headers, checks the same ranges, moves the same bytes and
//! writes the same status, serve the same requests from rings of the same shape in the same memory, in turn. Each batch is half
//! writes and half reads, of sectors that differ. The driver's side is not timed. The bare loop believes the driver what the device does
//! not: it takes chains of three descriptors alone, in one region, and remembers nothing of them.
//!
//! | line | requests at once | disk of both |
//! |---|---|---|
//! | `512 B`, `4 KiB` | 32 | in memory |
//! | `4 KiB, one at a time` | 1 | in memory: what a call costs beside its requests |
//! | `4 KiB, null` | 32 | moves nothing: what the device costs beside the copy |
//! | `4 KiB, pooled` | 32 | in memory; the device's is behind a thread, the bare loop's is not: what handing over costs |
//!
//!     cargo bench -p vmm-devices --features testkit --bench block_request [-- ROUNDS]
//!
//! The last line is the ratio of both for `4 KiB`: the median over rounds.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::panic, reason = "a program that measures")]

use std::error::Error;
use std::hint::black_box;
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::time::Instant;

use virtio_queue::{Queue, QueueOwnedT as _, QueueT as _};
use vmm_devices::testkit::{DriverQueue, Memory, guest_memory};
use vmm_devices::virtio::block::{Backend, Block, MemoryDisk, Pooled, ThreadPool};
use vmm_devices::virtio::{
    Activation, Doorbells, DriverLink, Progress, VirtioDevice as _, Virtqueue, Worker, feature,
};
use vmm_devices::vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _, VolatileSlice};

const RINGS: u64 = 0x1000;
const HEADERS: u64 = 0x10000;
const STATUSES: u64 = 0x20000;
const DATA: u64 = 0x10_0000;
const DISK: usize = 8 << 20;
const QUEUE: u16 = 128;

/// What is measured.
struct Case {
    name: &'static str,
    /// Bytes of a request.
    len: u32,
    /// Requests at once.
    batch: u64,
    disk: Disk,
}

#[derive(Clone, Copy, PartialEq)]
enum Disk {
    Memory,
    Null,
    Pooled,
}

const CASES: [Case; 5] = [
    Case { name: "512 B", len: 512, batch: 32, disk: Disk::Memory },
    Case { name: "4 KiB, one at a time", len: 4096, batch: 1, disk: Disk::Memory },
    Case { name: "4 KiB, null", len: 4096, batch: 32, disk: Disk::Null },
    Case { name: "4 KiB, pooled", len: 4096, batch: 32, disk: Disk::Pooled },
    Case { name: "4 KiB", len: 4096, batch: 32, disk: Disk::Memory },
];

fn main() {
    // Cargo calls it with arguments of its own.
    let rounds = std::env::args().skip(1).find_map(|argument| argument.parse().ok()).unwrap_or(4001);
    let memory = guest_memory(16 << 20).unwrap();
    let mut ratio = f64::NAN;
    for case in &CASES {
        ratio = measure(&memory, case, rounds);
        println!("{}: ratio {ratio:.3}", case.name);
    }
    println!("ratio: {ratio:.3}");
}

/// The median ratio.
fn measure(memory: &Memory, case: &Case, rounds: usize) -> f64 {
    let mut device = DeviceSide::new(memory, case.disk);
    let mut bare = BareSide::new(memory, case.disk);
    let mut times = Vec::with_capacity(rounds);
    for round in 0..rounds + rounds / 10 {
        let spent = if round % 2 == 0 {
            let device = device.serve(memory, case);
            [device, bare.serve(memory, case)]
        } else {
            let bare = bare.serve(memory, case);
            [device.serve(memory, case), bare]
        };
        // The first ones warm up.
        if round >= rounds / 10 {
            times.push(spent);
        }
    }
    for (side, name) in ["device", "bare loop"].into_iter().enumerate() {
        let each = median(times.iter().map(|times| times[side])) / case.batch as f64;
        println!("{}, {name}: {each:.1} ns a request", case.name);
    }
    median(times.iter().map(|[device, bare]| device / bare))
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Makes a batch available: writes and reads of the same sectors, at sectors that differ.
fn submit(queue: &mut DriverQueue<Memory>, memory: &Memory, case: &Case, round: u64) {
    for i in 0..case.batch {
        let (header_at, status_at) = (HEADERS + 16 * i, STATUSES + i);
        let (kind, sector) = (u32::from(is_write(i, round)), i / 2 * 16);
        let header = [u64::from(kind), sector];
        memory.memory().write_obj(header, GuestAddress(header_at)).unwrap();
        let (data, chain) = (DATA + i * 0x1000, queue.chain().readable(header_at, 16));
        let chain = if kind == 1 { chain.readable(data, case.len) } else { chain.writable(data, case.len) };
        chain.writable(status_at, 1).submit().unwrap();
    }
}

/// A batch of one is a write in one round and a read in the next.
fn is_write(i: u64, round: u64) -> bool {
    (i + round).is_multiple_of(2)
}

/// All were served, and well.
fn check(queue: &mut DriverQueue<Memory>, memory: &Memory, case: &Case, round: u64) {
    // A pool ends them in an order of its own.
    let mut used: Vec<_> = (0..case.batch).map(|_| queue.take_used().unwrap().unwrap()).collect();
    used.sort_unstable();
    let writes = (0..case.batch).filter(|i| is_write(*i, round)).count();
    assert_eq!(used.iter().filter(|(_, used)| *used == 1).count(), writes);
    assert_eq!(used.iter().filter(|(_, used)| *used == case.len + 1).count(), used.len() - writes);
    for i in 0..case.batch {
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

/// A disk of no contents.
struct NullDisk;

impl Backend for NullDisk {
    fn size(&self) -> io::Result<u64> {
        Ok(DISK as u64)
    }
    fn read_at(&self, buffers: &[VolatileSlice<'_>], _: u64) -> io::Result<usize> {
        Ok(black_box(buffers).iter().map(VolatileSlice::len).sum())
    }
    fn write_at(&self, buffers: &[VolatileSlice<'_>], _: u64, _: bool) -> io::Result<usize> {
        Ok(black_box(buffers).iter().map(VolatileSlice::len).sum())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

struct DeviceSide {
    queue: DriverQueue<Memory>,
    worker: Box<dyn Worker>,
    round: u64,
}

impl DeviceSide {
    fn new(memory: &Memory, disk: Disk) -> Self {
        let queue = DriverQueue::new(memory.clone(), RINGS, QUEUE).unwrap();
        let link = Arc::new(NoDriver);
        let mut own = queue.device_side().unwrap();
        own.set_event_idx(false);
        let own = Virtqueue::new(own, 0, memory.clone(), link.clone()).unwrap();
        let in_memory = Arc::new(MemoryDisk::new(DISK as u64));
        let builder = match disk {
            Disk::Memory => Block::builder(in_memory),
            Disk::Null => Block::builder(Arc::new(NullDisk)),
            Disk::Pooled => {
                let pool = ThreadPool::new(NonZeroUsize::MIN).unwrap();
                Block::concurrent(Arc::new(Pooled::new(in_memory, pool)))
            }
        };
        let mut block = builder.build().unwrap();
        let features = feature::VERSION_1 | vmm_devices::virtio::block::feature::FLUSH;
        let doorbells = Arc::new(Doorbells::new(1));
        let activation = Activation { features, queues: vec![Some(own)], link, doorbells };
        let worker = block.activate(activation).unwrap().remove(0);
        Self { queue, worker, round: 0 }
    }

    fn serve(&mut self, memory: &Memory, case: &Case) -> f64 {
        self.round += 1;
        submit(&mut self.queue, memory, case, self.round);
        let submitted = self.queue.submitted();
        let begun = Instant::now();
        assert_eq!(self.worker.process().unwrap(), Progress::Idle);
        while case.disk == Disk::Pooled && self.queue.used_index().unwrap() != submitted {
            assert_eq!(self.worker.process().unwrap(), Progress::Idle);
        }
        let spent = begun.elapsed();
        check(&mut self.queue, memory, case, self.round);
        spent.as_secs_f64() * 1e9
    }
}

struct BareSide {
    queue: DriverQueue<Memory>,
    own: Queue,
    disk: Vec<u8>,
    moves: bool,
    round: u64,
}

impl BareSide {
    fn new(memory: &Memory, disk: Disk) -> Self {
        // Rings of its own, behind those of the device and of the same shape.
        let queue = DriverQueue::new(memory.clone(), RINGS + 0x4000, QUEUE).unwrap();
        let own = queue.device_side().unwrap();
        Self { queue, own, disk: vec![0; DISK], moves: disk != Disk::Null, round: 0 }
    }

    fn serve(&mut self, memory: &Memory, case: &Case) -> f64 {
        self.round += 1;
        submit(&mut self.queue, memory, case, self.round);
        let begun = Instant::now();
        self.requests(memory);
        let spent = begun.elapsed();
        check(&mut self.queue, memory, case, self.round);
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
                    if self.moves {
                        memory.write_slice(bytes, data.addr()).unwrap();
                    }
                    data.len() + 1
                }
                1 => {
                    if self.moves {
                        memory.read_slice(bytes, data.addr()).unwrap();
                    }
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
