//! What the worker waits for: one epoll set, so that an executor watches a single descriptor, however many connections there are.
//!
//! Everything is edge-triggered: data that a guest has no room for is told once, and nobody spins until it has.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{Timespec, epoll};

/// How many events one look tells. Others stay for the next.
pub(super) const EVENTS: usize = 64;

/// What happened to whom.
#[derive(Clone, Copy, Debug)]
pub(super) struct Event {
    pub(super) tag: u64,
    /// There is input, or the end of it.
    pub(super) readable: bool,
    pub(super) writable: bool,
    /// The other side is gone, in both directions.
    pub(super) hung_up: bool,
}

/// The set.
#[derive(Debug)]
pub(super) struct Poll(OwnedFd);

impl Poll {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(epoll::CreateFlags::CLOEXEC)?))
    }

    /// Tells of input, its end, and room for output.
    pub(super) fn add(&self, fd: BorrowedFd<'_>, tag: u64) -> io::Result<()> {
        use epoll::EventFlags as Flags;
        let flags = Flags::IN | Flags::OUT | Flags::RDHUP | Flags::ET;
        Ok(epoll::add(&self.0, fd, epoll::EventData::new_u64(tag), flags)?)
    }

    /// Tells of the end alone, however much data comes and goes.
    pub(super) fn add_for_end(&self, fd: BorrowedFd<'_>, tag: u64) -> io::Result<()> {
        Ok(epoll::add(&self.0, fd, epoll::EventData::new_u64(tag), epoll::EventFlags::ET)?)
    }

    /// Tells no more of it, whoever still holds it.
    pub(super) fn remove(&self, fd: BorrowedFd<'_>) {
        // It fails for what was not added, which is no harm.
        let (Ok(()) | Err(_)) = epoll::delete(&self.0, fd);
    }

    /// Adds what has happened, [`EVENTS`] at most, to `found`. An epoll that fails tells nothing; timeouts end what waits for it.
    pub(super) fn look(&self, found: &mut Vec<Event>) {
        self.wait(Duration::ZERO, found);
    }

    /// The same, after waiting for something to happen, `timeout` at most.
    pub(super) fn wait(&self, timeout: Duration, found: &mut Vec<Event>) {
        use epoll::EventFlags as Flags;
        let mut room = [const { MaybeUninit::uninit() }; EVENTS];
        let timeout = Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        let Ok((events, _)) = epoll::wait(&self.0, &mut room, Some(&timeout)) else { return };
        found.extend(events.iter().map(|event| {
            let flags = event.flags;
            Event {
                tag: event.data.u64(),
                readable: flags.intersects(Flags::IN | Flags::RDHUP | Flags::HUP | Flags::ERR),
                writable: flags.intersects(Flags::OUT | Flags::HUP | Flags::ERR),
                hung_up: flags.intersects(Flags::HUP),
            }
        }));
    }
}

impl AsFd for Poll {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
