//! The INTR pin of a vCPU and the sleep of a halted one, as the backends here share them with their handles.

use std::sync::atomic::{AtomicU64, Ordering};
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

/// Where a thread sleeps until it is woken.
#[derive(Debug, Default)]
pub(crate) struct Sleeper {
    asleep: Mutex<()>,
    wakeup: Condvar,
}

impl Sleeper {
    /// Lets whoever sleeps look whether it is awake. What it looks at is to be set before.
    pub(crate) fn wake(&self) {
        // Taking the lock orders the notification after a sleeper's last look.
        drop(self.asleep.lock().unwrap_or_else(PoisonError::into_inner));
        self.wakeup.notify_all();
    }

    /// Sleeps until `awake`, at most until `timeout` has passed; whether it is awake.
    pub(crate) fn sleep(&self, timeout: Option<Duration>, awake: impl Fn() -> bool) -> bool {
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
}
