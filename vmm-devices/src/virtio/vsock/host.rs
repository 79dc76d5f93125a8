//! Unix sockets of the host, the way Firecracker and Cloud Hypervisor have them. With `PATH` as the path:
//!
//! | who connects | where | how |
//! |---|---|---|
//! | the guest, to port P of the host (CID 2) | `PATH_P`, at which a program listens | SOCK_STREAM; SOCK_SEQPACKET for a guest's SOCK_SEQPACKET |
//! | a program, to port P of the guest | `PATH` | SOCK_STREAM; writes `CONNECT P` and a line feed, and gets `OK N` and one when the guest has accepted, N being the port on this side |
//! | the same for messages | `PATH_seqpacket` | SOCK_SEQPACKET; the line is the first message, the answer another |
//!
//! A connection that is refused is closed. The sockets at which the device listens are made with mode 0600, before anybody can
//! connect to them; a socket that is there already is replaced if nobody listens at it.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};

use super::packet::Kind;
use super::socket::Socket;
use super::sys::take_no_descriptors;
use super::{ANY_PORT, HOST_CID, VsockError};
use crate::channel::{Grant, Party, VsockConnect, VsockListen};
use crate::closer::Closer;

/// Bytes that a path can have at most, for `_4294967295` has to fit behind it.
pub const MAX_PATH: usize = 107 - 11;

/// Programs that may wait until the device looks.
const BACKLOG: i32 = 128;

/// Where the host's side of a device is.
pub struct HostSockets {
    path: PathBuf,
    listeners: Vec<(Arc<OwnedFd>, Kind)>,
    grant: Grant<VsockListen>,
    name: Arc<str>,
    closer: Arc<Closer>,
    /// The kernel lets no descriptors into the sockets.
    takes_none: bool,
}

impl fmt::Debug for HostSockets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostSockets")
            .field("path", &self.path)
            .field("grant", &self.grant)
            .finish_non_exhaustive()
    }
}

impl HostSockets {
    /// Listens at `path` and `path_seqpacket`, whose mode is 0600. The thread that closes the sockets of programs is started here. The grant is the guest's, to accept connections of the host: at one of
    /// its ports, or at all with [`ANY_PORT`].
    ///
    /// # Errors
    /// If the path is too long, somebody listens there, something else is there, or the host refuses it.
    pub fn listen(path: impl AsRef<Path>, grant: Grant<VsockListen>) -> Result<Self, VsockError> {
        Self::listen_with_mode(path, 0o600, grant)
    }

    /// The same with another mode. The umask takes away from it.
    ///
    /// # Errors
    /// As [`HostSockets::listen`].
    pub fn listen_with_mode(
        path: impl AsRef<Path>,
        mode: u32,
        grant: Grant<VsockListen>,
    ) -> Result<Self, VsockError> {
        let path = path.as_ref().to_owned();
        let len = path.as_os_str().len();
        if !(1..=MAX_PATH).contains(&len) {
            return Err(VsockError::Path { len });
        }
        let (mut listeners, mut takes_none) = (Vec::new(), true);
        for (kind, path) in [(Kind::Stream, path.clone()), (Kind::SeqPacket, behind(&path, "seqpacket"))] {
            let socket = new_socket(kind)?;
            // Before anybody can connect.
            takes_none &= take_no_descriptors(&socket);
            let listener = listen_with(socket, &path, kind, mode);
            let listener = listener.map_err(|source| VsockError::Socket { path, source })?;
            listeners.push((Arc::new(listener), kind));
        }
        let closer = Arc::new(Closer::new("vsock-close", 1, None)?);
        Ok(Self { path, listeners, grant, name: "host".into(), closer, takes_none })
    }

    /// What the gate hears the host's programs called, instead of `host`.
    #[must_use]
    pub fn name(mut self, name: impl Into<Arc<str>>) -> Self {
        self.name = name.into();
        self
    }

    /// Removes the files of the sockets. Nothing else does: a confined process may not, and the next one replaces them.
    ///
    /// # Errors
    /// If they cannot be removed.
    pub fn remove_files(&self) -> io::Result<()> {
        std::fs::remove_file(&self.path)?;
        std::fs::remove_file(behind(&self.path, "seqpacket"))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn party(&self) -> Party {
        Party::Host(Arc::clone(&self.name))
    }

    /// Whether programs may connect to that port of the guest, as far as the grant for all of them goes.
    pub(super) fn allows(&self, port: u32) -> bool {
        let granted = self.grant.channel().port;
        self.grant.is_live() && (granted == ANY_PORT || granted == port)
    }

    pub(super) fn listeners(&self) -> &[(Arc<OwnedFd>, Kind)] {
        &self.listeners
    }

    /// As it is where the kernel lets descriptors into any socket.
    #[cfg(test)]
    pub(super) fn before_linux_6_16(mut self) -> Self {
        for (listener, _) in &self.listeners {
            super::sys::pass_descriptors(listener, true);
        }
        self.takes_none = false;
        self
    }

    /// Whether the kernel lets no descriptors into the sockets of programs.
    pub(super) fn takes_none(&self) -> bool {
        self.takes_none
    }

    /// Where the sockets of programs are closed.
    pub(super) fn closer(&self) -> &Arc<Closer> {
        &self.closer
    }

    /// Connects to the program that listens at the granted port.
    pub(super) fn dial(&self, grant: &Grant<VsockConnect>, kind: Kind) -> io::Result<Socket> {
        let address = SocketAddrUnix::new(behind(&self.path, &grant.channel().port.to_string()))?;
        let socket = new_socket(kind)?;
        let has_none = self.takes_none && take_no_descriptors(&socket);
        // A program with too many who wait refuses, as it does with TCP.
        connect(&socket, &address)?;
        Ok(Socket::of(socket, &self.closer, HOST_CID).has_none(has_none))
    }
}

impl Drop for HostSockets {
    fn drop(&mut self) {
        for (listener, _) in self.listeners.drain(..) {
            self.closer.close_listener(listener);
        }
    }
}

/// The path with `_` and a word behind it.
fn behind(path: &Path, word: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("_");
    name.push(word);
    name.into()
}

fn new_socket(kind: Kind) -> io::Result<OwnedFd> {
    let of = if kind == Kind::Stream { SocketType::STREAM } else { SocketType::SEQPACKET };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    Ok(socket_with(AddressFamily::UNIX, of, flags, None)?)
}

/// A socket that listens, with its file there with that mode from the first moment on.
pub(super) fn listen_at(path: &Path, kind: Kind, mode: u32) -> io::Result<OwnedFd> {
    listen_with(new_socket(kind)?, path, kind, mode)
}

fn listen_with(socket: OwnedFd, path: &Path, kind: Kind, mode: u32) -> io::Result<OwnedFd> {
    // The mode of the socket, which `bind` gives to the file.
    fchmod(&socket, Mode::from_raw_mode(mode))?;
    let address = SocketAddrUnix::new(path)?;
    // Two who replace the same socket take turns.
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    let directory = File::open(directory.unwrap_or(Path::new(".")))?;
    flock(&directory, FlockOperation::LockExclusive)?;
    match bind(&socket, &address) {
        Err(Errno::ADDRINUSE) if is_left_behind(path, kind, &address) => {
            std::fs::remove_file(path)?;
            bind(&socket, &address)?;
        }
        bound => bound?,
    }
    listen(&socket, BACKLOG)?;
    Ok(socket)
}

/// Whether there is a socket at which nobody listens.
fn is_left_behind(path: &Path, kind: Kind, address: &SocketAddrUnix) -> bool {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket());
    // Of another type there would be somebody too.
    is_socket && new_socket(kind).is_ok_and(|socket| connect(&socket, address) == Err(Errno::CONNREFUSED))
}
