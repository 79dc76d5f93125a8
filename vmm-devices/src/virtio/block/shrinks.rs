//! Which requests were let in by a larger disk than there is now: those may still write what is to be cut off.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::interrupt::lock;

/// A queue without a worker.
const NOBODY: u64 = u64::MAX;

/// How often a disk has become smaller, and what its workers have left behind of that.
#[derive(Debug)]
pub(super) struct Shrinks {
    count: AtomicU64,
    /// By queue, how often it had when the oldest of its requests was let in.
    oldest: Mutex<Box<[u64]>>,
    changed: Condvar,
}

impl Shrinks {
    pub(super) fn new(queues: u16) -> Self {
        let oldest = Mutex::new(vec![NOBODY; queues.into()].into());
        Self { count: AtomicU64::new(0), oldest, changed: Condvar::new() }
    }

    /// How often so far. A worker asks before it looks how large the disk is.
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::SeqCst)
    }

    /// Once more: the smaller size is there already.
    pub(super) fn add(&self) {
        self.count.fetch_add(1, Ordering::SeqCst);
    }

    /// The requests of `queue` were let in after so many, or `None` are left.
    pub(super) fn tell(&self, queue: u16, oldest: Option<u64>) {
        if let Some(place) = lock(&self.oldest).get_mut(usize::from(queue)) {
            *place = oldest.unwrap_or(NOBODY);
        }
        self.changed.notify_all();
    }

    /// Waits until no request is left that was let in before now; `false` if that takes longer.
    pub(super) fn wait(&self, timeout: Duration) -> bool {
        let now = self.count();
        let behind = |oldest: &mut Box<[u64]>| oldest.iter().any(|oldest| *oldest < now);
        let waited = self.changed.wait_timeout_while(lock(&self.oldest), timeout, behind);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}
