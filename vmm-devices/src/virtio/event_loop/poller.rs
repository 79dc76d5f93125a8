//! What a loop sleeps on: an epoll set with doorbells of the kernel, sources, a timer, and what wakes it.
//!
//! Everything is edge-triggered. An eventfd and a timer then need no read: each signal is an event of its own. A wake-up
//! costs the sleeper one `epoll_wait`, and whoever wakes it one `write`. `event-manager` has no way to add and remove from another
//! thread but a closure that waits for the loop's next turn, and milliseconds for time; `polling` makes three system calls more
//! at each wait.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, timerfd_create, timerfd_settime,
};

/// How many events one wait tells. Others stay for the next one, in the order of their coming.
const EVENTS: usize = 64;

/// Tags that are no slot's.
const TIMER: u64 = u64::MAX;
const KICK: u64 = u64::MAX - 1;

/// An eventfd.
pub(super) fn notifier() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

/// Signals an eventfd.
pub(super) fn signal(notifier: &OwnedFd) {
    // It fails when the counter is full, which takes 2^64 signals.
    let (Ok(_) | Err(_)) = rustix::io::write(notifier, &1_u64.to_ne_bytes());
}

pub(super) struct Poller {
    epoll: OwnedFd,
    timer: OwnedFd,
}

/// What [`Poller::wait`] found.
#[derive(Default)]
pub(super) struct Found {
    /// Tags of what is ready.
    pub(super) tags: Vec<u64>,
    /// It was time.
    pub(super) timer: bool,
}

impl Poller {
    /// Wakes up whenever `kick` is signalled.
    pub(super) fn new(kick: &OwnedFd) -> io::Result<Self> {
        let poller = Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            timer: timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?,
        };
        poller.add(kick, KICK)?;
        poller.add(&poller.timer, TIMER)?;
        Ok(poller)
    }

    /// Tells each arrival of input on `fd` by `tag`.
    pub(super) fn add(&self, fd: &OwnedFd, tag: u64) -> io::Result<()> {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        Ok(epoll::add(&self.epoll, fd, epoll::EventData::new_u64(tag), flags)?)
    }

    pub(super) fn remove(&self, fd: &OwnedFd) {
        // It fails for what was not added, which is no harm.
        let (Ok(()) | Err(_)) = epoll::delete(&self.epoll, fd);
    }

    /// Wakes up once, so many nanoseconds from now, at least one; `None` calls that off.
    pub(super) fn set_timer(&self, ns: Option<u64>) -> io::Result<()> {
        let time = Duration::from_nanos(ns.map_or(0, |ns| ns.max(1)));
        let once = Itimerspec { it_interval: Timespec::default(), it_value: timespec(time) };
        timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once)?;
        Ok(())
    }

    /// Waits at most so long, `None` without end. A signal ends it early, with nothing found.
    pub(super) fn wait(&self, timeout: Option<Duration>, found: &mut Found) -> io::Result<()> {
        // Longer ones end early.
        let timeout = timeout.map(|time| timespec(time.min(Duration::from_secs(1 << 20))));
        found.tags.clear();
        found.timer = false;
        let mut room = [const { MaybeUninit::uninit() }; EVENTS];
        let events = match epoll::wait(&self.epoll, &mut room, timeout.as_ref()) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        for event in events {
            match event.data.u64() {
                TIMER => found.timer = true,
                KICK => {}
                tag => found.tags.push(tag),
            }
        }
        Ok(())
    }
}

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

fn timespec(time: Duration) -> Timespec {
    // A u64 of nanoseconds has no more seconds than that.
    let tv_sec = i64::try_from(time.as_secs()).unwrap_or(i64::MAX);
    Timespec { tv_sec, tv_nsec: time.subsec_nanos().into() }
}
