//! A thread for each worker.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, Weak};
use std::thread::JoinHandle;

use super::bell::Inbox;
use super::shared::{self, LoopRunning, Shared};
use super::slot::rest;
use super::{EventLoop, join, spawn};
use crate::clock::Clock;
use crate::interrupt::lock;
use crate::virtio::{Doorbells, DriverLink, Executor, Running, Worker};

type Hook = Arc<dyn Fn(&[u16]) -> io::Result<()> + Send + Sync>;

/// Serves each worker, and so each queue where devices have a worker a queue, on a thread of its own, from the start of its
/// device to its reset.
///
/// Each thread has an [`EventLoop`] to itself: what is said there of stop, panics, time and cost is true here, but that nobody
/// waits for another's turn. A worker of another thread can still be waited for in a circle; workers stop no device.
///
/// ```
/// use vmm_devices::virtio::ThreadPerQueue;
///
/// # let clock = || 0;
/// let executor = ThreadPerQueue::new(clock).name("disk").on_start(|queues| {
///     // On the new thread: affinity, priority, seccomp filter, by queue. An error refuses to start the device.
///     let _ = queues;
///     Ok(())
/// });
/// ```
pub struct ThreadPerQueue {
    clock: Arc<dyn Clock>,
    name: String,
    on_start: Hook,
    /// Who is to hear of a clock that was set.
    loops: Mutex<Vec<Weak<Inbox>>>,
}

impl fmt::Debug for ThreadPerQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ThreadPerQueue").field("name", &self.name).finish_non_exhaustive()
    }
}

impl ThreadPerQueue {
    /// With the clock of the devices, by which workers have deadlines.
    pub fn new(clock: impl Clock + 'static) -> Self {
        Self {
            clock: Arc::new(clock),
            name: "virtio".to_owned(),
            on_start: Arc::new(|_| Ok(())),
            loops: Mutex::default(),
        }
    }

    /// Threads are named after it and the first queue that they serve: `disk-q0`. Linux shows 15 bytes of that.
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self
    }

    /// Called on each new thread, with the queues that it is to serve, before it serves them. The start of the device
    /// waits for it, and fails with it.
    #[must_use]
    pub fn on_start(mut self, hook: impl Fn(&[u16]) -> io::Result<()> + Send + Sync + 'static) -> Self {
        self.on_start = Arc::new(hook);
        self
    }

    /// Makes all threads look at their clock: for one that was set, or a machine that goes on after a pause.
    pub fn wake(&self) {
        lock(&self.loops).iter().filter_map(Weak::upgrade).for_each(|inbox| inbox.clock_moved());
    }

    fn prepare(
        &self,
        number: usize,
        link: Arc<dyn DriverLink>,
        doorbells: &Doorbells,
        worker: Box<dyn Worker>,
    ) -> io::Result<(Served, Receiver<io::Result<()>>)> {
        let queues = worker.queues();
        let name = match queues.first() {
            Some(queue) => format!("{}-q{queue}", self.name),
            None => format!("{}-w{number}", self.name),
        };
        let event_loop = EventLoop::with_clock(Arc::clone(&self.clock))?;
        let shared = Arc::clone(&event_loop.shared);
        let mut running = LoopRunning::new(Arc::clone(&shared));
        running.add(link, doorbells, worker)?;
        let (go, ready) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        let hook = Arc::clone(&self.on_start);
        let thread = spawn(&name, move || {
            let begin = catch_unwind(AssertUnwindSafe(|| hook(&queues)));
            let begin = begin.unwrap_or_else(|_| Err(io::Error::other("the thread's start hook panicked")));
            // Whoever starts the device says that all threads could begin, or is gone.
            if tell.send(begin).is_ok() && ready.recv().is_ok() {
                event_loop.serve();
            }
        })?;
        Ok((Served { running, shared, go: Some(go), thread: Some(thread) }, told))
    }
}

impl Executor for ThreadPerQueue {
    /// # Errors
    /// Also what the start hook says, or if a worker's source is something that cannot be polled, as a regular file.
    fn start(
        &self,
        link: Arc<dyn DriverLink>,
        doorbells: &Arc<Doorbells>,
        workers: Vec<Box<dyn Worker>>,
    ) -> io::Result<Box<dyn Running>> {
        let mut running = ThreadsRunning(Vec::new());
        let mut hooks = Vec::new();
        for (number, worker) in workers.into_iter().enumerate() {
            let (served, told) = self.prepare(number, Arc::clone(&link), doorbells, worker)?;
            running.0.push(served);
            hooks.push(told);
        }
        for told in hooks {
            told.recv().map_err(|_| io::Error::other("a queue's thread has ended"))??;
        }
        let mut bells = Vec::new();
        for served in &mut running.0 {
            served.running.insert()?;
            bells.append(&mut served.running.bells());
        }
        shared::connect(doorbells, bells);
        let mut loops = lock(&self.loops);
        loops.retain(|inbox| inbox.strong_count() > 0);
        for served in &mut running.0 {
            loops.push(Arc::downgrade(&served.shared.inbox));
            served.running.ring();
            if let Some(go) = served.go.take() {
                go.send(()).map_err(|_| io::Error::other("a queue's thread has ended"))?;
            }
        }
        Ok(Box::new(running))
    }

    fn notifiers(&self, queues: usize) -> io::Result<Vec<Arc<OwnedFd>>> {
        shared::notifiers(queues)
    }
}

/// A worker and its thread.
struct Served {
    running: LoopRunning,
    shared: Arc<Shared>,
    /// Lets the thread begin. It ends if this goes before.
    go: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

/// Those of one device. Dropped, it stops them.
struct ThreadsRunning(Vec<Served>);

impl ThreadsRunning {
    /// Ends the threads; their workers come to rest by `rest`.
    fn halt(
        &mut self,
        rest: impl FnOnce(Vec<Box<dyn Worker>>) -> Vec<Box<dyn Worker>>,
    ) -> Vec<Box<dyn Worker>> {
        let workers = Vec::from_iter(self.0.iter_mut().flat_map(|served| served.running.take()));
        let workers = rest(workers);
        for mut served in self.0.drain(..) {
            served.shared.close();
            served.go = None;
            join(served.thread.take());
        }
        workers
    }
}

impl Running for ThreadsRunning {
    fn stop(mut self: Box<Self>) -> Vec<Box<dyn Worker>> {
        self.halt(rest)
    }

    fn pause(mut self: Box<Self>) -> Vec<Box<dyn Worker>> {
        self.halt(|workers| workers)
    }
}

impl Drop for ThreadsRunning {
    fn drop(&mut self) {
        self.halt(rest);
    }
}
