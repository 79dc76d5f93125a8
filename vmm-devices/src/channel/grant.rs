//! The right to one channel.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

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

/// What grant and account have in common.
pub(super) struct Right {
    pub(super) request: Request,
    live: AtomicBool,
    close: Mutex<Option<Close>>,
}

impl Right {
    pub(super) fn new(request: Request) -> Self {
        Self { request, live: AtomicBool::new(true), close: Mutex::new(None) }
    }

    /// Ends the right, and returns when what the holder does then is done. Whether it was there until now.
    pub(super) fn revoke(&self) -> bool {
        let was_live = self.live.swap(false, Ordering::AcqRel);
        let close = self.close.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(close) = close {
            close();
        }
        was_live
    }

    pub(super) fn is_live(&self) -> bool {
        self.live.load(Ordering::Acquire)
    }

    fn on_revoked(&self, close: Close) {
        let mut place = self.close.lock().unwrap_or_else(PoisonError::into_inner);
        // Looked at under the lock that `revoke` takes after it has ended the right: one of the two calls it.
        if self.is_live() {
            *place = Some(close);
        } else {
            drop(place);
            close();
        }
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
    /// on when it returns: it stops the channel, takes it out of the guest's reach, and closes it, in that order. It replaces the
    /// one before, and is forgotten when the grant is dropped.
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
        let close = self.right.close.lock().unwrap_or_else(PoisonError::into_inner).take();
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
