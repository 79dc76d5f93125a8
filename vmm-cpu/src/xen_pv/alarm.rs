//! Kicks a virtual processor out of the guest when one of its timers runs out.

use std::fmt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::engine::EngineHandle;
use crate::error::{Error, Result};

/// One alarm, with a thread that sleeps for it. Ends when dropped.
pub(super) struct Alarm {
    shared: Arc<Shared>,
}

impl fmt::Debug for Alarm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Alarm").field("state", &*self.shared.lock()).finish()
    }
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    at: Option<Instant>,
    /// When the thread wakes up by itself.
    sleeps_until: Option<Instant>,
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, handle: &dyn EngineHandle) {
        let mut state = self.lock();
        while !state.ended {
            let now = Instant::now();
            if state.at.is_some_and(|at| at <= now) {
                state.at = None;
                drop(state);
                handle.kick();
                state = self.lock();
                continue;
            }
            state.sleeps_until = state.at;
            state = match state.at {
                Some(at) => {
                    self.changed.wait_timeout(state, at - now).unwrap_or_else(PoisonError::into_inner).0
                }
                None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }
}

impl Alarm {
    /// An alarm that is not set, for the virtual processor behind `handle`.
    ///
    /// # Errors
    /// If the host refuses a thread.
    pub(super) fn new(index: u32, handle: Arc<dyn EngineHandle>) -> Result<Self> {
        let shared = Arc::new(Shared { state: Mutex::default(), changed: Condvar::new() });
        let theirs = Arc::clone(&shared);
        std::thread::Builder::new()
            .name(format!("pv-timer{index}"))
            .spawn(move || theirs.run(&*handle))
            .map_err(|source| Error::Host {
                backend: super::NAME,
                operation: "starting a timer thread",
                source,
            })?;
        Ok(Self { shared })
    }

    /// Sets it, in place of what it was set to.
    pub(super) fn set(&self, at: Option<Instant>) {
        let mut state = self.shared.lock();
        state.at = at;
        // A thread that wakes up too early looks again by itself.
        let too_late = match (at, state.sleeps_until) {
            (Some(at), Some(until)) => at < until,
            (Some(_), None) => true,
            (None, _) => false,
        };
        if too_late {
            self.shared.changed.notify_one();
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        self.shared.lock().ended = true;
        self.shared.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender, channel};
    use std::time::Duration;

    use super::*;

    #[derive(Debug)]
    struct Kicks(Sender<Instant>);

    impl EngineHandle for Kicks {
        fn kick(&self) {
            self.0.send(Instant::now()).unwrap();
        }

        fn flush(&self) {}
    }

    fn alarm() -> (Alarm, Receiver<Instant>) {
        let (sender, kicks) = channel();
        (Alarm::new(0, Arc::new(Kicks(sender))).unwrap(), kicks)
    }

    #[test]
    fn kicks_once_and_not_too_early() {
        let (alarm, kicks) = alarm();
        let at = Instant::now() + Duration::from_millis(5);
        alarm.set(Some(at));
        assert!(kicks.recv().unwrap() >= at);
        alarm.set(Some(Instant::now()));
        kicks.recv().unwrap();
        drop(alarm);
        assert!(kicks.recv().is_err(), "its thread has ended and kicked no more");
    }

    #[test]
    fn an_earlier_time_counts_and_a_cleared_one_does_not() {
        let (alarm, kicks) = alarm();
        let far = Instant::now() + Duration::from_secs(3600);
        alarm.set(Some(far));
        // The thread sleeps for that one, or is about to.
        std::thread::sleep(Duration::from_millis(2));
        alarm.set(Some(Instant::now()));
        assert!(kicks.recv().unwrap() < far);
        alarm.set(Some(Instant::now() + Duration::from_millis(20)));
        alarm.set(None);
        assert!(kicks.recv_timeout(Duration::from_millis(60)).is_err());
    }
}
