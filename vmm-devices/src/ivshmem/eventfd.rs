//! Eventfds, also such that a hostile peer has as well.

use std::io::{self, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::FileType;
use rustix::io::{Errno, ReadWriteFlags};

/// One that is not signalled.
pub(super) fn create() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Adds one. If its counter is full it has been signalled already; then this waits, if a peer has made it a blocking one.
pub(super) fn signal(fd: impl AsFd) {
    let (Ok(_) | Err(_)) = rustix::io::write(fd, &1_u64.to_ne_bytes());
}

/// Takes what was added; whether there was something. It never waits, even if a peer has made the eventfd a blocking one and comes
/// first.
///
/// # Errors
/// If it cannot be read so: then it is none, or the kernel is older than Linux 5.8. There is no other way that would not wait.
pub(super) fn take(fd: impl AsFd) -> Result<bool, Errno> {
    match read_now(fd, &mut [0; 8]) {
        Ok(_) => Ok(true),
        Err(Errno::AGAIN) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether it is one, or as good as one: reading it never waits, and writing it does nothing to anything else. Nobody is asked
/// but the kernel, as whoever serves a file (FUSE) may never answer: not even to what its type is, or to its being closed.
pub(super) fn is_one(fd: impl AsFd) -> bool {
    // A read of nothing finds out whether it can be read: what cannot (epoll) calls any read invalid.
    let readable = read_now(&fd, &mut []) == Ok(0);
    // What knows not to wait finds this one too short. Others do not come so far (inotify, files of a server's), or take it.
    let counts = readable && read_now(&fd, &mut [0; 4]) == Err(Errno::INVAL);
    // An anonymous inode has no type.
    counts
        && rustix::fs::fstat(fd)
            .is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::Unknown)
}

/// Reads at the file's own position, without waiting.
fn read_now(fd: impl AsFd, into: &mut [u8]) -> Result<usize, Errno> {
    rustix::io::preadv2(fd, &mut [IoSliceMut::new(into)], u64::MAX, ReadWriteFlags::NOWAIT)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use rustix::fs::{OFlags, inotify};

    use super::*;

    #[test]
    fn what_was_signalled_is_taken_once() {
        let bell = create().unwrap();
        assert_eq!(take(&bell), Ok(false));
        signal(&bell);
        signal(&bell);
        assert_eq!([take(&bell), take(&bell)], [Ok(true), Ok(false)]);
    }

    /// A peer makes the eventfd a blocking one and takes what was there.
    #[test]
    fn taking_never_waits() {
        let bell = create().unwrap();
        let flags = rustix::fs::fcntl_getfl(&bell).unwrap();
        rustix::fs::fcntl_setfl(&bell, flags - OFlags::NONBLOCK).unwrap();
        let (tell, told) = mpsc::channel();
        let inotify = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
        thread::spawn(move || {
            tell.send(take(&bell)).unwrap();
            // It knows of no reads that do not wait.
            tell.send(take(&inotify)).unwrap();
        });
        assert_eq!(told.recv_timeout(Duration::from_secs(10)), Ok(Ok(false)));
        assert_eq!(told.recv_timeout(Duration::from_secs(10)), Ok(Err(Errno::OPNOTSUPP)));
    }

    #[test]
    fn what_is_none_is_seen() {
        let bell = create().unwrap();
        assert!(is_one(&bell));
        signal(&bell);
        assert!(is_one(&bell) && take(&bell) == Ok(true), "nothing of it is taken");
        let (reader, mut writer) = std::io::pipe().unwrap();
        let (one, other) = UnixStream::pair().unwrap();
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
        let inotify = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
        assert!(!is_one(&reader) && !is_one(&writer) && !is_one(one) && !is_one(other));
        writer.write_all(b"something to be read").unwrap();
        assert!(!is_one(reader) && !is_one(epoll) && !is_one(inotify));
        assert!(!is_one(tempfile::tempfile().unwrap()));
        assert!(!is_one(std::fs::File::open("/dev/null").unwrap()));
    }
}
