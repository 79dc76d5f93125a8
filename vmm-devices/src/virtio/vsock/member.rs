//! A device's place at a broker of another process.
//!
//! # Threat model
//! The broker, and those whom it connects, may send descriptors whose close takes as long as they like. What is no end of a connection, and
//! ends in which something lies, are closed on threads that nobody waits for. While too many are, the broker is not heard
//! ([`Fabric::is_full`]), whose calls of others then wait, or are refused by it.

use std::fmt;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::VsockError;
use super::fabric::{Delivery, Dial, Fabric, Who};
use super::packet::Kind;
use super::socket::{CLOSERS, Socket};
use super::wire::{BROKER, Message, Received, VERSION, reason, receive, what};
use crate::channel::{Grant, Party, VsockListen};
use crate::closer::Closer;

/// How long the broker may take to let it in, and to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// A device's place at a [`Broker`](super::Broker), which it leaves when this is dropped. Connections that are there go on without the
/// broker; new ones are refused when it is gone.
#[must_use]
pub struct Member {
    socket: Socket,
    /// Where what the broker sends is closed, and what lies in connections.
    closer: Arc<Closer>,
    cid: u32,
    grant: Grant<VsockListen>,
    gone: AtomicBool,
    /// Calls that were taken, and of which the broker has not heard that yet.
    taken: AtomicU64,
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").field("cid", &self.cid).finish_non_exhaustive()
    }
}

impl Member {
    /// Takes the place of context identifier `cid` at the broker of `path`. The grant is the guest's, to accept connections of others at
    /// [`ANY_PORT`](super::ANY_PORT) or one port; its asker, a virtual machine, is who the others see. Waits for the broker, 5 seconds at most. The
    /// threads that close what comes from others are started here.
    ///
    /// # Errors
    /// If there is no broker, or it refuses, or the host has no threads.
    pub fn join(path: impl AsRef<Path>, cid: u32, grant: Grant<VsockListen>) -> Result<Self, VsockError> {
        let Party::Vm(vm) = *grant.request().asker() else {
            return Err(VsockError::Broker { cid, reason: "only virtual machines have a place" });
        };
        let failed = |source: rustix::io::Errno| VsockError::Socket {
            path: path.as_ref().to_owned(),
            source: source.into(),
        };
        let address = SocketAddrUnix::new(path.as_ref()).map_err(failed)?;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
        let socket = socket.map_err(failed)?;
        let closer = Arc::new(Closer::new("vsock-close", CLOSERS, None)?);
        for timeout in [Timeout::Send, Timeout::Recv] {
            set_socket_timeout(&socket, timeout, Some(PATIENCE)).map_err(failed)?;
        }
        connect(&socket, &address).map_err(failed)?;
        let socket = Socket::of(socket, &closer, BROKER);
        let join = Message {
            what: what::JOIN,
            cid,
            port: VERSION,
            uuid: vm.uuid(),
            incarnation: vm.incarnation(),
            ..Message::default()
        };
        join.send(&socket, None).map_err(failed)?;
        match receive(&socket, RecvFlags::empty(), &closer) {
            Received::Message(Message { what: what::JOINED, .. }, _) => {
                let (gone, taken) = (AtomicBool::new(false), AtomicU64::new(0));
                Ok(Self { socket, closer, cid, grant, gone, taken })
            }
            Received::Message(Message { what: what::REFUSED, port, .. }, _) => {
                Err(VsockError::Broker { cid, reason: reason::text(port) })
            }
            _ => Err(VsockError::Broker { cid, reason: "it does not answer as brokers do" }),
        }
    }

    /// Tells the broker how many calls were taken, as soon as its socket has room.
    fn tell_taken(&self) {
        let taken = self.taken.swap(0, Ordering::Relaxed);
        let message = Message { what: what::TAKEN, tag: taken, ..Message::default() };
        if taken > 0 && message.send(&self.socket, None) != Ok(true) {
            self.taken.fetch_add(taken, Ordering::Relaxed);
        }
    }
}

impl Fabric for Member {
    fn cid(&self) -> u32 {
        self.cid
    }

    fn is_live(&self) -> bool {
        self.grant.is_live()
    }

    fn who(&self, _: u32) -> Who {
        if self.gone.load(Ordering::Relaxed) { Who::Nobody } else { Who::Unknown }
    }

    fn attend(&self, _: bool) {
        // What waits in the socket is bounded there, and whoever calls gives up in time.
    }

    fn dial(&self, dial: Dial) -> bool {
        let Dial { tag, cid, port, from_port, kind, .. } = dial;
        let kind = kind.number().into();
        let dial = Message { what: what::DIAL, kind, cid, port, from_port, tag, ..Message::default() };
        dial.send(&self.socket, None) == Ok(true)
    }

    fn next(&self) -> Option<Delivery> {
        loop {
            self.tell_taken();
            let (message, socket) = match receive(&self.socket, RecvFlags::DONTWAIT, &self.closer) {
                Received::Message(message, socket) => (message, socket),
                Received::Nothing => return None,
                Received::End => {
                    self.gone.store(true, Ordering::Relaxed);
                    return None;
                }
            };
            if message.what == what::ARRIVED {
                self.taken.fetch_add(1, Ordering::Relaxed);
            }
            match (message.what, socket, u16::try_from(message.kind).ok().and_then(Kind::of)) {
                (what::DIALED, socket, _) => return Some(Delivery::Dialed { tag: message.tag, socket }),
                (what::ARRIVED, Some(mut socket), Some(kind)) => {
                    socket.belongs_to(message.cid);
                    let granted = self.grant.channel().port;
                    // What is not granted is dropped, of which who called hears.
                    if granted == super::ANY_PORT || granted == message.port {
                        return Some(Delivery::Arrived {
                            socket,
                            cid: message.cid,
                            party: message.identity().into(),
                            port: message.from_port,
                            guest_port: message.port,
                            kind,
                        });
                    }
                }
                _ => {}
            }
        }
    }

    fn is_full(&self) -> bool {
        self.closer.is_full()
    }

    fn source(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
