//! Unix sockets that a program listens at.

use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Context as _, Result};

/// Listens at `path`. A socket there that nobody listens at is replaced, since a confined program leaves its own behind.
///
/// # Errors
/// If something else is there, or the host refuses it.
pub fn listen(path: &Path) -> Result<UnixListener> {
    let bound = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_left_behind(path) => {
            fs::remove_file(path).and_then(|()| UnixListener::bind(path))
        }
        bound => bound,
    };
    let taken = || format!("listening at {}; a path is wanted that is free", path.display());
    bound.with_context(taken)
}

/// Whether `path` is a socket at which nobody listens.
fn is_left_behind(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket())
        && UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_socket_that_is_left_behind_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let first = listen(&path).unwrap();
        let error = format!("{:#}", listen(&path).unwrap_err());
        assert!(error.contains(&*path.to_string_lossy()) && error.contains("in use"), "{error}");
        drop(first);
        let again = listen(&path).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        drop(again);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "a file of somebody's").unwrap();
        listen(&path).unwrap_err();
        assert_eq!(fs::read(&path).unwrap(), b"a file of somebody's");
    }
}
