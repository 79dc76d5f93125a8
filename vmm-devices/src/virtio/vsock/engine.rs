//! The worker's state: the connections of one activation, and what packets, sockets and the monitor do to them.
//!
//! What the guest is to get waits in `replies`, for packets that belong to no connection, and in the connections themselves, which take
//! turns in `ready`. A guest that makes more answers necessary than it takes is not listened to until it takes some
//! ([`Engine::is_congested`]); of those there are resets alone, which nobody answers, so that nothing goes round in circles.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::connection::{Phase, Receipt};
use super::door::Door;
use super::far::Framing;
use super::packet::{Header, Kind, boundary, operation, shutdown};
use super::poll::{EVENTS, Event, Poll};
use super::shared::{Setup, Shared, count};
use super::slots::{Key, Slots, Tag};

/// Resets that wait for the guest, which belong to no connection.
const MAX_REPLIES: usize = 256;

/// Bytes of a backlog that are worth sending before the batch is over.
const SOON: usize = 64 << 10;

/// Messages that may wait are so many times fewer than bytes.
const BYTES_PER_MESSAGE: u32 = 4;

/// Where a switch's deliveries are told.
const FABRIC: Tag = Tag::MAX;

pub(super) struct Engine {
    /// It has the listeners as well, and lets them go before those whose they are do.
    pub(super) door: Option<Door>,
    pub(super) setup: Arc<Setup>,
    pub(super) shared: Arc<Shared>,
    pub(super) poll: Poll,
    pub(super) slots: Slots,
    pub(super) replies: VecDeque<Header>,
    /// Connections that have something for the guest, in their order. A place may be another's by now.
    pub(super) ready: VecDeque<u32>,
    /// Connections whose backlog has grown.
    pub(super) dirty: Vec<u32>,
    pub(super) fabric_has_news: bool,
    /// When it is asked again, which lets nobody in now.
    pub(super) fabric_retry: Option<u64>,
    /// All is forgotten, and the worker has not told the driver yet that it is somewhere else.
    pub(super) reset_due: bool,
    /// Whether the driver and the device have agreed upon that kind.
    pub(super) streams: bool,
    pub(super) messages: bool,
    events: Vec<Event>,
    pub(super) scratch: Vec<u8>,
}

impl Engine {
    pub(super) fn new(
        setup: Arc<Setup>,
        shared: Arc<Shared>,
        streams: bool,
        messages: bool,
    ) -> io::Result<Self> {
        let poll = Poll::new()?;
        let door = match &setup.host {
            Some(host) => Some(Door::open(host, &poll, setup.patience.connect_ns)?),
            None => None,
        };
        if let Some(fabric) = &setup.fabric {
            poll.add(fabric.source(), FABRIC)?;
        }
        let slots = Slots::new(setup.connections);
        Ok(Self {
            door,
            setup,
            shared,
            poll,
            slots,
            replies: VecDeque::new(),
            ready: VecDeque::new(),
            dirty: Vec::new(),
            fabric_has_news: true,
            fabric_retry: None,
            reset_due: false,
            streams,
            messages,
            events: Vec::new(),
            scratch: Vec::new(),
        })
    }

    /// Whether the guest has to take some answers before it is listened to again.
    pub(super) fn is_congested(&self) -> bool {
        self.replies.len() >= MAX_REPLIES
    }

    /// When something is to be done though nothing happens.
    pub(super) fn deadline(&self) -> Option<u64> {
        let door = self.door.as_ref().and_then(Door::deadline);
        self.slots.next_timer().into_iter().chain(door).chain(self.fabric_retry).min()
    }

    /// Looks at all that is not the guest's. `true` if there is more of it.
    pub(super) fn look(&mut self) -> bool {
        let mut events = std::mem::take(&mut self.events);
        self.poll.look(&mut events);
        let mut more = events.len() == EVENTS;
        for event in events.drain(..) {
            match event.tag {
                FABRIC => self.fabric_has_news = true,
                tag if Door::owns(tag) => {
                    if let Some(door) = &mut self.door {
                        door.hear(tag);
                    }
                }
                tag => self.happened(tag, event),
            }
        }
        self.events = events;
        for tag in self.shared.take_revoked() {
            self.revoke(tag);
        }
        let now = self.setup.now();
        while let Some(place) = self.slots.take_due(now) {
            self.expire(place, now);
        }
        if self.shared.reset_due.swap(false, Ordering::SeqCst) {
            self.forget_all();
            self.reset_due = true;
        }
        more |= self.take_arrivals();
        more |= self.answer_door(now);
        more | self.take_deliveries(now)
    }

    fn happened(&mut self, tag: Tag, event: Event) {
        let Some(place) = self.slots.by_tag(tag) else { return };
        let Some(entry) = self.slots.get_mut(place) else { return };
        entry.readable |= event.readable;
        entry.writable |= event.writable;
        entry.hung_up |= event.hung_up;
        let bytes = entry.far.as_ref().is_some_and(|far| far.framing != Framing::Records);
        if event.hung_up && bytes && entry.connection.far_off() & shutdown::SEND != 0 {
            entry.connection.far_ended(shutdown::RECEIVE);
        }
        if event.hung_up && entry.connection.phase() == Phase::Requested {
            // Who asked has given up.
            entry.connection.reset();
        }
        self.flush(place);
    }

    fn revoke(&mut self, tag: Tag) {
        let Some(place) = self.slots.by_tag(tag) else { return };
        let Some(entry) = self.slots.get_mut(place) else { return };
        count(&self.shared.counts.revoked);
        entry.connection.reset();
        self.drop_far(place);
        self.settle(place);
    }

    fn expire(&mut self, place: u32, now: u64) {
        let Some(entry) = self.slots.get_mut(place) else { return };
        let drained = entry.drain_deadline.is_some_and(|deadline| deadline <= now);
        if entry.connection.expire(now) || drained {
            count(&self.shared.counts.timeouts);
            self.drop_far(place);
        }
        self.settle(place);
    }

    /// The guest is another one, or was elsewhere meanwhile: it knows of no connection.
    fn forget_all(&mut self) {
        for place in self.slots.places() {
            self.drop_far(place);
            self.remove(place);
        }
        self.replies.clear();
        self.ready.clear();
    }

    /// A packet of the guest's. `fill` writes what it has of data, `false` if that lies in no memory. `complete` is whether all of it is
    /// there.
    pub(super) fn packet(&mut self, header: &Header, complete: bool, fill: impl FnOnce(&mut [u8]) -> bool) {
        if header.src_cid != u64::from(self.setup.cid) {
            count(&self.shared.counts.ignored);
            return;
        }
        let (Some(kind), Ok(cid)) = (Kind::of(header.kind), u32::try_from(header.dst_cid)) else {
            return self.refuse(header);
        };
        let key = Key { guest_port: header.src_port, cid, port: header.dst_port };
        match self.slots.find(&key) {
            Some(place) => self.receive(place, header, complete, fill),
            None if header.op == operation::REQUEST => self.begin(key, kind, header),
            None => self.refuse(header),
        }
    }

    /// Answers with a reset what is none, as that ends nothing.
    pub(super) fn refuse(&mut self, header: &Header) {
        if header.op == operation::RST {
            return;
        }
        self.replies.push_back(Header {
            src_cid: header.dst_cid,
            dst_cid: header.src_cid,
            src_port: header.dst_port,
            dst_port: header.src_port,
            kind: header.kind,
            op: operation::RST,
            ..Header::default()
        });
    }

    fn receive(&mut self, place: u32, header: &Header, complete: bool, fill: impl FnOnce(&mut [u8]) -> bool) {
        let buffer = self.setup.buffer;
        let Some(entry) = self.slots.get_mut(place) else { return };
        let mut receipt = entry.connection.receive(header);
        let framing = entry.far.as_ref().map(|far| far.framing);
        if receipt == Receipt::Data {
            let ended = header.flags & boundary::MESSAGE != 0 && entry.connection.kind == Kind::SeqPacket;
            let record = header.flags & boundary::RECORD != 0;
            let most = usize::try_from(buffer / BYTES_PER_MESSAGE).unwrap_or(usize::MAX);
            if !complete || !entry.backlog.append(header.len, fill) {
                receipt = Receipt::Breach("data that is not there");
            } else if ended && !entry.backlog.close_message(record, most) {
                receipt = Receipt::Breach("more messages than can wait");
            } else if framing == Some(Framing::Messages) && entry.backlog.unfinished() >= buffer {
                // Its end would never come, for want of credit.
                receipt = Receipt::Breach("a message that is longer than the buffer");
            }
            if matches!(receipt, Receipt::Breach(_)) {
                entry.connection.reset();
            } else if entry.backlog.len() >= SOON {
                return self.flush(place);
            } else {
                self.dirty.push(place);
                return;
            }
        }
        match receipt {
            Receipt::Accepted => {
                self.greet(place);
                self.count_opened();
            }
            Receipt::Stale => {
                self.shared.counts.discarded.fetch_add(header.len.into(), Ordering::Relaxed);
                entry.connection.forwarded(0);
            }
            Receipt::Breach(_) => {
                count(&self.shared.counts.breaches);
                self.drop_far(place);
            }
            Receipt::Reset => {
                count(&self.shared.counts.resets);
            }
            Receipt::Shut => {
                if entry.connection.guest_off() == shutdown::BOTH {
                    entry.connection.reset();
                }
                return self.flush(place);
            }
            Receipt::Data | Receipt::Nothing | Receipt::Credit => {}
        }
        self.settle(place);
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let left = u32::try_from(self.slots.len()).unwrap_or(0);
        self.shared.counts.open.fetch_sub(left, Ordering::Relaxed);
    }
}

impl std::os::fd::AsFd for Engine {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.poll.as_fd()
    }
}
