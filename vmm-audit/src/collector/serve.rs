//! The collector's side.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::ring::{Class, Ring, Slot};
use super::shape::RingError;
use crate::event::{Event, Kind, Party, Text};
use crate::log::{LogError, LogWriter};
use crate::pipeline::{Cells as _, coalesced_events};

/// What goes wrong with a collector.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CollectorError {
    /// Its socket.
    #[error("socket {path}: {source}")]
    Socket {
        /// Where it is.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Its log.
    #[error(transparent)]
    Log(#[from] LogError),
}

/// How a collector works.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CollectorOptions {
    /// Emitters at a time at most. 256 if nothing is said.
    pub emitters: usize,
    /// Events that are taken of one ring at a time. 4096 if nothing is said.
    pub batch: u64,
    /// After how long without another event one says that the log is alive. A minute if nothing is said.
    pub heartbeat: Duration,
}

impl Default for CollectorOptions {
    fn default() -> Self {
        Self { emitters: 256, batch: 4096, heartbeat: Duration::from_secs(60) }
    }
}

/// What the collector is about to do, or has just done: for tests that end it there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Step {
    /// A ring was attached.
    Attached,
    /// Events were appended and not committed.
    Appended,
    /// They are on the disk, and the ring does not know.
    Committed,
    /// Half of the slots have been given back.
    GivenBack,
    /// An emitter is gone.
    Gone,
}

/// How often the ring of an emitter that is gone is emptied.
const ROUNDS: u32 = 64;

struct Client {
    stream: UnixStream,
    ring: Ring,
    source: u32,
    /// The next slot of each ring to be taken.
    next: [u64; 2],
    written: Vec<(u64, u64)>,
    written_total: u64,
    bad: u64,
    gone: bool,
    /// Times that its ring was emptied since it is gone.
    rounds: u32,
}

/// Takes events out of shared rings and writes them to a log.
pub struct Collector {
    listener: UnixListener,
    path: PathBuf,
    log: LogWriter,
    options: CollectorOptions,
    clients: Vec<Client>,
    next_source: u32,
    last_event: Instant,
    step: Box<dyn Fn(Step) + Send>,
}

impl Collector {
    /// Listens at `path` for emitters, whose events go to `log`. A socket that an earlier collector has left there is replaced. Only
    /// the owner of this process may connect.
    ///
    /// # Errors
    /// If the socket cannot be made.
    pub fn bind(
        path: impl Into<PathBuf>,
        log: LogWriter,
        options: CollectorOptions,
    ) -> Result<Self, CollectorError> {
        let path = path.into();
        let error = |source| CollectorError::Socket { path: path.clone(), source };
        // The log's lock says that the one which made it is no more.
        match std::fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(error(e)),
            _ => {}
        }
        let listener = UnixListener::bind(&path).map_err(error)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).map_err(error)?;
        listener.set_nonblocking(true).map_err(error)?;
        Ok(Self {
            listener,
            log,
            options,
            clients: Vec::new(),
            next_source: 1,
            last_event: Instant::now(),
            step: Box::new(|_| ()),
            path,
        })
    }

    /// Has `step` called at each step.
    #[must_use]
    pub fn on_step(mut self, step: impl Fn(Step) + Send + 'static) -> Self {
        self.step = Box::new(step);
        self
    }

    /// Collects until `stop` is set, and closes the log. A full disk is tried again as long as it takes; the emitters' rings fill
    /// then, with what that means for them.
    ///
    /// # Errors
    /// If the log fails; emitters are told.
    pub fn run(mut self, stop: &AtomicBool) -> Result<(), CollectorError> {
        let interval = self.options.heartbeat.as_millis().to_string();
        let beat = Event::new(Kind::Heartbeat).attribute("interval-ms", interval);
        let result = self.work(stop, &beat);
        if result.is_err() {
            self.clients.iter().for_each(|client| client.ring.set_state(2));
            return result;
        }
        self.clients.iter().for_each(|client| client.ring.set_state(0));
        let path = self.path;
        self.log.close()?;
        std::fs::remove_file(&path).map_err(|source| CollectorError::Socket { path, source })
    }

    fn work(&mut self, stop: &AtomicBool, beat: &Event) -> Result<(), CollectorError> {
        self.log.append_own(beat)?;
        loop {
            let stopping = stop.load(Ordering::Acquire);
            self.accept()?;
            let taken = self.round()?;
            if self.last_event.elapsed() >= self.options.heartbeat {
                self.log.append_own(beat)?;
                self.commit()?;
            }
            if taken == 0 {
                self.wait();
                // Of those who are gone, the log says so first.
                if stopping && !self.clients.iter().any(|client| client.gone) {
                    return Ok(());
                }
            }
        }
    }

    /// Waits until an emitter comes or goes, or it is time to look into the rings again.
    fn wait(&mut self) {
        let timeout = Timespec { tv_sec: 0, tv_nsec: 2_000_000 };
        let mut fds: Vec<PollFd<'_>> = vec![PollFd::new(&self.listener, PollFlags::IN)];
        fds.extend(self.clients.iter().map(|client| PollFd::new(&client.stream, PollFlags::IN)));
        let Ok(count) = poll(&mut fds, Some(&timeout)) else { return };
        if count == 0 {
            return;
        }
        // Emitters never send anything more: this is their end.
        let gone: Vec<bool> = fds.iter().skip(1).map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        for (client, gone) in self.clients.iter_mut().zip(gone) {
            client.gone |= gone;
        }
    }

    /// Lets in those who have connected, up to the first who is turned away: whoever connects without end does not keep the
    /// collector from the rings.
    fn accept(&mut self) -> Result<(), CollectorError> {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.clients.len() >= self.options.emitters {
                return self.turn_away("too many emitters: one was turned away");
            }
            match receive(&stream) {
                Ok((ring, who)) => self.attached(stream, ring, &who)?,
                Err(why) => return self.turn_away(format!("an emitter was turned away: {why}")),
            }
        }
        Ok(())
    }

    fn turn_away(&mut self, why: impl Into<Text>) -> Result<(), CollectorError> {
        self.log.append_own(&Event::new(Kind::Malformed).reason(why))?;
        Ok(self.commit()?)
    }

    fn attached(&mut self, stream: UnixStream, ring: Ring, who: &str) -> Result<(), CollectorError> {
        let source = self.next_source;
        self.next_source += 1;
        let mut next = [0; 2];
        for (class, next) in Class::BOTH.into_iter().zip(&mut next) {
            // What an earlier collector has written and not given back is not taken again.
            let given_back = ring.given_back(class);
            *next = self.log.ring(ring.ring_id(class)).unwrap_or(given_back);
            ring.give_back(class, given_back, *next);
        }
        let credentials = rustix::net::sockopt::socket_peercred(&stream);
        let mut event = Event::new(Kind::EmitterAttached).attribute("source", source.to_string());
        event.subject = who.parse::<Party>().ok();
        event.boot = crate::log::boot_id();
        if let Ok(credentials) = credentials {
            event = event
                .attribute("pid", credentials.pid.as_raw_nonzero().to_string())
                .attribute("uid", credentials.uid.as_raw().to_string());
        }
        event = event.attribute("ring", format!("{:016x}", ring.id()));
        self.log.append_own(&event)?;
        ring.set_state(1);
        let client = Client {
            stream,
            ring,
            source,
            next,
            written: Vec::new(),
            written_total: 0,
            bad: 0,
            gone: false,
            rounds: 0,
        };
        self.clients.push(client);
        self.commit()?;
        (self.step)(Step::Attached);
        Ok(())
    }

    /// Takes what is in the rings, has it on the disk, and gives the slots back.
    fn round(&mut self) -> Result<u64, CollectorError> {
        let mut taken = 0;
        for client in &mut self.clients {
            client.rounds += u32::from(client.gone);
            for class in Class::BOTH {
                taken += take(client, class, self.options.batch, &mut self.log)?;
            }
            let total = client.ring.total();
            if total != client.written_total {
                client.written_total = total;
                for event in coalesced_events(&client.ring, client.source, &mut client.written) {
                    self.log.append_own(&event)?;
                    taken += 1;
                }
            }
        }
        let gone = self.clients.iter().any(|client| client.gone);
        if taken == 0 && !gone {
            return Ok(0);
        }
        (self.step)(Step::Appended);
        self.commit()?;
        (self.step)(Step::Committed);
        for client in &mut self.clients {
            for (class, next) in Class::BOTH.into_iter().zip(client.next) {
                let from = client.ring.given_back(class);
                let half = from.wrapping_add(next.wrapping_sub(from) / 2);
                client.ring.give_back(class, from, half);
                (self.step)(Step::GivenBack);
                client.ring.give_back(class, half, next);
            }
        }
        self.depart()?;
        Ok(taken)
    }

    /// Says which emitters are gone, once their rings are empty.
    fn depart(&mut self) -> Result<(), CollectorError> {
        let (gone, stay): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.clients).into_iter().partition(|client| {
                let mut rings = Class::BOTH.into_iter().zip(client.next);
                let empty = rings.all(|(class, next)| !client.ring.is_claimed(class, next));
                // Someone else may have the memory too, and fill it for ever.
                client.gone && (empty || client.rounds > ROUNDS)
            });
        self.clients = stay;
        for client in gone {
            let event = Event::new(Kind::EmitterGone)
                .attribute("source", client.source.to_string())
                .attribute("torn", client.bad.to_string())
                .attribute("issued", client.ring.issued().to_string())
                .amount(client.ring.total(), 0);
            self.log.append_own(&event)?;
            self.commit()?;
            Class::BOTH.into_iter().for_each(|class| self.log.forget_ring(client.ring.ring_id(class)));
            (self.step)(Step::Gone);
        }
        Ok(())
    }

    fn commit(&mut self) -> Result<(), LogError> {
        loop {
            match self.log.commit() {
                Err(error) if error.is_transient() => {
                    tracing::error!(error = %error, "the audit log does not get any further");
                    std::thread::sleep(Duration::from_millis(50));
                }
                Err(error) => return Err(error),
                Ok(_) => {
                    self.last_event = Instant::now();
                    return Ok(());
                }
            }
        }
    }
}

/// Appends what is in one ring.
fn take(client: &mut Client, class: Class, batch: u64, log: &mut LogWriter) -> Result<u64, LogError> {
    let Some(next) = client.next.get_mut(class.place()) else { return Ok(0) };
    let begun = *next;
    for _ in 0..batch.min(client.ring.capacity(class)) {
        let event = match client.ring.read(class, *next) {
            Slot::Filled(event) => event,
            Slot::Bad(length) => {
                client.bad += 1;
                let why = format!("slot {next} of source {} says that it has {length} bytes", client.source);
                log.append_own(&Event::new(Kind::Malformed).reason(why))?;
                *next = next.wrapping_add(1);
                continue;
            }
            // Someone took the slot and died before it was filled.
            Slot::Empty if client.gone && client.ring.is_claimed(class, *next) => {
                client.bad += 1;
                *next = next.wrapping_add(1);
                continue;
            }
            Slot::Empty => break,
        };
        match Event::decode(&event) {
            Ok(_) => {
                log.append(client.source, &event)?;
            }
            Err(why) => {
                client.bad += 1;
                let text = format!("slot {next} of source {} is no event: {why}", client.source);
                let digest = crate::Digest::of(&event);
                log.append_own(&Event::new(Kind::Malformed).reason(text).request(digest))?;
            }
        }
        *next = next.wrapping_add(1);
    }
    if *next != begun {
        log.set_ring(client.ring.ring_id(class), *next);
    }
    Ok(next.wrapping_sub(begun))
}

/// Takes the ring and the name from one who has connected.
fn receive(stream: &UnixStream) -> Result<(Ring, String), String> {
    stream.set_read_timeout(Some(Duration::from_millis(200))).map_err(|e| e.to_string())?;
    let mut name = [0; Text::MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(stream, &mut [IoSliceMut::new(&mut name)], &mut control, RecvFlags::CMSG_CLOEXEC)
        .map_err(|e| format!("it has sent nothing: {e}"))?;
    let mut fds: Vec<OwnedFd> = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            fds.extend(received);
        }
    }
    let fd = fds.pop().ok_or("it has sent no memory")?;
    let ring = Ring::from_fd(fd).map_err(|e: RingError| e.to_string())?;
    let name = name.get(..received.bytes).unwrap_or_default();
    Ok((ring, String::from_utf8_lossy(name).into_owned()))
}
