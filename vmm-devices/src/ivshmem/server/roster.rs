//! Who is connected to a server, and what each of them is still to be told.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::net::sockopt;

use super::message::{Sent, send};
use super::{MEMORY, VERSION};
use crate::channel::{DoorbellRing, Grant, Party, RegionMap};

/// A message that is to be sent.
struct Outgoing {
    number: i64,
    descriptor: Option<Arc<OwnedFd>>,
}

/// A client.
pub(super) struct Peer {
    pub(super) socket: UnixStream,
    pub(super) party: Party,
    /// Others have it for each vector.
    pub(super) bells: Vec<Arc<OwnedFd>>,
    /// The rights that keep it.
    pub(super) map: Grant<RegionMap>,
    pub(super) ring: Option<Grant<DoorbellRing>>,
    outbox: VecDeque<Outgoing>,
    /// The host did not take the next one.
    refused: bool,
}

impl Peer {
    pub(super) fn new(
        (socket, party): (UnixStream, Party),
        bells: Vec<Arc<OwnedFd>>,
        map: Grant<RegionMap>,
        ring: Option<Grant<DoorbellRing>>,
    ) -> Self {
        Self { socket, party, bells, map, ring, outbox: VecDeque::new(), refused: false }
    }

    /// Messages that it has not taken, beyond those that the kernel keeps.
    pub(super) fn behind(&self) -> usize {
        self.outbox.len()
    }

    fn say(&mut self, number: i64, descriptor: Option<Arc<OwnedFd>>) {
        self.outbox.push_back(Outgoing { number, descriptor });
    }

    fn say_bells(&mut self, position: u16, bells: &[Arc<OwnedFd>]) {
        for bell in bells {
            self.say(position.into(), Some(Arc::clone(bell)));
        }
    }

    /// Sends what there is room for.
    fn flush(&mut self) -> Result<(), Errno> {
        self.refused = false;
        while let Some(Outgoing { number, descriptor }) = self.outbox.front() {
            match send(&self.socket, *number, descriptor.as_ref().map(|fd| fd.as_fd()))? {
                Sent::Whole => {}
                Sent::NoRoom => break,
                Sent::Refused => {
                    self.refused = true;
                    break;
                }
            }
            self.outbox.pop_front();
        }
        Ok(())
    }
}

/// The clients by position. Whoever is removed is handed out, to be parted with where no lock is held.
#[derive(Default)]
pub(super) struct Roster {
    next: u16,
    pub(super) peers: BTreeMap<u16, Peer>,
    /// Messages that one may be behind.
    most_behind: usize,
}

impl Roster {
    /// For so many peers with so many vectors.
    pub(super) fn new(max_peers: usize, vectors: u16) -> Self {
        // All that there may be to say of all peers, twice, and the beginning.
        let most_behind = max_peers.saturating_add(1).saturating_mul(usize::from(vectors).saturating_add(1));
        Self { next: 0, peers: BTreeMap::new(), most_behind: most_behind.saturating_mul(2).saturating_add(4) }
    }

    /// A position that was not used lately.
    pub(super) fn free_position(&mut self) -> Option<u16> {
        let free = (self.next..=u16::MAX).chain(0..self.next).find(|at| !self.peers.contains_key(at))?;
        self.next = free.wrapping_add(1);
        Some(free)
    }

    /// A client joins, and all hear of it. Those who could not be told are removed.
    pub(super) fn join(&mut self, position: u16, mut new: Peer, memory: OwnedFd) -> Vec<(u16, Peer)> {
        new.say(VERSION, None);
        new.say(position.into(), None);
        new.say(MEMORY, Some(Arc::new(memory)));
        if new.ring.is_some() {
            for (other, peer) in &self.peers {
                new.say_bells(*other, &peer.bells);
            }
        }
        let own = new.bells.clone();
        new.say_bells(position, &own);
        for peer in self.peers.values_mut().filter(|peer| peer.ring.is_some()) {
            peer.say_bells(position, &own);
        }
        self.peers.insert(position, new);
        self.flush_all()
    }

    /// A client is gone, and all hear of it.
    pub(super) fn remove(&mut self, position: u16) -> Vec<(u16, Peer)> {
        let mut removed = Vec::new();
        if let Some(peer) = self.peers.remove(&position) {
            self.tell_gone(position, peer.bells.len());
            removed.push((position, peer));
        }
        removed.append(&mut self.flush_all());
        removed
    }

    /// The same, and it is told that it is the one, if it listens.
    pub(super) fn dismiss(&mut self, position: u16) -> Vec<(u16, Peer)> {
        if let Some(peer) = self.peers.get_mut(&position) {
            peer.say(position.into(), None);
            // It goes either way.
            let (Ok(()) | Err(_)) = peer.flush();
        }
        self.remove(position)
    }

    /// A client may not ring any more: for it, all others are gone. What it held, to be dropped.
    pub(super) fn silence(&mut self, position: u16) -> (Option<Grant<DoorbellRing>>, Vec<(u16, Peer)>) {
        let others: Vec<u16> = self.peers.keys().copied().filter(|other| *other != position).collect();
        let mut right = None;
        if let Some(peer) = self.peers.get_mut(&position) {
            right = peer.ring.take();
            for other in others {
                peer.say(other.into(), None);
            }
        }
        (right, self.flush_all())
    }

    /// Whether the host refused to take something, which is to be [tried again](Self::flush_all) later.
    pub(super) fn is_refused(&self) -> bool {
        self.peers.values().any(|peer| peer.refused)
    }

    /// There is room for more to a client.
    pub(super) fn flush(&mut self, position: u16) -> Vec<(u16, Peer)> {
        match self.peers.get_mut(&position).map(Peer::flush) {
            Some(Err(_)) => self.remove(position),
            _ => Vec::new(),
        }
    }

    /// Others hear of `vectors` vectors no more. What of them has not been sent is not, so that who comes and goes while a slow client
    /// does not read costs neither memory nor that client its seat.
    fn tell_gone(&mut self, position: u16, vectors: usize) {
        let number = i64::from(position);
        for peer in self.peers.values_mut().filter(|peer| peer.ring.is_some()) {
            let before = peer.outbox.len();
            peer.outbox.retain(|message| message.number != number || message.descriptor.is_none());
            if before - peer.outbox.len() < vectors {
                peer.say(number, None);
            }
        }
    }

    /// Sends to all. Whoever cannot be sent to, or does not read, is removed, of which the others hear as well; that ends, since
    /// each time there are fewer.
    pub(super) fn flush_all(&mut self) -> Vec<(u16, Peer)> {
        let mut removed = Vec::new();
        loop {
            let most = self.most_behind;
            let lost: Vec<u16> = self
                .peers
                .iter_mut()
                .filter_map(|(position, peer)| {
                    (peer.flush().is_err() || peer.outbox.len() > most).then_some(*position)
                })
                .collect();
            if lost.is_empty() {
                return removed;
            }
            for position in lost {
                if let Some(peer) = self.peers.remove(&position) {
                    self.tell_gone(position, peer.bells.len());
                    removed.push((position, peer));
                }
            }
        }
    }
}

/// Keeps few messages to a client in the kernel, where the descriptors of all who do not read count against one limit (unix(7),
/// ETOOMANYREFS): as few as the kernel lets it be, six or seven. What waits here costs no descriptors.
pub(super) fn narrow(socket: &UnixStream) -> Result<(), Errno> {
    sockopt::set_socket_send_buffer_size(socket, 0)
}

/// Has `set` tell of a client by its position: that it sends, that it is gone, or that there is room for more.
pub(super) fn watch(set: &OwnedFd, socket: &UnixStream, position: u16) -> Result<(), Errno> {
    let events =
        epoll::EventFlags::IN | epoll::EventFlags::OUT | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
    epoll::add(set, socket, epoll::EventData::new_u64(position.into()), events)
}
