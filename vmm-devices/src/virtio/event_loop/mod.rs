//! Executors with threads of their own: [`EventLoop`] serves any number of devices on one, [`ThreadPerQueue`] each worker on
//! another.
//!
//! # Threat model
//! A guest chooses when doorbells ring, and resets its devices at any moment. Rings are counted once until the worker is called,
//! so a storm of them costs whoever rings, and neither memory nor, but for one call at a time, the loop. Workers take turns: one
//! that always has more to do delays another by one call of its own. What a worker does in a call is bounded by the worker.

mod bell;
mod poller;
mod shared;
mod slot;
mod threads;

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use self::poller::Found;
use self::shared::{LoopRunning, Shared};
use self::slot::{Outcome, Slot};
pub use self::threads::ThreadPerQueue;
use super::device::{DriverLink, Progress, Worker};
use super::doorbell::Doorbells;
use super::executor::{Executor, Running};
use crate::clock::Clock;

/// One loop on epoll that serves the queues of any number of devices, each by [`EventLoop::executor`].
///
/// It runs on a thread of its own:
///
/// ```
/// use std::sync::{Arc, Mutex};
/// use std::time::Instant;
/// use vmm_devices::interrupt::Unconnected;
/// use vmm_devices::virtio::{EventLoop, Rng, VirtioMmio};
/// use vmm_devices::vmm_memory::vm_memory::GuestAddress;
/// use vmm_devices::vmm_memory::{GuestRam, RegionConfig};
/// use vmm_devices::{BusRange, MmioBus};
///
/// let memory = GuestRam::builder().region(RegionConfig::new(GuestAddress(0), 1 << 20)).build()?.address_space();
/// let begin = Instant::now();
/// let clock = move || u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
///
/// let event_loop = EventLoop::new(clock)?.spawn("virtio")?; // ends when it is dropped
/// let source = std::fs::File::open("/dev/urandom")?;
/// let rng = VirtioMmio::builder(Rng::new(source), memory, Unconnected).executor(event_loop.executor()).build()?;
/// let bus = MmioBus::new();
/// bus.insert("rng", BusRange::new(0xd000_0000, VirtioMmio::<Memory>::SIZE), Arc::new(Mutex::new(rng)))?;
/// # type Memory = vmm_devices::vmm_memory::vm_memory::GuestMemoryAtomic<vmm_devices::vmm_memory::GuestMemoryMap>;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// or within any loop that a monitor has already: that one polls the descriptor of [`EventLoop::as_fd`] for input, and calls
/// [`EventLoop::run_once`] with no time to wait whenever there is some. To pin or confine its thread, spawn that yourself:
///
/// ```
/// # use vmm_devices::virtio::EventLoop;
/// # let mut event_loop = EventLoop::new(|| 0)?;
/// # let done = std::sync::atomic::AtomicBool::new(true);
/// std::thread::scope(|scope| {
///     scope.spawn(|| {
///         // Affinity and seccomp filter come here.
///         while !done.load(std::sync::atomic::Ordering::SeqCst) {
///             event_loop.run_once(None)?; // LoopExecutor::wake ends its wait
///         }
///         Ok::<(), std::io::Error>(())
///     });
/// });
/// # Ok::<(), std::io::Error>(())
/// ```
///
/// * **Stop.** A device is started and reset by any thread; the reset waits for a call of its workers that is under way, and for no
///   other. A worker must not stop its own device: it cannot wait for itself. That is noticed; the transport's `on_failure`
///   hears of it, and the worker is left out, to be stopped and dropped when its call ends.
/// * **Panics.** A worker that panics has failed as one that returns an error has: its device needs a reset, and others go on. Where
///   panics abort, they abort.
/// * **Time.** Deadlines are those of the clock that the loop was made with, which is the devices' as well. The loop sleeps by the
///   host's and looks again: at a clock that stands still after 1 ms, and ever less often down to 10 times a second.
///   [`LoopExecutor::wake`] tells of a clock that was set.
/// * **Cost.** A wake-up is a `write` of who rings and an `epoll_wait`; rings that come before the call are free. System calls:
///   `epoll_pwait`, `epoll_ctl`, `eventfd2`, `timerfd_create`, `timerfd_settime`, `write`, `fcntl`, `close`, `futex`.
pub struct EventLoop {
    shared: Arc<Shared>,
    found: Found,
    rung: Vec<u64>,
    /// Who is to be called, in this order.
    ready: VecDeque<Arc<Slot>>,
    alarm: Alarm,
}

/// What the timer was set for.
#[derive(Default)]
struct Alarm {
    deadline: Option<u64>,
    /// What the clock showed, and how often it showed the same when the timer had expired.
    seen: u64,
    stood_still: u32,
}

impl fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventLoop").field("ready", &self.ready.len()).finish_non_exhaustive()
    }
}

impl EventLoop {
    /// A loop with nothing to do. `clock` is that of the devices, by which workers have deadlines.
    ///
    /// # Errors
    /// If the host has no more descriptors; it takes three.
    pub fn new(clock: impl Clock + 'static) -> io::Result<Self> {
        Self::with_clock(Arc::new(clock))
    }

    fn with_clock(clock: Arc<dyn Clock>) -> io::Result<Self> {
        Ok(Self {
            shared: Shared::new(clock)?,
            found: Found::default(),
            rung: Vec::new(),
            ready: VecDeque::new(),
            alarm: Alarm::default(),
        })
    }

    /// What transports are given. All are the same.
    pub fn executor(&self) -> Arc<LoopExecutor> {
        Arc::new(LoopExecutor(Arc::clone(&self.shared)))
    }

    /// Waits until something happens, `timeout` at most, and calls each worker that has something to do once. How many
    /// calls that was: none if the time was over, a signal came, or [`LoopExecutor::wake`] was called.
    ///
    /// If a worker has more to do, the next call does not wait, and the descriptor to poll for says so.
    ///
    /// # Errors
    /// If the host's epoll fails, which a seccomp filter may do to it.
    pub fn run_once(&mut self, timeout: Option<Duration>) -> io::Result<usize> {
        let calls = self.turn(timeout)?;
        if !self.ready.is_empty() {
            self.shared.inbox.kick();
        }
        Ok(calls)
    }

    /// Runs it on a thread named `name`, of which Linux shows 15 bytes.
    ///
    /// # Errors
    /// If the host has no more threads, or the name contains a byte of 0.
    pub fn spawn(self, name: &str) -> io::Result<LoopThread> {
        let shared = Arc::clone(&self.shared);
        let thread = spawn(name, move || self.serve())?;
        Ok(LoopThread { shared, thread: Some(thread) })
    }

    /// Until it is closed.
    fn serve(mut self) {
        while !self.shared.closed.load(Ordering::SeqCst) {
            if let Err(error) = self.turn(None) {
                self.shared.fail(&error);
                return;
            }
        }
    }

    fn turn(&mut self, timeout: Option<Duration>) -> io::Result<usize> {
        let timeout = if self.ready.is_empty() { timeout } else { Some(Duration::ZERO) };
        self.shared.poller.wait(timeout, &mut self.found)?;
        self.shared.inbox.take(&mut self.rung);
        if self.shared.inbox.take_clock_moved() {
            self.alarm = Alarm::default();
        } else if self.found.timer {
            self.alarm.deadline = None;
        }
        let now = self.shared.clock.now_ns();
        self.shared.collect(self.found.tags.drain(..).chain(self.rung.drain(..)), now, &mut self.ready);
        // Those who have more to do come behind those who come meanwhile.
        let calls = self.ready.len();
        for _ in 0..calls {
            let Some(slot) = self.ready.pop_front() else { break };
            slot.queued.store(false, Ordering::Relaxed);
            self.call(slot);
        }
        self.set_alarm()?;
        Ok(calls)
    }

    fn call(&mut self, slot: Arc<Slot>) {
        match slot.call() {
            Outcome::Served(progress, deadline) => {
                self.shared.set_deadline(&slot, deadline);
                if progress == Progress::More && !slot.queued.swap(true, Ordering::Relaxed) {
                    self.ready.push_back(slot);
                }
            }
            Outcome::Over => self.shared.remove(&slot),
        }
    }

    /// Sets the timer for the earliest deadline, unless it is.
    fn set_alarm(&mut self) -> io::Result<()> {
        let earliest = self.shared.earliest();
        let alarm = &mut self.alarm;
        if earliest == alarm.deadline {
            return Ok(());
        }
        let expired_early = alarm.deadline.is_none();
        alarm.deadline = earliest;
        let Some(deadline) = earliest else { return self.shared.poller.set_timer(None) };
        let now = self.shared.clock.now_ns();
        alarm.stood_still = if expired_early && now == alarm.seen { alarm.stood_still + 1 } else { 0 };
        alarm.seen = now;
        self.shared.poller.set_timer(Some(nap(deadline.saturating_sub(now), alarm.stood_still)))
    }
}

const MILLISECOND: u64 = 1_000_000;

/// An hour. A clock that runs faster than the host's is looked at so often at least.
const MAX_NAP: u64 = 3_600_000_000_000;

/// How long to sleep, in nanoseconds, for a deadline that is `left` away on a clock that stood still so many times.
fn nap(left: u64, stood_still: u32) -> u64 {
    let at_least = stood_still.checked_sub(1).map_or(0, |times| MILLISECOND << times.min(7));
    left.max(at_least).min(MAX_NAP)
}

impl Drop for EventLoop {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// Becomes readable when [`EventLoop::run_once`] has something to do.
impl AsFd for EventLoop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.poller.as_fd()
    }
}

/// An [`EventLoop`] on a thread of its own. The thread ends when this is dropped, and devices that still run are served no
/// more; their resets find their workers nevertheless.
pub struct LoopThread {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for LoopThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoopThread").field("thread", &self.thread).finish_non_exhaustive()
    }
}

impl LoopThread {
    /// What transports are given. All are the same.
    pub fn executor(&self) -> Arc<LoopExecutor> {
        Arc::new(LoopExecutor(Arc::clone(&self.shared)))
    }
}

impl Drop for LoopThread {
    fn drop(&mut self) {
        self.shared.close();
        join(self.thread.take());
    }
}

/// The [`Executor`] of an [`EventLoop`].
pub struct LoopExecutor(Arc<Shared>);

impl fmt::Debug for LoopExecutor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoopExecutor").finish_non_exhaustive()
    }
}

impl LoopExecutor {
    /// Ends the loop's wait, and makes it look at its clock: for a clock that was set, or a machine that goes on after a pause.
    pub fn wake(&self) {
        self.0.inbox.clock_moved();
    }
}

impl Executor for LoopExecutor {
    /// # Errors
    /// Also if the loop is there no more, or a worker's source is something that cannot be polled, as a regular file.
    fn start(
        &self,
        link: Arc<dyn DriverLink>,
        doorbells: &Arc<Doorbells>,
        workers: Vec<Box<dyn Worker>>,
    ) -> io::Result<Box<dyn Running>> {
        let mut running = LoopRunning::new(Arc::clone(&self.0));
        for worker in workers {
            running.add(Arc::clone(&link), doorbells, worker)?;
        }
        running.insert()?;
        shared::connect(doorbells, running.bells());
        running.ring();
        Ok(Box::new(running))
    }

    fn notifiers(&self, queues: usize) -> io::Result<Vec<Arc<OwnedFd>>> {
        shared::notifiers(queues)
    }
}

fn spawn(name: &str, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    if name.contains('\0') {
        let why = format!("thread name {name:?} contains a byte of 0");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
    }
    thread::Builder::new().name(name.to_owned()).spawn(run)
}

/// Waits for the end of a thread, unless it is this one.
fn join(thread: Option<JoinHandle<()>>) {
    if let Some(thread) = thread.filter(|thread| thread.thread().id() != thread::current().id()) {
        // One that panicked has said so.
        let (Ok(()) | Err(_)) = thread.join();
    }
}

#[cfg(test)]
mod tests;
