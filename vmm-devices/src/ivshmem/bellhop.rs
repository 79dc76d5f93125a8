//! Rings eventfds of peers that are not trusted, on a thread of its own.
//!
//! Whoever has an eventfd can make it a blocking one and fill it, and then a write waits. So neither a vCPU nor the thread that listens
//! to the server writes to it: this one does, and if it waits, nothing but further rings of the same device wait with it.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use super::eventfd;
use crate::interrupt::lock;

/// See the module. Dropping what holds it ends its thread, which is not waited for.
pub(super) struct Bellhop {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    work: Mutex<Work>,
    wake: Condvar,
}

#[derive(Default)]
struct Work {
    /// Each once: rings that come before the first one went out are one with it. There are as many as the device has bells.
    due: Vec<Arc<OwnedFd>>,
    ended: bool,
}

impl Bellhop {
    /// Starts its thread.
    pub(super) fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        thread::Builder::new().name("ivshmem-rings".to_owned()).spawn(move || theirs.run())?;
        Ok(Self { shared })
    }

    /// Has `fd` rung soon.
    pub(super) fn carry(&self, fd: &Arc<OwnedFd>) {
        let mut work = lock(&self.shared.work);
        if work.due.iter().all(|due| due.as_raw_fd() != fd.as_raw_fd()) {
            work.due.push(Arc::clone(fd));
            drop(work);
            self.shared.wake.notify_one();
        }
    }
}

impl Drop for Bellhop {
    fn drop(&mut self) {
        let mut work = lock(&self.shared.work);
        work.ended = true;
        work.due.clear();
        self.shared.wake.notify_one();
    }
}

impl Shared {
    fn run(&self) {
        loop {
            let mut work = lock(&self.work);
            while work.due.is_empty() && !work.ended {
                work = self.wake.wait(work).unwrap_or_else(PoisonError::into_inner);
            }
            if work.ended {
                return;
            }
            let due = std::mem::take(&mut work.due);
            drop(work);
            due.iter().for_each(eventfd::signal);
        }
    }
}
