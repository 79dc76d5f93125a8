//! One worker in a loop's care.

use std::any::Any;
use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::bell::{Bell, Inbox};
use crate::interrupt::lock;
use crate::virtio::{Doorbells, DriverLink, Progress, Worker};

/// Slots of all loops have numbers of their own, and never one twice: what comes late for one that is gone finds none.
static NEXT: AtomicU64 = AtomicU64::new(1);

thread_local! {
    /// The slot whose worker this thread is calling.
    static CALLING: Cell<u64> = const { Cell::new(0) };
}

pub(super) struct Slot {
    pub(super) id: u64,
    pub(super) bell: Arc<Bell>,
    /// What is in the epoll set for it: descriptors of its own, so that nothing depends on what the worker does with those that
    /// it has, and two workers may wait for the same thing.
    pub(super) watched: Mutex<Vec<OwnedFd>>,
    pub(super) queues: Vec<u16>,
    link: Arc<dyn DriverLink>,
    worker: Mutex<Option<Box<dyn Worker>>>,
    /// It was stopped: no call begins any more, though one that waits for its turn again and again may be quicker than who stops it.
    over: AtomicBool,
    /// The worker was stopped in a call of its own, at whose end it goes.
    orphaned: AtomicBool,
    /// It waits for its turn. The loop's own.
    pub(super) queued: AtomicBool,
}

/// What a call came to.
pub(super) enum Outcome {
    /// Whether there is more to do, and when the worker wants to be called in any case.
    Served(Progress, Option<u64>),
    /// There will be no other.
    Over,
}

impl Slot {
    pub(super) fn new(
        inbox: &Arc<Inbox>,
        link: Arc<dyn DriverLink>,
        doorbells: &Doorbells,
        worker: Box<dyn Worker>,
    ) -> io::Result<Arc<Self>> {
        let id = NEXT.fetch_add(1, Ordering::Relaxed);
        let sources = worker.sources();
        let mut watched =
            sources.iter().map(rustix::fd::BorrowedFd::try_clone_to_owned).collect::<io::Result<Vec<_>>>()?;
        let queues = worker.queues();
        for queue in &queues {
            if let Some(notifier) = doorbells.notifier(*queue) {
                watched.push(notifier.try_clone()?);
            }
        }
        drop(sources);
        Ok(Arc::new(Self {
            id,
            bell: Bell::new(Arc::clone(inbox), id),
            watched: Mutex::new(watched),
            queues,
            link,
            worker: Mutex::new(Some(worker)),
            over: AtomicBool::new(false),
            orphaned: AtomicBool::new(false),
            queued: AtomicBool::new(false),
        }))
    }

    /// Calls the worker, unless it is over with it. One that fails, by an error or a panic, has been called for the last time.
    pub(super) fn call(&self) -> Outcome {
        if self.over.load(Ordering::SeqCst) {
            return Outcome::Over;
        }
        let mut place = lock(&self.worker);
        let Some(worker) = place.as_mut() else { return Outcome::Over };
        let outcome = within(self.id, || {
            self.bell.answer();
            let result = catch_unwind(AssertUnwindSafe(|| {
                worker.process().map(|progress| Outcome::Served(progress, worker.deadline()))
            }));
            match result {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(error)) => self.give_up(&error),
                Err(panic) => self.give_up(&WorkerPanicked::new(&*panic)),
            }
        });
        if self.orphaned.load(Ordering::SeqCst) {
            rest(place.take());
            return Outcome::Over;
        }
        outcome
    }

    /// Under the worker's lock, so that the link hears nothing of it after a stop, when it may be another driver's.
    fn give_up(&self, why: &dyn std::error::Error) -> Outcome {
        // The monitor hears of it as well, in a callback of its own, which is no reason to end the loop either.
        let (Ok(()) | Err(_)) = catch_unwind(AssertUnwindSafe(|| self.link.needs_reset(why)));
        Outcome::Over
    }

    /// The loop itself has failed.
    pub(super) fn abandon(&self, why: &dyn std::error::Error) {
        let place = lock(&self.worker);
        if place.is_some() {
            self.give_up(why);
        }
    }

    /// Takes the worker away as soon as no call is under way. None begins from now on.
    ///
    /// A call of its own cannot be waited for. The worker then stays, and is stopped where that call ends.
    pub(super) fn take(&self) -> Option<Box<dyn Worker>> {
        self.over.store(true, Ordering::SeqCst);
        self.bell.silence();
        if CALLING.get() == self.id {
            self.orphaned.store(true, Ordering::SeqCst);
            self.link.needs_reset(&StoppedFromWithin);
            return None;
        }
        lock(&self.worker).take()
    }
}

/// Brings workers to rest.
pub(super) fn rest(workers: impl IntoIterator<Item = Box<dyn Worker>>) -> Vec<Box<dyn Worker>> {
    let mut workers = Vec::from_iter(workers);
    for worker in &mut workers {
        // One that panicked before may do so again; the others must come to rest all the same.
        let (Ok(()) | Err(_)) = catch_unwind(AssertUnwindSafe(|| worker.stop()));
    }
    workers
}

/// Runs `call`, which is the worker's of that slot.
fn within<T>(slot: u64, call: impl FnOnce() -> T) -> T {
    let before = CALLING.replace(slot);
    let result = call();
    CALLING.set(before);
    result
}

/// A mistake in the program of a device.
#[derive(Debug, thiserror::Error)]
#[error("its worker panicked: {message}")]
struct WorkerPanicked {
    message: String,
}

impl WorkerPanicked {
    fn new(panic: &(dyn Any + Send)) -> Self {
        let text = panic.downcast_ref::<&str>().copied();
        let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
        Self { message: text.unwrap_or("without a message").to_owned() }
    }
}

/// A mistake in the program of a monitor, or a device.
#[derive(Debug, thiserror::Error)]
#[error("it was stopped by its own worker, which must leave that to another thread")]
struct StoppedFromWithin;
