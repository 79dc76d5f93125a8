//! A broker: joins the devices of several processes by their context identifiers, through a Unix socket.
//!
//! A monitor connects, and says which identifier its guest has and who that is ([`Member::join`](super::Member::join)). When its guest
//! calls another, the broker asks its gate, makes a pair of sockets and gives an end to each monitor. What the guests say to each other it
//! does not see, and what is open goes on without it.
//!
//! It keeps a copy of the caller's end, by which it cuts the connection when the grant is revoked, or when the monitor dies.
//!
//! # Threat model
//! Whoever may connect to the socket, whose mode is 0600, may say that it is any guest, unless [`Broker::identify`] knows better.
//! Monitors are hostile beyond that: each has a bounded number of connections, and of calls to others that these have not looked at.
//! Descriptors are not taken from it. Those that it has sent, also through connections, go with the socket that they lie in, on threads that
//! nobody waits for: one monitor has one of these, and no more connections while too many of its are still to be closed. One that does not
//! read its answers is not heard until it does, and disconnected after a while; what makes no sense ends the conversation.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::net::{Shutdown, SocketFlags, accept_with, shutdown, sockopt};
use rustix::process::{Resource, getrlimit};

use super::far::{Framing, again, pair};
use super::host::listen_at;
use super::packet::Kind;
use super::poll::{Event, Poll};
use super::shared::is_guest_cid;
use super::wire::{Message, Received, VERSION, hear_member, reason, what};
use super::{ANY_PORT, VsockError};
use crate::channel::{Gatekeeper, Grant, Party, VmIdentity, VsockConnect, VsockListen};
use crate::closer::Closer;
use crate::interrupt::lock;

/// Monitors at most, those that have not said who they are included.
const MAX_PEERS: usize = 1024;

/// How long to wait for what the host has no room for now: descriptors, or a place in a monitor's socket.
const AFTER_FAILURE: Duration = Duration::from_millis(50);

/// How long a monitor may take to say who it is, and to make room for an answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Connections at most that one guest has asked for and that are open.
const MAX_CONNECTIONS: usize = 1024;

/// What there is at most, with a descriptor for each: of what the process may have, half for connections, an eighth for those of one
/// guest, a quarter for monitors.
struct Bounds {
    peers: usize,
    connections: usize,
    connections_of_one: usize,
}

impl Bounds {
    fn of(descriptors: usize) -> Self {
        Self {
            peers: MAX_PEERS.min(descriptors / 4),
            connections: descriptors / 2,
            connections_of_one: MAX_CONNECTIONS.min(descriptors / 8),
        }
    }

    fn of_this_process() -> Self {
        let descriptors = getrlimit(Resource::Nofile).current;
        Self::of(descriptors.map_or(usize::MAX, |most| usize::try_from(most).unwrap_or(usize::MAX)))
    }
}

/// Calls at most that a monitor has been told of and has not taken, and those of one guest among them. There is more room in its socket.
const MAX_UNTAKEN: usize = 128;
const MAX_UNTAKEN_OF_ONE: usize = 32;

/// Threads that close sockets, by the identifier of who has sent what lies in them; those who have none are one.
const CLOSERS: usize = 8;
const STRANGERS: u32 = 0;

/// Messages of one monitor that are heard before others are.
const MAX_MESSAGES: usize = 64;

const LISTENER: u64 = 0;
const KICK: u64 = 1;
const FIRST: u64 = 2;

/// Who is at the other end of a broker's socket, as the kernel says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Credentials {
    /// Process that connected.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

type Identify = Box<dyn Fn(&Credentials, u32, VmIdentity) -> Option<VmIdentity> + Send>;

/// See the module.
pub struct Broker {
    /// `None` at the end.
    listener: Option<OwnedFd>,
    poll: Poll,
    control: Arc<Control>,
    closer: Arc<Closer>,
    gatekeeper: Gatekeeper,
    identify: Identify,
    bounds: Bounds,
    /// Somebody may wait at the door.
    knocked: bool,
    peers: BTreeMap<u64, Peer>,
    by_cid: BTreeMap<u32, u64>,
    open: BTreeMap<u64, Open>,
    /// Who may have said more.
    busy: BTreeSet<u64>,
    /// Who has no room for its answer.
    waiting: BTreeSet<u64>,
    next: u64,
}

impl fmt::Debug for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Broker").field("members", &self.by_cid.keys()).finish_non_exhaustive()
    }
}

/// What handles and grants reach.
struct Control {
    kick: OwnedFd,
    stopped: AtomicBool,
    revoked: Mutex<Vec<u64>>,
}

impl Control {
    fn kick(&self) {
        // It fails when the counter is full, which takes 2^64 signals.
        let (Ok(_) | Err(_)) = rustix::io::write(&self.kick, &1_u64.to_ne_bytes());
    }

    fn revoke(&self, id: u64) {
        lock(&self.revoked).push(id);
        self.kick();
    }
}

/// A monitor.
struct Peer {
    socket: OwnedFd,
    since: Instant,
    place: Option<Place>,
    connections: usize,
    /// What it is to hear of its last call, before another one is heard.
    answer: Option<Answer>,
    /// Identifiers of those who have called it, without its having taken that: the oldest first.
    untaken: VecDeque<u32>,
}

/// What a monitor is to hear of its call.
struct Answer {
    tag: u64,
    made: Option<(u64, Open)>,
    since: Instant,
}

/// How it goes on with a monitor.
enum Next {
    /// With the next message.
    Message,
    /// When there is room.
    Room,
    /// Not at all.
    End,
}

impl Peer {
    fn new(socket: OwnedFd) -> Self {
        Self {
            socket,
            since: Instant::now(),
            place: None,
            connections: 0,
            answer: None,
            untaken: VecDeque::new(),
        }
    }

    fn end(self, closer: &Closer) {
        part(closer, self.place.map_or(STRANGERS, |place| place.cid), self.socket);
        if let Some((_, open)) = self.answer.and_then(|answer| answer.made) {
            part(closer, open.called, open.socket);
        }
    }
}

struct Place {
    cid: u32,
    vm: VmIdentity,
    _grant: Grant<VsockListen>,
}

/// A connection.
struct Open {
    /// A copy of the caller's end.
    socket: Arc<OwnedFd>,
    caller: u64,
    /// Who has sent what lies there.
    called: u32,
    grant: Grant<VsockConnect>,
}

/// Ends a broker's [`Broker::run`]. Clones are the same.
#[derive(Clone)]
pub struct BrokerHandle(Arc<Control>);

impl fmt::Debug for BrokerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BrokerHandle").finish_non_exhaustive()
    }
}

impl BrokerHandle {
    /// It returns soon.
    pub fn stop(&self) {
        self.0.stopped.store(true, Ordering::SeqCst);
        self.0.kick();
    }
}

impl Broker {
    /// Listens at `path`, whose mode is 0600. The threads that close sockets are started here: a process that then confines itself needs to
    /// make none. Each member asks `gatekeeper` to be reached ([`VsockListen`] of [`ANY_PORT`]), and each
    /// connection for [`VsockConnect`]. How many descriptors the process may have now (RLIMIT_NOFILE) bounds what there is: half of them
    /// are for connections, of which one guest can have asked for a quarter, 1024 at most, and those that it was called by and that are
    /// still to be closed are as many; a quarter is for members, 1024 at most.
    ///
    /// # Errors
    /// If somebody listens there, something else is there, or the host refuses it.
    pub fn listen(path: impl AsRef<Path>, gatekeeper: Gatekeeper) -> Result<Self, VsockError> {
        let path: PathBuf = path.as_ref().to_owned();
        let listener =
            listen_at(&path, Kind::SeqPacket, 0o600).map_err(|source| VsockError::Socket { path, source })?;
        let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| VsockError::Host(error.into()))?;
        let poll = Poll::new()?;
        poll.add(listener.as_fd(), LISTENER)?;
        poll.add(kick.as_fd(), KICK)?;
        let control = Control { kick, stopped: AtomicBool::new(false), revoked: Mutex::default() };
        Ok(Self {
            listener: Some(listener),
            poll,
            control: Arc::new(control),
            closer: Arc::new(Closer::new("vsock-close", CLOSERS, None)?),
            gatekeeper,
            identify: Box::new(|_, _, claimed| Some(claimed)),
            bounds: Bounds::of_this_process(),
            knocked: false,
            peers: BTreeMap::new(),
            by_cid: BTreeMap::new(),
            open: BTreeMap::new(),
            busy: BTreeSet::new(),
            waiting: BTreeSet::new(),
            next: FIRST,
        })
    }

    /// Who a monitor's guest is: `who` gets what the kernel says of the process, the context identifier, and who the monitor says that
    /// its guest is; `None` refuses it. Unless told, monitors are believed.
    #[must_use]
    pub fn identify(
        mut self,
        who: impl Fn(&Credentials, u32, VmIdentity) -> Option<VmIdentity> + Send + 'static,
    ) -> Self {
        self.identify = Box::new(who);
        self
    }

    /// Ends [`Broker::run`].
    pub fn handle(&self) -> BrokerHandle {
        BrokerHandle(Arc::clone(&self.control))
    }

    /// The context identifiers that are there.
    pub fn cids(&self) -> Vec<u32> {
        self.by_cid.keys().copied().collect()
    }

    /// How many connections are open.
    pub fn connections(&self) -> usize {
        self.open.len()
    }

    /// Serves until it is stopped.
    pub fn run(mut self) {
        while !self.control.stopped.load(Ordering::SeqCst) {
            self.run_once(Duration::from_secs(1));
        }
    }

    /// Waits until something happens, `timeout` at most, and does it.
    pub fn run_once(&mut self, timeout: Duration) {
        let retries = self.knocked || !self.waiting.is_empty();
        let timeout = match (self.busy.is_empty(), retries) {
            (false, _) => Duration::ZERO,
            (true, true) => timeout.min(AFTER_FAILURE),
            (true, false) => timeout,
        };
        let mut events: Vec<Event> = Vec::new();
        self.poll.wait(timeout, &mut events);
        for event in events {
            match event.tag {
                LISTENER => self.knocked = true,
                KICK => {}
                id if self.open.contains_key(&id) => {
                    if event.hung_up {
                        self.close(id);
                    }
                }
                id => {
                    self.busy.insert(id);
                }
            }
        }
        if std::mem::take(&mut self.knocked) {
            self.accept();
        }
        let revoked = std::mem::take(&mut *lock(&self.control.revoked));
        for id in revoked {
            self.close(id);
            self.disconnect(id);
        }
        let mut heard = std::mem::take(&mut self.busy);
        heard.append(&mut self.waiting);
        for id in heard {
            self.hear(id);
        }
        let silent =
            self.peers.iter().filter(|(_, peer)| peer.place.is_none() && peer.since.elapsed() > PATIENCE);
        for id in silent.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.disconnect(id);
        }
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        loop {
            // Nobody else is let in while more is to be closed than can be, and nobody tells when there is less.
            self.knocked = self.closer.is_full();
            if self.knocked {
                return;
            }
            let socket = match again(|| accept_with(listener, flags)) {
                Ok(socket) => socket,
                Err(Errno::CONNABORTED) => continue,
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    // Nobody tells when there is a descriptor again.
                    self.knocked = true;
                    return;
                }
            };
            self.next += 1;
            let id = self.next;
            if self.peers.len() < self.bounds.peers && self.poll.add(socket.as_fd(), id).is_ok() {
                self.peers.insert(id, Peer::new(socket));
                self.busy.insert(id);
            } else {
                part(&self.closer, STRANGERS, socket);
            }
        }
    }

    fn hear(&mut self, id: u64) {
        for _ in 0..MAX_MESSAGES {
            let Some(peer) = self.peers.get(&id) else { return };
            let next = if peer.answer.is_some() {
                self.answer(id)
            } else {
                match hear_member(&peer.socket) {
                    Received::Message(message, _) => self.heard(id, &message),
                    Received::Nothing => return,
                    Received::End => Next::End,
                }
            };
            match next {
                Next::Message => {}
                Next::Room => {
                    self.waiting.insert(id);
                    return;
                }
                Next::End => return self.disconnect(id),
            }
        }
        self.busy.insert(id);
    }

    fn heard(&mut self, id: u64, message: &Message) -> Next {
        let placed = self.peers.get(&id).is_some_and(|peer| peer.place.is_some());
        let made_sense = match (message.what, placed) {
            (what::JOIN, false) => self.join(id, message),
            (what::DIAL, true) => self.dial(id, message),
            (what::TAKEN, true) => self.taken(id, message),
            _ => false,
        };
        if made_sense { Next::Message } else { Next::End }
    }

    fn join(&mut self, id: u64, message: &Message) -> bool {
        let placed = self.place(id, message);
        let answer = match &placed {
            Ok(_) => Message { what: what::JOINED, ..Message::default() },
            Err(why) => Message { what: what::REFUSED, port: *why, ..Message::default() },
        };
        let Some(peer) = self.peers.get_mut(&id) else { return false };
        let sent = answer.send(&peer.socket, None) == Ok(true);
        let Some(place) = placed.ok().filter(|_| sent) else { return false };
        let control = Arc::clone(&self.control);
        place._grant.on_revoked(move || control.revoke(id));
        self.by_cid.insert(place.cid, id);
        peer.place = Some(place);
        true
    }

    fn place(&self, id: u64, message: &Message) -> Result<Place, u32> {
        let peer = self.peers.get(&id).ok_or(reason::WHO)?;
        let cid = message.cid;
        if message.port != VERSION {
            return Err(reason::VERSION);
        }
        let kernel = sockopt::socket_peercred(&peer.socket).map_err(|_| reason::WHO)?;
        let credentials = Credentials {
            pid: kernel.pid.as_raw_nonzero().get(),
            uid: kernel.uid.as_raw(),
            gid: kernel.gid.as_raw(),
        };
        let claimed = message.identity();
        let vm = (self.identify)(&credentials, cid, claimed).filter(|_| is_guest_cid(cid));
        let vm = vm.ok_or(reason::WHO)?;
        if self.by_cid.contains_key(&cid) {
            return Err(reason::TAKEN);
        }
        let asked = self.gatekeeper.open(vm.into(), None, VsockListen { port: ANY_PORT });
        Ok(Place { cid, vm, _grant: asked.map_err(|_| reason::GATE)? })
    }

    fn dial(&mut self, id: u64, message: &Message) -> bool {
        let made = self.connect(id, message);
        let Some(peer) = self.peers.get_mut(&id) else { return false };
        peer.answer = Some(Answer { tag: message.tag, made, since: Instant::now() });
        true
    }

    fn taken(&mut self, id: u64, message: &Message) -> bool {
        let Some(peer) = self.peers.get_mut(&id) else { return false };
        let count = usize::try_from(message.tag).ok().filter(|count| *count <= peer.untaken.len());
        count.is_some_and(|count| peer.untaken.drain(..count).count() > 0)
    }

    /// Sends the answer that waits. A connection whose socket cannot go is refused.
    fn answer(&mut self, id: u64) -> Next {
        let Some(peer) = self.peers.get_mut(&id) else { return Next::End };
        let Some(mut answer) = peer.answer.take() else { return Next::Message };
        let message = Message { what: what::DIALED, tag: answer.tag, ..Message::default() };
        let socket = answer.made.as_ref().map(|(_, open)| open.socket.as_fd());
        match message.send(&peer.socket, socket) {
            Ok(true) => {}
            Ok(false) if answer.since.elapsed() < PATIENCE => {
                peer.answer = Some(answer);
                return Next::Room;
            }
            // Others leave theirs unread, which is no fault of this one.
            Err(Errno::TOOMANYREFS) if answer.made.is_some() => {
                if let Some((_, open)) = answer.made.take() {
                    part(&self.closer, open.called, open.socket);
                }
                peer.answer = Some(answer);
                return Next::Message;
            }
            Ok(false) | Err(_) => {
                peer.answer = Some(answer);
                return Next::End;
            }
        }
        if let Some((number, open)) = answer.made {
            peer.connections += 1;
            let (control, closer) = (Arc::clone(&self.control), Arc::clone(&self.closer));
            let (socket, called) = (Arc::downgrade(&open.socket), open.called);
            open.grant.on_revoked(move || {
                if let Some(socket) = socket.upgrade() {
                    // The broker may let go of it meanwhile, so that this one is the last.
                    part(&closer, called, socket);
                }
                control.revoke(number);
            });
            let watched = self.poll.add_for_end(open.socket.as_fd(), number);
            self.open.insert(number, open);
            if watched.is_err() {
                self.close(number);
            }
        }
        Next::Message
    }

    fn connect(&mut self, id: u64, message: &Message) -> Option<(u64, Open)> {
        let Message { cid, port, from_port, kind, .. } = *message;
        Kind::of(u16::try_from(kind).ok()?)?;
        let peer = self.peers.get(&id).filter(|peer| peer.connections < self.bounds.connections_of_one)?;
        // What is to be closed has descriptors as well.
        if self.open.len() + self.closer.left() >= self.bounds.connections
            || self.closer.left_of(cid) >= self.bounds.connections_of_one
        {
            return None;
        }
        let caller = peer.place.as_ref()?;
        let other = self.peers.get(self.by_cid.get(&cid)?)?;
        let called = other.place.as_ref().filter(|place| place.cid != caller.cid)?;
        let its = other.untaken.iter().filter(|other| **other == caller.cid).count();
        if other.untaken.len() >= MAX_UNTAKEN || its >= MAX_UNTAKEN_OF_ONE {
            return None;
        }
        let (asker, peer) = (Party::Vm(caller.vm), Some(Party::Vm(called.vm)));
        let grant = self.gatekeeper.open(asker, peer, VsockConnect { port }).ok()?;
        let (ours, theirs) = pair(Framing::Records).ok()?;
        let arrived = Message {
            what: what::ARRIVED,
            kind,
            cid: caller.cid,
            port,
            from_port,
            tag: 0,
            uuid: caller.vm.uuid(),
            incarnation: caller.vm.incarnation(),
        };
        if arrived.send(&other.socket, Some(theirs.as_fd())) != Ok(true) {
            return None;
        }
        let called = self.by_cid.get(&cid).and_then(|called| self.peers.get_mut(called))?;
        called.untaken.push_back(arrived.cid);
        self.next += 1;
        Some((self.next, Open { socket: Arc::new(ours), caller: id, called: cid, grant }))
    }

    /// Forgets a connection, of which nothing is left then.
    fn close(&mut self, id: u64) {
        let Some(open) = self.open.remove(&id) else { return };
        self.poll.remove(open.socket.as_fd());
        if let Some(peer) = self.peers.get_mut(&open.caller) {
            peer.connections = peer.connections.saturating_sub(1);
        }
        part(&self.closer, open.called, open.socket);
    }

    /// A monitor is gone, and what its guest had called with it. What others have called ends as its own sockets do.
    fn disconnect(&mut self, id: u64) {
        let Some(peer) = self.peers.remove(&id) else { return };
        self.poll.remove(peer.socket.as_fd());
        self.waiting.remove(&id);
        if let Some(place) = &peer.place {
            self.by_cid.remove(&place.cid);
        }
        let called: Vec<u64> =
            self.open.iter().filter(|(_, open)| open.caller == id).map(|(number, _)| *number).collect();
        for number in called {
            self.close(number);
        }
        peer.end(&self.closer);
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if let Some(listener) = self.listener.take() {
            self.closer.close_listener(listener);
        }
        std::mem::take(&mut self.peers).into_values().for_each(|peer| peer.end(&self.closer));
        // They go on, for those who have them.
        let open = std::mem::take(&mut self.open).into_values();
        open.for_each(|open| self.closer.close_of(open.called, open.socket));
    }
}

/// Nothing goes through it any more, whoever holds it. In it may be descriptors that somebody has sent, which may take long to close.
fn part(closer: &Closer, whose: u32, socket: impl AsFd + Send + 'static) {
    // What is not connected any more needs none.
    let (Ok(()) | Err(_)) = shutdown(&socket, Shutdown::Both);
    closer.close_of(whose, socket);
}
