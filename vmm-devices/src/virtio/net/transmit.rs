//! The driver's frames, on their way to the network.

use std::ops::Deref;
use std::sync::Arc;

use smallvec::SmallVec;
use vmm_memory::vm_memory::{GuestMemory, Permissions, VolatileSlice};

use super::shared::{Shared, count};
use crate::net::{ETHERNET_HEADER, HEADER, MAX_FRAME, NetPort, Offloads, PacketInfo, Sent};
use crate::virtio::device::{DeviceMemory, Progress};
use crate::virtio::metrics::Activity;
use crate::virtio::queue::{Chain, QueueError, Virtqueue, pieces};
use crate::virtio::rate::Throttled;
use crate::virtio::slices::{each_slice, erase};

/// Bytes that are sent before others have their turn, or what takes as long.
const SHARE: usize = 4 << 20;
/// What a frame costs beside its bytes.
const EFFORT: usize = 4096;

/// A frame that the device has taken, and keeps. It holds no memory.
struct Kept {
    chain: Chain<()>,
    info: PacketInfo,
    len: usize,
    begun_ns: u64,
    /// What it waits for; `None` for room.
    throttled: Option<Throttled>,
}

/// One transmit queue.
pub(super) struct Transmit<M: DeviceMemory> {
    queue: Virtqueue<M>,
    shared: Arc<Shared>,
    /// What the driver may leave to the backend.
    agreed: Offloads,
    kept: Option<Kept>,
}

/// Why no more frames are taken.
enum Next {
    Empty,
    Wait,
    Others,
}

/// What became of a frame.
enum Outcome {
    Done,
    Full,
}

impl<M: DeviceMemory> Transmit<M> {
    pub(super) fn new(queue: Virtqueue<M>, shared: Arc<Shared>, agreed: Offloads) -> Self {
        Self { queue, shared, agreed, kept: None }
    }

    pub(super) fn queue(&self) -> u16 {
        self.queue.index()
    }

    pub(super) fn deadline(&self) -> Option<u64> {
        self.kept.as_ref().and_then(|kept| kept.throttled.as_ref()).map(Throttled::until_ns)
    }

    pub(super) fn stop(&mut self) {
        self.kept = None;
    }

    /// Sends what is there.
    pub(super) fn process(&mut self, port: &mut dyn NetPort) -> Result<Progress, QueueError> {
        self.queue.decline_doorbells()?;
        let next = self.serve(port);
        port.flush();
        match next? {
            Next::Empty => self.queue.rest(),
            // No doorbell of the driver is worth anything now.
            Next::Wait => self.queue.interrupt().map(|()| Progress::Idle),
            Next::Others => self.queue.interrupt().map(|()| Progress::More),
        }
    }

    fn serve(&mut self, port: &mut dyn NetPort) -> Result<Next, QueueError> {
        let memory = self.queue.memory();
        let mut left = SHARE;
        if let Some(mut kept) = self.kept.take() {
            if let Some(throttled) = kept.throttled.take()
                && let Err(throttled) = throttled.retry()
            {
                kept.throttled = Some(throttled);
                self.kept = Some(kept);
                return Ok(Next::Wait);
            }
            match self.send(&*memory, port, &kept)? {
                Outcome::Done => left = left.saturating_sub(kept.len + EFFORT),
                Outcome::Full => {
                    self.kept = Some(kept);
                    return Ok(Next::Wait);
                }
            }
        }
        while left > 0 {
            let Some(chain) = self.queue.pop(&*memory)? else { return Ok(Next::Empty) };
            let begun_ns = self.shared.now_ns();
            let Some((info, len)) = look(&chain, self.agreed) else {
                count(&self.shared.counters.refused);
                self.shared.ended(Activity::Write, 0, false, begun_ns);
                self.queue.complete_in(&memory, chain.head(), 0)?;
                left = left.saturating_sub(EFFORT);
                continue;
            };
            let chain = chain.in_memory(());
            let mut kept = Kept { chain, info, len, begun_ns, throttled: None };
            if let Some(rate) = &self.shared.send_rate
                && let Err(throttled) = rate.admit(len as u64)
            {
                self.shared.throttled();
                kept.throttled = Some(throttled);
                self.kept = Some(kept);
                return Ok(Next::Wait);
            }
            match self.send(&*memory, port, &kept)? {
                Outcome::Done => left = left.saturating_sub(len + EFFORT),
                Outcome::Full => {
                    self.kept = Some(kept);
                    return Ok(Next::Wait);
                }
            }
        }
        Ok(Next::Others)
    }

    /// Gives a frame to the port, and its buffers back to the driver, unless there is no room.
    fn send(&mut self, memory: &M::M, port: &mut dyn NetPort, kept: &Kept) -> Result<Outcome, QueueError> {
        let Kept { chain, info, len, begun_ns, .. } = kept;
        let counters = &self.shared.counters;
        let mut frame: SmallVec<[VolatileSlice<'_>; 24]> = SmallVec::new();
        let behind = pieces(chain.readable(), HEADER as u64, *len);
        let found = each_slice(memory, behind, Permissions::Read, |slice| frame.push(erase(&slice)));
        let sent = if found != Some(*len) {
            count(&counters.refused);
            false
        } else if !self.shared.link().up {
            count(&counters.send_dropped);
            false
        } else {
            match port.transmit(info, &frame) {
                Ok(Sent::Done) => {
                    count(&counters.sent);
                    counters.sent_bytes.fetch_add(*len as u64, std::sync::atomic::Ordering::Relaxed);
                    true
                }
                Ok(Sent::Full) => return Ok(Outcome::Full),
                Err(_) => {
                    count(&counters.send_dropped);
                    false
                }
            }
        };
        self.shared.ended(Activity::Write, if sent { *len as u64 } else { 0 }, sent, *begun_ns);
        self.queue.complete_in(memory, chain.head(), 0)?;
        Ok(Outcome::Done)
    }
}

/// What a chain says of its frame, and the frame's length; `None` if it holds none that may go out. Read once.
fn look<T: Deref<Target: GuestMemory>>(chain: &Chain<T>, agreed: Offloads) -> Option<(PacketInfo, usize)> {
    let len = chain.readable_len().checked_sub(HEADER as u64)?;
    let len = usize::try_from(len).ok().filter(|len| (ETHERNET_HEADER..=MAX_FRAME).contains(len))?;
    let mut header = [0; HEADER];
    if chain.read(0, &mut header).ok()? != HEADER {
        return None;
    }
    let info = PacketInfo::from_bytes(&header).ok()?;
    // That a checksum was found right is said of received frames alone. How long the headers are is a hint, and may be more than there
    // is (5.1.6.2).
    let header_len = info.header_len.min(u16::try_from(len).unwrap_or(u16::MAX));
    let info = PacketInfo { data_valid: false, header_len, ..info };
    info.check(len, agreed).ok()?;
    Some((info, len))
}
