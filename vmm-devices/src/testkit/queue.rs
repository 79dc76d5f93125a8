//! The driver's side of a split virtqueue (Virtio 1.3, 2.7).

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT as _};
use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestMemoryError};

use crate::virtio::DeviceMemory;

/// Flags of a descriptor (2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

type Result<T> = std::result::Result<T, GuestMemoryError>;

/// A queue in guest memory, as a driver has it.
///
/// Descriptors are handed out in a circle, without a look at whether they are in use: who makes more chains than there are
/// descriptors makes what a hostile driver makes.
#[derive(Clone, Debug)]
pub struct DriverQueue<M: DeviceMemory> {
    memory: M,
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    next_descriptor: u16,
    next_available: u16,
    next_used: u16,
}

impl<M: DeviceMemory> DriverQueue<M> {
    /// A queue of `size` descriptors, whose rings lie at `at` and behind; `at` is a multiple of 16.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn new(memory: M, at: u64, size: u16) -> Result<Self> {
        let available = at + 16 * u64::from(size);
        let used = (available + 6 + 2 * u64::from(size)).next_multiple_of(4);
        let queue = Self {
            memory,
            size,
            descriptors: at,
            available,
            used,
            next_descriptor: 0,
            next_available: 0,
            next_used: 0,
        };
        let zeros = vec![0; usize::try_from(queue.end() - at).unwrap_or(0)];
        queue.memory.memory().write_slice(&zeros, GuestAddress(at))?;
        Ok(queue)
    }

    /// The same queue in `memory`, which is a copy: the driver of a machine that goes on elsewhere. How far it is comes with it.
    pub fn moved_to<N: DeviceMemory>(&self, memory: N) -> DriverQueue<N> {
        let Self { size, descriptors, available, used, next_descriptor, next_available, next_used, .. } =
            *self;
        DriverQueue { memory, size, descriptors, available, used, next_descriptor, next_available, next_used }
    }

    /// The first address behind its rings.
    pub fn end(&self) -> u64 {
        self.used + 6 + 8 * u64::from(self.size)
    }

    /// How many descriptors it has.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Addresses of descriptor table, available ring and used ring.
    pub fn rings(&self) -> [u64; 3] {
        [self.descriptors, self.available, self.used]
    }

    /// Writes what a buffer holds.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn put(&self, gpa: u64, bytes: &[u8]) -> Result<()> {
        self.memory.memory().write_slice(bytes, GuestAddress(gpa))
    }

    /// Reads what a buffer holds.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn get(&self, gpa: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.memory.memory().read_slice(&mut bytes, GuestAddress(gpa))?;
        Ok(bytes)
    }

    /// The device's side of it, as a transport configures that, for a test without a transport.
    ///
    /// # Errors
    /// If its size is none that queues can have.
    pub fn device_side(&self) -> std::result::Result<Queue, virtio_queue::Error> {
        let mut queue = Queue::new(self.size)?;
        queue.try_set_desc_table_address(GuestAddress(self.descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(self.available))?;
        queue.try_set_used_ring_address(GuestAddress(self.used))?;
        queue.set_ready(true);
        Ok(queue)
    }

    /// Writes one descriptor, whatever stood there.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn write_descriptor(&self, index: u16, gpa: u64, len: u32, flags: u16, next: u16) -> Result<()> {
        write_descriptor(
            &self.memory,
            self.descriptors + 16 * u64::from(index),
            [gpa, len.into(), flags.into(), next.into()],
        )
    }

    /// The first descriptor of the chain that comes next.
    pub fn next_head(&self) -> u16 {
        self.next_descriptor
    }

    /// How many chains were made available so far.
    pub fn submitted(&self) -> u16 {
        self.next_available
    }

    /// Begins a chain.
    pub fn chain(&mut self) -> ChainBuilder<'_, M> {
        ChainBuilder { queue: self, buffers: Vec::new() }
    }

    /// Makes the chain at descriptor `head` available.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn make_available(&mut self, head: u16) -> Result<()> {
        let place = self.available + 4 + 2 * u64::from(self.next_available % self.size.max(1));
        let memory = self.memory.memory();
        memory.write_obj(head.to_le(), GuestAddress(place))?;
        drop(memory);
        self.next_available = self.next_available.wrapping_add(1);
        self.write_available_index(self.next_available)
    }

    /// Says how many chains there were so far, true or not.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn write_available_index(&self, index: u16) -> Result<()> {
        self.memory.memory().store(index.to_le(), GuestAddress(self.available + 2), Ordering::Release)
    }

    /// How many chains there were so far, as the available ring says.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn available_index(&self) -> Result<u16> {
        self.memory.memory().load(GuestAddress(self.available + 2), Ordering::Acquire).map(u16::from_le)
    }

    /// Flags of the available ring (2.7.7): 1 for no interrupts, without VIRTIO_F_EVENT_IDX.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn write_available_flags(&self, flags: u16) -> Result<()> {
        self.memory.memory().store(flags.to_le(), GuestAddress(self.available), Ordering::Release)
    }

    /// With VIRTIO_F_EVENT_IDX: the entry of the used ring that is worth an interrupt.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn write_used_event(&self, index: u16) -> Result<()> {
        let place = self.available + 4 + 2 * u64::from(self.size);
        self.memory.memory().store(index.to_le(), GuestAddress(place), Ordering::Release)
    }

    /// Flags of the used ring: 1 if the device wants no doorbell, without VIRTIO_F_EVENT_IDX.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn used_flags(&self) -> Result<u16> {
        self.memory.memory().load(GuestAddress(self.used), Ordering::Acquire).map(u16::from_le)
    }

    /// How many chains the device has used so far.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn used_index(&self) -> Result<u16> {
        self.memory.memory().load(GuestAddress(self.used + 2), Ordering::Acquire).map(u16::from_le)
    }

    /// The next chain that the device gave back: its head, and how many bytes were written.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn take_used(&mut self) -> Result<Option<(u32, u32)>> {
        if self.used_index()? == self.next_used {
            return Ok(None);
        }
        let place = self.used + 4 + 8 * u64::from(self.next_used % self.size.max(1));
        let [id, len]: [u32; 2] = self.memory.memory().read_obj(GuestAddress(place))?;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(Some((u32::from_le(id), u32::from_le(len))))
    }

    /// The same for a device that is served by another thread: waits for the next chain, `patience` at most.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn await_used(&mut self, patience: Duration) -> Result<Option<(u32, u32)>> {
        let begun = Instant::now();
        loop {
            let used = self.take_used()?;
            if used.is_some() || begun.elapsed() >= patience {
                return Ok(used);
            }
            thread::yield_now();
        }
    }
}

/// Table entry: address, length, flags, next.
fn write_descriptor<M: DeviceMemory>(
    memory: &M,
    place: u64,
    [gpa, len, flags, next]: [u64; 4],
) -> Result<()> {
    memory.memory().write_obj([gpa.to_le(), (len | flags << 32 | next << 48).to_le()], GuestAddress(place))
}

/// Buffers of a chain, in their order.
#[derive(Debug)]
#[must_use]
pub struct ChainBuilder<'a, M: DeviceMemory> {
    queue: &'a mut DriverQueue<M>,
    buffers: Vec<(u64, u32, u16)>,
}

impl<M: DeviceMemory> ChainBuilder<'_, M> {
    /// A buffer for the device to read.
    pub fn readable(mut self, gpa: u64, len: u32) -> Self {
        self.buffers.push((gpa, len, 0));
        self
    }

    /// A buffer for the device to write.
    pub fn writable(mut self, gpa: u64, len: u32) -> Self {
        self.buffers.push((gpa, len, WRITE));
        self
    }

    /// Writes the descriptors, and makes them available; the head. Without a buffer that is whatever stands in the next
    /// descriptor.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn submit(self) -> Result<u16> {
        let Self { queue, buffers } = self;
        let size = queue.size.max(1);
        let head = queue.next_descriptor;
        let count = buffers.len();
        for (done, (gpa, len, flags)) in (1..).zip(buffers) {
            let (index, last) = (queue.next_descriptor, done == count);
            queue.next_descriptor = (index + 1) % size;
            let flags = if last { flags } else { flags | NEXT };
            queue.write_descriptor(index, gpa, len, flags, queue.next_descriptor)?;
        }
        queue.make_available(head)?;
        Ok(head)
    }

    /// The same by way of a table at `table` (2.7.5.3); 16 bytes for each buffer.
    ///
    /// # Errors
    /// If there is no memory.
    pub fn submit_indirect(self, table: u64) -> Result<u16> {
        let Self { queue, buffers } = self;
        let count = buffers.len() as u64;
        for (index, (gpa, len, flags)) in (0..).zip(buffers) {
            let flags = if index + 1 == count { flags } else { flags | NEXT };
            let entry = [gpa, len.into(), flags.into(), index + 1];
            write_descriptor(&queue.memory, table + 16 * index, entry)?;
        }
        let head = queue.next_descriptor;
        queue.next_descriptor = (head + 1) % queue.size.max(1);
        queue.write_descriptor(head, table, u32::try_from(16 * count).unwrap_or(u32::MAX), INDIRECT, 0)?;
        queue.make_available(head)?;
        Ok(head)
    }
}
