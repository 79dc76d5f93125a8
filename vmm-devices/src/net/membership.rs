//! The right to be on a network, as those hold it who carry frames.

use std::fmt;
use std::sync::{Arc, OnceLock, PoisonError, RwLock, Weak};

use super::backend::{Link, NetEvents};
use super::error::NetError;
use crate::channel::{Grant, NetworkAttach};

/// A [`Grant`], and what follows when it is taken back: no frame goes in either direction from then on, and the device hears that its
/// link is down. For those who write a backend.
pub struct Membership {
    grant: Grant<NetworkAttach>,
    /// Whether frames go. Who moves one reads it meanwhile, so that none is under way when it has been written.
    open: RwLock<bool>,
    events: OnceLock<Arc<dyn NetEvents>>,
}

impl fmt::Debug for Membership {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Membership").field("grant", &self.grant).finish_non_exhaustive()
    }
}

impl Membership {
    /// As long as the grant is there.
    ///
    /// # Errors
    /// [`NetError::Revoked`] if it has been taken back.
    pub fn new(grant: Grant<NetworkAttach>) -> Result<Arc<Self>, NetError> {
        let membership = Arc::new(Self { grant, open: RwLock::new(true), events: OnceLock::new() });
        let weak = Arc::downgrade(&membership);
        membership.grant.on_revoked(move || {
            if let Some(membership) = Weak::upgrade(&weak) {
                membership.close();
            }
        });
        if membership.grant.is_live() { Ok(membership) } else { Err(NetError::Revoked) }
    }

    /// What follows when it is taken back, for who hears of that first ([`Grant::on_revoked`] has one listener).
    pub(in crate::net) fn close(&self) {
        *self.open.write().unwrap_or_else(PoisonError::into_inner) = false;
        if let Some(events) = self.events.get() {
            events.link_changed();
        }
    }

    /// The right.
    pub fn grant(&self) -> &Grant<NetworkAttach> {
        &self.grant
    }

    /// Moves a frame, while it may. It is not taken back meanwhile.
    ///
    /// # Errors
    /// [`NetError::Revoked`] if it has been taken back.
    pub fn frame<T>(&self, f: impl FnOnce() -> Result<T, NetError>) -> Result<T, NetError> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        if *open && self.grant.is_live() { f() } else { Err(NetError::Revoked) }
    }

    /// What [`NetBackend::listen`](super::NetBackend::listen) is told.
    pub fn listen(&self, events: Arc<dyn NetEvents>) {
        if self.events.set(Arc::clone(&events)).is_ok() && !self.grant.is_live() {
            events.link_changed();
        }
    }

    /// Tells the device that the link is another one.
    pub fn tell_link(&self) {
        if let Some(events) = self.events.get() {
            events.link_changed();
        }
    }

    /// `link`, as long as there is a right to it.
    pub fn link(&self, link: Link) -> Link {
        if self.grant.is_live() { link } else { Link::DOWN }
    }
}
