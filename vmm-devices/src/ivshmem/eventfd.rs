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
pub(super) fn take(fd: impl AsFd) -> bool {
    let mut count = [0; 8];
    // No offset: the file's own position.
    let taken =
        rustix::io::preadv2(&fd, &mut [IoSliceMut::new(&mut count)], u64::MAX, ReadWriteFlags::NOWAIT);
    match taken {
        Ok(_) => true,
        // Kernels that have no such flag for eventfds. To be signalled once too often is no harm.
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => rustix::io::read(&fd, &mut count).is_ok(),
        Err(_) => false,
    }
}

/// Whether it may be one: files, pipes, sockets and devices, to which a write does something, are not.
pub(super) fn may_be_one(fd: impl AsFd) -> bool {
    // An anonymous inode has no type.
    rustix::fs::fstat(fd).is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::Unknown)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use rustix::fs::OFlags;

    use super::*;

    #[test]
    fn what_was_signalled_is_taken_once() {
        let bell = create().unwrap();
        assert!(!take(&bell));
        signal(&bell);
        signal(&bell);
        assert!(take(&bell) && !take(&bell));
    }

    /// A peer makes the eventfd a blocking one and takes what was there.
    #[test]
    fn taking_never_waits() {
        let bell = create().unwrap();
        let flags = rustix::fs::fcntl_getfl(&bell).unwrap();
        rustix::fs::fcntl_setfl(&bell, flags - OFlags::NONBLOCK).unwrap();
        let (tell, told) = mpsc::channel();
        thread::spawn(move || tell.send(take(&bell)));
        assert_eq!(told.recv_timeout(Duration::from_secs(10)), Ok(false));
    }

    #[test]
    fn what_is_none_is_seen() {
        assert!(may_be_one(create().unwrap()));
        let (reader, writer) = std::io::pipe().unwrap();
        let (one, other) = UnixStream::pair().unwrap();
        assert!(!may_be_one(reader) && !may_be_one(writer) && !may_be_one(one) && !may_be_one(other));
        assert!(!may_be_one(tempfile::tempfile().unwrap()));
        assert!(!may_be_one(std::fs::File::open("/dev/null").unwrap()));
    }
}
