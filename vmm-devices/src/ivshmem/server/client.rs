//! The client, for a device whose peers are in other processes.

use std::fmt;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_memory::{Access, MemoryError, PeerMemory};

use super::dialogue::{Dialogue, Event, ProtocolError};
use super::listener::Listener;
use super::message::Receiver;
use crate::channel::{DoorbellRing, Grant, RegionMap};
use crate::ivshmem::error::IvshmemError;
use crate::ivshmem::region::{Member, Region};
use crate::ivshmem::{MAX_PEERS, MAX_VECTORS};
use crate::virtio::rate::Rate;

/// What a client expects of its server, and what it does not.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct ClientConfig {
    /// Vectors of the device, 1 to [`MAX_VECTORS`]; those that the server does not connect stay unconnected.
    pub vectors: u16,
    /// Peers that it takes, up to [`MAX_PEERS`]; it does not see others. Each is a descriptor for each vector, and a thread that rings
    /// it, if the client does not ring [directly](Self::rings_directly).
    pub max_peers: usize,
    /// How long it waits for each of the server's first messages.
    pub patience: Duration,
    /// Takes memory whose size is not sealed: [`PeerMemory::from_unsealed_fd`] says what that risks.
    pub unsealed: bool,
    /// Goes on when the server is gone without a word, as QEMU does. If not, the device is closed then: nobody could take its
    /// right back.
    pub outlives_server: bool,
    /// Rings on the thread of the vCPU. A peer that makes its eventfd a blocking one and fills it makes the vCPU wait; if not,
    /// there are threads for that, one for each peer that there may be and for the device itself, which start when it
    /// [joins](Client::join) and sleep but for rings; each costs its wake-up.
    pub rings_directly: bool,
    /// How often the guest is interrupted at most. What is beyond waits and is one.
    pub interrupt_rate: Option<Rate>,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self {
            vectors: 1,
            max_peers: 32,
            patience: Duration::from_secs(5),
            unsealed: false,
            outlives_server: false,
            rings_directly: false,
            interrupt_rate: None,
        }
    }
}

impl ClientConfig {
    /// So many vectors.
    #[must_use]
    pub fn vectors(self, vectors: u16) -> Self {
        Self { vectors, ..self }
    }

    /// So many peers.
    #[must_use]
    pub fn max_peers(self, max_peers: usize) -> Self {
        Self { max_peers, ..self }
    }

    /// Waits so long for each of the first messages.
    #[must_use]
    pub fn patience(self, patience: Duration) -> Self {
        Self { patience, ..self }
    }

    /// Whether memory is taken whose size is not sealed.
    #[must_use]
    pub fn unsealed(self, unsealed: bool) -> Self {
        Self { unsealed, ..self }
    }

    /// Whether it goes on without its server.
    #[must_use]
    pub fn outlives_server(self, outlives_server: bool) -> Self {
        Self { outlives_server, ..self }
    }

    /// Whether it rings on the thread of the vCPU.
    #[must_use]
    pub fn rings_directly(self, rings_directly: bool) -> Self {
        Self { rings_directly, ..self }
    }

    /// How often the guest is interrupted at most.
    #[must_use]
    pub fn interrupt_rate(self, interrupt_rate: Option<Rate>) -> Self {
        Self { interrupt_rate, ..self }
    }
}

/// A connection to a server that has said where the memory is.
pub struct Client {
    region: Region,
    position: u16,
    config: ClientConfig,
    socket: UnixStream,
    receiver: Receiver,
    dialogue: Dialogue,
}

impl Client {
    /// Connects to the server at `path`, whose memory goes by the name `region` here.
    ///
    /// # Errors
    /// [`IvshmemError::Vectors`], [`IvshmemError::Host`] if there is no server, [`IvshmemError::Protocol`] if it does not keep to the
    /// protocol, and [`IvshmemError::Memory`] or [`IvshmemError::Size`] if its memory cannot be taken.
    pub fn connect(
        path: &Path,
        region: impl Into<Arc<str>>,
        config: ClientConfig,
    ) -> Result<Self, IvshmemError> {
        let socket = UnixStream::connect(path).map_err(IvshmemError::host("connecting to the server"))?;
        Self::over(socket, region, config)
    }

    /// The same over a socket that is connected.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub fn over(
        socket: UnixStream,
        region: impl Into<Arc<str>>,
        config: ClientConfig,
    ) -> Result<Self, IvshmemError> {
        let region: Arc<str> = region.into();
        let vectors = config.vectors;
        if !(1..=MAX_VECTORS).contains(&vectors) {
            return Err(IvshmemError::Vectors { vectors, max: MAX_VECTORS });
        }
        let mut dialogue = Dialogue::new(vectors, config.max_peers.min(MAX_PEERS));
        let mut receiver = Receiver::new();
        let (position, memory) = match greet(&socket, &mut receiver, &mut dialogue, config.patience) {
            Ok(greeted) => greeted,
            Err(source) => {
                // And what waits in the socket unread.
                retire((receiver, dialogue, socket));
                return Err(IvshmemError::Protocol { region, source });
            }
        };
        let memory = if config.unsealed {
            PeerMemory::from_unsealed_fd(memory)?
        } else if let Err(error) = rustix::fs::fcntl_get_seals(&memory) {
            // Whose file it is, is not asked before it is known to be the kernel's.
            retire((memory, receiver, socket));
            return Err(MemoryError::NotMemfd { source: error.into() }.into());
        } else {
            PeerMemory::from_fd(memory)?
        };
        Ok(Self { region: Region::of_peer(region, memory)?, position, config, socket, receiver, dialogue })
    }

    /// What peers will call the device.
    pub fn position(&self) -> u16 {
        self.position
    }

    /// Size of the memory in bytes.
    pub fn size(&self) -> u64 {
        self.region.size()
    }

    /// The most that the server lets it be mapped for.
    pub fn access(&self) -> Access {
        self.region.access()
    }

    /// Takes the seat, with a thread of its own that listens to server and peers. Without `ring` the guest rings for nobody. Peers
    /// may still come, at any time.
    ///
    /// # Errors
    /// As [`Region::attach`], and [`IvshmemError::Host`] if the host refuses threads or descriptors.
    pub fn join(
        self,
        map: Grant<RegionMap>,
        ring: Option<Grant<DoorbellRing>>,
    ) -> Result<Member, IvshmemError> {
        let Self { region, position, config, socket, receiver, dialogue } = self;
        let member = region.seat((position, config.vectors), map, ring)?;
        let listener = Listener::new(socket, receiver, dialogue, config, &member.port)
            .map_err(IvshmemError::host("listening to the server"))?;
        listener.start(&member.port).map_err(IvshmemError::host("a thread that listens to the server"))?;
        Ok(member)
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client")
            .field("region", &self.region)
            .field("position", &self.position)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

/// Closes what is refused of a server on a thread of its own: it may be a file that the server lets nobody close.
fn retire(refused: impl Send + 'static) {
    // If the host has no thread, then here.
    let retired = thread::Builder::new().name("ivshmem-refused".to_owned()).spawn(move || drop(refused));
    let (Ok(_) | Err(_)) = retired;
}

/// The messages that come first.
fn greet(
    socket: &UnixStream,
    receiver: &mut Receiver,
    dialogue: &mut Dialogue,
    patience: Duration,
) -> Result<(u16, OwnedFd), ProtocolError> {
    let mut position = 0;
    let mut begun = Instant::now();
    loop {
        let Some(message) = receiver.receive(socket)? else {
            let left = patience.saturating_sub(begun.elapsed());
            if left.is_zero() {
                let milliseconds = patience.as_millis();
                return Err(ProtocolError::Silent { what: dialogue.expects(), milliseconds });
            }
            let timeout = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            match poll(&mut [PollFd::from_borrowed_fd(socket.as_fd(), PollFlags::IN)], Some(&timeout)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(ProtocolError::Socket(error.into())),
            }
        };
        match dialogue.hear(message)? {
            Event::Position(found) => position = found,
            Event::Memory(memory) => return Ok((position, memory)),
            _ => {}
        }
        begun = Instant::now();
    }
}
