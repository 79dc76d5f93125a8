//! The device in isolation: driven over MMIO by the kit's driver, or as a bare worker, on disks that fail, hang, and come back short.

mod device;
mod dirty;
mod disks;
mod flaws;
mod model;
mod requests;
mod threads;
#[cfg(feature = "io-uring")]
mod uring;

use std::io;
use std::sync::{Arc, Mutex};

use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _, VolatileSlice};

use super::request::kind;
use super::*;
use crate::testkit::{
    Driver as _, DriverQueue, FaultyDisk, LineRecorder, LinkRecorder, Memory, MmioDriver, guest_memory_of,
};
use crate::virtio::{VirtioMmio, Virtqueue};

const HEADER: u64 = 0x8000;
const STATUS: u64 = 0x9000;
const DATA: u64 = 0x10000;
/// Where there is neither RAM nor anything else.
const NOWHERE: u64 = 0x4000_0000;
/// What is in the data and status before a request.
const POISON: u8 = 0xee;

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

/// A guest with one disk, of which it uses queue 0.
struct Rig {
    memory: Memory,
    driver: MmioDriver,
    queue: DriverQueue<Memory>,
    handle: BlockHandle,
    line: LineRecorder,
    /// Requests end when they want to.
    patient: bool,
    /// So many did.
    taken: u16,
}

/// Two regions that touch at 0x20000.
fn memory() -> Memory {
    guest_memory_of(&[(0, 0x20000), (0x20000, 0xe0000)]).unwrap()
}

impl Rig {
    fn new(builder: BlockBuilder, features: u64) -> Self {
        let block = builder.build().unwrap();
        let (memory, line, handle) = (memory(), LineRecorder::default(), block.handle());
        let transport = VirtioMmio::new(block, memory.clone(), line.clone()).unwrap();
        let driver = MmioDriver::new(Arc::new(Mutex::new(transport)));
        let queue = DriverQueue::new(memory.clone(), 0x1000, 64).unwrap();
        driver.start(features, &[(0, &queue)]).unwrap();
        Self { memory, driver, queue, handle, line, patient: false, taken: 0 }
    }

    fn put(&self, gpa: u64, bytes: &[u8]) {
        self.memory.memory().write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    fn get(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory.memory().read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    fn put_header(&self, kind: u32, sector: u64) {
        self.put(HEADER, &header(kind, sector));
    }

    /// Makes a request whose data the device reads; its status, and the used length.
    fn give(&mut self, kind: u32, sector: u64, data: &[u8]) -> (u8, u32) {
        self.put_header(kind, sector);
        self.put(DATA, data);
        self.put(STATUS, &[POISON]);
        let mut chain = self.queue.chain().readable(HEADER, 16);
        if !data.is_empty() {
            chain = chain.readable(DATA, u32::try_from(data.len()).unwrap());
        }
        let head = chain.writable(STATUS, 1).submit().unwrap();
        self.ended(head)
    }

    /// Makes a request whose data the device writes; its status, the used length, and the data.
    fn ask(&mut self, kind: u32, sector: u64, len: usize) -> (u8, u32, Vec<u8>) {
        self.put_header(kind, sector);
        self.put(DATA, &vec![POISON; len]);
        self.put(STATUS, &[POISON]);
        let mut chain = self.queue.chain().readable(HEADER, 16);
        if len > 0 {
            chain = chain.writable(DATA, u32::try_from(len).unwrap());
        }
        let head = chain.writable(STATUS, 1).submit().unwrap();
        let (status, used) = self.ended(head);
        (status, used, self.get(DATA, len))
    }

    fn ended(&mut self, head: u16) -> (u8, u32) {
        self.driver.notify(0);
        while self.patient && self.queue.used_index().unwrap() == self.taken {
            std::thread::yield_now();
            self.driver.notify(0);
        }
        self.taken = self.taken.wrapping_add(1);
        let (id, used) = self.queue.take_used().unwrap().expect("the request has ended");
        assert_eq!(id, u32::from(head));
        (self.get(STATUS, 1)[0], used)
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.give(kind::OUT, sector, data).0
    }

    fn read(&mut self, sector: u64, len: usize) -> Vec<u8> {
        let (status, used, data) = self.ask(kind::IN, sector, len);
        assert_eq!((status, used), (OK, u32::try_from(len).unwrap() + 1));
        data
    }

    /// A segment of a discard or write-zeroes request.
    fn segment(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> (u8, u32) {
        self.give(kind, 0, &segment(sector, sectors, flags))
    }
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// Sectors that differ from each other.
fn pattern(sectors: usize) -> Vec<u8> {
    (0..sectors * 512).map(|i| u8::try_from((i / 512 * 31 + i % 251) % 255).unwrap()).collect()
}

/// A disk that does as it is told, with room to grow.
fn faulty(size: u64) -> Arc<FaultyDisk> {
    Arc::new(FaultyDisk::with_room(size, 4 << 20))
}

/// What it was asked for, in words.
fn calls(disk: &FaultyDisk) -> Vec<String> {
    disk.take_calls().iter().map(ToString::to_string).collect()
}

/// What a driver of today takes.
const ALL: u64 = feature::FLUSH
    | feature::CONFIG_WCE
    | feature::DISCARD
    | feature::WRITE_ZEROES
    | feature::SEG_MAX
    | feature::BLK_SIZE
    | feature::TOPOLOGY;

const SECTORS: usize = 64;

/// A guest with a disk of [`SECTORS`] sectors.
fn probed(features: u64) -> (Rig, Arc<FaultyDisk>) {
    let probe = faulty(SECTORS as u64 * 512);
    (Rig::new(Block::builder(probe.clone()), features), probe)
}

type Bare = (Memory, DriverQueue<Memory>, Box<dyn Worker>, Block);

/// A worker without a transport, and its device.
fn bare(builder: BlockBuilder, features: u64) -> Bare {
    bare_in(memory(), 64, builder, features)
}

fn bare_in(memory: Memory, size: u16, builder: BlockBuilder, features: u64) -> Bare {
    let link = Arc::new(LinkRecorder::default());
    let queue = DriverQueue::new(memory.clone(), 0x1000, size).unwrap();
    let own = Virtqueue::new(queue.device_side().unwrap(), 0, memory.clone(), link.clone()).unwrap();
    let mut block = builder.build().unwrap();
    let activation =
        Activation { features, queues: vec![Some(own)], link, doorbells: Arc::new(Doorbells::new(1)) };
    let mut workers = block.activate(activation).unwrap();
    (memory, queue, workers.pop().unwrap(), block)
}
