//! The grant by which a connection is there, of either kind.

use std::sync::{Arc, Weak};

use rustix::net::{Shutdown, shutdown};

use super::shared::Shared;
use super::slots::Tag;
use super::socket::Socket;
use crate::channel::{Grant, VsockConnect, VsockListen};

/// Of who asked for the connection, or of who accepts it.
#[derive(Debug)]
pub(super) enum Right {
    Connect(Grant<VsockConnect>),
    Accept(Grant<VsockListen>),
}

impl Right {
    pub(super) fn is_live(&self) -> bool {
        match self {
            Self::Connect(grant) => grant.is_live(),
            Self::Accept(grant) => grant.is_live(),
        }
    }

    /// When the right is gone, nothing goes through `socket` any more, both ways, from that moment on; the worker then ends what is
    /// left of the connection, and tells the guest.
    pub(super) fn bind(&self, shared: &Arc<Shared>, tag: Tag, socket: Option<&Arc<Socket>>) {
        let (shared, socket) = (Arc::downgrade(shared), socket.map(Arc::clone));
        let close = move || {
            if let Some(socket) = socket {
                // What is not connected any more needs none.
                let (Ok(()) | Err(_)) = shutdown(&socket, Shutdown::Both);
            }
            if let Some(shared) = Weak::upgrade(&shared) {
                shared.revoke(tag);
            }
        };
        match self {
            Self::Connect(grant) => grant.on_revoked(close),
            Self::Accept(grant) => grant.on_revoked(close),
        }
    }
}
