//! Where devices get the time from: the machine's one clock, never the host's.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Nanoseconds in a second.
pub(crate) const NANOSECONDS: u64 = 1_000_000_000;

/// A source of time that does not run backwards. A paused machine's clock stands still.
///
/// A closure is one. What the nanoseconds count from is said where a device takes a clock.
///
/// ```
/// use vmm_devices::Clock;
///
/// let start = std::time::Instant::now();
/// let clock = move || u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
/// assert!(clock.now_ns() <= clock.now_ns());
/// ```
pub trait Clock: Send + Sync {
    /// The time in nanoseconds. Called by devices on every access that depends on it, with the device
    /// locked: it must not use the device.
    fn now_ns(&self) -> u64;
}

impl<F: Fn() -> u64 + Send + Sync> Clock for F {
    fn now_ns(&self) -> u64 {
        self()
    }
}

impl<T: Clock + ?Sized> Clock for Arc<T> {
    fn now_ns(&self) -> u64 {
        (**self).now_ns()
    }
}

/// A clock that goes as far as it is told: for tests and for deterministic machines. Share it in an [`Arc`].
#[derive(Debug, Default)]
pub struct ManualClock(AtomicU64);

impl ManualClock {
    /// A clock that shows `ns`.
    pub fn new(ns: u64) -> Self {
        Self(AtomicU64::new(ns))
    }

    /// Goes on by `ns`, and stops at the largest value.
    pub fn advance(&self, ns: u64) {
        let step = |now: u64| Some(now.saturating_add(ns));
        // The closure always gives a value, so there is no other outcome.
        let (Ok(_) | Err(_)) = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, step);
    }

    /// Shows `ns` from now on.
    pub fn set(&self, ns: u64) {
        self.0.store(ns, Ordering::SeqCst);
    }
}

impl Clock for ManualClock {
    fn now_ns(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// Whole ticks of a clock of `hertz` that have passed at `ns`, cut to 64 bits.
pub(crate) fn ticks_at(ns: u64, hertz: u64) -> u64 {
    // At most 2^64 * hertz / 10^9, which fits where hertz is below 10^9.
    u64::try_from(u128::from(ns) * u128::from(hertz) / u128::from(NANOSECONDS)).unwrap_or(u64::MAX)
}

/// The first nanosecond at which [`ticks_at`] gives `ticks`.
pub(crate) fn ns_of_tick(ticks: u64, hertz: u64) -> u64 {
    u64::try_from((u128::from(ticks) * u128::from(NANOSECONDS)).div_ceil(u128::from(hertz)))
        .unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tick_and_nanosecond_agree() {
        for hertz in [1_193_182, 3_579_545] {
            for tick in [0, 1, 2, 17, 1 << 24, 1 << 40] {
                let ns = ns_of_tick(tick, hertz);
                assert_eq!(ticks_at(ns, hertz), tick);
                if ns > 0 {
                    assert_eq!(ticks_at(ns - 1, hertz), tick - 1);
                }
            }
        }
        assert_eq!(ns_of_tick(u64::MAX, 1), u64::MAX);
    }

    #[test]
    fn manual_clock_stops_at_the_end() {
        let clock = Arc::new(ManualClock::new(5));
        clock.advance(7);
        assert_eq!(clock.now_ns(), 12);
        clock.advance(u64::MAX);
        assert_eq!(clock.now_ns(), u64::MAX);
        clock.set(3);
        assert_eq!(clock.now_ns(), 3);
    }
}
