//! A split virtqueue from the device's side (Virtio 1.3, 2.7), on `virtio-queue`, which keeps the rings.
//!
//! The rings, descriptors and buffers lie in the driver's memory and may change at any moment. Each descriptor is read once,
//! when its chain is taken; what was read is checked, and nothing else is believed later. A chain that breaks the rules ends
//! its queue; a buffer that lies in no RAM fails the one request that it belongs to.

mod again;
mod position;

use std::collections::VecDeque;
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use smallvec::SmallVec;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT as _, QueueT as _};
use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestMemory, GuestMemoryError};

use self::again::Again;
pub(super) use self::position::Position;
use super::device::{DeviceMemory, DriverLink, Progress};

/// VIRTQ_AVAIL_F_NO_INTERRUPT (2.7.6).
const NO_INTERRUPT: u16 = 1;

/// How a driver has broken the rules of its queue. There is no going on but by a reset.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// The rings are not where rings can be, or the driver announced more chains than there are descriptors.
    #[error("queue {index}: {source}")]
    Ring {
        /// Which queue.
        index: u16,
        /// What is wrong.
        source: virtio_queue::Error,
    },
    /// The queue is not ready, or its rings do not lie in RAM.
    #[error(
        "queue {index}: its rings ({descriptors:#x}, {available:#x}, {used:#x}) are not aligned, or not in RAM"
    )]
    Place {
        /// Which queue.
        index: u16,
        /// Address of the descriptor table.
        descriptors: u64,
        /// Address of the available ring.
        available: u64,
        /// Address of the used ring.
        used: u64,
    },
    /// A chain has no end, an index beyond the table, a table within a table, more than 4 GiB, or is longer than the queue can be.
    #[error("queue {index}: the chain at descriptor {head} does not end as chains do")]
    Chain {
        /// Which queue.
        index: u16,
        /// Its first descriptor.
        head: u16,
    },
    /// A buffer for the device to read comes after one to write (2.7.4.2.1).
    #[error("queue {index}: the chain at descriptor {head} has readable buffers behind writable ones")]
    Order {
        /// Which queue.
        index: u16,
        /// Its first descriptor.
        head: u16,
    },
    /// A chain was made available again before it was used.
    #[error("queue {index}: descriptor {head} is made available twice")]
    InFlight {
        /// Which queue.
        index: u16,
        /// Its first descriptor.
        head: u16,
    },
}

/// A queue that the driver has set up. It belongs to the one worker that serves it.
pub struct Virtqueue<M: DeviceMemory> {
    queue: Queue,
    memory: M,
    index: u16,
    /// Which chains are in flight, among others.
    position: Arc<Position>,
    /// Chains that were in flight when the device was saved, and come again.
    again: VecDeque<u16>,
    /// Something was completed since the driver was last thought of.
    completed: bool,
    /// The used index when the driver was last thought of.
    told: u16,
    link: Arc<dyn DriverLink>,
}

impl<M: DeviceMemory> fmt::Debug for Virtqueue<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Virtqueue")
            .field("index", &self.index)
            .field("queue", &self.queue)
            .finish_non_exhaustive()
    }
}

impl<M: DeviceMemory> Virtqueue<M> {
    /// Queue `index` of a device, as its driver has configured `queue`.
    ///
    /// # Errors
    /// [`QueueError::Place`] if the rings cannot be used.
    pub fn new(queue: Queue, index: u16, memory: M, link: Arc<dyn DriverLink>) -> Result<Self, QueueError> {
        if !queue.is_valid(&*memory.memory()) {
            return Err(QueueError::Place {
                index,
                descriptors: queue.desc_table(),
                available: queue.avail_ring(),
                used: queue.used_ring(),
            });
        }
        let told = queue.next_used();
        Ok(Self::at(queue, index, memory, link, told, &[]))
    }

    fn at(queue: Queue, index: u16, memory: M, link: Arc<dyn DriverLink>, told: u16, again: &[u16]) -> Self {
        let indices = [queue.next_avail(), queue.next_used(), told];
        let position = Arc::new(Position::new(queue.size(), indices, again));
        let (completed, again) = (told != queue.next_used(), again.iter().copied().collect());
        Self { queue, memory, index, position, again, completed, told, link }
    }

    /// A queue as it was saved: it stands where it stood, the driver was last thought of at entry `told` of the used ring, and the chains
    /// at `in_flight`, which are different ones of it, are taken again first.
    ///
    /// # Errors
    /// As [`Virtqueue::new`].
    pub(super) fn restored(
        queue: Queue,
        index: u16,
        memory: M,
        link: Arc<dyn DriverLink>,
        (told, in_flight): (u16, &[u16]),
    ) -> Result<Self, QueueError> {
        let Self { queue, index, memory, link, .. } = Self::new(queue, index, memory, link)?;
        Ok(Self::at(queue, index, memory, link, told, in_flight))
    }

    /// How far it has come, now and later.
    pub(super) fn position(&self) -> &Arc<Position> {
        &self.position
    }

    /// How many chains come again that were in flight when the device was saved: those that [`Virtqueue::pop`] gives first.
    pub fn left_in_flight(&self) -> usize {
        self.again.len()
    }

    /// Its number.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// How many descriptors it has.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The guest's memory as it is now: what [`Virtqueue::pop`] is given, once for many chains.
    pub fn memory(&self) -> M::T {
        self.memory.memory()
    }

    /// Takes the next chain that the driver has made available. It is the device's until [`Virtqueue::complete`].
    ///
    /// `memory` is where its buffers are looked for: a reference to what [`Virtqueue::memory`] gave, or, for a chain that
    /// stays in flight, that itself.
    ///
    /// # Errors
    /// The driver has broken the rules; so it will be again.
    pub fn pop<T: Deref<Target = M::M> + Clone>(
        &mut self,
        memory: T,
    ) -> Result<Option<Chain<T>>, QueueError> {
        if let Some(head) = self.again.pop_front() {
            let mut descriptors = Again::new(&*memory, self.queue.desc_table(), self.queue.size(), head);
            return self.gather(&mut descriptors, head, memory.clone()).map(Some);
        }
        let index = self.index;
        let ring = |source| QueueError::Ring { index, source };
        let mut next = self.queue.iter(&*memory).map_err(ring)?.next();
        // By reference: to move it takes as long as to read a descriptor.
        let Some(raw) = &mut next else {
            self.check_next_entry(&*memory).map_err(|error| ring(virtio_queue::Error::GuestMemory(error)))?;
            return Ok(None);
        };
        let head = raw.head_index();
        let chain = self.gather(raw, head, memory.clone())?;
        if !self.position.take(head, self.queue.next_avail()) {
            return Err(QueueError::InFlight { index, head });
        }
        Ok(Some(chain))
    }

    /// The chain that those descriptors are.
    #[inline]
    fn gather<T>(
        &self,
        descriptors: &mut impl Iterator<Item = Descriptor>,
        head: u16,
        memory: T,
    ) -> Result<Chain<T>, QueueError> {
        let index = self.index;
        let mut chain = Chain { head, memory, segments: SmallVec::new(), readable: 0, lens: [0; 2] };
        let [readable_len, writable_len] = &mut chain.lens;
        let mut ended = false;
        // In a table of its own a chain may be as long as the device's queue can be (2.7.5.3.1), however few descriptors its driver has
        // chosen: devices say how long requests may be, and know nothing of that choice.
        let most = usize::from(self.queue.max_size());
        for descriptor in descriptors {
            if ended || chain.segments.len() >= most {
                return Err(QueueError::Chain { index, head });
            }
            let segment = Segment { gpa: descriptor.addr(), len: descriptor.len() };
            if descriptor.is_write_only() {
                chain.segments.push(segment);
                *writable_len += u64::from(segment.len);
            } else if chain.readable == chain.segments.len() {
                chain.segments.push(segment);
                chain.readable += 1;
                *readable_len += u64::from(segment.len);
            } else {
                return Err(QueueError::Order { index, head });
            }
            ended = !descriptor.has_next();
        }
        if ended { Ok(chain) } else { Err(QueueError::Chain { index, head }) }
    }

    /// Whether the entry can be read that comes next, if there is one. `virtio-queue` takes one that cannot for none, and a worker would
    /// look for it for ever.
    fn check_next_entry(&self, memory: &M::M) -> Result<(), GuestMemoryError> {
        let next = self.queue.next_avail();
        let index: u16 = memory.load(GuestAddress(self.queue.avail_ring() + 2), Ordering::Acquire)?;
        if u16::from_le(index) == next {
            return Ok(());
        }
        let place = self.queue.avail_ring() + 4 + 2 * u64::from(next % self.queue.size().max(1));
        memory.load::<u16>(GuestAddress(place), Ordering::Relaxed).map(drop)
    }

    /// Gives a chain back: the device has written the first `written` bytes of its writable buffers (2.7.8), and no more.
    ///
    /// # Errors
    /// If the used ring is in RAM no more.
    pub fn complete(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        self.complete_in(&self.memory(), head, written)
    }

    /// The same for who has the guest's memory at hand: a [`Chain::memory`], as a rule.
    ///
    /// # Errors
    /// As [`Virtqueue::complete`].
    pub fn complete_in(&mut self, memory: &M::M, head: u16, written: u32) -> Result<(), QueueError> {
        self.position.complete(head);
        let index = self.index;
        self.completed = true;
        self.queue.add_used(memory, head, written).map_err(|source| QueueError::Ring { index, source })?;
        self.position.set_next_used(self.queue.next_used());
        Ok(())
    }

    /// Gives several chains back at once, heads and bytes written: the driver sees none of them before it sees all. As
    /// [`Virtqueue::complete_in`] for each otherwise.
    ///
    /// # Errors
    /// As [`Virtqueue::complete`]; then it sees none.
    pub fn complete_all(&mut self, memory: &M::M, ended: &[(u16, u32)]) -> Result<(), QueueError> {
        let index = self.index;
        let ring = |source| QueueError::Ring { index, source };
        let lost = |error| ring(virtio_queue::Error::GuestMemory(error));
        let size = self.queue.size().max(1);
        let mut next = self.queue.next_used();
        for &(head, written) in ended {
            self.position.complete(head);
            let place = self.queue.used_ring() + 4 + 8 * u64::from(next % size);
            let element = [u32::from(head).to_le(), written.to_le()];
            memory.write_obj(element, GuestAddress(place)).map_err(lost)?;
            next = next.wrapping_add(1);
        }
        self.completed = true;
        self.queue.set_next_used(next);
        self.position.set_next_used(next);
        memory.store(next.to_le(), GuestAddress(self.queue.used_ring() + 2), Ordering::Release).map_err(lost)
    }

    /// Interrupts the driver for what was completed since the last time, if it wants to hear of it (2.7.7).
    ///
    /// # Errors
    /// If the rings are in RAM no more.
    pub fn interrupt(&mut self) -> Result<(), QueueError> {
        self.interrupt_in(&self.memory())
    }

    fn interrupt_in(&mut self, memory: &M::M) -> Result<(), QueueError> {
        if !std::mem::take(&mut self.completed) {
            return Ok(());
        }
        let index = self.index;
        let ring = |source| QueueError::Ring { index, source };
        // What was completed is visible before this looks whether the driver wants to hear of it.
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        let event_idx = self.queue.event_idx_enabled();
        let place = if event_idx { available + 4 + 2 * u64::from(self.queue.size()) } else { available };
        let said: u16 = memory
            .load(GuestAddress(place), Ordering::Relaxed)
            .map_err(|error| ring(virtio_queue::Error::GuestMemory(error)))?;
        let said = u16::from_le(said);
        let used = self.queue.next_used();
        let before = std::mem::replace(&mut self.told, used);
        self.position.set_told(used);
        // Whether the entry that it waits for is among those used since (2.7.7.2). `virtio-queue` would know of those that were completed
        // one by one alone.
        let wanted = if event_idx {
            used.wrapping_sub(said).wrapping_sub(1) < used.wrapping_sub(before)
        } else {
            said & NO_INTERRUPT == 0
        };
        if wanted {
            self.link.used(index);
        }
        Ok(())
    }

    /// Asks the driver not to ring until [`Virtqueue::rest`] (2.7.10): what it adds is seen without.
    ///
    /// # Errors
    /// If the rings are in RAM no more.
    pub fn decline_doorbells(&mut self) -> Result<(), QueueError> {
        let index = self.index;
        let declined = self.queue.disable_notification(&*self.memory.memory());
        declined.map_err(|source| QueueError::Ring { index, source })
    }

    /// What [`Worker::process`](super::Worker::process) ends with: interrupts the driver for what was completed, and asks it to ring
    /// for whatever it adds from now on. [`Progress::More`] if there are chains already, for which it will not ring.
    ///
    /// # Errors
    /// If the rings are in RAM no more.
    pub fn rest(&mut self) -> Result<Progress, QueueError> {
        let memory = self.memory();
        self.interrupt_in(&memory)?;
        let index = self.index;
        let ring = |source| QueueError::Ring { index, source };
        if !self.queue.enable_notification(&*memory).map_err(ring)? {
            return Ok(Progress::Idle);
        }
        if self.queue.event_idx_enabled() {
            // The event is the first of the chains that are there, which has passed.
            let available = self.queue.avail_idx(&*memory, Ordering::Relaxed).map_err(ring)?;
            let event = self.queue.used_ring() + 4 + 8 * u64::from(self.queue.size());
            memory
                .store(available.0.to_le(), GuestAddress(event), Ordering::Relaxed)
                .map_err(|error| ring(virtio_queue::Error::GuestMemory(error)))?;
        }
        Ok(Progress::More)
    }

    /// How many chains are available, as far as the ring says.
    ///
    /// # Errors
    /// If the ring is in RAM no more.
    pub fn available(&self) -> Result<u16, QueueError> {
        let index = self.index;
        let available = self.queue.avail_idx(&*self.memory.memory(), Ordering::Acquire);
        let available = available.map_err(|source| QueueError::Ring { index, source })?;
        Ok(available.0.wrapping_sub(self.queue.next_avail()))
    }

    /// Reaches the driver.
    pub fn link(&self) -> &Arc<dyn DriverLink> {
        &self.link
    }
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    gpa: GuestAddress,
    len: u32,
}

/// The buffers of one request: those that the device reads, then those that it writes. Both are seen as one run of bytes
/// each, whatever pieces they come in.
#[derive(Clone)]
pub struct Chain<T> {
    head: u16,
    memory: T,
    /// The first `readable` of them are for the device to read.
    segments: SmallVec<[Segment; 6]>,
    readable: usize,
    /// Bytes to read, and to write.
    lens: [u64; 2],
}

impl<T> fmt::Debug for Chain<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain")
            .field("head", &self.head)
            .field("segments", &self.segments)
            .finish_non_exhaustive()
    }
}

impl<T> Chain<T> {
    /// The same buffers, looked for in `memory`: what [`Virtqueue::memory`] gave, for a chain that was taken by reference and is
    /// now to stay in flight; `()` for one that holds no snapshot meanwhile.
    pub fn in_memory<U>(self, memory: U) -> Chain<U> {
        let Self { head, segments, readable, lens, .. } = self;
        Chain { head, memory, segments, readable, lens }
    }

    /// Its first descriptor, by which [`Virtqueue::complete`] knows it.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The buffers to read: guest-physical address and length of each.
    pub fn readable(&self) -> impl ExactSizeIterator<Item = (GuestAddress, u32)> + '_ {
        self.segments.get(..self.readable).unwrap_or_default().iter().map(|s| (s.gpa, s.len))
    }

    /// The buffers to write.
    pub fn writable(&self) -> impl ExactSizeIterator<Item = (GuestAddress, u32)> + '_ {
        self.segments.get(self.readable..).unwrap_or_default().iter().map(|s| (s.gpa, s.len))
    }

    /// How many buffers it has.
    pub(super) fn segments(&self) -> usize {
        self.segments.len()
    }

    /// Bytes to read, all in all.
    pub fn readable_len(&self) -> u64 {
        let [readable, _] = self.lens;
        readable
    }

    /// Bytes that may be written, all in all.
    pub fn writable_len(&self) -> u64 {
        let [_, writable] = self.lens;
        writable
    }
}

impl<T: Deref<Target: GuestMemory>> Chain<T> {
    /// The memory in which its buffers lie.
    pub fn memory(&self) -> &T::Target {
        &self.memory
    }

    /// Reads from byte `offset` of what is to be read on; how many bytes there were, `data.len()` at most.
    ///
    /// # Errors
    /// If a buffer does not lie in RAM.
    pub fn read(&self, offset: u64, data: &mut [u8]) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        for (gpa, len) in pieces(self.readable(), offset, data.len()) {
            let Some(part) = data.get_mut(done..done + len) else { break };
            self.memory.read_slice(part, gpa)?;
            done += len;
        }
        Ok(done)
    }

    /// Writes from byte `offset` of what may be written on; how many bytes found room.
    ///
    /// # Errors
    /// If a buffer does not lie in RAM. What lies before it was written.
    pub fn write(&self, offset: u64, data: &[u8]) -> Result<usize, GuestMemoryError> {
        let mut done = 0;
        for (gpa, len) in pieces(self.writable(), offset, data.len()) {
            let Some(part) = data.get(done..done + len) else { break };
            self.memory.write_slice(part, gpa)?;
            done += len;
        }
        Ok(done)
    }

    /// As [`Chain::read`], up to the first byte that lies in no RAM: for a stream, of which a part is worth something.
    pub fn read_some(&self, offset: u64, data: &mut [u8]) -> usize {
        let mut done = 0;
        for (gpa, len) in pieces(self.readable(), offset, data.len()) {
            let Some(part) = data.get_mut(done..done + len) else { break };
            let read = self.memory.read(part, gpa).unwrap_or(0);
            done += read;
            if read < len {
                break;
            }
        }
        done
    }

    /// As [`Chain::write`], up to the first byte that lies in no RAM. What it returns is what was written, to the byte.
    pub fn write_some(&self, offset: u64, data: &[u8]) -> usize {
        let mut done = 0;
        for (gpa, len) in pieces(self.writable(), offset, data.len()) {
            let Some(part) = data.get(done..done + len) else { break };
            let written = self.memory.write(part, gpa).unwrap_or(0);
            done += written;
            if written < len {
                break;
            }
        }
        done
    }
}

/// The parts of buffers that hold `len` bytes from byte `offset` on, as many as there are.
pub(super) fn pieces(
    buffers: impl Iterator<Item = (GuestAddress, u32)>,
    offset: u64,
    len: usize,
) -> impl Iterator<Item = (GuestAddress, usize)> {
    let (mut skip, mut left) = (offset, len);
    buffers.map_while(move |(gpa, size)| {
        if left == 0 {
            return None;
        }
        let size = u64::from(size);
        let within = skip.min(size);
        skip -= within;
        // Below 4 GiB, which a usize holds on the hosts that this crate is for.
        let part = usize::try_from(size - within).unwrap_or(usize::MAX).min(left);
        left -= part;
        // An address that wraps lies in no RAM.
        Some((GuestAddress(gpa.0.saturating_add(within)), part))
    })
}

#[cfg(test)]
mod tests;
