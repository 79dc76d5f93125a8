//! The worker's state: the connections of one activation, and what packets, sockets and the monitor do to them.
//!
//! What the guest is to get waits in `replies`, for packets that belong to no connection, and in the connections themselves, which take
//! turns in `ready`. A guest that makes more answers necessary than it takes is not listened to until it takes some
//! ([`Engine::is_congested`]); of those there are resets alone, which nobody answers, so that nothing goes round in circles.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::HOST_CID;
use super::connection::{Connection, Phase, Receipt};
use super::door::{Door, Knock};
use super::fabric::{Delivery, Dial, Who};
use super::far::{Far, Framing, Sent};
use super::packet::{Header, Kind, boundary, operation, shutdown};
use super::poll::{EVENTS, Event, Poll};
use super::right::Right;
use super::shared::{Arrival, Setup, Shared, count};
use super::slots::{Entry, Greeting, Key, Slots, Tag};
use crate::channel::{Party, VsockConnect, VsockListen};

/// Resets that wait for the guest, which belong to no connection.
const MAX_REPLIES: usize = 256;

/// Deliveries of a switch, and connections of programs of the host, that are looked at in one call.
const MAX_ARRIVALS: usize = 64;

/// Bytes of a backlog that are worth sending before the batch is over.
const SOON: usize = 64 << 10;

/// Messages that may wait are so many times fewer than bytes.
const BYTES_PER_MESSAGE: u32 = 4;

/// Where a switch's deliveries are told.
const FABRIC: Tag = Tag::MAX;

pub(super) struct Engine {
    pub(super) setup: Arc<Setup>,
    pub(super) shared: Arc<Shared>,
    pub(super) poll: Poll,
    pub(super) slots: Slots,
    pub(super) replies: VecDeque<Header>,
    /// Connections that have something for the guest, in their order. A place may be another's by now.
    pub(super) ready: VecDeque<u32>,
    /// Connections whose backlog has grown.
    dirty: Vec<u32>,
    door: Option<Door>,
    fabric_has_news: bool,
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
            setup,
            shared,
            poll,
            slots,
            replies: VecDeque::new(),
            ready: VecDeque::new(),
            dirty: Vec::new(),
            door,
            fabric_has_news: true,
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
        self.slots.next_timer().into_iter().chain(door).min()
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
        // The worker tells the driver, and takes the flag.
        if self.shared.reset_due.load(Ordering::SeqCst) {
            self.forget_all();
        }
        more |= self.take_arrivals();
        more |= self.answer_door(now);
        more | self.take_deliveries()
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

    fn take_arrivals(&mut self) -> bool {
        for _ in 0..MAX_ARRIVALS {
            let Some(arrival) = self.shared.next_arrival() else { return false };
            self.admit(arrival);
        }
        true
    }

    fn answer_door(&mut self, now: u64) -> bool {
        let Some(door) = &mut self.door else { return false };
        let more = door.work(&self.poll, now, MAX_ARRIVALS);
        let knocks = door.take();
        for Knock { socket, kind, port } in knocks {
            let Some(host) = &self.setup.host else { continue };
            if !host.allows(port) {
                count(&self.shared.counts.refused);
                continue;
            }
            let asker = host.party();
            let peer = Some(self.setup.party.clone());
            let Ok(grant) = self.setup.gatekeeper.open(asker, peer, VsockConnect { port }) else {
                count(&self.shared.counts.refused);
                continue;
            };
            let framing = if kind == Kind::Stream { Framing::Bytes } else { Framing::Messages };
            self.admit(Arrival {
                far: Far::new(socket, framing),
                kind,
                cid: HOST_CID,
                port: 0,
                guest_port: port,
                greeting: Greeting::Line,
                right: Right::Connect(grant),
            });
        }
        more
    }

    fn take_deliveries(&mut self) -> bool {
        let setup = Arc::clone(&self.setup);
        let Some(fabric) = setup.fabric.as_ref().filter(|_| self.fabric_has_news) else { return false };
        for _ in 0..MAX_ARRIVALS {
            match fabric.next() {
                None => {
                    self.fabric_has_news = false;
                    return false;
                }
                Some(Delivery::Dialed { tag, socket }) => self.dialed(tag, socket),
                Some(Delivery::Arrived { socket, cid, party, port, guest_port, kind }) => {
                    let grant = setup.gatekeeper.open(
                        setup.party.clone(),
                        Some(party),
                        VsockListen { port: guest_port },
                    );
                    let Some(grant) = grant.ok().filter(|_| fabric.is_live()) else {
                        count(&self.shared.counts.refused);
                        continue;
                    };
                    let far = Far::new(socket, Framing::Records);
                    let right = Right::Accept(grant);
                    let greeting = Greeting::Record;
                    self.admit(Arrival { far, kind, cid, port, guest_port, greeting, right });
                }
            }
        }
        true
    }

    /// Asks the guest whether it takes a connection. One that cannot be is dropped, of which the other side hears.
    fn admit(&mut self, arrival: Arrival) {
        let Arrival { far, kind, cid, port, guest_port, greeting, right } = arrival;
        let possible = if kind == Kind::Stream { self.streams } else { self.messages };
        let key = |port| Key { guest_port, cid, port };
        let mut port = port;
        if port == 0 {
            let free =
                (0..64).map(|_| self.shared.next_port()).find(|port| self.slots.find(&key(*port)).is_none());
            port = free.unwrap_or(0);
        }
        let (setup, now) = (&self.setup, self.setup.now());
        let connection = Connection::requested(kind, setup.buffer, setup.patience, now);
        let entry = Entry::new(key(port), connection, greeting);
        let placed = if possible && right.is_live() { self.slots.insert(entry) } else { None };
        let Some((place, tag)) = placed else {
            count(&self.shared.counts.refused);
            return;
        };
        self.shared.counts.open.fetch_add(1, Ordering::Relaxed);
        self.join(place, tag, far, right);
    }

    /// Gives a connection its far end, and its right.
    fn join(&mut self, place: u32, tag: Tag, far: Far, right: Right) {
        let watched = self.poll.add(far.as_fd(), tag);
        right.bind(&self.shared, tag, Some(far.socket()));
        let Some(entry) = self.slots.get_mut(place) else { return };
        (entry.far, entry.right) = (Some(far), Some(right));
        if watched.is_err() {
            entry.connection.reset();
        }
        self.settle(place);
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
    fn refuse(&mut self, header: &Header) {
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

    /// The guest wants a connection.
    fn begin(&mut self, key: Key, kind: Kind, header: &Header) {
        if self.try_begin(key, kind, header).is_none() {
            count(&self.shared.counts.refused);
            self.refuse(header);
        }
    }

    fn try_begin(&mut self, key: Key, kind: Kind, header: &Header) -> Option<()> {
        let possible = if kind == Kind::Stream { self.streams } else { self.messages };
        if !possible || self.slots.is_full() {
            return None;
        }
        let setup = Arc::clone(&self.setup);
        let peer = match key.cid {
            HOST_CID => Who::Known(setup.host.as_ref()?.party()),
            cid if cid == setup.cid => return None,
            cid => setup.fabric.as_ref().filter(|fabric| fabric.is_live())?.who(cid),
        };
        let peer: Option<Party> = match peer {
            Who::Nobody => return None,
            Who::Unknown => None,
            Who::Known(party) => Some(party),
        };
        let grant = setup.gatekeeper.open(setup.party.clone(), peer, VsockConnect { port: key.port }).ok()?;
        let connection = Connection::dialing(kind, header, setup.buffer, setup.patience, setup.now());
        let mut entry = Entry::new(key, connection, Greeting::Nothing);
        if key.cid == HOST_CID {
            let socket = setup.host.as_ref()?.dial(&grant, kind).ok()?;
            let framing = if kind == Kind::Stream { Framing::Bytes } else { Framing::Messages };
            entry.connection.accepted();
            let (place, tag) = self.slots.insert(entry)?;
            self.count_opened();
            self.shared.counts.open.fetch_add(1, Ordering::Relaxed);
            self.join(place, tag, Far::new(socket, framing), Right::Connect(grant));
            return Some(());
        }
        let (place, tag) = self.slots.insert(entry)?;
        let dial = Dial { tag, cid: key.cid, port: key.port, from_port: key.guest_port, kind };
        if !setup.fabric.as_ref().is_some_and(|fabric| fabric.dial(dial)) {
            self.slots.remove(place);
            return None;
        }
        self.shared.counts.open.fetch_add(1, Ordering::Relaxed);
        self.fabric_has_news = true;
        let right = Right::Connect(grant);
        right.bind(&self.shared, tag, None);
        if let Some(entry) = self.slots.get_mut(place) {
            entry.right = Some(right);
        }
        self.settle(place);
        Some(())
    }

    /// What the switch says to a connection that the guest wants.
    fn dialed(&mut self, tag: Tag, socket: Option<OwnedFd>) {
        let Some(place) = self.slots.by_tag(tag) else { return };
        let Some(entry) = self.slots.get_mut(place) else { return };
        match (socket, entry.right.take()) {
            (Some(socket), Some(right))
                if entry.connection.phase() == Phase::Dialing && entry.far.is_none() =>
            {
                self.join(place, tag, Far::new(socket, Framing::Records), right);
            }
            (_, right) => {
                entry.right = right;
                if entry.far.is_none() {
                    entry.connection.reset();
                    count(&self.shared.counts.refused);
                }
                self.settle(place);
            }
        }
    }

    fn count_opened(&self) {
        count(&self.shared.counts.opened);
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

    /// The guest has accepted.
    fn greet(&mut self, place: u32) {
        let Some(entry) = self.slots.get_mut(place) else { return };
        let Some(far) = &entry.far else { return };
        let sent = match entry.greeting {
            Greeting::Nothing => Sent::All,
            Greeting::Line => far.say_line(&format!("OK {}\n", entry.key.port)),
            Greeting::Record => far.say_accepted(),
        };
        if sent != Sent::All {
            entry.connection.reset();
            self.drop_far(place);
        }
    }

    /// The batch is over: what it brought is sent.
    pub(super) fn flush_all(&mut self) {
        let mut dirty = std::mem::take(&mut self.dirty);
        for place in dirty.drain(..) {
            self.flush(place);
        }
        self.dirty = dirty;
    }

    /// Sends what waits for the far end, as far as there is room.
    fn flush(&mut self, place: u32) {
        let close_ns = self.setup.patience.close_ns;
        let now = self.setup.now();
        let Some(entry) = self.slots.get_mut(place) else { return };
        if let Some(far) = entry.far.as_ref().filter(|_| entry.writable) {
            let mut left = 0;
            let mut sent = far.send_backlog(&mut entry.backlog, entry.connection.kind, &mut left);
            entry.connection.forwarded(left);
            let untold = entry.connection.guest_off() & !entry.told_far;
            // A message without an end has none any more.
            if sent == Sent::All && untold != 0 {
                sent = far.say_shut(untold);
                if sent == Sent::All {
                    entry.told_far |= untold;
                }
            }
            if left > 0 && entry.drain_deadline.is_some() {
                entry.drain_deadline = Some(now.saturating_add(close_ns));
            }
            match sent {
                Sent::All => {}
                Sent::Full => entry.writable = false,
                Sent::Gone => {
                    let lost = u32::try_from(entry.backlog.clear()).unwrap_or(u32::MAX);
                    self.shared.counts.discarded.fetch_add(lost.into(), Ordering::Relaxed);
                    entry.connection.forwarded(lost);
                    entry.told_far = shutdown::BOTH;
                    // Another device has said why, in what is still to be read; if it has not, it died.
                    entry.readable = true;
                    if far.framing != Framing::Records {
                        entry.connection.far_ended(shutdown::RECEIVE);
                    }
                }
            }
        }
        self.settle(place);
    }

    /// Lets the far end go, and what waited for it.
    pub(super) fn drop_far(&mut self, place: u32) {
        let Some(entry) = self.slots.get_mut(place) else { return };
        if let Some(far) = entry.far.take() {
            self.poll.remove(far.as_fd());
            far.cut();
        }
        let lost = entry.backlog.clear();
        self.shared.counts.discarded.fetch_add(lost as u64, Ordering::Relaxed);
        entry.staged = None;
        entry.drain_deadline = None;
        // Its closure holds the socket.
        entry.right = None;
    }

    /// What follows from the state of a connection, after anything has changed.
    pub(super) fn settle(&mut self, place: u32) {
        let Some(entry) = self.slots.get_mut(place) else { return };
        if entry.connection.phase() == Phase::Over {
            // Data that the guest sent before it ended in order still has to find its reader.
            let drains = entry.connection.guest_off() & shutdown::SEND != 0
                && entry.far.is_some()
                && (entry.backlog.len() > 0 || entry.told_far != entry.connection.guest_off());
            if !drains {
                self.drop_far(place);
            } else if entry.drain_deadline.is_none() {
                entry.drain_deadline = Some(self.setup.now().saturating_add(self.setup.patience.close_ns));
            }
        }
        let Some(entry) = self.slots.get_mut(place) else { return };
        if entry.has_data() && entry.connection.may_send() && entry.connection.credit.available() == 0 {
            let most = entry.connection.credit.peer_alloc();
            if entry.connection.kind == Kind::SeqPacket && entry.unfinished > 0 && entry.unfinished >= most {
                // The guest waits for the end of the message, and that waits for room.
                entry.connection.reset();
                return self.drop_and_settle(place);
            }
            entry.connection.want_credit();
        }
        let has_control = entry.connection.has_control();
        if entry.connection.phase() == Phase::Over && !has_control {
            if entry.far.is_none() {
                return self.remove(place);
            }
            self.slots.unmap(place);
        }
        let Some(entry) = self.slots.get_mut(place) else { return };
        if (has_control || entry.may_move()) && !std::mem::replace(&mut entry.queued, true) {
            self.ready.push_back(place);
        }
        let at = entry.connection.deadline().into_iter().chain(entry.drain_deadline).min();
        self.slots.set_timer(place, at);
    }

    fn drop_and_settle(&mut self, place: u32) {
        self.drop_far(place);
        self.settle(place);
    }

    fn remove(&mut self, place: u32) {
        let Some(entry) = self.slots.remove(place) else { return };
        if entry.queued {
            // A guest that takes nothing would make it longer and longer.
            self.ready.retain(|other| *other != place);
        }
        self.shared.counts.open.fetch_sub(1, Ordering::Relaxed);
        // The gate hears of its end with no lock held.
        drop(entry);
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
