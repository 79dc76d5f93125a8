//! How connections begin: those that the guest wants, and those that programs of the host, the monitor and other guests want.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::HOST_CID;
use super::connection::{Connection, Phase};
use super::door::Knock;
use super::engine::Engine;
use super::fabric::{Delivery, Dial, Who};
use super::far::{Far, Framing, Sent};
use super::packet::{Header, Kind};
use super::right::Right;
use super::shared::{Arrival, count};
use super::slots::{Entry, Greeting, Key, Tag};
use super::socket::{Socket, WHILE_FULL};
use crate::channel::{Party, VsockConnect, VsockListen};

/// Deliveries of a switch, and connections of programs of the host, that are looked at in one call.
const MAX_ARRIVALS: usize = 64;

impl Engine {
    pub(super) fn take_arrivals(&mut self) -> bool {
        for _ in 0..MAX_ARRIVALS {
            let Some(arrival) = self.shared.next_arrival() else { return false };
            self.admit(arrival);
        }
        true
    }

    pub(super) fn answer_door(&mut self, now: u64) -> bool {
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

    pub(super) fn take_deliveries(&mut self, now: u64) -> bool {
        let setup = Arc::clone(&self.setup);
        let Some(fabric) = setup.fabric.as_ref().filter(|_| self.fabric_has_news) else { return false };
        self.fabric_retry = None;
        for _ in 0..MAX_ARRIVALS {
            if fabric.is_full() {
                self.fabric_retry = Some(now.saturating_add(WHILE_FULL));
                return false;
            }
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
    pub(super) fn admit(&mut self, arrival: Arrival) {
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
        let mut entry = Entry::new(key(port), connection, greeting);
        entry.incoming = true;
        let placed = if possible && right.is_live() { self.slots.insert(entry) } else { None };
        let Some((place, tag)) = placed else {
            count(&self.shared.counts.refused);
            return;
        };
        self.shared.counts.open.fetch_add(1, Ordering::Relaxed);
        self.join(place, tag, far, right);
    }

    /// Gives a connection its far end, and its right.
    pub(super) fn join(&mut self, place: u32, tag: Tag, far: Far, right: Right) {
        let watched = self.poll.add(far.as_fd(), tag);
        right.bind(&self.shared, tag, Some(far.socket()));
        let Some(entry) = self.slots.get_mut(place) else { return };
        (entry.far, entry.right) = (Some(far), Some(right));
        if watched.is_err() {
            entry.connection.reset();
        }
        self.settle(place);
    }

    /// The guest wants a connection.
    pub(super) fn begin(&mut self, key: Key, kind: Kind, header: &Header) {
        if self.try_begin(key, kind, header).is_none() {
            count(&self.shared.counts.refused);
            self.refuse(header);
        }
    }

    pub(super) fn try_begin(&mut self, key: Key, kind: Kind, header: &Header) -> Option<()> {
        let possible = if kind == Kind::Stream { self.streams } else { self.messages };
        if !possible || self.slots.is_full() {
            return None;
        }
        let setup = Arc::clone(&self.setup);
        let peer = match key.cid {
            HOST_CID => Who::Known(setup.host.as_ref().filter(|host| !host.closer().is_full())?.party()),
            cid if cid == setup.cid => return None,
            cid => setup.fabric.as_ref().filter(|fabric| fabric.is_live() && !fabric.is_full())?.who(cid),
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
        let wanted = Arc::new(());
        let alive = Arc::downgrade(&wanted);
        entry.wanted = Some(wanted);
        let (place, tag) = self.slots.insert(entry)?;
        let dial = Dial { tag, cid: key.cid, port: key.port, from_port: key.guest_port, kind, wanted: alive };
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
    pub(super) fn dialed(&mut self, tag: Tag, socket: Option<Socket>) {
        let Some(place) = self.slots.by_tag(tag) else { return };
        let Some(entry) = self.slots.get_mut(place) else { return };
        match (socket, entry.right.take()) {
            (Some(mut socket), Some(right))
                if entry.connection.phase() == Phase::Dialing && entry.far.is_none() =>
            {
                socket.belongs_to(entry.key.cid);
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

    pub(super) fn count_opened(&self) {
        count(&self.shared.counts.opened);
    }

    /// The guest has accepted.
    pub(super) fn greet(&mut self, place: u32) {
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
}
