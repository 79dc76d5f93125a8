//! What the guest gets: packets into its buffers, each connection in its turn.

use super::connection::{Control, Phase};
use super::engine::Engine;
use super::far::{Came, Far, Framing, MAX_MESSAGE};
use super::packet::{Header, MAX_DATA, boundary, operation, shutdown};
use super::shared::count;
use super::slots::{Entry, Staged};
use crate::virtio::metrics::Activity;
use crate::virtio::queue::QueueError;

/// Bytes of data that a connection gets in its turn, about.
const QUANTUM: usize = 64 << 10;

/// The buffers that the guest has given.
pub(super) trait Buffers {
    /// Bytes of data that the next one has room for behind a header, at least one; `None` if there is no buffer.
    fn next_room(&mut self) -> Result<Option<usize>, QueueError>;

    /// The same for all that are there, as far as it is interesting: up to `most` bytes.
    fn room(&mut self, most: usize) -> Result<usize, QueueError>;

    /// Fills the next one, which has room. `false` if it does not lie in memory as a whole.
    fn put(&mut self, header: &Header, data: &[u8]) -> Result<bool, QueueError>;
}

/// How a turn went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    /// It may go on when it is its turn again, if it has something.
    Over,
    /// There is no buffer.
    NoBuffer,
}

/// How delivery went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Delivered {
    /// Everything.
    All,
    /// Something waits for buffers.
    NoBuffer,
    /// There is more.
    More,
    /// Data waits for the rate limit.
    Throttled,
}

impl Entry {
    /// Whether there is data from the far end, as far as one knows.
    pub(super) fn has_data(&self) -> bool {
        self.staged.is_some() || self.readable && self.far.is_some()
    }

    /// Whether something of the far end can be read, or given to the guest.
    pub(super) fn may_move(&self) -> bool {
        let connection = &self.connection;
        self.has_data()
            && match connection.phase() {
                Phase::Dialing => true,
                Phase::Open if self.has_ended() => false,
                // What the guest does not take is read all the same, for the end is behind it.
                Phase::Open => !connection.may_send() || connection.credit.available() > 0,
                _ => false,
            }
    }

    /// Whether nothing more comes. What another device says comes as data does, to the last.
    fn has_ended(&self) -> bool {
        let records = self.far.as_ref().is_some_and(|far| far.framing == Framing::Records);
        let last = if records { shutdown::BOTH } else { shutdown::SEND };
        self.connection.far_off() & last == last
    }

    /// A header to the guest from this connection.
    fn header(&mut self, cid: u32, (op, flags): Control, len: u32) -> Header {
        let (buf_alloc, fwd_cnt) = self.connection.credit.tell();
        Header {
            src_cid: self.key.cid.into(),
            dst_cid: cid.into(),
            src_port: self.key.port,
            dst_port: self.key.guest_port,
            len,
            kind: self.connection.kind.number(),
            op,
            flags,
            buf_alloc,
            fwd_cnt,
        }
    }
}

impl Engine {
    /// Gives the guest what there is for it, as far as there are buffers, for `turns` turns. `admit` says whether data may go, and is
    /// told how much went.
    pub(super) fn deliver(
        &mut self,
        buffers: &mut impl Buffers,
        mut turns: usize,
        admit: &mut impl FnMut(Option<u64>) -> bool,
    ) -> Result<Delivered, QueueError> {
        while let Some(reply) = self.replies.front() {
            if buffers.next_room()?.is_none() {
                return Ok(Delivered::NoBuffer);
            }
            if !buffers.put(reply, &[])? {
                count(&self.shared.counts.undeliverable);
            }
            self.replies.pop_front();
        }
        // Those that only wait for the rate come again when that lets them, and cost no turn: one round of them is enough.
        let (mut held, mut may_move) = (0, true);
        while let Some(place) = self.ready.pop_front() {
            if held > self.ready.len() {
                self.ready.push_front(place);
                return Ok(Delivered::Throttled);
            }
            let Some(entry) = self.slots.get_mut(place).filter(|entry| entry.queued) else { continue };
            if turns == 0 {
                self.ready.push_front(place);
                return Ok(Delivered::More);
            }
            may_move = may_move && admit(None);
            if !may_move && !entry.connection.has_control() {
                self.ready.push_back(place);
                held += 1;
                continue;
            }
            turns -= 1;
            entry.queued = false;
            let mut moved = 0;
            let turn = self.turn(place, buffers, may_move, &mut moved)?;
            if moved > 0 {
                admit(Some(moved));
            }
            if turn == Turn::NoBuffer {
                if let Some(entry) = self.slots.get_mut(place) {
                    entry.queued = true;
                    self.ready.push_front(place);
                }
                return Ok(Delivered::NoBuffer);
            }
            self.settle(place);
        }
        Ok(Delivered::All)
    }

    fn turn(
        &mut self,
        place: u32,
        buffers: &mut impl Buffers,
        may_move: bool,
        moved: &mut u64,
    ) -> Result<Turn, QueueError> {
        let (cid, now) = (self.setup.cid, self.setup.now());
        loop {
            let Some(entry) = self.slots.get_mut(place) else { return Ok(Turn::Over) };
            if !entry.connection.has_control() {
                break;
            }
            if buffers.next_room()?.is_none() {
                return Ok(Turn::NoBuffer);
            }
            let Some(control) = entry.connection.next_control(now) else { break };
            let header = entry.header(cid, control, 0);
            let put = buffers.put(&header, &[])?;
            self.setup.ended(Activity::Other, 0, put, now);
            if !put {
                self.tear(place);
            }
        }
        if !may_move {
            return Ok(Turn::Over);
        }
        let Some(entry) = self.slots.get_mut(place).filter(|entry| entry.may_move()) else {
            return Ok(Turn::Over);
        };
        if entry.right.as_ref().is_some_and(|right| !right.is_live()) {
            // Its end is on the way.
            return Ok(Turn::Over);
        }
        let Some(far) = entry.far.clone() else { return Ok(Turn::Over) };
        if far.framing == Framing::Bytes {
            self.move_bytes(place, &far, buffers, moved)
        } else {
            self.move_packets(place, &far, buffers, moved)
        }
    }

    /// A buffer was not where it was said to be, and what it was for is lost.
    fn tear(&mut self, place: u32) {
        count(&self.shared.counts.undeliverable);
        if let Some(entry) = self.slots.get_mut(place) {
            entry.connection.reset();
            self.drop_far(place);
        }
    }

    /// Of a stream just so much is read as there is room for.
    fn move_bytes(
        &mut self,
        place: u32,
        far: &Far,
        buffers: &mut impl Buffers,
        moved: &mut u64,
    ) -> Result<Turn, QueueError> {
        let Some(entry) = self.slots.get_mut(place) else { return Ok(Turn::Over) };
        let takes = entry.connection.may_send();
        let credit = usize::try_from(entry.connection.credit.available()).unwrap_or(usize::MAX);
        let most = if takes { buffers.room(QUANTUM.min(credit))?.min(QUANTUM).min(credit) } else { QUANTUM };
        if most == 0 {
            return Ok(Turn::NoBuffer);
        }
        let mut scratch = std::mem::take(&mut self.scratch);
        scratch.resize(scratch.len().max(QUANTUM), 0);
        let came = far.receive(scratch.get_mut(..most).unwrap_or_default());
        let mut turn = Turn::Over;
        match came {
            Came::Data(len, _) if takes => {
                let data = scratch.get(..len).unwrap_or_default();
                let sent = self.send(place, data, 0, buffers, moved)?;
                if sent < len {
                    // There was room, so it is gone with the connection.
                    turn = Turn::Over;
                }
            }
            Came::Data(len, _) => {
                self.shared.counts.discarded.fetch_add(len as u64, std::sync::atomic::Ordering::Relaxed);
            }
            other => self.ended(place, other),
        }
        self.scratch = scratch;
        Ok(turn)
    }

    /// What is read of messages and records as a whole, and does not find room, is kept.
    fn move_packets(
        &mut self,
        place: u32,
        far: &Far,
        buffers: &mut impl Buffers,
        moved: &mut u64,
    ) -> Result<Turn, QueueError> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let size = if far.framing == Framing::Messages { MAX_MESSAGE } else { QUANTUM };
        scratch.resize(scratch.len().max(size), 0);
        let turn = self.move_some_packets(place, far, &mut scratch, buffers, moved);
        self.scratch = scratch;
        turn
    }

    fn move_some_packets(
        &mut self,
        place: u32,
        far: &Far,
        scratch: &mut [u8],
        buffers: &mut impl Buffers,
        moved: &mut u64,
    ) -> Result<Turn, QueueError> {
        for _ in 0..MAX_PACKETS {
            let Some(entry) = self.slots.get_mut(place).filter(|entry| entry.may_move()) else { break };
            if entry.connection.may_send() && buffers.next_room()?.is_none() {
                return Ok(Turn::NoBuffer);
            }
            if let Some(mut staged) = entry.staged.take() {
                let data = staged.bytes.get(staged.at..).unwrap_or_default();
                let (len, sent) = (data.len(), self.send(place, data, staged.flags, buffers, moved)?);
                if sent < len
                    && let Some(entry) = self.slots.get_mut(place).filter(|entry| entry.far.is_some())
                {
                    staged.at += sent;
                    entry.staged = Some(staged);
                }
            } else {
                match far.receive(scratch) {
                    Came::Data(len, flags) => {
                        let data = scratch.get(far.prefix()..far.prefix() + len).unwrap_or_default();
                        self.take_packet(place, far, data, flags, buffers, moved)?;
                    }
                    other => {
                        self.ended(place, other);
                        break;
                    }
                }
            }
            if *moved >= QUANTUM as u64 {
                break;
            }
        }
        Ok(Turn::Over)
    }

    fn take_packet(
        &mut self,
        place: u32,
        far: &Far,
        data: &[u8],
        flags: u32,
        buffers: &mut impl Buffers,
        moved: &mut u64,
    ) -> Result<(), QueueError> {
        let Some(entry) = self.slots.get_mut(place) else { return Ok(()) };
        let connection = &mut entry.connection;
        if !connection.may_send() {
            if connection.phase() == Phase::Dialing {
                // Data before the answer.
                self.ended(place, Came::Broken);
            }
            return Ok(());
        }
        let largest = usize::try_from(connection.credit.peer_alloc()).unwrap_or(usize::MAX);
        if far.framing == Framing::Messages && data.len() > largest {
            // The guest could never take it as a whole.
            self.ended(place, Came::Broken);
            return Ok(());
        }
        let sent = self.send(place, data, flags, buffers, moved)?;
        if sent < data.len()
            && let Some(entry) = self.slots.get_mut(place).filter(|entry| entry.far.is_some())
        {
            let bytes = data.get(sent..).unwrap_or_default().to_vec();
            entry.staged = Some(Staged { bytes, at: 0, flags });
        }
        Ok(())
    }

    /// Gives the guest data, as far as there are buffers and credit, and says of the last of it what `flags` say. How much that
    /// was; less if the connection has ended.
    fn send(
        &mut self,
        place: u32,
        data: &[u8],
        flags: u32,
        buffers: &mut impl Buffers,
        moved: &mut u64,
    ) -> Result<usize, QueueError> {
        let cid = self.setup.cid;
        let mut sent = 0;
        loop {
            let left = data.get(sent..).unwrap_or_default();
            if left.is_empty() && (sent > 0 || flags & boundary::MESSAGE == 0) {
                return Ok(sent);
            }
            let Some(entry) = self.slots.get_mut(place) else { return Ok(sent) };
            let Some(room) = buffers.next_room()? else { return Ok(sent) };
            let credit = entry.connection.credit.available().min(MAX_DATA);
            let most = room.min(usize::try_from(credit).unwrap_or(0));
            let (part, last) = match left.get(..most) {
                Some(part) if part.len() < left.len() => (part, false),
                _ => (left, true),
            };
            if part.is_empty() && !left.is_empty() {
                return Ok(sent);
            }
            let len = u32::try_from(part.len()).unwrap_or(0);
            let begun = self.setup.now();
            entry.connection.credit.send(len);
            let header = entry.header(cid, (operation::RW, if last { flags } else { 0 }), len);
            let put = buffers.put(&header, part)?;
            self.setup.ended(Activity::Read, if put { len } else { 0 }, put, begun);
            if !put {
                self.tear(place);
                return Ok(sent);
            }
            entry.unfinished = if last { 0 } else { entry.unfinished.saturating_add(len) };
            *moved += u64::from(len);
            sent += part.len();
            if left.is_empty() {
                return Ok(sent);
            }
        }
    }

    /// What came from the far end that is no data.
    fn ended(&mut self, place: u32, came: Came) {
        let Some(entry) = self.slots.get_mut(place) else { return };
        let records = entry.far.as_ref().is_some_and(|far| far.framing == Framing::Records);
        match came {
            Came::Accepted if entry.connection.phase() == Phase::Dialing => {
                entry.connection.accepted();
                count(&self.shared.counts.opened);
            }
            Came::Shut(flags) if entry.connection.phase() == Phase::Open => entry.connection.far_ended(flags),
            Came::Nothing => entry.readable = false,
            Came::End if !records => {
                entry.readable = false;
                let both = if entry.hung_up { shutdown::BOTH } else { shutdown::SEND };
                entry.connection.far_ended(both);
            }
            // A device that has nothing more to say says so first.
            Came::End if entry.connection.far_off() == shutdown::BOTH => entry.readable = false,
            _ => {
                entry.connection.reset();
                self.drop_far(place);
            }
        }
    }
}

/// Messages and records that are read in a turn.
const MAX_PACKETS: usize = 64;
