//! The thread of a client: hears of peers, and is rung by them.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{Timespec, epoll};

use super::client::ClientConfig;
use super::dialogue::{Dialogue, Event, ProtocolError};
use super::message::Receiver;
use crate::ivshmem::MAX_PEERS;
use crate::ivshmem::bellhop::Bellhop;
use crate::ivshmem::bells::Bell;
use crate::ivshmem::eventfd;
use crate::ivshmem::port::Port;
use crate::virtio::rate::TokenBucket;

/// Tags of what is waited for; vectors are their own.
const SOCKET: u64 = u64::MAX;
const KICK: u64 = u64::MAX - 1;
const CONTROL: u64 = u64::MAX - 2;

/// Messages that are heard before others have their turn.
const AT_ONCE: usize = 64;

/// How long the thread's end is waited for at most. What it does then cannot be seen by a guest any more.
const LAST: Duration = Duration::from_secs(1);

/// How the thread is ended.
struct Stop {
    stopped: AtomicBool,
    kick: OwnedFd,
}

/// See the module.
pub(super) struct Listener {
    socket: UnixStream,
    receiver: Receiver,
    dialogue: Dialogue,
    config: ClientConfig,
    port: Weak<Port>,
    bellhop: Option<Arc<Bellhop>>,
    /// Socket and kick.
    control: OwnedFd,
    /// Those and the client's own bells.
    everything: OwnedFd,
    own: Vec<Arc<OwnedFd>>,
    stop: Arc<Stop>,
    bucket: Option<TokenBucket>,
    begun: Instant,
}

/// Why the thread ends.
enum Ending {
    Stopped,
    Revoked,
    Lost,
}

impl Listener {
    pub(super) fn new(
        socket: UnixStream,
        receiver: Receiver,
        dialogue: Dialogue,
        config: ClientConfig,
        port: &Arc<Port>,
    ) -> io::Result<Self> {
        // Its peers, and itself.
        let lanes = config.max_peers.min(MAX_PEERS).saturating_add(1);
        let bellhop = if config.rings_directly { None } else { Some(Arc::new(Bellhop::start(lanes)?)) };
        let stop = Arc::new(Stop { stopped: AtomicBool::new(false), kick: eventfd::create()? });
        let control = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let everything = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let input = epoll::EventFlags::IN | epoll::EventFlags::RDHUP;
        epoll::add(&control, &socket, epoll::EventData::new_u64(SOCKET), input)?;
        epoll::add(&control, &stop.kick, epoll::EventData::new_u64(KICK), input)?;
        epoll::add(&everything, &control, epoll::EventData::new_u64(CONTROL), input)?;
        let bucket = config.interrupt_rate.map(|rate| TokenBucket::new(rate, 0));
        let (port, begun) = (Arc::downgrade(port), Instant::now());
        Ok(Self {
            socket,
            receiver,
            dialogue,
            config,
            port,
            bellhop,
            control,
            everything,
            own: Vec::new(),
            stop,
            bucket,
            begun,
        })
    }

    /// Starts the thread, which ends when `port` is closed; that it does nothing any more is waited for.
    pub(super) fn start(self, port: &Arc<Port>) -> io::Result<()> {
        let stop = Arc::clone(&self.stop);
        let (ends, ended) = mpsc::channel::<()>();
        let thread = thread::Builder::new().name("ivshmem".to_owned()).spawn(move || self.run(ends))?;
        port.on_leave(Box::new(move || {
            stop.stopped.store(true, Ordering::SeqCst);
            eventfd::signal(&stop.kick);
            // It may be this one: then it ends by itself.
            if thread.thread().id() != thread::current().id() {
                // Nothing is sent: it is over when the other end is dropped.
                let (Ok(()) | Err(_)) = ended.recv_timeout(LAST);
            }
        }));
        Ok(())
    }

    fn run(mut self, ends: mpsc::Sender<()>) {
        self.listen();
        // What the dialogue and the receiver keep comes last: the server may let nobody close it.
        let Self { socket, dialogue, receiver, .. } = self;
        drop(socket);
        drop(ends);
        drop((dialogue, receiver));
    }

    fn listen(&mut self) {
        let ending = loop {
            match self.turn() {
                Ok(None) => {}
                Ok(Some(ending)) => break ending,
                Err(_) => break Ending::Lost,
            }
        };
        let closes = match ending {
            Ending::Stopped => false,
            Ending::Revoked => true,
            Ending::Lost => !self.config.outlives_server,
        };
        if closes {
            // The connection ends with it: whoever sees its end knows that the memory is out of the guest's reach.
            if let Some(port) = self.port.upgrade() {
                port.close();
            }
            return;
        }
        // Peers can be rung, and ring, without the server.
        if matches!(ending, Ending::Lost) && epoll::delete(&self.control, &self.socket).is_ok() {
            while let Ok(None) = self.turn() {}
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.begun.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Waits for something and does it.
    fn turn(&mut self) -> Result<Option<Ending>, ProtocolError> {
        let mut found = Vec::with_capacity(16);
        wait(&self.everything, None, &mut found)?;
        for tag in found {
            if tag == CONTROL {
                if let Some(ending) = self.attend(None)? {
                    return Ok(Some(ending));
                }
            } else if let Some(ending) = self.rung(tag)? {
                return Ok(Some(ending));
            }
        }
        Ok(None)
    }

    /// A peer has rung for a vector.
    fn rung(&mut self, tag: u64) -> Result<Option<Ending>, ProtocolError> {
        let now = self.now();
        if let Some(until) = self.bucket.as_mut().and_then(|bucket| bucket.take(now, 1)) {
            // Until then, just what is not a ring. The ring itself is as it was.
            let deadline = self.begun + Duration::from_nanos(until);
            while let left = deadline.saturating_duration_since(Instant::now())
                && !left.is_zero()
            {
                if let Some(ending) = self.attend(Some(left))? {
                    return Ok(Some(ending));
                }
            }
        }
        let place = usize::try_from(tag).unwrap_or(usize::MAX);
        let (Some(fd), Ok(vector), Some(port)) =
            (self.own.get(place), u16::try_from(tag), self.port.upgrade())
        else {
            return Ok(None);
        };
        let none = |_| ProtocolError::NoEventfd { peer: port.position(), vector };
        if eventfd::take(fd).map_err(none)? {
            port.receive(vector);
        }
        Ok(None)
    }

    /// What comes from the server, and whether to stop, waiting at most so long for the first of it.
    fn attend(&mut self, timeout: Option<Duration>) -> Result<Option<Ending>, ProtocolError> {
        let mut found = Vec::with_capacity(2);
        wait(&self.control, Some(timeout.unwrap_or_default()), &mut found)?;
        if self.stop.stopped.load(Ordering::SeqCst) {
            return Ok(Some(Ending::Stopped));
        }
        if !found.contains(&SOCKET) {
            return Ok(None);
        }
        for _ in 0..AT_ONCE {
            let Some(message) = self.receiver.receive(&self.socket)? else { break };
            let event = self.dialogue.hear(message)?;
            let Some(port) = self.port.upgrade() else { return Ok(Some(Ending::Stopped)) };
            match event {
                Event::Bell(peer, fd) => port.add_bell(peer, self.bell(peer, Arc::new(fd))),
                Event::Gone(peer) => {
                    port.remove_peer(peer);
                    if let Some(bellhop) = &self.bellhop {
                        bellhop.forget(peer);
                    }
                }
                Event::Own(vector, fd) => self.own_bell(&port, vector, fd)?,
                Event::Revoked => return Ok(Some(Ending::Revoked)),
                Event::Beyond => port.metrics.beyond_limits.one(),
                Event::Version | Event::Position(_) | Event::Memory(_) => {}
            }
        }
        Ok(None)
    }

    fn bell(&self, peer: u16, fd: Arc<OwnedFd>) -> Bell {
        match &self.bellhop {
            Some(bellhop) => Bell::Carried(peer, fd, Arc::clone(bellhop)),
            None => Bell::Outside(fd),
        }
    }

    /// Vectors come in order, so this one is the next.
    fn own_bell(&mut self, port: &Port, vector: u16, fd: OwnedFd) -> Result<(), ProtocolError> {
        let socket = |error: rustix::io::Errno| ProtocolError::Socket(error.into());
        epoll::add(&self.everything, &fd, epoll::EventData::new_u64(vector.into()), epoll::EventFlags::IN)
            .map_err(socket)?;
        let fd = Arc::new(fd);
        self.own.push(Arc::clone(&fd));
        // A guest may ring itself.
        port.add_bell(port.position(), self.bell(port.position(), fd));
        Ok(())
    }
}

fn wait(set: &OwnedFd, timeout: Option<Duration>, found: &mut Vec<u64>) -> Result<(), ProtocolError> {
    let timeout = timeout.map(|time| Timespec {
        tv_sec: i64::try_from(time.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: time.subsec_nanos().into(),
    });
    let mut events = [const { std::mem::MaybeUninit::uninit() }; 16];
    match epoll::wait(set, &mut events, timeout.as_ref()) {
        Ok((events, _)) => found.extend(events.iter().map(|event| event.data.u64())),
        Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(ProtocolError::Socket(error.into())),
    }
    Ok(())
}
