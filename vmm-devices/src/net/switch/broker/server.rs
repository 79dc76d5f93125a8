//! The broker: one thread has all clients, and serves each in turn.

use std::collections::BTreeMap;
use std::fmt;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::net::sockopt;

use super::BrokerError;
use super::memory::{self, Side};
use super::message::{Hello, Message};
use super::socket::{self, Heard};
use crate::channel::{Gatekeeper, NetworkAttach, Party, Refusal};
use crate::closer::Closer;
use crate::net::switch::metrics::DropReason;
use crate::net::switch::port::flush;
use crate::net::switch::ring::Consumer;
use crate::net::switch::{PortConfig, PortId, PortSnapshot, Switch, SwitchPort};
use crate::net::{MacAddr, NetEvents, Offloads, PacketInfo};

/// Clients have so long for their hello, where nothing else is said.
const HELLO: Duration = Duration::from_secs(5);

/// Frames of one client that are moved before others have their turn, and their bytes.
const FRAMES: usize = 64;
const BYTES: usize = 1 << 20;

/// Messages of one client that are read before others have their turn.
const MESSAGES: usize = 16;

/// Threads that close what clients have passed.
const CLOSERS: usize = 8;

/// Of all clients, that are looked at at once.
const EVENTS: usize = 64;

const LISTENER: u64 = 0;
const WAKER: u64 = 1;
const FIRST: u64 = 2;

/// Who wants a port.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Peer {
    /// Its process, as the kernel says. A process may end, and another have its number.
    pub pid: i32,
    /// Its user, as the kernel says.
    pub uid: u32,
    /// Its group, as the kernel says.
    pub gid: u32,
    /// The name that it gives itself.
    pub name: Arc<str>,
    /// The address that it says its device has.
    pub mac: Option<MacAddr>,
    /// What it gives beside, for who hands out secrets.
    pub token: Vec<u8>,
}

/// What a server tells its monitor.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum ServerEvent {
    /// A client has got a port.
    Attached {
        /// Who.
        peer: Peer,
        /// Which port.
        port: PortId,
    },
    /// Somebody has got none.
    Refused {
        /// Who, as far as it has said.
        peer: Option<Peer>,
        /// Why.
        reason: String,
    },
    /// A client is gone.
    Left {
        /// Who.
        peer: Peer,
        /// Why.
        reason: String,
        /// What it has done.
        metrics: Box<PortSnapshot>,
    },
}

type Identify = Box<dyn Fn(&Peer) -> Result<Party, Refusal> + Send>;
type Configure = Box<dyn Fn(&Peer) -> Result<PortConfig, Refusal> + Send>;

/// How a server is to be.
pub struct ServerBuilder {
    switch: Switch,
    gatekeeper: Gatekeeper,
    identify: Identify,
    configure: Configure,
    events: Box<dyn Fn(ServerEvent) + Send>,
    clients: usize,
    ring: usize,
    hello: Duration,
}

impl fmt::Debug for ServerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerBuilder").field("switch", &self.switch).finish_non_exhaustive()
    }
}

/// Those of this process's user, by the name that they give themselves.
fn of_this_user(peer: &Peer) -> Result<Party, Refusal> {
    let own = rustix::process::geteuid().as_raw();
    if peer.uid != own {
        return Err(Refusal::new(format!("it is of user {}, and this network of user {own}", peer.uid)));
    }
    Ok(Party::Host(Arc::clone(&peer.name)))
}

impl ServerBuilder {
    /// Who a client is for the gate. Where nothing is said: clients of this process's user are who they say, and others nobody.
    #[must_use]
    pub fn identify(mut self, identify: impl Fn(&Peer) -> Result<Party, Refusal> + Send + 'static) -> Self {
        self.identify = Box::new(identify);
        self
    }

    /// The port that a client gets. Where nothing is said: one of its name, locked to the address that it says it has.
    #[must_use]
    pub fn configure(
        mut self,
        configure: impl Fn(&Peer) -> Result<PortConfig, Refusal> + Send + 'static,
    ) -> Self {
        self.configure = Box::new(configure);
        self
    }

    /// Hears who comes and goes, on the server's thread.
    #[must_use]
    pub fn events(mut self, events: impl Fn(ServerEvent) + Send + 'static) -> Self {
        self.events = Box::new(events);
        self
    }

    /// How many clients there are at most, those included that have not said who they are; 64 where nothing is said.
    #[must_use]
    pub fn max_clients(mut self, most: usize) -> Self {
        self.clients = most;
        self
    }

    /// Bytes of a client's ring at most; 4 MiB where nothing is said.
    #[must_use]
    pub fn max_queue_bytes(mut self, most: usize) -> Self {
        self.ring = most;
        self
    }

    /// How long a client may take to say who it is; 5 seconds where nothing is said.
    #[must_use]
    pub fn hello_timeout(mut self, longest: Duration) -> Self {
        self.hello = longest;
        self
    }

    /// Listens at `path`. Who may connect there is the path's permissions' to say; it is removed by whoever made it.
    /// The threads that close what clients pass are started here: a process that then confines itself needs to make none.
    ///
    /// # Errors
    /// If it cannot be listened at, or the host refuses what else that takes.
    pub fn listen(self, path: impl AsRef<Path>) -> Result<SwitchServer, BrokerError> {
        let listener = socket::listen(path.as_ref())?;
        let poll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let waker = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let add =
            |fd: &OwnedFd, id| epoll::add(&poll, fd, epoll::EventData::new_u64(id), epoll::EventFlags::IN);
        add(&listener, LISTENER)?;
        add(&waker, WAKER)?;
        let stop = Arc::default();
        let closer = Arc::new(Closer::new("net-close", CLOSERS, Some(&waker))?);
        Ok(SwitchServer {
            config: self,
            path: path.as_ref().to_owned(),
            listener: Some(listener),
            listens: true,
            poll,
            waker,
            stop,
            closer,
            clients: BTreeMap::new(),
            next: FIRST,
        })
    }
}

/// A server, with its clients. Dropped, it is gone, and so are their ports.
pub struct SwitchServer {
    config: ServerBuilder,
    path: PathBuf,
    /// `None` at the end.
    listener: Option<OwnedFd>,
    /// Who wants to connect is heard.
    listens: bool,
    poll: OwnedFd,
    waker: Arc<OwnedFd>,
    stop: Arc<AtomicBool>,
    closer: Arc<Closer>,
    clients: BTreeMap<u64, Client>,
    next: u64,
}

impl fmt::Debug for SwitchServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let clients = self.clients.len();
        f.debug_struct("SwitchServer")
            .field("path", &self.path)
            .field("clients", &clients)
            .finish_non_exhaustive()
    }
}

impl AsFd for SwitchServer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.poll.as_fd()
    }
}

/// Ends [`SwitchServer::run`], from any thread or a signal's.
#[derive(Clone, Debug)]
pub struct ServerStopper {
    waker: Arc<OwnedFd>,
    stop: Arc<AtomicBool>,
}

impl ServerStopper {
    /// Has it end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        wake(&self.waker);
    }
}

pub(super) fn wake(waker: &OwnedFd) {
    // Where there is no room for it, it has been woken.
    let (Ok(_) | Err(_)) = rustix::io::write(waker, &1_u64.to_ne_bytes());
}

/// Somebody who has connected.
struct Client {
    socket: OwnedFd,
    state: State,
}

enum State {
    /// It has not said who it is.
    New { until: Instant },
    /// It has a port.
    Member(Box<Member>),
}

struct Member {
    peer: Peer,
    port: SwitchPort,
    consumer: Consumer,
    link: Arc<Line>,
    /// What it may leave to others.
    transmit: Offloads,
    /// There may be frames in its ring.
    awake: bool,
    up: bool,
}

/// What wakes a client, and the server when a port changes.
struct Line {
    /// `None` at the end.
    bell: Option<OwnedFd>,
    waker: Arc<OwnedFd>,
    closer: Arc<Closer>,
}

impl Line {
    fn ring(&self) {
        if let Some(bell) = &self.bell {
            socket::ring(bell);
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        self.closer.close(self.bell.take());
    }
}

impl NetEvents for Line {
    fn ready(&self, _: u16) {
        self.ring();
    }

    fn link_changed(&self) {
        wake(&self.waker);
    }
}

impl SwitchServer {
    /// A server for `switch`, which asks `gatekeeper` about each client.
    pub fn builder(switch: Switch, gatekeeper: Gatekeeper) -> ServerBuilder {
        ServerBuilder {
            switch,
            gatekeeper,
            identify: Box::new(of_this_user),
            configure: Box::new(|peer| {
                let config = PortConfig::new(Arc::clone(&peer.name));
                Ok(match peer.mac {
                    Some(mac) => config.mac(mac),
                    None => config,
                })
            }),
            events: Box::new(|_| {}),
            clients: 64,
            ring: 4 << 20,
            hello: HELLO,
        }
    }

    /// Ends [`SwitchServer::run`].
    pub fn stopper(&self) -> ServerStopper {
        ServerStopper { waker: Arc::clone(&self.waker), stop: Arc::clone(&self.stop) }
    }

    /// Serves clients, until it is stopped.
    ///
    /// # Errors
    /// If the host refuses to let it wait.
    pub fn run(&mut self) -> Result<(), BrokerError> {
        while !self.stop.load(Ordering::SeqCst) {
            self.turn(None)?;
        }
        Ok(())
    }

    /// Waits until there is something to do, no longer than `longest`, and serves each client once: for who has a loop of its own.
    /// It is called again whenever [`AsFd::as_fd`] is readable, and without a wait while this returns true: there is more to do.
    ///
    /// # Errors
    /// If the host refuses to let it wait.
    pub fn turn(&mut self, longest: Option<Duration>) -> Result<bool, BrokerError> {
        let mut events = [const { MaybeUninit::<epoll::Event>::uninit() }; EVENTS];
        let longest = [self.longest(), longest].into_iter().flatten().min();
        let timeout = longest.and_then(|longest| Timespec::try_from(longest).ok());
        let heard = match epoll::wait(&self.poll, &mut events, timeout.as_ref()) {
            Ok((heard, _)) => &*heard,
            Err(rustix::io::Errno::INTR) => &[],
            Err(error) => return Err(error.into()),
        };
        for event in heard {
            match event.data.u64() {
                LISTENER => self.accept(),
                WAKER => self.look(),
                id => self.hear(id),
            }
        }
        self.move_frames();
        self.expire();
        self.listen()?;
        Ok(self.longest() == Some(Duration::ZERO))
    }

    /// How long it may wait: not at all while there are frames, and as long as somebody may take for a hello.
    fn longest(&self) -> Option<Duration> {
        let member = |client: &Client| matches!(&client.state, State::Member(member) if member.awake);
        if self.clients.values().any(member) {
            return Some(Duration::ZERO);
        }
        let until = self.clients.values().filter_map(|client| match client.state {
            State::New { until } => Some(until),
            State::Member(_) => None,
        });
        Some(until.min()?.saturating_duration_since(Instant::now()) + Duration::from_millis(1))
    }

    /// Nobody else is let in while more is to be closed than can be.
    fn listen(&mut self) -> Result<(), BrokerError> {
        let listens = !self.closer.is_full();
        if let Some(listener) = &self.listener
            && listens != self.listens
        {
            let flags = if listens { epoll::EventFlags::IN } else { epoll::EventFlags::empty() };
            epoll::modify(&self.poll, listener, epoll::EventData::new_u64(LISTENER), flags)?;
            self.listens = listens;
        }
        Ok(())
    }

    fn accept(&mut self) {
        let Some(listener) = &self.listener else { return };
        let accepted = match socket::accept(listener) {
            Ok(Some(accepted)) => accepted,
            Ok(None) => return,
            Err(error) => {
                // No descriptor is left, as a rule: who waits, waits. Nothing is gained by trying at once.
                self.tell(ServerEvent::Refused {
                    peer: None,
                    reason: format!("it cannot be accepted: {error}"),
                });
                std::thread::sleep(Duration::from_millis(10));
                return;
            }
        };
        let most = self.config.clients;
        if self.clients.len() >= most {
            self.refuse(accepted, None, format!("there are {most} clients, which is the most"));
            return;
        }
        let id = self.next;
        self.next += 1;
        let data = epoll::EventData::new_u64(id);
        if let Err(error) = epoll::add(&self.poll, &accepted, data, epoll::EventFlags::IN) {
            self.refuse(accepted, None, format!("it cannot be waited for: {error}"));
            return;
        }
        let state = State::New { until: Instant::now() + self.config.hello };
        self.clients.insert(id, Client { socket: accepted, state });
    }

    fn tell(&self, event: ServerEvent) {
        (self.config.events)(event);
    }

    fn refuse(&self, socket: OwnedFd, peer: Option<Peer>, reason: String) {
        self.hang_up(socket, &reason);
        self.tell(ServerEvent::Refused { peer, reason });
    }

    fn hang_up(&self, socket: OwnedFd, reason: &str) {
        // It may be gone.
        drop(socket::send(&socket, &Message::Refused { reason: reason.to_owned() }));
        // Which it may not be part of.
        let (Ok(()) | Err(_)) = epoll::delete(&self.poll, &socket);
        self.closer.close(socket);
    }

    /// A port is another than before: it may be gone.
    fn look(&mut self) {
        let mut count = [0; 8];
        let (Ok(_) | Err(_)) = rustix::io::read(&self.waker, &mut count);
        let mut gone = Vec::new();
        for (id, client) in &mut self.clients {
            let State::Member(member) = &mut client.state else { continue };
            if !member.port.port.is_live() {
                gone.push(*id);
                continue;
            }
            let up = member.port.port.is_up();
            // Where there is no room for it, it is said the next time.
            if up != member.up && socket::send(&client.socket, &Message::Link { up }).is_ok_and(|sent| sent) {
                member.up = up;
            }
        }
        for id in gone {
            self.end(id, "the right to be on the network was taken back");
        }
    }

    /// A client has said something.
    fn hear(&mut self, id: u64) {
        for _ in 0..MESSAGES {
            let Some(client) = self.clients.get(&id) else { return };
            let mut descriptors = Vec::new();
            let heard = match &client.state {
                State::New { .. } => socket::receive_with(&client.socket, &mut descriptors),
                State::Member(_) => socket::receive(&client.socket),
            };
            let more = match heard {
                Ok(Heard::Nothing) => false,
                Ok(Heard::End) => {
                    self.end(id, "it has closed its connection");
                    false
                }
                Ok(Heard::Message(message)) => {
                    self.obey(id, message, &descriptors);
                    true
                }
                Err(error) => {
                    self.end(id, &error.to_string());
                    false
                }
            };
            if !descriptors.is_empty() {
                // What was taken of them are copies.
                self.closer.close(descriptors);
            }
            if !more {
                return;
            }
        }
    }

    fn obey(&mut self, id: u64, message: Message, descriptors: &[OwnedFd]) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        match (&mut client.state, message) {
            (State::New { .. }, Message::Hello(hello)) => self.welcome(id, hello, descriptors),
            (State::Member(member), Message::Driver { present: true, receive }) => {
                let line: Arc<dyn NetEvents> = Arc::<Line>::clone(&member.link);
                member.port.port.open(receive, line);
            }
            (State::Member(member), Message::Driver { present: false, .. }) => member.port.port.close(),
            (State::Member(member), Message::Bell) => member.awake = true,
            _ => self.end(id, "it has sent a message that is not its turn"),
        }
    }

    /// Who has said hello gets a port, or hears why not.
    fn welcome(&mut self, id: u64, hello: Hello, descriptors: &[OwnedFd]) {
        let Some(client) = self.clients.get(&id) else { return };
        let peer = match sockopt::socket_peercred(&client.socket) {
            Ok(credentials) => Peer {
                pid: credentials.pid.as_raw_nonzero().get(),
                uid: credentials.uid.as_raw(),
                gid: credentials.gid.as_raw(),
                name: hello.name.as_str().into(),
                mac: hello.mac,
                token: hello.token.clone(),
            },
            Err(error) => return self.end(id, &format!("nobody knows who it is: {error}")),
        };
        match self.admit(&peer, &hello, descriptors) {
            Ok(member) => {
                let (up, port) = (member.up, member.port.id());
                let mtu = self.config.switch.inner.mtu;
                let Some(client) = self.clients.get_mut(&id) else { return };
                client.state = State::Member(Box::new(member));
                if !socket::send(&client.socket, &Message::Welcome { mtu, up }).is_ok_and(|sent| sent) {
                    return self.end(id, "it does not hear");
                }
                self.tell(ServerEvent::Attached { peer, port });
            }
            Err(reason) => {
                if let Some(client) = self.clients.remove(&id) {
                    self.refuse(client.socket, Some(peer), reason);
                }
            }
        }
    }

    /// What a client gets; nothing of it stays if that fails. The reason is for the client as well.
    fn admit(&self, peer: &Peer, hello: &Hello, descriptors: &[OwnedFd]) -> Result<Member, String> {
        let ServerBuilder { switch, gatekeeper, identify, configure, ring, .. } = &self.config;
        if hello.network != **switch.network() {
            return Err(format!("this is network {:?}", switch.network()));
        }
        let size = usize::try_from(hello.ring).unwrap_or(usize::MAX);
        if size > *ring {
            return Err(format!("rings of {size} bytes; {ring} are the most"));
        }
        let text = |error: &dyn std::error::Error| error.to_string();
        let party = identify(peer).map_err(|refusal| text(&refusal))?;
        let config = configure(peer).map_err(|refusal| text(&refusal))?;
        config.check().map_err(|error| text(&error))?;
        let channel = NetworkAttach { network: Arc::clone(switch.network()) };
        let grant = gatekeeper.open(party, None, channel).map_err(|refusal| text(&refusal))?;
        let [memory, bell] = descriptors else {
            return Err("a hello has two descriptors".to_owned());
        };
        socket::check_bell(bell).map_err(|error| text(&error))?;
        let memory = memory::take(memory, size).map_err(|error| text(&error))?;
        let (producer, consumer) = memory::ends(&memory, size, Side::Broker).map_err(|error| text(&error))?;
        let bell = bell.try_clone().map_err(|error| text(&error))?;
        let config = config.queues(1);
        let lanes = std::iter::once((producer, None));
        let port = switch.attach_with(grant, config, lanes).map_err(|error| text(&error))?;
        let (bell, waker) = (Some(bell), Arc::clone(&self.waker));
        let link = Arc::new(Line { bell, waker, closer: Arc::clone(&self.closer) });
        let line: Arc<dyn NetEvents> = Arc::<Line>::clone(&link);
        crate::net::NetBackend::listen(&port, line);
        let up = port.port.is_up();
        Ok(Member { peer: peer.clone(), port, consumer, link, transmit: hello.transmit, awake: true, up })
    }

    fn end(&mut self, id: u64, reason: &str) {
        let Some(Client { socket, state }) = self.clients.remove(&id) else { return };
        match state {
            State::New { .. } => self.refuse(socket, None, reason.to_owned()),
            State::Member(member) => {
                let Member { peer, port, .. } = *member;
                self.hang_up(socket, reason);
                let metrics = Box::new(port.metrics());
                drop(port);
                self.tell(ServerEvent::Left { peer, reason: reason.to_owned(), metrics });
            }
        }
    }

    /// Each client's turn.
    fn move_frames(&mut self) {
        let mut broken = Vec::new();
        for (id, client) in &mut self.clients {
            if let State::Member(member) = &mut client.state
                && member.awake
                && let Err(error) = member.move_frames(&self.config.switch)
            {
                broken.push((*id, error.to_string()));
            }
        }
        for (id, reason) in broken {
            self.end(id, &reason);
        }
    }

    /// Who has not said hello in time.
    fn expire(&mut self) {
        let now = Instant::now();
        let late = |client: &Client| matches!(client.state, State::New { until } if until <= now);
        let late: Vec<_> =
            self.clients.iter().filter(|(_, client)| late(client)).map(|(id, _)| *id).collect();
        late.into_iter().for_each(|id| self.end(id, "it has not said hello in time"));
    }
}

impl Drop for SwitchServer {
    fn drop(&mut self) {
        if let Some(listener) = self.listener.take() {
            self.closer.close_listener(listener);
        }
        for (_, Client { socket, state }) in std::mem::take(&mut self.clients) {
            drop(state);
            self.closer.close(socket);
        }
    }
}

impl Member {
    fn move_frames(&mut self, switch: &Switch) -> Result<(), BrokerError> {
        let Self { port, consumer, link, transmit, .. } = self;
        let port = &port.port;
        let mut bytes = 0;
        for _ in 0..FRAMES {
            let Some(front) = consumer.front()? else { break };
            let checked = PacketInfo::from_bytes(&front.info)
                .and_then(|info| info.check(front.len, *transmit).map(|()| info));
            match checked {
                // A port that was revoked sends nothing; the server is told of that.
                Ok(info) => drop(switch.inner.forward(port, &info, &consumer.frame(&front)?)),
                Err(_) => port.counters.dropped(DropReason::Malformed),
            }
            consumer.pop(&front)?;
            bytes += front.len;
            if bytes > BYTES {
                break;
            }
        }
        if consumer.wakes()? {
            link.ring();
        }
        flush(port);
        if consumer.front()?.is_none() && consumer.sleep()? {
            self.awake = false;
        }
        Ok(())
    }
}
