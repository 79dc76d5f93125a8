//! The server.

use std::fmt;
use std::io;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{Timespec, epoll};
use vmm_memory::Access;

use super::roster::{Peer, Roster, narrow, watch};
use crate::channel::{DoorbellRing, Gatekeeper, Grant, Party, RegionMap};
use crate::closer::{self, Closer};
use crate::interrupt::lock;
use crate::ivshmem::error::IvshmemError;
use crate::ivshmem::eventfd;
use crate::ivshmem::region::Region;
use crate::ivshmem::{MAX_PEERS, MAX_VECTORS};

const LISTENER: u64 = u64::MAX;
const KICK: u64 = u64::MAX - 1;

/// Clients that are taken before others have their turn.
const AT_ONCE: usize = 16;

/// Threads that close connections.
const CLOSERS: usize = 8;

/// How long nobody is taken after the host has refused to.
const REST: Duration = Duration::from_millis(50);

/// After how long the host is asked again to take messages that it has refused.
const AGAIN: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// Whose process is at the other end, as the kernel says (`SO_PEERCRED`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Credentials {
    /// Its number when it connected; another process may have that by now.
    pub pid: i32,
    /// Its user.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// A client that is connected.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PeerInfo {
    /// Its position.
    pub position: u16,
    /// Who it is, to the gate.
    pub party: Party,
    /// What it has the memory for.
    pub access: Access,
    /// Whether it may ring.
    pub rings: bool,
    /// Messages that it has not taken yet, beyond those that the kernel keeps for it.
    pub behind: usize,
}

type Identify = Box<dyn Fn(&Credentials) -> Party + Send + Sync>;
type Wanted = Box<dyn Fn(&Party) -> Access + Send + Sync>;

/// Brings clients together at a [`Region`]. It works on a thread of its own until it is dropped, and others close the connections. All are
/// there from the beginning: a process that then confines itself needs to make none.
///
/// Each client is put to the gate: first whether it may have the memory, else it is disconnected; then whether it may ring, else it is
/// told of no peer, and others may ring it. When a right to the memory is taken back, the client is told and disconnected; it
/// depends on the client what that makes of mappings that it has.
pub struct Server {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    path: Option<PathBuf>,
}

struct Shared {
    region: Region,
    vectors: u16,
    max_peers: usize,
    gatekeeper: Gatekeeper,
    identify: Identify,
    wanted: Wanted,
    roster: Mutex<Roster>,
    set: OwnedFd,
    kick: Arc<OwnedFd>,
    closer: Closer,
    ended: AtomicBool,
}

/// What a client gets.
struct Seat {
    position: u16,
    party: Party,
    bells: Vec<Arc<OwnedFd>>,
    map: Grant<RegionMap>,
    ring: Option<Grant<DoorbellRing>>,
    memory: OwnedFd,
}

impl Server {
    /// A server of `region` with so many vectors for each client, 1 to [`MAX_VECTORS`]. The gatekeeper's gate decides who gets what.
    pub fn builder(region: Region, vectors: u16, gatekeeper: Gatekeeper) -> ServerBuilder {
        ServerBuilder {
            region,
            vectors,
            gatekeeper,
            max_peers: 32,
            identify: Box::new(|who| Party::Host(format!("uid {} pid {}", who.uid, who.pid).into())),
            wanted: None,
        }
    }

    /// Takes a client that is connected by other means.
    ///
    /// # Errors
    /// [`IvshmemError::Revoked`] if the gate refuses, [`IvshmemError::Full`], [`IvshmemError::Closing`], and [`IvshmemError::Host`].
    pub fn admit(&self, socket: UnixStream) -> Result<u16, IvshmemError> {
        Shared::admit(&self.shared, socket)
    }

    /// Who is connected, by position.
    pub fn peers(&self) -> Vec<PeerInfo> {
        let roster = lock(&self.shared.roster);
        let info = |(position, peer): (&u16, &Peer)| PeerInfo {
            position: *position,
            party: peer.party.clone(),
            access: peer.map.channel().access,
            rings: peer.ring.is_some(),
            behind: peer.behind(),
        };
        roster.peers.iter().map(info).collect()
    }

    /// Tells a client that it is gone, and disconnects it. Whether there was one.
    pub fn disconnect(&self, position: u16) -> bool {
        self.shared.dismiss(position)
    }

    /// The memory.
    pub fn region(&self) -> &Region {
        &self.shared.region
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        eventfd::signal(&self.shared.kick);
        if let Some(thread) = self.thread.take() {
            // A panic of it has been told by then.
            let (Ok(()) | Err(_)) = thread.join();
        }
        let peers = std::mem::take(&mut lock(&self.shared.roster).peers);
        self.shared.part(peers);
        if let Some(path) = &self.path {
            // Somebody else may have removed it.
            let (Ok(()) | Err(_)) = std::fs::remove_file(path);
        }
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server")
            .field("region", &self.shared.region)
            .field("peers", &self.peers())
            .finish_non_exhaustive()
    }
}

impl Shared {
    /// What whoever is at the other end gets.
    fn seat(&self, socket: &UnixStream) -> Result<Seat, IvshmemError> {
        let region = self.region.name();
        let failed = |error: rustix::io::Errno| IvshmemError::Host {
            operation: "taking a client",
            source: error.into(),
        };
        let ucred = rustix::net::sockopt::socket_peercred(socket).map_err(failed)?;
        let who = Credentials {
            pid: ucred.pid.as_raw_nonzero().get(),
            uid: ucred.uid.as_raw(),
            gid: ucred.gid.as_raw(),
        };
        narrow(socket).map_err(failed)?;
        if self.closer.is_full() {
            let (region, left) = (Arc::clone(region), self.closer.left());
            return Err(IvshmemError::Closing { region, left, max: closer::MOST });
        }
        if lock(&self.roster).peers.len() >= self.max_peers {
            return Err(IvshmemError::Full { region: Arc::clone(region), max: self.max_peers });
        }
        let party = (self.identify)(&who);
        let refused = |_| IvshmemError::Revoked { region: Arc::clone(region) };
        let access = (self.wanted)(&party);
        let map = RegionMap { region: Arc::clone(region), access };
        let map = self.gatekeeper.open(party.clone(), None, map).map_err(refused)?;
        let ring = DoorbellRing { region: Arc::clone(region) };
        let ring = self.gatekeeper.open(party.clone(), None, ring).ok();
        let memory = self.region.descriptor(access)?;
        let bells =
            (0..self.vectors).map(|_| eventfd::create().map(Arc::new)).collect::<io::Result<Vec<_>>>();
        let bells = bells.map_err(IvshmemError::host("making eventfds for a client"))?;

        let position = lock(&self.roster).free_position();
        let position =
            position.ok_or(IvshmemError::Full { region: Arc::clone(region), max: self.max_peers })?;
        Ok(Seat { position, party, bells, map, ring, memory })
    }

    fn admit(this: &Arc<Self>, socket: UnixStream) -> Result<u16, IvshmemError> {
        let region = this.region.name();
        let Seat { position, party, bells, map, ring, memory } = match this.seat(&socket) {
            Ok(seat) => seat,
            Err(error) => {
                this.hang_up(socket);
                return Err(error);
            }
        };
        let weak = Arc::downgrade(this);
        map.on_revoked(move || {
            if let Some(shared) = weak.upgrade() {
                shared.dismiss(position);
            }
        });
        if let Some(ring) = &ring {
            let weak = Arc::downgrade(this);
            ring.on_revoked(move || {
                if let Some(shared) = weak.upgrade() {
                    shared.silence(position);
                }
            });
        }
        let (may_map, may_ring) = (map.watch(), ring.as_ref().map(Grant::watch));
        let peer = Peer::new((socket, party), bells, map, ring);
        let mut roster = lock(&this.roster);
        // Another thread may have been quicker.
        if roster.peers.len() >= this.max_peers || roster.peers.contains_key(&position) {
            drop(roster);
            this.part([(position, peer)]);
            return Err(IvshmemError::Full { region: Arc::clone(region), max: this.max_peers });
        }
        let mut lost = roster.join(position, peer, memory);
        // Now, so that nothing of it is told before it is there. What is the case already is told at once.
        let watched = roster.peers.get(&position).map(|peer| watch(&this.set, &peer.socket, position));
        if let Some(Err(_)) = watched {
            lost.append(&mut roster.remove(position));
        }
        this.let_go(roster);
        this.part(lost);
        // Revoked when nobody found it yet.
        if may_ring.is_some_and(|right| !right.is_live()) {
            this.silence(position);
        }
        if !may_map.is_live() {
            this.dismiss(position);
            return Err(IvshmemError::Revoked { region: Arc::clone(region) });
        }
        Ok(position)
    }

    fn dismiss(&self, position: u16) -> bool {
        // Their grants are dropped, of which the gate hears, with nothing locked.
        let mut roster = lock(&self.roster);
        let removed = roster.dismiss(position);
        self.let_go(roster);
        let was_there = removed.iter().any(|(whose, _)| *whose == position);
        self.part(removed);
        was_there
    }

    fn silence(&self, position: u16) {
        let mut roster = lock(&self.roster);
        let (right, removed) = roster.silence(position);
        self.let_go(roster);
        drop(right);
        self.part(removed);
    }

    /// With nothing locked.
    fn part(&self, removed: impl IntoIterator<Item = (u16, Peer)>) {
        for (_, peer) in removed {
            self.hang_up(peer.socket);
        }
    }

    /// Ends a connection. In it may be what the client has sent, which is never read: descriptors that may take long to close.
    fn hang_up(&self, socket: UnixStream) {
        // It may never have been in there.
        let (Ok(()) | Err(_)) = epoll::delete(&self.set, &socket);
        // The client sees that now, unless it has hung up itself.
        let (Ok(()) | Err(_)) = socket.shutdown(Shutdown::Both);
        self.closer.close(socket);
    }

    /// Whatever thread has had something sent: if the host has refused it, the server's own thread tries again.
    fn let_go(&self, roster: MutexGuard<'_, Roster>) {
        if roster.is_refused() {
            eventfd::signal(&self.kick);
        }
    }

    fn run(self: &Arc<Self>, listener: Option<&UnixListener>) {
        let mut events = [const { MaybeUninit::uninit() }; 64];
        let mut listens = true;
        while !self.ended.load(Ordering::SeqCst) {
            let mut roster = lock(&self.roster);
            let removed = if roster.is_refused() { roster.flush_all() } else { Vec::new() };
            let again = roster.is_refused().then_some(&AGAIN);
            drop(roster);
            self.part(removed);
            // Nobody else is let in while more is to be closed than can be.
            if let Some(listener) = listener
                && listens == self.closer.is_full()
            {
                listens = !listens;
                let flags = if listens { epoll::EventFlags::IN } else { epoll::EventFlags::empty() };
                let tag = epoll::EventData::new_u64(LISTENER);
                // The set is its own, and the listener in it.
                if epoll::modify(&self.set, listener, tag, flags).is_err() {
                    return;
                }
            }
            let tags: Vec<(u64, epoll::EventFlags)> = match epoll::wait(&self.set, &mut events, again) {
                Ok((events, _)) => events.iter().map(|event| (event.data.u64(), event.flags)).collect(),
                Err(rustix::io::Errno::INTR) => continue,
                // The set is its own, so that does not happen.
                Err(_) => return,
            };
            for (tag, flags) in tags {
                match (u16::try_from(tag), listener) {
                    (Ok(position), _) => self.look_at(position, flags),
                    (Err(_), Some(listener)) if tag == LISTENER => self.accept(listener),
                    // The end, or something to be tried again; the beginning of the loop sees to both.
                    _ => {
                        let (Ok(_) | Err(_)) = eventfd::take(&self.kick);
                    }
                }
            }
        }
    }

    fn look_at(&self, position: u16, flags: epoll::EventFlags) {
        let mut roster = lock(&self.roster);
        // Clients have nothing to say.
        let speaks = epoll::EventFlags::IN
            | epoll::EventFlags::RDHUP
            | epoll::EventFlags::HUP
            | epoll::EventFlags::ERR;
        let removed = if flags.intersects(speaks) { roster.remove(position) } else { roster.flush(position) };
        drop(roster);
        self.part(removed);
    }

    fn accept(self: &Arc<Self>, listener: &UnixListener) {
        for _ in 0..AT_ONCE {
            if self.closer.is_full() {
                return;
            }
            match listener.accept() {
                // Whoever is refused learns that by the end of the connection.
                Ok((socket, _)) => {
                    let (Ok(_) | Err(_)) = Self::admit(self, socket);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    // No descriptors, perhaps: it would be told of the same client again at once.
                    thread::sleep(REST);
                    return;
                }
            }
        }
    }
}

/// See [`Server::builder`].
pub struct ServerBuilder {
    region: Region,
    vectors: u16,
    gatekeeper: Gatekeeper,
    max_peers: usize,
    identify: Identify,
    wanted: Option<Wanted>,
}

impl ServerBuilder {
    /// So many clients at once, up to [`MAX_PEERS`]; 32 unless said here. Each that does not read keeps up to 8 descriptors on their
    /// way, of which a user without privileges has as many as RLIMIT_NOFILE. Beyond that no client hears of new ones until others read.
    #[must_use]
    pub fn max_peers(mut self, max_peers: usize) -> Self {
        self.max_peers = max_peers.min(MAX_PEERS);
        self
    }

    /// Who a client is, to the gate; by its user and process number unless said here.
    #[must_use]
    pub fn identify(mut self, identify: impl Fn(&Credentials) -> Party + Send + Sync + 'static) -> Self {
        self.identify = Box::new(identify);
        self
    }

    /// What a client is to have the memory for, which the gate is then asked; all that there is unless said here.
    #[must_use]
    pub fn access(mut self, wanted: impl Fn(&Party) -> Access + Send + Sync + 'static) -> Self {
        self.wanted = Some(Box::new(wanted));
        self
    }

    /// Listens at `path`, where nothing is yet. The socket is removed when the server is dropped.
    ///
    /// # Errors
    /// [`IvshmemError::Vectors`], and [`IvshmemError::Host`].
    pub fn bind(self, path: &Path) -> Result<Server, IvshmemError> {
        let listener = UnixListener::bind(path).map_err(IvshmemError::host("listening"))?;
        let mut server = self.start(Some(listener))?;
        server.path = Some(path.to_owned());
        Ok(server)
    }

    /// Listens at a socket that is there.
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub fn listen(self, listener: UnixListener) -> Result<Server, IvshmemError> {
        self.start(Some(listener))
    }

    /// Listens nowhere: clients come by [`Server::admit`].
    ///
    /// # Errors
    /// As [`bind`](Self::bind).
    pub fn unbound(self) -> Result<Server, IvshmemError> {
        self.start(None)
    }

    fn start(self, listener: Option<UnixListener>) -> Result<Server, IvshmemError> {
        let Self { region, vectors, gatekeeper, max_peers, identify, wanted } = self;
        if !(1..=MAX_VECTORS).contains(&vectors) {
            return Err(IvshmemError::Vectors { vectors, max: MAX_VECTORS });
        }
        let most = region.access();
        let kick = eventfd::create().map_err(IvshmemError::host("eventfd2"))?;
        let kick = Arc::new(kick);
        let closer = Closer::new("ivshmem-close", CLOSERS, Some(&kick))
            .map_err(IvshmemError::host("threads that close connections"))?;
        let shared = Arc::new(Shared {
            region,
            vectors,
            max_peers,
            gatekeeper,
            identify,
            wanted: wanted.unwrap_or_else(|| Box::new(move |_| most)),
            roster: Mutex::new(Roster::new(max_peers, vectors)),
            set: epoll::create(epoll::CreateFlags::CLOEXEC)
                .map_err(io::Error::from)
                .map_err(IvshmemError::host("epoll_create1"))?,
            kick,
            closer,
            ended: AtomicBool::new(false),
        });
        let add = |fd: BorrowedFd<'_>, tag| {
            epoll::add(&shared.set, fd, epoll::EventData::new_u64(tag), epoll::EventFlags::IN)
                .map_err(io::Error::from)
                .map_err(IvshmemError::host("epoll_ctl"))
        };
        add(shared.kick.as_fd(), KICK)?;
        if let Some(listener) = &listener {
            listener
                .set_nonblocking(true)
                .map_err(IvshmemError::host("making the listener one that does not wait"))?;
            add(listener.as_fd(), LISTENER)?;
        }
        let theirs = Arc::clone(&shared);
        let thread = thread::Builder::new()
            .name("ivshmem-server".to_owned())
            .spawn(move || {
                theirs.run(listener.as_ref());
                if let Some(listener) = listener {
                    theirs.closer.close_listener(listener);
                }
            })
            .map_err(IvshmemError::host("a thread for the server"))?;
        Ok(Server { shared, thread: Some(thread), path: None })
    }
}

impl fmt::Debug for ServerBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerBuilder")
            .field("region", &self.region)
            .field("vectors", &self.vectors)
            .field("max_peers", &self.max_peers)
            .finish_non_exhaustive()
    }
}
