//! Which thread serves queues, and when.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, TryLockError, Weak};

use super::device::{DriverLink, Progress, Worker};
use super::doorbell::Doorbells;
use crate::interrupt::lock;

/// Serves the queues of devices. A transport hands it the workers when a driver starts its device, and takes them back when
/// the driver resets it.
///
/// | executor | for whom |
/// |---|---|
/// | [`Inline`] | machines of one thread, deterministic ones, and tests. No sources, no deadlines, no in-kernel doorbells |
/// | `EventLoop` | most machines: one thread serves all devices, or the monitor's own loop does |
/// | `ThreadPerQueue` | queues that keep a processor busy each, and threads that are pinned or confined one by one |
///
/// The last two come with the feature `event-loop`. Each device of a machine may have another one.
pub trait Executor: Send + Sync {
    /// Connects `doorbells`, and from now on calls each of `workers` when one of its queues' rings, or when what else it
    /// waits for comes; again at once while it says [`Progress::More`], in turn with others. A worker that fails is not
    /// called again, and `link` hears that the device needs a reset.
    ///
    /// # Errors
    /// If the host refuses what that takes. No worker was called.
    fn start(
        &self,
        link: Arc<dyn DriverLink>,
        doorbells: &Arc<Doorbells>,
        workers: Vec<Box<dyn Worker>>,
    ) -> std::io::Result<Box<dyn Running>>;

    /// Eventfds by which a device with that many queues can be rung, one for each, for kernels that ring without an exit to
    /// the monitor (KVM's ioeventfd). A transport asks once, and gives them to all
    /// [`Doorbells`] that it makes, which is where [`Executor::start`] finds them. Empty if this executor polls none.
    ///
    /// # Errors
    /// If the host has no more descriptors.
    fn notifiers(&self, queues: usize) -> std::io::Result<Vec<Arc<OwnedFd>>> {
        let _ = queues;
        Ok(Vec::new())
    }
}

/// Workers that an [`Executor`] has started.
pub trait Running: Send {
    /// Ends that: waits for calls that are under way, lets each worker come to rest, and gives all back. Not called by
    /// a worker.
    fn stop(self: Box<Self>) -> Vec<Box<dyn Worker>>;
}

/// Serves a queue at its doorbell, on the thread that rings, which is a vCPU's as a rule. The guest waits meanwhile: for
/// machines of one thread, for deterministic ones, and for tests.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inline;

/// How often a worker that has more to do is called at one doorbell. What is then left waits for the next one, or for
/// another of its device.
const ROUNDS: u32 = 256;

/// The workers of one device.
struct Served {
    link: Arc<dyn DriverLink>,
    workers: Mutex<Vec<Slot>>,
    /// A doorbell rang since they were last looked at.
    rung: AtomicBool,
}

struct Slot {
    worker: Box<dyn Worker>,
    failed: bool,
}

impl Executor for Inline {
    fn start(
        &self,
        link: Arc<dyn DriverLink>,
        doorbells: &Arc<Doorbells>,
        workers: Vec<Box<dyn Worker>>,
    ) -> std::io::Result<Box<dyn Running>> {
        let slots = workers.into_iter().map(|worker| Slot { worker, failed: false });
        let served =
            Arc::new(Served { link, workers: Mutex::new(slots.collect()), rung: AtomicBool::new(false) });
        // The device's own doorbells hold no worker, which hold them.
        let weak = Arc::downgrade(&served);
        doorbells.connect(move |_| {
            if let Some(served) = Weak::upgrade(&weak) {
                served.serve();
            }
        });
        Ok(Box::new(InlineRunning(served)))
    }
}

impl Served {
    /// Calls the workers, unless somebody does, who then goes on. A worker that rings while it is called is such a case.
    fn serve(&self) {
        self.rung.store(true, Ordering::SeqCst);
        let mut left = ROUNDS;
        while self.rung.load(Ordering::SeqCst) && left > 0 {
            let mut workers = match self.workers.try_lock() {
                Ok(workers) => workers,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            self.rung.store(false, Ordering::SeqCst);
            left -= 1;
            for slot in workers.iter_mut().filter(|slot| !slot.failed) {
                match slot.worker.process() {
                    Ok(Progress::Idle) => {}
                    Ok(Progress::More) => self.rung.store(true, Ordering::SeqCst),
                    Err(error) => {
                        slot.failed = true;
                        self.link.needs_reset(&error);
                    }
                }
            }
        }
    }
}

struct InlineRunning(Arc<Served>);

impl fmt::Debug for InlineRunning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InlineRunning").finish_non_exhaustive()
    }
}

impl Running for InlineRunning {
    fn stop(self: Box<Self>) -> Vec<Box<dyn Worker>> {
        let slots = std::mem::take(&mut *lock(&self.0.workers));
        let mut workers: Vec<_> = slots.into_iter().map(|slot| slot.worker).collect();
        workers.iter_mut().for_each(|worker| worker.stop());
        workers
    }
}
