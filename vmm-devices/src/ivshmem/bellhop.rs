//! Rings eventfds of peers that are not trusted, on threads of its own.
//!
//! Whoever has an eventfd can make it a blocking one and fill it, and then a write waits, in the kernel, until somebody takes what is
//! there; to look first does not help, since it may be filled in between. So neither a vCPU nor the thread that listens to the
//! server writes to it: one of these does. As many peers as there may be can each have one wait, and each no more than one, so
//! that nothing waits but further rings for the same peer. They start at once, as a confined monitor starts none later.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;

use super::eventfd;
use crate::interrupt::lock;

/// What a thread that writes 8 bytes needs, and more.
const STACK: usize = 64 << 10;

/// See the module. Dropping what holds it ends its threads, which are not waited for.
pub(super) struct Bellhop {
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    work: Mutex<Work>,
    wake: Condvar,
}

/// A peer's bell.
type Ring = (u16, Arc<OwnedFd>);

#[derive(Default)]
struct Work {
    /// Each once: rings that come before the first one went out are one with it. There are as many as the device has bells.
    due: Vec<Ring>,
    /// What threads are at, one for a peer.
    busy: Vec<Ring>,
    ended: bool,
}

impl Work {
    /// The first that is due of a peer that nobody is at.
    fn next(&mut self) -> Option<Ring> {
        let free = |(peer, _): &Ring| self.busy.iter().all(|(other, _)| other != peer);
        let at = self.due.iter().position(free)?;
        Some(self.due.remove(at))
    }
}

impl Bellhop {
    /// Starts its threads: so many peers can be rung without one waiting for another.
    pub(super) fn start(peers: usize) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        // Dropped if the host refuses one, which ends those that there are.
        let bellhop = Self { shared: Arc::clone(&shared) };
        for _ in 0..peers {
            let theirs = Arc::clone(&shared);
            let thread = thread::Builder::new().name("ivshmem-rings".to_owned()).stack_size(STACK);
            thread.spawn(move || theirs.run())?;
        }
        Ok(bellhop)
    }

    /// Has `fd`, which is a bell of `peer`'s, rung soon.
    pub(super) fn carry(&self, peer: u16, fd: &Arc<OwnedFd>) {
        let mut work = lock(&self.shared.work);
        if work.due.iter().all(|(_, due)| due.as_raw_fd() != fd.as_raw_fd()) {
            work.due.push((peer, Arc::clone(fd)));
            drop(work);
            self.shared.wake.notify_one();
        }
    }

    /// The peer is gone: who waits there is let go.
    pub(super) fn forget(&self, peer: u16) {
        let mut work = lock(&self.shared.work);
        work.due.retain(|(other, _)| *other != peer);
        for (_, fd) in work.busy.iter().filter(|(other, _)| *other == peer) {
            // What was there is for nobody any more.
            let (Ok(_) | Err(_)) = eventfd::take(fd);
        }
    }
}

impl Drop for Bellhop {
    fn drop(&mut self) {
        let mut work = lock(&self.shared.work);
        work.ended = true;
        work.due.clear();
        self.shared.wake.notify_all();
    }
}

impl Shared {
    fn run(&self) {
        let mut work = lock(&self.work);
        while !work.ended {
            let Some((peer, fd)) = work.next() else {
                work = self.wake.wait(work).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            work.busy.push((peer, Arc::clone(&fd)));
            drop(work);
            eventfd::signal(&fd);
            work = lock(&self.work);
            work.busy.retain(|(other, _)| *other != peer);
        }
    }
}
