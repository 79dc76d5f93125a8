//! A switch: joins the devices of several virtual machines of one process by their context identifiers.
//!
//! A connection between two guests is a pair of sockets, one end for each device. The switch makes the pair and hands the ends out; what
//! the guests say to each other it does not see.
//!
//! # Threat model
//! A guest chooses whom it calls and how often. What nobody has looked at yet is bounded, for each caller as well, and forgotten when it
//! is given up. A call that finds no room, or no driver, is refused; a device that dies, or whose guest is reset, resets its connections
//! on the other side.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, Weak};

use rustix::event::{EventfdFlags, eventfd};

use super::fabric::{Delivery, Dial, Fabric, Who};
use super::far::{Framing, pair};
use super::shared::is_guest_cid;
use super::socket::Socket;
use super::{ANY_PORT, VsockError};
use crate::channel::{Grant, Party, VsockListen};
use crate::interrupt::lock;

/// Calls of others that may wait for one device.
const MAX_CALLS: usize = 256;

/// Those of one of them.
const MAX_CALLS_OF_ONE: usize = 32;

/// A switch. Its clones are the same one.
#[derive(Clone, Default)]
pub struct Switch {
    members: Arc<Mutex<BTreeMap<u32, Weak<Member>>>>,
}

struct Member {
    party: Party,
    /// For which port, or [`ANY_PORT`]; without one nobody connects to it.
    grant: Option<Grant<VsockListen>>,
    inbox: Mutex<Inbox>,
    bell: OwnedFd,
}

#[derive(Default)]
struct Inbox {
    /// The device has a driver.
    attended: bool,
    waiting: VecDeque<Waiting>,
}

/// Something that nobody has looked at yet.
struct Waiting {
    delivery: Delivery,
    /// See [`Dial::wanted`].
    wanted: Weak<()>,
}

impl fmt::Debug for Switch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Switch").field("members", &self.members().keys()).finish_non_exhaustive()
    }
}

impl Switch {
    /// One with nobody there.
    pub fn new() -> Self {
        Self::default()
    }

    /// A seat for a device with that context identifier, which [`VsockBuilder::switch`](super::VsockBuilder::switch) takes. The grant is
    /// for accepting connections of others, at one port or at all with [`ANY_PORT`], and its asker is who the others see; each
    /// connection is asked for beside it.
    ///
    /// # Errors
    /// If the identifier is none of a guest's, or is taken.
    pub fn join(&self, cid: u32, grant: Grant<VsockListen>) -> Result<Seat, VsockError> {
        let party = grant.request().asker().clone();
        self.sit(cid, party, Some(grant))
    }

    /// A seat for a device whose guest connects to others, each time with a grant, and to which nobody connects.
    ///
    /// # Errors
    /// As [`join`](Self::join).
    pub fn join_to_connect(&self, cid: u32, party: impl Into<Party>) -> Result<Seat, VsockError> {
        self.sit(cid, party.into(), None)
    }

    fn sit(&self, cid: u32, party: Party, grant: Option<Grant<VsockListen>>) -> Result<Seat, VsockError> {
        if !is_guest_cid(cid) {
            return Err(VsockError::Cid { cid });
        }
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| VsockError::Host(error.into()))?;
        let member = Arc::new(Member { party, grant, inbox: Mutex::default(), bell });
        let mut members = self.members();
        if members.get(&cid).is_some_and(|member| member.strong_count() > 0) {
            drop(members);
            return Err(VsockError::Taken { cid });
        }
        members.insert(cid, Arc::downgrade(&member));
        drop(members);
        Ok(Seat { switch: self.clone(), cid, member })
    }

    /// The context identifiers that are there.
    pub fn cids(&self) -> Vec<u32> {
        self.members().iter().filter(|(_, member)| member.strong_count() > 0).map(|(cid, _)| *cid).collect()
    }

    fn members(&self) -> std::sync::MutexGuard<'_, BTreeMap<u32, Weak<Member>>> {
        lock(&self.members)
    }

    fn find(&self, cid: u32) -> Option<Arc<Member>> {
        self.members().get(&cid).and_then(Weak::upgrade).filter(|member| member.is_live())
    }
}

impl Inbox {
    /// A device's own answers are no more than its connections.
    fn has_room_for(&self, delivery: &Delivery) -> bool {
        let Delivery::Arrived { cid: caller, .. } = delivery else { return true };
        let callers = self.waiting.iter().filter_map(|waiting| match &waiting.delivery {
            Delivery::Arrived { cid, .. } => Some(cid),
            Delivery::Dialed { .. } => None,
        });
        let (all, its) = callers.fold((0, 0), |(all, its), cid| (all + 1, its + usize::from(cid == caller)));
        all < MAX_CALLS && its < MAX_CALLS_OF_ONE
    }
}

impl Member {
    /// Whether its right to be there has not been taken back.
    fn is_live(&self) -> bool {
        self.grant.as_ref().is_none_or(Grant::is_live)
    }

    fn deliver(&self, delivery: Delivery, wanted: Weak<()>) -> bool {
        let mut inbox = lock(&self.inbox);
        // What is given up holds a socket all the same.
        inbox.waiting.retain(|waiting| waiting.wanted.strong_count() > 0);
        let room = inbox.attended && inbox.has_room_for(&delivery);
        if room {
            inbox.waiting.push_back(Waiting { delivery, wanted });
        }
        drop(inbox);
        // It fails when the counter is full, which takes 2^64 signals.
        let (Ok(_) | Err(_)) = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
        room
    }
}

/// A device's place at a [`Switch`], which it leaves when this is dropped.
#[must_use]
pub struct Seat {
    switch: Switch,
    cid: u32,
    member: Arc<Member>,
}

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seat").field("cid", &self.cid).finish_non_exhaustive()
    }
}

impl Fabric for Seat {
    fn cid(&self) -> u32 {
        self.cid
    }

    fn is_live(&self) -> bool {
        self.member.is_live()
    }

    fn who(&self, cid: u32) -> Who {
        self.switch.find(cid).map_or(Who::Nobody, |member| Who::Known(member.party.clone()))
    }

    fn attend(&self, attended: bool) {
        let mut inbox = lock(&self.member.inbox);
        inbox.attended = attended;
        let left = std::mem::take(&mut inbox.waiting);
        drop(inbox);
        // Whoever waits hears that nobody is there.
        drop(left);
    }

    fn dial(&self, dial: Dial) -> bool {
        let Dial { tag, cid, port, from_port, kind, wanted } = dial;
        let Some(other) = self.switch.find(cid) else { return false };
        let granted = other.grant.as_ref().map(|grant| grant.channel().port);
        if granted != Some(ANY_PORT) && granted != Some(port) {
            return false;
        }
        let Ok((ours, theirs)) = pair(Framing::Records) else { return false };
        let party = self.member.party.clone();
        let arrived = Delivery::Arrived {
            socket: Socket::ours(theirs),
            cid: self.cid,
            party,
            port: from_port,
            guest_port: port,
            kind,
        };
        other.deliver(arrived, Weak::clone(&wanted))
            && self.member.deliver(Delivery::Dialed { tag, socket: Some(Socket::ours(ours)) }, wanted)
    }

    fn next(&self) -> Option<Delivery> {
        lock(&self.member.inbox).waiting.pop_front().map(|waiting| waiting.delivery)
    }

    fn is_full(&self) -> bool {
        false
    }

    fn source(&self) -> BorrowedFd<'_> {
        self.member.bell.as_fd()
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut members = self.switch.members();
        if members.get(&self.cid).is_some_and(|member| member.as_ptr() == Arc::as_ptr(&self.member)) {
            members.remove(&self.cid);
        }
    }
}
