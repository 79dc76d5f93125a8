//! Frames of the network, on their way into the driver's buffers.
//!
//! The port writes right into them. The device takes as many buffers as the longest frame may need before it asks for one, and keeps
//! those that are left for the next. Behind them lies memory of its own, for a frame that is longer than the buffers at hand: such a
//! one waits there for more, or is dropped where more would not help.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use smallvec::SmallVec;
use vmm_memory::vm_memory::{Permissions, VolatileSlice};

use super::room::{Room, behind_header, fill, peek};
use super::shared::{Shared, count, read};
use super::state::NetFrameState;
use crate::interrupt::lock;
use crate::net::{
    ETHERNET_HEADER, HEADER, MAX_FRAME, NetError, NetPort, Offloads, PacketInfo, Received, RxFilter,
    is_tagged,
};
use crate::vectored::MOST_SLICES;
use crate::virtio::device::{DeviceMemory, Progress};
use crate::virtio::metrics::Activity;
use crate::virtio::queue::{Chain, QueueError, Virtqueue, pieces};
use crate::virtio::rate::Throttled;
use crate::virtio::slices::{each_slice, erase, mark_dirty};

/// Bytes that are received before others have their turn, or what takes as long.
const SHARE: usize = 4 << 20;
/// What a frame costs beside its bytes.
const EFFORT: usize = 4096;

/// Bytes of the longest frame that no segmentation is left to do of, unless the network is of a larger MTU: with room for tags.
const ORDINARY: usize = 1514 + 8;

/// Bytes of a tag, behind the addresses of a frame (IEEE 802.1Q).
const TAG: usize = 4;

/// Bytes of a frame that a filter looks at.
const SEEN: usize = ETHERNET_HEADER + 2;

/// Slices that the buffers may consist of; one more is the device's own memory.
const SLICES: usize = MOST_SLICES - 1;

/// Bytes of a frame at most, which begins so, for a driver that was promised `mtu`.
pub(super) fn longest(mtu: Option<u16>, info: &PacketInfo, seen: &[u8]) -> usize {
    match mtu {
        // Of what is to be cut the pieces are no longer (5.1.4.1); nor is a tag part of the packet.
        Some(mtu) if info.gso.is_none() => {
            usize::from(mtu) + ETHERNET_HEADER + if is_tagged(seen) { TAG } else { 0 }
        }
        _ => MAX_FRAME,
    }
}

/// A buffer that the driver has made available. It holds no memory.
struct Held {
    chain: Chain<()>,
    /// Bytes that are written at most.
    room: usize,
    /// Slices that they consist of.
    slices: usize,
}

/// A frame that has come and is not given to the driver yet.
struct Waiting {
    received: Received,
    begun_ns: u64,
    place: Place,
}

/// Where it is, and what it waits for.
enum Place {
    /// In the first buffers; its turn.
    Buffers(Throttled),
    /// In memory of the device's; buffers.
    Spill,
}

/// One receive queue.
pub(super) struct Receive<M: DeviceMemory> {
    queue: Virtqueue<M>,
    shared: Arc<Shared>,
    /// A frame may lie in several buffers.
    mergeable: bool,
    /// Bytes of buffers that are wanted before a frame is received.
    wanted: usize,
    /// Bytes of a packet, without its Ethernet header, that the driver has been promised as the most (VIRTIO_NET_F_MTU).
    mtu: Option<u16>,
    held: VecDeque<Held>,
    spill: Box<[u8]>,
    waiting: Option<Waiting>,
    filter: Arc<RxFilter>,
    offloads: Offloads,
    /// How often the driver had wished for something else when these were taken.
    wished: Option<u32>,
    /// It was paused, here or elsewhere: what waited then is with the device.
    paused: bool,
}

/// Why no more frames are received.
enum Next {
    /// There are none.
    NoFrames,
    /// The driver has to make buffers available.
    NoBuffers,
    /// The cable is out; somebody says so when it is in again.
    NoLink,
    Wait,
    Others,
}

impl<M: DeviceMemory> Receive<M> {
    pub(super) fn new(
        queue: Virtqueue<M>,
        shared: Arc<Shared>,
        mergeable: bool,
        agreed: Offloads,
        mtu: Option<u16>,
    ) -> Self {
        let segmented = agreed != Offloads::NONE && agreed != Offloads::CSUM;
        let most = shared.backend.mtu().map_or(0, |mtu| usize::from(mtu) + ETHERNET_HEADER + 8);
        let wanted = HEADER + if segmented { MAX_FRAME } else { ORDINARY.max(most) };
        let filter = Arc::new(RxFilter::everything(shared.mac));
        Self {
            queue,
            shared,
            mergeable,
            wanted,
            mtu,
            held: VecDeque::new(),
            spill: vec![0; MAX_FRAME].into_boxed_slice(),
            waiting: None,
            filter,
            offloads: agreed,
            wished: None,
            paused: true,
        }
    }

    pub(super) fn queue(&self) -> u16 {
        self.queue.index()
    }

    fn pair(&self) -> u16 {
        self.queue.index() / 2
    }

    pub(super) fn deadline(&self) -> Option<u64> {
        match &self.waiting.as_ref()?.place {
            Place::Buffers(throttled) => Some(throttled.until_ns()),
            Place::Spill => None,
        }
    }

    pub(super) fn stop(&mut self) {
        self.waiting = None;
        self.held.clear();
        drop(self.shared.kept(self.pair()));
    }

    /// Gives a frame that waits to the device, for which its place in line is given up: its bytes, which may be in buffers that the driver
    /// makes available anew where it goes on.
    pub(super) fn pause(&mut self) -> Result<(), QueueError> {
        self.paused = true;
        let memory = self.queue.memory();
        let mut room = Room::new();
        if matches!(&self.waiting, Some(Waiting { place: Place::Buffers(_), .. })) {
            self.find(&*memory, &mut room)?;
        }
        let Some(Waiting { received: Received { info, len }, place, .. }) = self.waiting.take() else {
            return Ok(());
        };
        let bytes = match place {
            Place::Buffers(_) => {
                let mut bytes = vec![0; len];
                let there = peek(&behind_header(&room, &[]), len, &mut bytes).len();
                bytes.truncate(there);
                bytes
            }
            Place::Spill => self.spill.get(..len).unwrap_or_default().to_vec(),
        };
        self.shared.keep(NetFrameState::new(self.pair(), info, bytes));
        Ok(())
    }

    /// Takes it back.
    fn go_on(&mut self) {
        if !std::mem::take(&mut self.paused) {
            return;
        }
        let Some(frame) = self.shared.kept(self.pair()) else { return };
        let len = frame.bytes.len();
        if let Some((info, place)) = frame.info().zip(self.spill.get_mut(..len)) {
            place.copy_from_slice(&frame.bytes);
            let (received, begun_ns) = (Received { info, len }, self.shared.now_ns());
            self.waiting = Some(Waiting { received, begun_ns, place: Place::Spill });
        }
    }

    /// Receives what is there.
    pub(super) fn process(&mut self, port: &mut dyn NetPort) -> Result<Progress, QueueError> {
        self.queue.decline_doorbells()?;
        self.go_on();
        self.look_at_wishes();
        let memory = self.queue.memory();
        // Taken out, so that the port may write to it while the rest is used.
        let mut spill = std::mem::take(&mut self.spill);
        let next = self.serve(&*memory, &mut spill, port);
        self.spill = spill;
        match next? {
            // The driver need not ring for buffers while there are enough.
            Next::NoFrames if self.has_enough() => self.queue.interrupt().map(|()| Progress::Idle),
            // Buffers that are available and cannot be taken are no reason to come back.
            Next::NoFrames | Next::NoBuffers => {
                self.queue.rest().map(|more| if self.is_full() { Progress::Idle } else { more })
            }
            Next::Wait | Next::NoLink => self.queue.interrupt().map(|()| Progress::Idle),
            Next::Others => self.queue.interrupt().map(|()| Progress::More),
        }
    }

    fn look_at_wishes(&mut self) {
        let wished = Some(self.shared.wished.load(Ordering::SeqCst));
        if wished != self.wished {
            let wishes = lock(&self.shared.wishes);
            (self.filter, self.offloads) = (Arc::clone(&wishes.filter), wishes.offloads);
            self.wished = wished;
        }
    }

    /// Bytes of the buffers that it holds.
    fn room(&self) -> usize {
        self.held.iter().map(|held| held.room).sum()
    }

    fn slices(&self) -> usize {
        self.held.iter().map(|held| held.slices).sum()
    }

    fn has_enough(&self) -> bool {
        if self.mergeable { self.room() >= self.wanted } else { !self.held.is_empty() }
    }

    /// Whether it can hold no more buffers, or the driver has none left.
    fn is_full(&self) -> bool {
        let most = if self.mergeable { usize::from(self.queue.size()) } else { 1 };
        let descriptors: usize = self.held.iter().map(|held| held.chain.segments()).sum();
        descriptors >= most || self.slices() >= SLICES
    }

    /// Looks for the memory of buffers that it holds since an earlier call.
    fn find<'a>(&mut self, memory: &'a M::M, room: &mut Room<'a>) -> Result<(), QueueError> {
        let before = self.held.len();
        for held in std::mem::take(&mut self.held) {
            self.hold(held.chain, memory, room)?;
        }
        // A frame that lies in one which is no memory any more is gone with it.
        let lost = |waiting: &mut Waiting| matches!(waiting.place, Place::Buffers(_));
        if self.held.len() != before
            && let Some(waiting) = self.waiting.take_if(lost)
        {
            self.drop_frame(waiting.begun_ns);
        }
        Ok(())
    }

    /// Takes a buffer, unless it is no good, in which case the driver gets it back.
    fn hold<'a>(
        &mut self,
        chain: Chain<()>,
        memory: &'a M::M,
        room: &mut Room<'a>,
    ) -> Result<(), QueueError> {
        let (before, free) = (room.len(), SLICES.saturating_sub(self.slices()));
        let len = usize::try_from(chain.writable_len()).unwrap_or(usize::MAX).min(HEADER + MAX_FRAME);
        let (mut slices, mut bytes) = (0, 0);
        let found = each_slice(memory, pieces(chain.writable(), 0, len), Permissions::Write, |slice| {
            if slices < free {
                slices += 1;
                bytes += slice.len();
                room.push(erase(&slice));
            }
        });
        if found == Some(len) && bytes >= HEADER {
            self.held.push_back(Held { chain, room: bytes, slices });
            return Ok(());
        }
        room.truncate(before);
        count(&self.shared.counters.bad_buffers);
        self.queue.complete_in(memory, chain.head(), 0)
    }

    /// Takes buffers until there are so many bytes of them, or as many as it can hold. Those that are no good cost something of what is
    /// `left` to be done: a driver may make them available as fast as they are given back.
    fn take_buffers<'a>(
        &mut self,
        wanted: usize,
        left: &mut usize,
        memory: &'a M::M,
        room: &mut Room<'a>,
    ) -> Result<(), QueueError> {
        while self.room() < wanted && !self.is_full() && *left > 0 {
            let Some(chain) = self.queue.pop(memory)? else { break };
            let before = self.held.len();
            self.hold(chain.in_memory(()), memory, room)?;
            if self.held.len() == before {
                *left = left.saturating_sub(EFFORT);
            }
        }
        Ok(())
    }

    fn serve<'a>(
        &mut self,
        memory: &'a M::M,
        spill: &mut [u8],
        port: &mut dyn NetPort,
    ) -> Result<Next, QueueError> {
        let mut room: Room<'a> = Room::new();
        self.find(memory, &mut room)?;
        let mut left = SHARE;
        while left > 0 {
            // A pair that the driver does not use is one without a cable.
            let link = self.shared.link().up && self.pair() < *read(&self.shared.in_use);
            // While it is down frames lead nowhere, those that wait among them.
            if let Some(waiting) = self.waiting.take_if(|_| !link) {
                self.drop_frame(waiting.begun_ns);
            }
            let (received, begun_ns, throttled) = match self.waiting.take() {
                Some(Waiting { received, begun_ns, place: Place::Buffers(throttled) }) => {
                    (received, begun_ns, throttled.retry())
                }
                Some(waiting) => {
                    let needed = HEADER + waiting.received.len;
                    self.take_buffers(needed, &mut left, memory, &mut room)?;
                    if self.room() < needed {
                        if !self.is_full() {
                            self.waiting = Some(waiting);
                            return Ok(if left > 0 { Next::NoBuffers } else { Next::Others });
                        }
                        // No others will come.
                        self.drop_frame(waiting.begun_ns);
                        continue;
                    }
                    let frame = spill.get(..waiting.received.len).unwrap_or_default();
                    fill(&behind_header(&room, &[]), frame);
                    self.mark(waiting.received.len, memory);
                    (waiting.received, waiting.begun_ns, self.admit(waiting.received.len))
                }
                None => {
                    left = left.saturating_sub(EFFORT);
                    if link {
                        self.take_buffers(self.wanted, &mut left, memory, &mut room)?;
                        if self.held.is_empty() {
                            return Ok(if left > 0 { Next::NoBuffers } else { Next::Others });
                        }
                    }
                    let own = VolatileSlice::from(&mut *spill);
                    let buffers = behind_header(if link { &room } else { &[] }, &[own]);
                    let received = match port.receive(&buffers) {
                        Ok(Some(received)) => received,
                        Ok(None) => return Ok(if link { Next::NoFrames } else { Next::NoLink }),
                        Err(error) => {
                            count(&self.shared.counters.receive_dropped);
                            match error {
                                NetError::Host(error) if error.kind() != io::ErrorKind::Interrupted => {
                                    return Ok(Next::NoFrames);
                                }
                                _ => continue,
                            }
                        }
                    };
                    left = left.saturating_sub(received.len);
                    let begun_ns = self.shared.now_ns();
                    if !link {
                        self.drop_frame(begun_ns);
                        continue;
                    }
                    self.mark(received.len, memory);
                    let mut seen = [0; SEEN];
                    let seen = peek(&buffers, received.len, &mut seen);
                    let Some(received) = self.check(received, seen, begun_ns) else { continue };
                    let fits = self.room().saturating_sub(HEADER);
                    if received.len > fits {
                        // What lies in the buffers is joined with what found no room there.
                        drop(buffers);
                        if self.mergeable && received.len <= spill.len() {
                            spill.copy_within(..received.len - fits, fits);
                            let start = spill.get_mut(..fits).unwrap_or_default();
                            peek(&behind_header(&room, &[]), fits, start);
                            self.waiting = Some(Waiting { received, begun_ns, place: Place::Spill });
                        } else {
                            self.drop_frame(begun_ns);
                        }
                        continue;
                    }
                    (received, begun_ns, self.admit(received.len))
                }
            };
            if let Err(throttled) = throttled {
                self.waiting = Some(Waiting { received, begun_ns, place: Place::Buffers(throttled) });
                return Ok(Next::Wait);
            }
            let used = self.deliver(received, begun_ns, memory)?;
            room.drain(..used);
        }
        Ok(Next::Others)
    }

    /// Lets a frame in, or says when it may go on.
    fn admit(&self, len: usize) -> Result<(), Throttled> {
        let Some(rate) = &self.shared.receive_rate else { return Ok(()) };
        rate.admit(len as u64).inspect_err(|_| self.shared.throttled())
    }

    fn drop_frame(&self, begun_ns: u64) {
        count(&self.shared.counters.receive_dropped);
        self.shared.ended(Activity::Read, 0, false, begun_ns);
    }

    /// Whether the driver gets a frame that begins so; with what it is told of it.
    fn check(&self, received: Received, seen: &[u8], begun_ns: u64) -> Option<Received> {
        let Received { mut info, len } = received;
        let most = longest(self.mtu, &info, seen);
        let fits = (ETHERNET_HEADER..=most).contains(&len) && info.check(len, self.offloads).is_ok();
        if !fits {
            self.drop_frame(begun_ns);
            return None;
        }
        if !self.filter.is_everything() && !self.filter.passes(seen) {
            count(&self.shared.counters.filtered);
            return None;
        }
        // A driver that does not take that over looks at checksums itself.
        info.data_valid &= self.offloads.contains(Offloads::CSUM);
        Some(Received { info, len })
    }

    /// Tells the dirty bitmaps of a frame in the first buffers.
    fn mark(&self, len: usize, memory: &M::M) {
        let mut left = HEADER + len;
        for Held { chain, room, .. } in &self.held {
            let part = left.min(*room);
            mark_dirty(memory, pieces(chain.writable(), 0, part));
            left -= part;
            if left == 0 {
                break;
            }
        }
    }

    /// Gives the driver a frame that lies in the first buffers; how many slices these had.
    fn deliver(&mut self, received: Received, begun_ns: u64, memory: &M::M) -> Result<usize, QueueError> {
        // Whoever takes the pair out of use waits for this one, and none follows it (5.1.6.5.6.2).
        let in_use = read(&self.shared.in_use);
        if self.pair() >= *in_use {
            drop(in_use);
            self.drop_frame(begun_ns);
            return Ok(0);
        }
        let mut left = HEADER + received.len;
        let mut used: SmallVec<[(u16, u32); 64]> = SmallVec::new();
        let mut first = None;
        let mut slices = 0;
        while left > 0 {
            // There is room for it.
            let Some(held) = self.held.pop_front() else { break };
            let part = left.min(held.room);
            left -= part;
            slices += held.slices;
            used.push((held.chain.head(), u32::try_from(part).unwrap_or(u32::MAX)));
            first.get_or_insert(held.chain);
        }
        let header = received.info.to_bytes(u16::try_from(used.len()).unwrap_or(u16::MAX));
        let told = first.is_some_and(|chain| chain.in_memory(memory).write(0, &header).is_ok());
        if !told {
            // Its memory has gone meanwhile.
            used.iter_mut().for_each(|(_, written)| *written = 0);
        }
        let counters = &self.shared.counters;
        if told {
            count(&counters.received);
            counters.received_bytes.fetch_add(received.len as u64, Ordering::Relaxed);
        } else {
            count(&counters.receive_dropped);
        }
        self.shared.ended(Activity::Read, if told { received.len as u64 } else { 0 }, told, begun_ns);
        self.queue.complete_all(memory, &used)?;
        Ok(slices)
    }
}
