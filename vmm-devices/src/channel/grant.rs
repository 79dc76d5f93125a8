//! The right to one channel.

use std::cell::Cell;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::keeper::Account;
use super::request::{Channel, Request};

/// Which grant of a [`Gatekeeper`](super::Gatekeeper)'s; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GrantId(pub(super) u64);

impl GrantId {
    /// As a number, for logs.
    pub fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for GrantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "grant {}", self.0)
    }
}

/// What a holder does when its right is gone.
type Close = Box<dyn FnOnce() + Send>;

thread_local! {
    /// In how many holders' closures this thread is.
    static INSIDE: Cell<usize> = const { Cell::new(0) };
}

/// How a right ends.
#[derive(Default)]
struct End {
    close: Option<Close>,
    /// Threads that are in a closure of the holder's.
    closing: usize,
}

/// What grant and account have in common.
pub(super) struct Right {
    pub(super) request: Request,
    live: AtomicBool,
    end: Mutex<End>,
    closed: Condvar,
}

impl Right {
    pub(super) fn new(request: Request) -> Self {
        Self { request, live: AtomicBool::new(true), end: Mutex::default(), closed: Condvar::new() }
    }

    fn end(&self) -> MutexGuard<'_, End> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the right, and returns when what the holder does then is done, whoever had it done. Whether the right was there until
    /// now.
    pub(super) fn revoke(&self) -> bool {
        let mut end = self.end();
        let was_live = self.live.swap(false, Ordering::AcqRel);
        if let Some(close) = end.close.take() {
            self.run(close, end);
        } else if INSIDE.get() == 0 {
            // Who is in a closure never waits for those who are, of this right or of another: so no two wait for each other.
            while end.closing > 0 {
                end = self.closed.wait(end).unwrap_or_else(PoisonError::into_inner);
            }
        }
        was_live
    }

    pub(super) fn is_live(&self) -> bool {
        self.live.load(Ordering::Acquire)
    }

    fn on_revoked(&self, close: Close) {
        let mut end = self.end();
        // Looked at under the lock under which `revoke` ends the right: one of the two calls it.
        if self.is_live() {
            let before = end.close.replace(close);
            drop(end);
            // It may hold what holds this grant.
            drop(before);
        } else {
            self.run(close, end);
        }
    }

    /// Calls what the holder has said, without the lock, while others wait.
    fn run(&self, close: Close, mut end: MutexGuard<'_, End>) {
        /// Also when the closure panics.
        struct Inside<'a>(&'a Right);
        impl Drop for Inside<'_> {
            fn drop(&mut self) {
                INSIDE.set(INSIDE.get() - 1);
                self.0.end().closing -= 1;
                self.0.closed.notify_all();
            }
        }
        end.closing += 1;
        INSIDE.set(INSIDE.get() + 1);
        drop(end);
        let inside = Inside(self);
        close();
        drop(inside);
    }
}

/// The right to one channel of one kind. [`Gatekeeper::open`](super::Gatekeeper::open) makes it and nothing else does; it cannot be
/// copied. Whoever has the channel keeps it, and drops it once the channel is closed.
#[must_use = "a channel whose grant is dropped is closed"]
pub struct Grant<C: Channel> {
    channel: C,
    id: GrantId,
    right: Arc<Right>,
    account: Arc<Account>,
}

impl<C: Channel> Grant<C> {
    pub(super) fn new(channel: C, id: GrantId, right: Arc<Right>, account: Arc<Account>) -> Self {
        Self { channel, id, right, account }
    }

    /// Which one it is.
    pub fn id(&self) -> GrantId {
        self.id
    }

    /// What it is for.
    pub fn channel(&self) -> &C {
        &self.channel
    }

    /// What was asked for.
    pub fn request(&self) -> &Request {
        &self.right.request
    }

    /// Whether it has not been revoked. A holder looks before each use; it costs a load.
    pub fn is_live(&self) -> bool {
        self.right.is_live()
    }

    /// Has `close` called when the right is revoked; at once if it has been. It comes from the thread that revokes, which goes
    /// on when it returns: it stops the channel, takes it out of the guest's reach, and closes it, in that order. Others who revoke
    /// meanwhile wait for it, so that it must not wait for them. It replaces the one before, and is forgotten when the grant is
    /// dropped.
    pub fn on_revoked(&self, close: impl FnOnce() + Send + 'static) {
        self.right.on_revoked(Box::new(close));
    }

    /// For those who use the channel while another holds the grant.
    pub fn watch(&self) -> Watch {
        Watch { right: Arc::clone(&self.right) }
    }
}

impl<C: Channel> Drop for Grant<C> {
    fn drop(&mut self) {
        // What it would close is closed. The closure may hold what holds this grant, so it goes without the lock.
        let close = self.right.end().close.take();
        drop(close);
        self.right.live.store(false, Ordering::Release);
        self.account.closed(self.id, &self.right.request);
    }
}

impl<C: Channel> fmt::Debug for Grant<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Grant")
            .field("id", &self.id)
            .field("request", &self.right.request)
            .field("live", &self.is_live())
            .finish_non_exhaustive()
    }
}

/// Sees whether a right is there, and is none itself.
#[derive(Clone)]
pub struct Watch {
    right: Arc<Right>,
}

impl Watch {
    /// Whether the grant is there and has not been revoked.
    pub fn is_live(&self) -> bool {
        self.right.is_live()
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").field("live", &self.is_live()).finish_non_exhaustive()
    }
}
