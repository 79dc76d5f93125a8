//! The port of a device whose switch is another process's.

use std::fmt;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vmm_memory::vm_memory::{MmapRegion, VolatileSlice};

use super::BrokerError;
use super::memory::{self, Side};
use super::message::{Hello, Message, TEXT};
use super::server::wake;
use super::socket::{self, Heard};
use crate::channel::{Grant, NetworkAttach};
use crate::closer::Closer;
use crate::interrupt::lock;
use crate::net::switch::port::broken;
use crate::net::switch::ring::{self, Consumer, Producer};
use crate::net::{
    Agreed, Link, MAX_FRAME, MacAddr, Membership, NetBackend, NetError, NetEvents, NetPort, Offloads,
    PacketInfo, Received, Sent,
};

/// How long a broker may take for an answer.
const ANSWER: Duration = Duration::from_secs(5);

/// Pauses between two attempts to connect again: the first, and the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// How a client is to be.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    name: String,
    mac: Option<MacAddr>,
    token: Vec<u8>,
    ring: usize,
    reconnect: bool,
}

impl ClientConfig {
    /// One that calls itself so: 1 to 96 bytes.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), mac: None, token: Vec::new(), ring: 2 << 20, reconnect: true }
    }

    /// The address of its device, to which a broker locks the port.
    #[must_use]
    pub fn mac(mut self, mac: MacAddr) -> Self {
        self.mac = Some(mac);
        self
    }

    /// By which the broker is to know it: 96 bytes at most.
    #[must_use]
    pub fn token(mut self, token: impl Into<Vec<u8>>) -> Self {
        self.token = token.into();
        self
    }

    /// Bytes of each of its two rings: a power of two from 256 KiB on; 2 MiB where nothing is said.
    #[must_use]
    pub fn queue_bytes(mut self, bytes: usize) -> Self {
        self.ring = bytes;
        self
    }

    /// Whether it connects again when the broker is gone, which is the default. A process that can open no sockets leaves the link down instead.
    #[must_use]
    pub fn reconnect(mut self, reconnect: bool) -> Self {
        self.reconnect = reconnect;
        self
    }
}

/// A port at a broker's switch. The port is there as long as this is, but for the times in which there is no broker.
///
/// A thread of its own hears when the broker goes, and connects again; it is there from [`SwitchClient::connect`] on.
pub struct SwitchClient {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for SwitchClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SwitchClient")
            .field("path", &self.shared.path)
            .field("link", &self.link())
            .finish_non_exhaustive()
    }
}

struct Shared {
    path: PathBuf,
    config: ClientConfig,
    network: String,
    membership: Arc<Membership>,
    memory: Arc<MmapRegion<()>>,
    /// The same, to be passed on.
    memory_fd: OwnedFd,
    /// Rung by the broker.
    bell: OwnedFd,
    /// The broker's end.
    bell_fd: OwnedFd,
    /// Ends the thread.
    stop: OwnedFd,
    /// Of connections to a broker that may be anybody.
    closer: Closer,
    line: Mutex<Line>,
    mtu: Option<u16>,
}

/// What there is while there is a broker.
struct Line {
    producer: Producer,
    consumer: Consumer,
    /// `None` when there is no broker.
    socket: Option<Arc<OwnedFd>>,
    /// As the broker says.
    up: bool,
    /// What the driver takes, while there is one.
    driver: Option<Offloads>,
    events: Option<Arc<dyn NetEvents>>,
}

impl Line {
    /// Tells the broker whether there is a driver.
    fn tell_driver(&self) {
        if let Some(socket) = &self.socket {
            let (present, receive) = (self.driver.is_some(), self.driver.unwrap_or(Offloads::NONE));
            // Where it cannot be told, the thread sees why.
            drop(socket::send(socket, &Message::Driver { present, receive }));
        }
    }

    /// The broker is not to be dealt with any more: it is gone, or writes nonsense.
    fn hang_up(&mut self) {
        if let Some(socket) = self.socket.take() {
            // The thread sees the end.
            let (Ok(()) | Err(_)) = rustix::net::shutdown(&socket, rustix::net::Shutdown::Both);
        }
    }

    fn checked<T>(&mut self, result: Result<T, ring::RingError>) -> Result<T, NetError> {
        result.map_err(|error| {
            self.hang_up();
            broken(error)
        })
    }
}

/// What came of a hello.
struct Connected {
    socket: OwnedFd,
    mtu: Option<u16>,
    up: bool,
}

/// Connects, and says hello.
fn connect(
    path: &Path,
    hello: Hello,
    descriptors: &[&OwnedFd],
    stop: Option<&OwnedFd>,
    closer: &Closer,
) -> Result<Connected, BrokerError> {
    let socket = socket::connect(path)?;
    match say_hello(&socket, hello, descriptors, stop) {
        Ok((mtu, up)) => Ok(Connected { socket, mtu, up }),
        Err(error) => {
            closer.close(socket);
            Err(error)
        }
    }
}

/// What the broker answers: the MTU, and whether the link is up.
fn say_hello(
    socket: &OwnedFd,
    hello: Hello,
    descriptors: &[&OwnedFd],
    stop: Option<&OwnedFd>,
) -> Result<(Option<u16>, bool), BrokerError> {
    let said = socket::send_with(socket, &Message::Hello(hello), descriptors);
    if !matches!(&said, Err(BrokerError::Host(error)) if error.kind() == std::io::ErrorKind::BrokenPipe) {
        // Else it has refused before it was asked, and said why.
        said?;
    }
    let until = Instant::now() + ANSWER;
    loop {
        match socket::receive(socket)? {
            Heard::Message(Message::Welcome { mtu, up }) => return Ok((mtu, up)),
            Heard::Message(Message::Refused { reason }) => return Err(BrokerError::Refused { reason }),
            Heard::Message(_) => return Err(BrokerError::Protocol { what: "no answer to a hello" }),
            Heard::End => return Err(BrokerError::Protocol { what: "nothing, and closed the connection" }),
            Heard::Nothing => {}
        }
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || !wait(socket, stop, Some(left))? {
            return Err(BrokerError::Protocol { what: "no answer in time" });
        }
    }
}

/// Waits until the socket has something. False if that is in vain.
fn wait(socket: &OwnedFd, stop: Option<&OwnedFd>, longest: Option<Duration>) -> Result<bool, BrokerError> {
    let timeout = longest.and_then(|longest| Timespec::try_from(longest).ok());
    let mut fds = vec![PollFd::new(socket, PollFlags::IN)];
    fds.extend(stop.map(|stop| PollFd::new(stop, PollFlags::IN)));
    match poll(&mut fds, timeout.as_ref()) {
        Ok(0) => return Ok(false),
        Ok(_) => {}
        Err(rustix::io::Errno::INTR) => return Ok(true),
        Err(error) => return Err(error.into()),
    }
    Ok(fds.get(1).is_none_or(|stop| stop.revents().is_empty()))
}

impl SwitchClient {
    /// A port at the broker that listens at `path`, on the network that the grant is for.
    ///
    /// # Errors
    /// If there is no broker, or it refuses, or the host does; [`BrokerError::Revoked`] if the grant is revoked.
    pub fn connect(
        grant: Grant<NetworkAttach>,
        path: impl AsRef<Path>,
        config: ClientConfig,
    ) -> Result<Self, BrokerError> {
        let network = grant.channel().network.to_string();
        for (what, len) in [
            ("a name", config.name.len()),
            ("a network's name", network.len()),
            ("a token", config.token.len()),
        ] {
            if len > TEXT {
                return Err(BrokerError::Text { what, len, most: TEXT });
            }
        }
        let membership = Membership::new(grant).map_err(|_| BrokerError::Revoked)?;
        let (memory_fd, memory) = memory::create(config.ring)?;
        let (bell, bell_fd) = socket::bell()?;
        let (producer, consumer) = memory::ends(&memory, config.ring, Side::Client)?;
        let path = path.as_ref().to_owned();
        let closer = Closer::new("net-close", 1, None)?;
        let hello = hello(&config, &network);
        let Connected { socket, mtu, up } = connect(&path, hello, &[&memory_fd, &bell_fd], None, &closer)?;
        let socket = Arc::new(socket);
        let line =
            Line { producer, consumer, socket: Some(Arc::clone(&socket)), up, driver: None, events: None };
        let shared = Arc::new(Shared {
            path,
            config,
            network,
            membership,
            memory,
            memory_fd,
            bell,
            bell_fd,
            stop: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            closer,
            line: Mutex::new(line),
            mtu,
        });
        let of_grant = Arc::downgrade(&shared);
        shared.membership.grant().on_revoked(move || {
            if let Some(shared) = of_grant.upgrade() {
                shared.revoked();
            }
        });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("net-switch".to_owned());
        let thread = thread.spawn(move || of_thread.keep(socket))?;
        Ok(Self { shared, thread: Some(thread) })
    }
}

fn hello(config: &ClientConfig, network: &str) -> Hello {
    Hello {
        transmit: Offloads::ALL,
        // Checked when the memory was made.
        ring: u32::try_from(config.ring).unwrap_or(0),
        mac: config.mac,
        name: config.name.clone(),
        network: network.to_owned(),
        token: config.token.clone(),
    }
}

impl Shared {
    /// What the thread does: hears the broker, and looks for it when it is gone. At the end it has hung up.
    fn keep(&self, mut socket: Arc<OwnedFd>) {
        loop {
            let goes_on = self.listen(&socket);
            {
                let mut line = lock(&self.line);
                line.hang_up();
                line.up = false;
            }
            // Nobody else has it any more.
            self.closer.close(socket);
            if !goes_on {
                return;
            }
            self.membership.tell_link();
            if !self.config.reconnect {
                return;
            }
            let Some(again) = self.connect_again() else { return };
            socket = again;
            self.membership.tell_link();
            let events = lock(&self.line).events.clone();
            if let Some(events) = events {
                events.ready(0);
            }
        }
    }

    /// The right is gone: so is the port, at the broker as well.
    fn revoked(&self) {
        self.membership.close();
        self.end();
    }

    /// Has the thread end, and hangs up.
    fn end(&self) {
        wake(&self.stop);
        lock(&self.line).hang_up();
    }

    /// Hears the broker until it is gone. False if this is to end.
    fn listen(&self, socket: &Arc<OwnedFd>) -> bool {
        loop {
            // Before each message, so that one who sends them without end is left as well.
            match wait(socket, Some(&self.stop), None) {
                Ok(true) => {}
                Ok(false) | Err(_) => return self.goes_on(),
            }
            match socket::receive(socket) {
                Ok(Heard::Nothing) => {}
                Ok(Heard::Message(Message::Link { up })) => {
                    let was_up = std::mem::replace(&mut lock(&self.line).up, up);
                    if was_up != up {
                        self.membership.tell_link();
                    }
                }
                Ok(Heard::Message(_) | Heard::End) | Err(_) => return self.goes_on(),
            }
        }
    }

    fn goes_on(&self) -> bool {
        let mut fds = [PollFd::new(&self.stop, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut fds, Some(&now)) == Ok(0)
    }

    /// `None` if this is to end.
    fn connect_again(&self) -> Option<Arc<OwnedFd>> {
        let mut pause = FIRST_PAUSE;
        loop {
            let mut fds = [PollFd::new(&self.stop, PollFlags::IN)];
            if poll(&mut fds, Timespec::try_from(pause).ok().as_ref()) != Ok(0) && !self.goes_on() {
                return None;
            }
            if !self.membership.grant().is_live() {
                return None;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
            if let Ok(socket) = self.try_again() {
                return Some(socket);
            }
        }
    }

    fn try_again(&self) -> Result<Arc<OwnedFd>, BrokerError> {
        // Nobody uses the rings meanwhile: there is no socket.
        let (producer, consumer) = memory::ends(&self.memory, self.config.ring, Side::Client)?;
        let hello = hello(&self.config, &self.network);
        let descriptors = [&self.memory_fd, &self.bell_fd];
        let Connected { socket, up, .. } =
            connect(&self.path, hello, &descriptors, Some(&self.stop), &self.closer)?;
        let socket = Arc::new(socket);
        let mut line = lock(&self.line);
        (line.producer, line.consumer) = (producer, consumer);
        (line.socket, line.up) = (Some(Arc::clone(&socket)), up);
        line.tell_driver();
        Ok(socket)
    }
}

impl Drop for SwitchClient {
    fn drop(&mut self) {
        self.shared.end();
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

impl NetBackend for SwitchClient {
    fn transmit_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn receive_offloads(&self) -> Offloads {
        Offloads::ALL
    }

    fn mtu(&self) -> Option<u16> {
        self.shared.mtu
    }

    fn link(&self) -> Link {
        let up = {
            let line = lock(&self.shared.line);
            line.up && line.socket.is_some()
        };
        self.shared.membership.link(Link { up, speed: None })
    }

    fn listen(&self, events: Arc<dyn NetEvents>) {
        self.shared.membership.listen(events);
    }

    fn attach(&self, agreed: &Agreed, events: Arc<dyn NetEvents>) -> Result<Vec<Box<dyn NetPort>>, NetError> {
        if agreed.pairs != 1 {
            return Err(NetError::Pairs { pairs: agreed.pairs, most: 1 });
        }
        let mut line = lock(&self.shared.line);
        line.driver = Some(agreed.receive);
        line.events = Some(events);
        let cleared = line.consumer.clear();
        if line.checked(cleared).is_ok() {
            line.tell_driver();
        }
        let shared = Arc::downgrade(&self.shared);
        let bell = self.shared.bell.try_clone()?;
        Ok(vec![Box::new(ClientPort { shared, bell, receives: agreed.receive })])
    }

    fn set_receive_offloads(&self, offloads: Offloads) -> Result<(), NetError> {
        let mut line = lock(&self.shared.line);
        line.driver = line.driver.map(|_| offloads);
        line.tell_driver();
        Ok(())
    }
}

/// The pair of queues of a client.
struct ClientPort {
    shared: Weak<Shared>,
    bell: OwnedFd,
    receives: Offloads,
}

impl fmt::Debug for ClientPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientPort").field("receives", &self.receives).finish_non_exhaustive()
    }
}

impl NetPort for ClientPort {
    fn transmit(&mut self, info: &PacketInfo, frame: &[VolatileSlice<'_>]) -> Result<Sent, NetError> {
        let Some(shared) = self.shared.upgrade() else { return Ok(Sent::Done) };
        shared.membership.frame(|| {
            let mut line = lock(&shared.line);
            if line.socket.is_none() {
                // As on a cable that is not plugged in.
                return Ok(Sent::Done);
            }
            let len: usize = frame.iter().map(VolatileSlice::len).sum();
            if len > MAX_FRAME {
                return Err(NetError::Frame { len });
            }
            loop {
                let pushed = line.producer.push(&info.to_bytes(0), len, frame.iter().copied());
                if line.checked(pushed)? {
                    return Ok(Sent::Done);
                }
                let has_room = line.producer.wait(len);
                if !line.checked(has_room)? {
                    wake_broker(&mut line)?;
                    return Ok(Sent::Full);
                }
            }
        })
    }

    fn hush(&mut self) {
        socket::hush(&self.bell);
    }

    fn flush(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            // A broker that is broken is seen at the next frame.
            drop(wake_broker(&mut lock(&shared.line)));
        }
    }

    fn receive(&mut self, buffers: &[VolatileSlice<'_>]) -> Result<Option<Received>, NetError> {
        let Some(shared) = self.shared.upgrade() else { return Ok(None) };
        let received = shared.membership.frame(|| {
            let mut line = lock(&shared.line);
            if line.socket.is_none() {
                return Ok(None);
            }
            let front = loop {
                let front = line.consumer.front();
                if let Some(front) = line.checked(front)? {
                    break front;
                }
                let sleeps = line.consumer.sleep();
                if line.checked(sleeps)? {
                    return Ok(None);
                }
                // There is one now, which does not go away again.
            };
            let room: usize = buffers.iter().map(VolatileSlice::len).sum();
            let info = PacketInfo::from_bytes(&front.info);
            let info = info.and_then(|info| info.check(front.len, self.receives).map(|()| info));
            let frame = match info {
                Ok(info) if front.len <= room => {
                    let copied = line.consumer.frame(&front).map(|frame| ring::copy(frame, buffers));
                    line.checked(copied)?;
                    Ok(Received { info, len: front.len })
                }
                Ok(_) => Err(NetError::Frame { len: front.len }),
                Err(error) => Err(error.into()),
            };
            let popped = line.consumer.pop(&front);
            line.checked(popped)?;
            // One that is none is the caller's to count, and to weigh: a broker may put them in as fast as they are taken out.
            frame.map(Some)
        });
        match received {
            Err(NetError::Revoked) => Ok(None),
            received => received,
        }
    }

    fn source(&self) -> Option<BorrowedFd<'_>> {
        Some(self.bell.as_fd())
    }
}

fn wake_broker(line: &mut Line) -> Result<(), NetError> {
    let wakes = line.producer.wakes();
    if line.checked(wakes)?
        && let Some(socket) = &line.socket
    {
        // Where there is no room, the broker has not heard earlier ones yet; where there is no broker, the thread sees it.
        drop(socket::send(socket, &Message::Bell));
    }
    Ok(())
}

impl Drop for ClientPort {
    fn drop(&mut self) {
        if let Some(shared) = self.shared.upgrade() {
            self.flush();
            let mut line = lock(&shared.line);
            (line.driver, line.events) = (None, None);
            line.tell_driver();
        }
    }
}
