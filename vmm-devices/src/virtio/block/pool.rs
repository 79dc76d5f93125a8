//! Threads that do requests while others are made: the asynchronous way that every backend has, on every host.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::backend::{Backend, ConcurrentDisk, IoQueue, Job, JobEnd, Waker};
use crate::interrupt::lock;
use crate::virtio::device::Progress;

/// Threads that any number of disks share. A disk that hangs holds as many of them as it has requests: what must not wait for it
/// gets a pool of its own.
pub struct ThreadPool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl fmt::Debug for ThreadPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ThreadPool").field("threads", &self.threads.len()).finish_non_exhaustive()
    }
}

#[derive(Default)]
struct Shared {
    work: Mutex<Work>,
    changed: Condvar,
}

#[derive(Default)]
struct Work {
    tasks: VecDeque<Task>,
    closed: bool,
}

/// A job, and who wants to know of its end.
struct Task {
    job: Job,
    queue: Arc<Origin>,
}

/// Where jobs come from: one queue of a device.
struct Origin {
    disk: Arc<dyn Backend>,
    state: Mutex<State>,
    idle: Condvar,
    waker: Waker,
}

#[derive(Default)]
struct State {
    ended: Vec<JobEnd>,
    under_way: usize,
}

impl ThreadPool {
    /// Starts `threads` threads. That many requests of all its disks are done at a time.
    ///
    /// # Errors
    /// If the host has no more threads.
    pub fn new(threads: NonZeroUsize) -> io::Result<Arc<Self>> {
        let mut pool = Self { shared: Arc::default(), threads: Vec::new() };
        for index in 0..threads.get() {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new().name(format!("disk {index}"));
            pool.threads.push(thread.spawn(move || shared.work())?);
        }
        Ok(Arc::new(pool))
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        lock(&self.shared.work).closed = true;
        self.shared.changed.notify_all();
        let own = std::thread::current().id();
        for thread in self.threads.drain(..).filter(|thread| thread.thread().id() != own) {
            // One that has panicked has ended, too.
            let (Ok(()) | Err(_)) = thread.join();
        }
    }
}

impl Shared {
    fn work(&self) {
        loop {
            let mut work = lock(&self.work);
            let task = loop {
                match work.tasks.pop_front() {
                    Some(task) => break task,
                    None if work.closed => return,
                    None => work = self.changed.wait(work).unwrap_or_else(PoisonError::into_inner),
                }
            };
            drop(work);
            task.run();
        }
    }
}

impl Task {
    fn run(self) {
        let Self { job, queue } = self;
        let tag = job.tag;
        // A backend that panics fails its request, and not those who wait for it.
        let run = catch_unwind(AssertUnwindSafe(|| job.run(&*queue.disk)));
        let result = run.unwrap_or_else(|_| Err(io::Error::other("the disk's backend has panicked")));
        // Its memory goes before anybody is told that it has ended.
        drop(job);
        let mut state = lock(&queue.state);
        // Of others that nobody has looked at yet there is word already.
        let news = state.ended.is_empty();
        state.ended.push(JobEnd { tag, result });
        state.under_way -= 1;
        if state.under_way == 0 {
            queue.idle.notify_all();
        }
        drop(state);
        if news {
            // Last: it may serve the queue on this thread. What panics there is not this thread's business.
            let (Ok(()) | Err(_)) = catch_unwind(AssertUnwindSafe(|| (queue.waker)()));
        }
    }
}

/// Any disk, whose requests are done by a [`ThreadPool`].
pub struct Pooled {
    disk: Arc<dyn Backend>,
    pool: Arc<ThreadPool>,
}

impl fmt::Debug for Pooled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pooled").field("pool", &self.pool).finish_non_exhaustive()
    }
}

impl Pooled {
    /// `disk`, whose blocking calls are made by the threads of `pool`.
    pub fn new(disk: Arc<dyn Backend>, pool: Arc<ThreadPool>) -> Self {
        Self { disk, pool }
    }
}

impl ConcurrentDisk for Pooled {
    fn disk(&self) -> Arc<dyn Backend> {
        Arc::clone(&self.disk)
    }

    fn queue(&self, _depth: u16, waker: Waker) -> io::Result<Box<dyn IoQueue>> {
        let (state, idle) = (Mutex::default(), Condvar::new());
        let origin = Arc::new(Origin { disk: Arc::clone(&self.disk), state, idle, waker });
        Ok(Box::new(PoolQueue { pool: Arc::clone(&self.pool), origin, submitted: Vec::new() }))
    }
}

struct PoolQueue {
    pool: Arc<ThreadPool>,
    origin: Arc<Origin>,
    /// Since the last kick.
    submitted: Vec<Job>,
}

impl fmt::Debug for PoolQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PoolQueue").field("pool", &self.pool).finish_non_exhaustive()
    }
}

impl IoQueue for PoolQueue {
    fn submit(&mut self, job: Job) {
        self.submitted.push(job);
    }

    fn kick(&mut self) {
        let Shared { work, changed } = &*self.pool.shared;
        let count = self.submitted.len();
        if count == 0 {
            return;
        }
        lock(&self.origin.state).under_way += count;
        let tasks = self.submitted.drain(..).map(|job| Task { job, queue: Arc::clone(&self.origin) });
        lock(work).tasks.extend(tasks);
        if count == 1 { changed.notify_one() } else { changed.notify_all() }
    }

    fn reap(&mut self, ended: &mut Vec<JobEnd>) -> Progress {
        ended.append(&mut lock(&self.origin.state).ended);
        Progress::Idle
    }

    fn drain(&mut self) {
        self.kick();
        let mut state = lock(&self.origin.state);
        while state.under_way > 0 {
            state = self.origin.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn cancel(&mut self) {
        self.submitted.clear();
        // What no thread has begun does not wait behind other disks.
        let mut work = lock(&self.pool.shared.work);
        let is_own = |task: &Task| Arc::ptr_eq(&task.queue, &self.origin);
        let (own, others): (VecDeque<_>, _) = std::mem::take(&mut work.tasks).into_iter().partition(is_own);
        work.tasks = others;
        drop(work);
        let mut state = lock(&self.origin.state);
        state.under_way -= own.len();
        while state.under_way > 0 {
            state = self.origin.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.ended.clear();
    }
}

impl Drop for PoolQueue {
    fn drop(&mut self) {
        self.cancel();
    }
}
