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
use super::{ANY_PORT, VsockError};
use crate::channel::{Grant, Party, VsockConnect, VsockListen};

/// Bytes that a path can have at most, for `_4294967295` has to fit behind it.
pub const MAX_PATH: usize = 107 - 11;

/// Programs that may wait until the device looks.
const BACKLOG: i32 = 128;

/// Where the host's side of a device is.
#[derive(Debug)]
pub struct HostSockets {
    path: PathBuf,
    listeners: Vec<(Arc<OwnedFd>, Kind)>,
    grant: Grant<VsockListen>,
    name: Arc<str>,
}

impl HostSockets {
    /// Listens at `path` and `path_seqpacket`, whose mode is 0600. The grant is the guest's, to accept connections of the host: at one of
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
        let mut listeners = Vec::new();
        for (kind, path) in [(Kind::Stream, path.clone()), (Kind::SeqPacket, behind(&path, "seqpacket"))] {
            let listener =
                listen_at(&path, kind, mode).map_err(|source| VsockError::Socket { path, source })?;
            listeners.push((Arc::new(listener), kind));
        }
        Ok(Self { path, listeners, grant, name: "host".into() })
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

    /// Connects to the program that listens at the granted port.
    pub(super) fn dial(&self, grant: &Grant<VsockConnect>, kind: Kind) -> io::Result<OwnedFd> {
        let address = SocketAddrUnix::new(behind(&self.path, &grant.channel().port.to_string()))?;
        let socket = new_socket(kind)?;
        // A program with too many who wait refuses, as it does with TCP.
        connect(&socket, &address)?;
        Ok(socket)
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
    let socket = new_socket(kind)?;
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
