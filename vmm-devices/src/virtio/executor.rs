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

    /// Ends it for a while: waits for calls that are under way, and gives all workers back as they are, to be
    /// [started](Executor::start) again or stopped. Not called by a worker.
    fn pause(self: Box<Self>) -> Vec<Box<dyn Worker>>;
}

/// Serves a queue at its doorbell, on the thread that rings, which is a vCPU's as a rule. The guest waits meanwhile: for
/// machines of one thread, for deterministic ones, and for tests.
///
/// Nothing calls a worker at its [`deadline`](Worker::deadline): a request that a rate limit holds up waits for the next doorbell.
#[derive(Clone, Copy, Debug, Default)]
pub struct Inline;

/// How often a worker that has more to do is called at one doorbell: once for each request of the largest queue. Only a driver
/// that adds chains all the while, from another vCPU, gets there; what is then left waits for the next doorbell, and the driver
/// rings for whatever it adds next.
const ROUNDS: u32 = 1 << 15;

/// A worker, and who calls it.
struct Served {
    link: Arc<dyn DriverLink>,
    queues: Vec<u16>,
    worker: Mutex<Slot>,
    /// A doorbell rang since it was last called.
    rung: AtomicBool,
}

struct Slot {
    /// `None` when it has been stopped.
    worker: Option<Box<dyn Worker>>,
    failed: bool,
}

impl Executor for Inline {
    fn start(
        &self,
        link: Arc<dyn DriverLink>,
        doorbells: &Arc<Doorbells>,
        workers: Vec<Box<dyn Worker>>,
    ) -> std::io::Result<Box<dyn Running>> {
        let served = workers.into_iter().map(|worker| Served {
            link: Arc::clone(&link),
            queues: worker.queues(),
            worker: Mutex::new(Slot { worker: Some(worker), failed: false }),
            rung: AtomicBool::new(false),
        });
        let served: Arc<[Served]> = served.collect();
        // The device's own doorbells hold no worker, which hold them.
        let weak = Arc::downgrade(&served);
        doorbells.connect(move |queue| {
            if let Some(served) = Weak::upgrade(&weak) {
                served.iter().filter(|served| served.queues.contains(&queue)).for_each(Served::serve);
            }
        });
        Ok(Box::new(InlineRunning(served)))
    }
}

impl Served {
    /// Calls the worker, unless somebody does, who then goes on. A worker that rings while it is called is such a case.
    fn serve(&self) {
        self.rung.store(true, Ordering::SeqCst);
        let mut left = ROUNDS;
        while self.rung.load(Ordering::SeqCst) && left > 0 {
            let mut slot = match self.worker.try_lock() {
                Ok(slot) => slot,
                Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            self.rung.store(false, Ordering::SeqCst);
            left -= 1;
            let Slot { worker: Some(worker), failed: false } = &mut *slot else { return };
            match worker.process() {
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

struct InlineRunning(Arc<[Served]>);

impl fmt::Debug for InlineRunning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InlineRunning").finish_non_exhaustive()
    }
}

impl Running for InlineRunning {
    fn stop(self: Box<Self>) -> Vec<Box<dyn Worker>> {
        let mut workers = self.pause();
        workers.iter_mut().for_each(|worker| worker.stop());
        workers
    }

    fn pause(self: Box<Self>) -> Vec<Box<dyn Worker>> {
        self.0.iter().filter_map(|served| lock(&served.worker).worker.take()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::LinkRecorder;
    use crate::virtio::QueueError;

    /// Says which of its queues it serves, and rings the other worker's as well as its own, once.
    struct Ringer {
        queue: u16,
        doorbells: Weak<Doorbells>,
        calls: Arc<Mutex<Vec<u16>>>,
        rings: Vec<u16>,
        /// Calls after which it is idle.
        busy: u32,
    }

    impl Worker for Ringer {
        fn queues(&self) -> Vec<u16> {
            vec![self.queue]
        }

        fn process(&mut self) -> Result<Progress, QueueError> {
            lock(&self.calls).push(self.queue);
            if let Some(doorbells) = self.doorbells.upgrade() {
                self.rings.drain(..).for_each(|queue| doorbells.ring(queue));
            }
            self.busy = self.busy.saturating_sub(1);
            Ok(if self.busy > 0 { Progress::More } else { Progress::Idle })
        }
    }

    #[test]
    fn a_doorbell_calls_the_worker_of_its_queue() {
        let (doorbells, calls) = (Arc::new(Doorbells::new(3)), Arc::<Mutex<Vec<u16>>>::default());
        let worker = |queue, rings: &[u16], busy| -> Box<dyn Worker> {
            let (doorbells, calls, rings) = (Arc::downgrade(&doorbells), Arc::clone(&calls), rings.to_vec());
            Box::new(Ringer { queue, doorbells, calls, rings, busy })
        };
        let workers = vec![worker(0, &[0, 2], 0), worker(1, &[], 3), worker(2, &[0], 0)];
        let running = Inline.start(Arc::new(LinkRecorder::default()), &doorbells, workers).unwrap();
        let called = || std::mem::take(&mut *lock(&calls));
        doorbells.ring(1);
        assert_eq!(called(), [1, 1, 1], "while it has more to do");
        doorbells.ring(0);
        assert_eq!(called(), [0, 2, 0], "rings of its own included, when it has come back");
        doorbells.ring(0);
        assert_eq!(called(), [0]);
        assert_eq!(running.stop().iter().map(|worker| worker.queues()).collect::<Vec<_>>(), [[0], [1], [2]]);
        doorbells.ring(0);
        assert!(called().is_empty());
    }

    #[test]
    fn a_driver_that_never_ends_does_not_hold_the_thread() {
        let (doorbells, calls) = (Arc::new(Doorbells::new(1)), Arc::<Mutex<Vec<u16>>>::default());
        let worker = Ringer {
            queue: 0,
            doorbells: Weak::new(),
            calls: Arc::clone(&calls),
            rings: Vec::new(),
            busy: u32::MAX,
        };
        let running = Inline.start(Arc::new(LinkRecorder::default()), &doorbells, vec![Box::new(worker)]);
        doorbells.ring(0);
        doorbells.ring(0);
        assert_eq!(lock(&calls).len(), 2 * ROUNDS as usize);
        assert_eq!(running.unwrap().stop().len(), 1);
    }
}
