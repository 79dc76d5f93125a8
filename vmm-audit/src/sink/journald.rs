//! The systemd journal, by its native protocol: a datagram of fields, or a sealed memfd of them if they are too long for one.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use super::{Delivery, Sink, SinkError, describe, severity};

/// Where the journal listens.
const SOCKET: &str = "/run/systemd/journal/socket";

/// Sends entries to the journal: `MESSAGE`, `PRIORITY`, and the event's fields as `VMM_AUDIT_...`.
pub struct Journald {
    path: PathBuf,
    socket: UnixDatagram,
}

impl Journald {
    /// The journal of this host.
    ///
    /// # Errors
    /// If the system refuses a socket.
    pub fn new() -> Result<Self, SinkError> {
        Self::at(Path::new(SOCKET))
    }

    /// A journal that listens at `path`.
    ///
    /// # Errors
    /// If the system refuses a socket.
    pub fn at(path: &Path) -> Result<Self, SinkError> {
        let socket = UnixDatagram::unbound();
        let socket = socket.map_err(|source| SinkError::Io { sink: "journald".to_owned(), source })?;
        Ok(Self { path: path.to_owned(), socket })
    }

    fn send_bytes(&self, bytes: &[u8]) -> io::Result<()> {
        match self.socket.send_to(bytes, &self.path) {
            Err(e) if matches!(Errno::from_io_error(&e), Some(Errno::MSGSIZE | Errno::NOBUFS)) => {
                self.send_memory(bytes)
            }
            sent => sent.map(drop),
        }
    }

    fn send_memory(&self, bytes: &[u8]) -> io::Result<()> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = rustix::fs::memfd_create("vmm-audit-journal", flags)?;
        let mut file = std::fs::File::from(memory);
        io::Write::write_all(&mut file, bytes)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals)?;
        self.send_fd(&file)
    }

    fn send_fd(&self, file: &std::fs::File) -> io::Result<()> {
        use rustix::net::{
            SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, sendmsg_addr,
        };
        let fds = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let address = SocketAddrUnix::new(&self.path)?;
        let nothing: [IoSlice<'_>; 0] = [];
        sendmsg_addr(&self.socket, &address, &nothing, &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

/// A field of the native protocol: with its length before it if it has lines.
fn field(to: &mut Vec<u8>, name: &str, value: &str) {
    to.extend_from_slice(name.as_bytes());
    if value.contains('\n') {
        to.push(b'\n');
        to.extend_from_slice(&(value.len() as u64).to_le_bytes());
    } else {
        to.push(b'=');
    }
    to.extend_from_slice(value.as_bytes());
    to.push(b'\n');
}

fn fields(delivery: &Delivery) -> Vec<u8> {
    let mut bytes = Vec::new();
    field(&mut bytes, "MESSAGE", &describe(&delivery.event));
    field(&mut bytes, "PRIORITY", &severity(&delivery.event).to_string());
    field(&mut bytes, "SYSLOG_IDENTIFIER", "vmm-audit");
    if let serde_json::Value::Object(map) = delivery.to_json() {
        for (name, value) in map {
            let value = match value {
                serde_json::Value::String(text) => text,
                other => other.to_string(),
            };
            field(&mut bytes, &format!("VMM_AUDIT_{}", name.to_uppercase()), &value);
        }
    }
    bytes
}

impl Sink for Journald {
    fn send(&mut self, delivery: &Delivery) -> Result<(), SinkError> {
        let sent = self.send_bytes(&fields(delivery));
        sent.map_err(|source| SinkError::Io { sink: format!("journal at {}", self.path.display()), source })
    }
}
