//! This side's end of a connection: a Unix socket whose other end may be that of a program of the host, or of another monitor.
//!
//! # Threat model
//! Whoever has the other end may send descriptors beside data. To close one can take as long as who made it likes ([`Closer`]), and the
//! kernel closes those that a read has no room for before the reader goes on. So nothing is read that descriptors are beside: they stay in
//! the socket, which is over then. A socket in which something is left goes to a thread that nobody waits for. What connects two devices
//! of this process carries none, and what the kernel lets no descriptors into ([`sys`](super::sys)) has none: that is read without a look.
//!
//! Nobody else reads from this end. A broker could, which keeps copies of those that it hands out: it is trusted not to.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::io::{Errno, IoSliceMut};
use rustix::net::{RecvAncillaryBuffer, RecvFlags, ReturnFlags, Shutdown, recv, recvmsg, shutdown, sockopt};

use super::far::again;
use crate::closer::Closer;

/// Threads of those that close the sockets of other monitors, and of programs of the host.
pub(super) const CLOSERS: usize = 4;

/// Nanoseconds until one looks again whether somebody can be let in, while too much is to be closed.
pub(super) const WHILE_FULL: u64 = 50_000_000;

/// See the module.
#[derive(Debug)]
pub(super) struct Socket {
    /// `None` at the end.
    fd: Option<OwnedFd>,
    peer: Peer,
    /// Descriptors may be in it, so that one looks before one reads.
    looks: bool,
}

/// Who has the other end.
enum Peer {
    /// A device of this process.
    Ours,
    /// Somebody else, with where the socket is closed, and as whose.
    Other(Arc<Closer>, u32),
}

impl std::fmt::Debug for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ours => f.write_str("Ours"),
            Self::Other(_, whose) => f.debug_tuple("Other").field(whose).finish(),
        }
    }
}

impl Socket {
    /// One end of what connects two devices of this process.
    pub(super) fn ours(fd: OwnedFd) -> Self {
        Self { fd: Some(fd), peer: Peer::Ours, looks: false }
    }

    /// One whose other end has the guest of that identifier, or a program of the host.
    pub(super) fn of(fd: OwnedFd, closer: &Arc<Closer>, whose: u32) -> Self {
        // What the kernel adds to a message would be taken for what the other side does.
        let (Ok(()) | Err(_)) = sockopt::set_socket_passcred(&fd, false);
        // Else urgent data is passed over, also by a look, and dropped with what is beside it. Where there is none, nothing need be done.
        let (Ok(()) | Err(_)) = sockopt::set_socket_oobinline(&fd, true);
        Self { fd: Some(fd), peer: Peer::Other(Arc::clone(closer), whose), looks: true }
    }

    /// The same, into which the kernel has let no descriptors from the beginning on, if that is so.
    pub(super) fn has_none(mut self, has_none: bool) -> Self {
        self.looks &= !has_none;
        self
    }

    /// That guest has the other end, as is known by now.
    pub(super) fn belongs_to(&mut self, cid: u32) {
        if let Peer::Other(_, whose) = &mut self.peer {
            *whose = cid;
        }
    }

    /// Looks at what comes next, which stays there: how many bytes are in `room` now, and whether something is beside them.
    pub(super) fn look(&self, room: &mut [u8]) -> Result<(usize, bool), Errno> {
        let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
        let mut none = RecvAncillaryBuffer::default();
        let seen = again(|| recvmsg(self, &mut [IoSliceMut::new(&mut *room)], &mut none, flags))?;
        Ok((seen.bytes, seen.flags.contains(ReturnFlags::CTRUNC)))
    }

    /// Reads a part of a stream into `room`, or one message: how many bytes are there, and how many it has.
    ///
    /// # Errors
    /// Those of recv(2); [`Errno::BADMSG`] if descriptors are beside it.
    pub(super) fn receive(&self, room: &mut [u8], is_stream: bool) -> Result<(usize, usize), Errno> {
        let flags = RecvFlags::DONTWAIT | if is_stream { RecvFlags::empty() } else { RecvFlags::TRUNC };
        let mut room = room;
        if self.looks {
            // Of a stream just what was seen is read, for more may have come. A message is one whatever is seen of it.
            let seen: &mut [u8] = if is_stream { &mut *room } else { &mut [] };
            let (len, passes) = self.look(seen)?;
            if passes {
                return Err(Errno::BADMSG);
            }
            if is_stream {
                room = room.get_mut(..len).unwrap_or_default();
            }
        }
        if room.is_empty() && is_stream {
            return Ok((0, 0));
        }
        again(|| recv(self, &mut *room, flags))
    }

    /// What it is for the kernel, which is closed as any descriptor is.
    #[cfg(test)]
    pub(super) fn into_fd(mut self) -> OwnedFd {
        self.peer = Peer::Ours;
        self.fd.take().unwrap()
    }

    /// Whether nothing is left in it, when nothing comes any more.
    fn is_empty(&self) -> bool {
        // Each message has the sender's identity beside it then, which there is no room for, so that an empty one is not taken for the end.
        if sockopt::set_socket_passcred(self, true).is_err() {
            return false;
        }
        let mut seen = self.look(&mut [0]);
        if seen == Err(Errno::CONNRESET) {
            // Told once, before what came earlier.
            seen = self.look(&mut [0]);
        }
        seen == Ok((0, false))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // No socket, where there is none any more.
        self.fd.as_ref().map_or(rustix::fs::CWD, AsFd::as_fd)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let Peer::Other(closer, whose) = &self.peer else { return };
        // Who has the other end hears of it now. What is not connected any more needs none.
        let (Ok(()) | Err(_)) = shutdown(&*self, Shutdown::Both);
        if !self.is_empty() {
            closer.close_of(*whose, self.fd.take());
        }
    }
}
