//! A hostile guest on a block device: registers, queue memory, and a monitor that resizes the disk meanwhile. For the random
//! test and the fuzz target.

use std::sync::{Arc, Mutex};

use arbitrary::Arbitrary;
use vmm_devices::testkit::{Driver as _, DriverQueue, LineRecorder, Memory, MmioDriver, guest_memory_of};
use vmm_devices::virtio::VirtioMmio;
use vmm_devices::virtio::block::{Block, BlockHandle, MemoryDisk};
use vmm_devices::virtio::metrics::DeviceMetrics;
use vmm_devices::virtio::rate::{Limits, Rate, RateLimiter};
use vmm_devices::vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};
use vmm_devices::{BusDevice, Clock as _, ManualClock};

/// One thing that guest or monitor does.
#[derive(Clone, Debug, Arbitrary)]
pub enum Action {
    /// A register or the configuration, at any width.
    Write {
        offset: u16,
        data: [u8; 8],
        width: u8,
    },
    /// The same, most of which is a register.
    Register {
        index: u8,
        value: u32,
    },
    Read {
        offset: u16,
        width: u8,
    },
    /// What a driver does that knows its business.
    Start {
        features: u64,
        size: u8,
    },
    Status {
        status: u8,
    },
    /// Anything anywhere.
    Memory {
        at: u16,
        bytes: [u8; 8],
    },
    Descriptor {
        index: u8,
        gpa: u64,
        len: u32,
        flags: u16,
        next: u16,
    },
    Available {
        head: u8,
    },
    AvailableIndex {
        index: u16,
    },
    /// A request that is nearly one.
    Request {
        kind: u8,
        sector: u64,
        flags: u32,
        data: Vec<Piece>,
        cut: u8,
        indirect: bool,
    },
    Notify {
        queue: u16,
    },
    Resize {
        sectors: u16,
    },
    Pass {
        ns: u32,
    },
}

/// A buffer.
#[derive(Clone, Debug, Arbitrary)]
pub struct Piece {
    gpa: u32,
    sectors: u8,
    odd: u16,
    readable: bool,
}

const RAM: u64 = 0x40000;
const RINGS: u64 = 0x1000;
const HEADER: u64 = 0x8000;
const TABLE: u64 = 0x9000;
/// Sectors that the guest may ever have; the disk has as many again, which are not its business.
const SECTORS: u64 = 128;
const MARK: u8 = 0xa7;
const TYPES: [u32; 8] = [0, 1, 1, 4, 8, 11, 13, 2];

pub struct BlockGuest {
    memory: Memory,
    registers: Arc<dyn BusDevice>,
    driver: MmioDriver,
    queue: DriverQueue<Memory>,
    disk: Arc<MemoryDisk>,
    handle: BlockHandle,
    clock: Arc<ManualClock>,
}

impl BlockGuest {
    pub fn new() -> Self {
        let memory = guest_memory_of(&[(0, RAM / 2), (RAM / 2, RAM / 2)]).unwrap();
        let disk = Arc::new(MemoryDisk::new(2 * SECTORS * 512));
        disk.write(SECTORS * 512, &[MARK; (SECTORS * 512) as usize]).unwrap();
        let clock = Arc::new(ManualClock::new(0));
        let limits = Limits { bytes: Rate::new(1 << 30, 1 << 20), operations: Rate::new(1 << 20, 64) };
        let block = Block::builder(disk.clone())
            .serial("fuzz")
            .queue_size(64)
            .queues(2.try_into().unwrap())
            .rate(RateLimiter::new(clock.clone(), limits))
            .metrics(Arc::new(DeviceMetrics::default()), clock.clone())
            .build()
            .unwrap();
        let handle = block.handle();
        handle.set_capacity(SECTORS * 512).unwrap();
        let transport = VirtioMmio::new(block, memory.clone(), LineRecorder::default()).unwrap();
        let registers: Arc<dyn BusDevice> = Arc::new(Mutex::new(transport));
        let driver = MmioDriver::new(Arc::clone(&registers));
        let queue = DriverQueue::new(memory.clone(), RINGS, 64).unwrap();
        Self { memory, registers, driver, queue, disk, handle, clock }
    }

    fn put(&self, gpa: u64, bytes: &[u8]) {
        // What is beyond is not there.
        let (Ok(()) | Err(_)) = self.memory.memory().write_slice(bytes, GuestAddress(gpa));
    }

    pub fn perform(&mut self, action: &Action) {
        match action {
            Action::Write { offset, data, width } => {
                let width = 1 << (width % 4);
                self.registers.write(u64::from(*offset) % 0x200, &data[..width]);
            }
            Action::Register { index, value } => self.driver.write(u64::from(index % 64) * 4, *value),
            Action::Read { offset, width } => {
                let mut data = [0; 8];
                let data = &mut data[..1 << (width % 4)];
                self.registers.read(u64::from(*offset) % 0x200, data);
            }
            Action::Start { features, size } => {
                let features = features & self.driver.device_features();
                self.queue = DriverQueue::new(self.memory.clone(), RINGS, 4 << (size % 5)).unwrap();
                let (Ok(()) | Err(_)) = self.driver.start(features, &[(0, &self.queue)]);
            }
            Action::Status { status } => self.driver.set_status(*status),
            Action::Memory { at, bytes } => self.put(u64::from(*at), bytes),
            Action::Descriptor { index, gpa, len, flags, next } => {
                let index = u16::from(*index) % self.queue.size();
                self.queue.write_descriptor(index, *gpa, *len, *flags, *next).unwrap();
            }
            Action::Available { head } => self.queue.make_available(u16::from(*head)).unwrap(),
            Action::AvailableIndex { index } => self.queue.write_available_index(*index).unwrap(),
            Action::Request { kind, sector, flags, data, cut, indirect } => {
                self.request((*kind, *sector, *flags), data, *cut, *indirect);
            }
            Action::Notify { queue } => self.driver.notify(*queue),
            Action::Resize { sectors } => {
                self.handle.set_capacity(u64::from(*sectors) % (SECTORS + 1) * 512).unwrap();
            }
            Action::Pass { ns } => self.clock.advance(u64::from(*ns)),
        }
    }

    fn request(&mut self, (kind, sector, flags): (u8, u64, u32), data: &[Piece], cut: u8, indirect: bool) {
        let kind = TYPES.get(usize::from(kind)).copied().unwrap_or(kind.into());
        let sector = if sector % 5 == 0 { sector } else { sector % (SECTORS + 3) };
        let header = [u64::from(kind), sector, sector, 1 | u64::from(flags) << 32];
        self.put(HEADER, &header.map(u64::to_le_bytes).concat());
        let cut = u32::from(cut % 33);
        let mut chain = self.queue.chain().readable(HEADER, cut).readable(HEADER + u64::from(cut), 32 - cut);
        if kind < 11 {
            chain = self.queue.chain().readable(HEADER, cut.min(16));
            if cut < 16 {
                chain = chain.readable(HEADER + u64::from(cut), 16 - cut);
            }
            for piece in data.iter().take(8) {
                let gpa = u64::from(piece.gpa) % (RAM + 0x1000);
                let len = u32::from(piece.sectors % 4) * 512 + u32::from(piece.odd.saturating_sub(0xf000));
                chain = if piece.readable { chain.readable(gpa, len) } else { chain.writable(gpa, len) };
            }
        }
        let chain = chain.writable(HEADER + 0x100, 1);
        if indirect {
            chain.submit_indirect(TABLE).unwrap()
        } else {
            chain.submit().unwrap()
        };
        self.driver.notify(0);
    }

    /// What must hold whatever the guest did.
    pub fn check(self) {
        let mut beyond = vec![0; (SECTORS * 512) as usize];
        self.disk.read(SECTORS * 512, &mut beyond).unwrap();
        assert!(beyond.iter().all(|byte| *byte == MARK), "sectors beyond the capacity were written");
        // A device that was reset touches nothing, and works for a driver that begins anew.
        self.driver.set_status(0);
        assert_eq!(self.driver.status(), 0);
        let snapshot = || {
            let mut ram = vec![0; RAM as usize];
            self.memory.memory().read_slice(&mut ram, GuestAddress(0)).unwrap();
            ram
        };
        let before = snapshot();
        self.handle.set_capacity(SECTORS * 512).unwrap();
        (0..3).for_each(|queue| self.driver.notify(queue));
        assert!(before == snapshot(), "memory was touched after a reset");
        self.clock.set(self.clock.now_ns().saturating_add(10_000_000_000));
        let mut queue = DriverQueue::new(self.memory.clone(), RINGS, 8).unwrap();
        self.driver.start(0, &[(0, &queue)]).unwrap();
        self.put(HEADER, &[8u64, 0].map(u64::to_le_bytes).concat());
        let chain = queue.chain().readable(HEADER, 16).writable(HEADER + 0x40, 20).writable(HEADER + 0x80, 1);
        let head = chain.submit().unwrap();
        self.driver.notify(0);
        assert_eq!(queue.take_used().unwrap(), Some((head.into(), 21)));
    }
}

/// A whole life.
pub fn exercise(actions: &[Action]) {
    let mut guest = BlockGuest::new();
    for action in actions {
        guest.perform(action);
    }
    guest.check();
}
