//! The emitter's side.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::ring::{Class, Ring};
use super::shape::{RingError, RingOptions};
use crate::event::{EventBytes, Party};
use crate::log::monotonic_clock;
use crate::pipeline::{Cells, Emitter, Full, Refused, Transport, Wait, full_for};

/// How often a collector is looked for that is not there.
const RETRY: Duration = Duration::from_millis(100);

/// Why an emitter cannot be attached.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The collector cannot be reached.
    #[error("collector at {path}: {source}")]
    Connect {
        /// Its socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// There is no ring.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// The system gives no thread.
    #[error("no thread: {0}")]
    Thread(io::Error),
}

/// Hands the ring to the collector, with the name under which the emitter wants to be known.
fn hand_over(path: &Path, ring: &Ring, who: &str) -> io::Result<UnixStream> {
    let stream = UnixStream::connect(path)?;
    let fds = [ring.fd()];
    let fds = fds.each_ref().map(|fd| fd.as_fd());
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let sent = sendmsg(&stream, &[IoSlice::new(who.as_bytes())], &mut control, SendFlags::NOSIGNAL)?;
    if sent == who.len() { Ok(stream) } else { Err(io::ErrorKind::WriteZero.into()) }
}

struct Shared {
    ring: Arc<Ring>,
    full_since: AtomicU64,
    /// How far the reserved ring was given back when it was last looked at, and when that was.
    progress: Mutex<(u64, u64)>,
}

impl Transport for Shared {
    fn push(&self, critical: bool, _: u64, event: EventBytes, wait: bool) -> Result<Option<Wait>, Full> {
        if !self.ring.fits(&event) || self.ring.state() == 2 {
            return Err(Full);
        }
        let class = if critical { Class::Critical } else { Class::Bulk };
        let number = self.ring.push(class, &event, &|| ()).ok_or(Full)?;
        let ring = Arc::clone(&self.ring);
        let done = move || match ring.given_back(class).wrapping_sub(number) {
            ahead if ahead > 0 && ahead < 1 << 63 => Some(Ok(())),
            _ if ring.state() == 2 => Some(Err("the collector's log is closed".to_owned())),
            _ => None,
        };
        Ok(wait.then(|| Wait::Polled(Box::new(done))))
    }

    fn refuses(&self, deadline: Duration) -> Option<Refused> {
        if self.ring.state() == 2 {
            return Some(Refused::Closed("the collector's log is closed".to_owned()));
        }
        let now = monotonic_clock();
        let given_back = self.ring.given_back(Class::Critical);
        let mut progress = self.progress.lock().unwrap_or_else(PoisonError::into_inner);
        if progress.0 != given_back || !self.ring.is_waiting(Class::Critical) {
            *progress = (given_back, now);
        }
        let stalled = Duration::from_nanos(now.saturating_sub(progress.1));
        (stalled >= deadline).then_some(Refused::Stalled(stalled))
    }

    fn was_full(&self, full: bool) -> Duration {
        full_for(&self.full_since, full)
    }
}

/// A connection to a collector. When it is dropped, the collector says that the emitter is gone.
#[derive(Debug)]
pub struct Attached {
    emitter: Emitter,
    ring: Arc<Ring>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Attached {
    /// Emits into the collector's log. Its clones are the same source.
    pub fn emitter(&self) -> &Emitter {
        &self.emitter
    }

    /// Whether a collector has the ring now.
    pub fn is_collected(&self) -> bool {
        self.ring.state() == 1
    }
}

#[cfg(test)]
impl Attached {
    /// What a hostile emitter does.
    pub(super) fn scribble(&self) {
        self.ring.push(Class::Critical, b"this is no event", &|| ());
        self.ring.push(Class::Critical, &[0xff; 100], &|| ());
        self.ring.scribble();
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that keeps the collector panicked");
        }
    }
}

/// Connects to the collector at `path`, as `who`; `deadline` is that of [`PipelineOptions`](crate::pipeline::PipelineOptions). If the collector ends
/// later, the next one at that path is connected to.
///
/// # Errors
/// If there is no collector, or the system refuses memory or a thread.
pub fn attach(
    path: impl Into<PathBuf>,
    who: &Party,
    options: RingOptions,
    deadline: Duration,
) -> Result<Attached, AttachError> {
    connect(path.into(), who, options, deadline, true)
}

/// The same, with no other collector if that one ends: nothing is admitted from then on. For a process that gives up connecting before it
/// runs a guest.
///
/// # Errors
/// Likewise.
pub fn attach_once(
    path: impl Into<PathBuf>,
    who: &Party,
    options: RingOptions,
    deadline: Duration,
) -> Result<Attached, AttachError> {
    connect(path.into(), who, options, deadline, false)
}

fn connect(
    path: PathBuf,
    who: &Party,
    options: RingOptions,
    deadline: Duration,
    again: bool,
) -> Result<Attached, AttachError> {
    let ring = Arc::new(Ring::create(options)?);
    let who = who.to_string();
    let connected = hand_over(&path, &ring, &who);
    let stream = connected.map_err(|source| AttachError::Connect { path: path.clone(), source })?;
    let shared = Shared {
        ring: Arc::clone(&ring),
        full_since: AtomicU64::new(0),
        progress: Mutex::new((0, monotonic_clock())),
    };
    let emitter = Emitter::new(Arc::new(shared), Arc::clone(&ring) as Arc<dyn Cells>, 0, deadline);
    let stop = Arc::new(AtomicBool::new(false));
    let (ended, kept) = (Arc::clone(&stop), Arc::clone(&ring));
    let keep = move || {
        let mut stream = Some(stream);
        while let Some(open) = stream {
            if !is_gone(&open, &ended) {
                return;
            }
            // Without another one, the log is as good as closed.
            kept.set_state(if again { 0 } else { 2 });
            stream = again.then(|| reconnect(&path, &kept, &who, &ended)).flatten();
        }
    };
    let thread = std::thread::Builder::new().name("vmm-audit-attach".to_owned()).spawn(keep);
    Ok(Attached { emitter, ring, stop, thread: Some(thread.map_err(AttachError::Thread)?) })
}

/// Waits for the collector to go, or for this side's end; whether it was the collector.
fn is_gone(stream: &UnixStream, stop: &AtomicBool) -> bool {
    while !stop.load(Ordering::Acquire) {
        let timeout = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
        match poll(&mut [PollFd::new(stream, PollFlags::IN)], Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            // The collector never sends anything: this is its end.
            Ok(_) | Err(_) => return true,
        }
    }
    false
}

/// Looks for the next collector, until this side ends.
fn reconnect(path: &Path, ring: &Ring, who: &str, stop: &AtomicBool) -> Option<UnixStream> {
    while !stop.load(Ordering::Acquire) {
        if let Ok(stream) = hand_over(path, ring, who) {
            return Some(stream);
        }
        std::thread::sleep(RETRY);
    }
    None
}
