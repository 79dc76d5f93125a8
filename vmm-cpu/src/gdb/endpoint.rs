//! Where a debugger connects: a TCP port or a Unix socket.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A debugger that reads nothing for so long is gone.
const LONGEST_WRITE: Duration = Duration::from_secs(10);

/// Why nobody can connect.
#[derive(Debug, thiserror::Error)]
#[error("{address:?} is no place to wait for a debugger: {reason}")]
#[non_exhaustive]
pub struct ListenError {
    /// What was asked for.
    pub address: String,
    /// What is wrong with it.
    pub reason: String,
}

/// A place where debuggers connect, one at a time; a second one waits until the first is gone.
///
/// Whoever can connect owns the guest (and nothing of the host but the guest's memory): keep it on the loopback
/// interface, or in a directory that others cannot enter.
#[derive(Debug)]
pub struct Endpoint {
    listener: Listener,
    address: String,
}

#[derive(Debug)]
enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

impl Endpoint {
    /// Waits for debuggers at `address`: `unix:PATH`, `HOST:PORT`, or `:PORT` on the loopback interface. Port 0 is any
    /// that is free; see [`Endpoint::address`]. A socket at PATH that nobody listens at is replaced; the one made here
    /// stays behind.
    ///
    /// # Errors
    /// [`ListenError`] for an address of another form, and with the host's reason.
    pub fn listen(address: &str) -> Result<Self, ListenError> {
        let error = |reason: &dyn fmt::Display| ListenError {
            address: address.to_owned(),
            reason: reason.to_string(),
        };
        // Without a path the host would choose a name that nobody knows.
        if let Some(path) = address.strip_prefix("unix:").filter(|path| !path.is_empty()) {
            let listener = listen_at_path(Path::new(path)).map_err(|reason| error(&reason))?;
            return Ok(Self { listener: Listener::Unix(listener), address: address.to_owned() });
        }
        if address.rsplit_once(':').is_none_or(|(_, port)| port.parse::<u16>().is_err()) {
            return Err(error(&"expected HOST:PORT, :PORT or unix:PATH"));
        }
        let on_loopback = address.starts_with(':').then(|| format!("127.0.0.1{address}"));
        let bound = TcpListener::bind(on_loopback.as_deref().unwrap_or(address));
        let listener = bound.map_err(|reason| error(&reason))?;
        let local: SocketAddr = listener.local_addr().map_err(|reason| error(&reason))?;
        Ok(Self { listener: Listener::Tcp(listener), address: local.to_string() })
    }

    /// Where that is: what GDB's `target remote` takes, with the port's number. (GDB wants a Unix socket's path without
    /// `unix:`.)
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The next debugger. Blocks unless one is waiting.
    pub(super) fn accept(&self) -> io::Result<Stream> {
        let stream = match &self.listener {
            Listener::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                // Packets are small and each is waited for.
                stream.set_nodelay(true)?;
                stream.set_write_timeout(Some(LONGEST_WRITE))?;
                Stream::Tcp(stream)
            }
            Listener::Unix(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_write_timeout(Some(LONGEST_WRITE))?;
                Stream::Unix(stream)
            }
        };
        Ok(stream)
    }
}

fn listen_at_path(path: &Path) -> io::Result<UnixListener> {
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_left_behind(path) => {
            std::fs::remove_file(PathBuf::from(path))?;
            UnixListener::bind(path)
        }
        result => result,
    }
}

/// Whether `path` is a socket at which nobody listens.
fn is_left_behind(path: &Path) -> bool {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket());
    is_socket
        && UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

impl AsRawFd for Endpoint {
    fn as_raw_fd(&self) -> RawFd {
        match &self.listener {
            Listener::Tcp(listener) => listener.as_raw_fd(),
            Listener::Unix(listener) => listener.as_raw_fd(),
        }
    }
}

/// A debugger's connection.
#[derive(Debug)]
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl AsRawFd for Stream {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Tcp(stream) => stream.as_raw_fd(),
            Self::Unix(stream) => stream.as_raw_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_another_form_is_an_error_that_names_it() {
        for address in ["", "1234", "localhost", "localhost:http", "127.0.0.1:65536", "unix:"] {
            let error = Endpoint::listen(address).err();
            assert!(
                error.is_some_and(|error| error.to_string().contains(&format!("{address:?}"))),
                "{address}"
            );
        }
    }

    #[test]
    fn a_port_alone_is_on_the_loopback_interface() {
        let endpoint = Endpoint::listen(":0").unwrap();
        let address: SocketAddr = endpoint.address().parse().unwrap();
        assert!(address.ip().is_loopback() && address.port() != 0);
        assert!(Endpoint::listen(endpoint.address()).is_err(), "the port is taken");
    }

    #[test]
    fn a_socket_left_behind_is_replaced_and_one_in_use_is_not() {
        let path = std::env::temp_dir().join(format!("vmm-cpu-gdb-{}", std::process::id()));
        let address = format!("unix:{}", path.display());
        drop(UnixListener::bind(&path).unwrap());
        let endpoint = Endpoint::listen(&address).unwrap();
        assert!(Endpoint::listen(&address).is_err());
        drop(endpoint);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "a file").unwrap();
        assert!(Endpoint::listen(&address).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"a file");
        std::fs::remove_file(&path).unwrap();
    }
}
