//! The INTR pin of a vCPU and the sleep of a halted one, as the backends here share them with their handles.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// The pin is high.
const HIGH: u64 = 1;
/// It was asserted once more.
const ONE: u64 = 2;

/// A level, and how often it was asserted, so that an interrupt which comes while an older one is withdrawn is not lost.
#[derive(Debug, Default)]
pub(crate) struct IntrPin(AtomicU64);

/// What [`IntrPin::now`] saw.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Moment(u64);

impl IntrPin {
    pub(crate) fn is_high(&self) -> bool {
        self.now().0 & HIGH != 0
    }

    /// The level and when that was.
    pub(crate) fn now(&self) -> Moment {
        Moment(self.0.load(Ordering::SeqCst))
    }

    pub(crate) fn set(&self, asserted: bool) {
        if asserted {
            self.0.fetch_add(ONE, Ordering::SeqCst);
            self.0.fetch_or(HIGH, Ordering::SeqCst);
        } else {
            self.0.fetch_and(!HIGH, Ordering::SeqCst);
        }
    }

    /// Drives the pin low, unless somebody asserted it since `moment`; whether it is low.
    pub(crate) fn withdraw(&self, moment: Moment) -> bool {
        let low = moment.0 & !HIGH;
        self.0.compare_exchange(moment.0, low, Ordering::SeqCst, Ordering::SeqCst).is_ok()
    }
}

/// Where a thread sleeps until it is woken. Nobody pays for a system call to wake one that does not sleep.
///
/// Whoever wakes sets what is looked at and looks for sleepers afterwards; a sleeper counts itself and looks afterwards.
/// Both do so sequentially consistent, so that one of the two sees the other.
#[derive(Debug, Default)]
pub(crate) struct Sleeper {
    sleepers: AtomicU32,
    asleep: Mutex<()>,
    wakeup: Condvar,
}

impl Sleeper {
    /// Lets whoever sleeps look whether it is awake. What it looks at is to be set before.
    pub(crate) fn wake(&self) {
        fence(Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) == 0 {
            return;
        }
        // Taking the lock orders the notification after a sleeper's last look.
        drop(self.asleep.lock().unwrap_or_else(PoisonError::into_inner));
        self.wakeup.notify_all();
    }

    /// Sleeps until `awake`, at most until `timeout` has passed; whether it is awake.
    pub(crate) fn sleep(&self, timeout: Option<Duration>, awake: impl Fn() -> bool) -> bool {
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        let is_awake = self.sleep_counted(timeout, awake);
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
        is_awake
    }

    fn sleep_counted(&self, timeout: Option<Duration>, awake: impl Fn() -> bool) -> bool {
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        let mut guard = self.asleep.lock().unwrap_or_else(PoisonError::into_inner);
        while !awake() {
            guard = match deadline {
                None => self.wakeup.wait(guard).unwrap_or_else(PoisonError::into_inner),
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return false;
                    }
                    self.wakeup.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interrupt_asserted_while_another_is_withdrawn_stays() {
        let pin = IntrPin::default();
        pin.set(true);
        let before = pin.now();
        // Between the callback's answer and what the vCPU makes of it.
        pin.set(true);
        assert!(!pin.withdraw(before) && pin.is_high());
        assert!(pin.withdraw(pin.now()) && !pin.is_high());
    }

    #[test]
    fn sleep_ends_by_time_or_because_it_is_awake() {
        let sleeper = Sleeper::default();
        assert!(!sleeper.sleep(Some(Duration::from_millis(1)), || false));
        assert!(sleeper.sleep(None, || true));
    }

    #[test]
    fn no_call_to_wake_is_lost() {
        const TURNS: u32 = 20_000;
        let (sleepers, turn) = ([Sleeper::default(), Sleeper::default()], AtomicU32::new(0));
        let play = |own: u32| {
            for n in (0..TURNS).filter(|n| n % 2 == own) {
                let mine = || turn.load(Ordering::Relaxed) == n;
                assert!(sleepers[own as usize].sleep(Some(Duration::from_secs(20)), mine), "turn {n}");
                turn.store(n + 1, Ordering::Relaxed);
                sleepers[1 - own as usize].wake();
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| play(0));
            play(1);
        });
    }
}
