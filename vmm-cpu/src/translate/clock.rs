//! The virtual machine's clock: the host's monotonic time, or one that counts executed instructions.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::Result;
use crate::hypervisor::ClockSource;
use crate::vm::VmClock;

/// Rate of the time-stamp counter unless another is asked for: one tick a nanosecond.
pub(crate) const DEFAULT_TSC_KHZ: u32 = 1_000_000;

/// See the module.
#[derive(Debug)]
pub(crate) struct Clock {
    tsc_khz: u32,
    source: ClockSource,
    time: Mutex<Time>,
    /// Time of a deterministic clock in nanoseconds: one an instruction, plus what halted vCPUs skipped.
    counted: AtomicU64,
}

#[derive(Debug)]
struct Time {
    /// Guest time when the clock was last set going or stopped.
    passed: Duration,
    /// When it was set going; `None` while it stands.
    since: Option<Instant>,
}

impl Time {
    fn now(&self) -> Duration {
        self.passed + self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

impl Clock {
    pub(crate) fn new(tsc_khz: Option<u32>, source: ClockSource) -> Self {
        Self {
            tsc_khz: tsc_khz.unwrap_or(DEFAULT_TSC_KHZ),
            source,
            time: Mutex::new(Time { passed: Duration::ZERO, since: Some(Instant::now()) }),
            counted: AtomicU64::new(0),
        }
    }

    pub(crate) fn is_deterministic(&self) -> bool {
        self.source == ClockSource::Deterministic
    }

    /// Guest time in nanoseconds.
    pub(crate) fn nanoseconds(&self) -> u64 {
        if self.is_deterministic() {
            return self.counted.load(Ordering::Relaxed);
        }
        u64::try_from(self.time().now().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Lets a deterministic clock go on; others go by themselves.
    pub(crate) fn advance(&self, nanoseconds: u64) {
        if self.is_deterministic() {
            self.counted.fetch_add(nanoseconds, Ordering::Relaxed);
        }
    }

    /// Ticks of the counter in that time.
    #[allow(clippy::cast_possible_truncation, reason = "the counter wraps, after centuries")]
    pub(crate) fn ticks(&self, nanoseconds: u64) -> u64 {
        (u128::from(nanoseconds) * u128::from(self.tsc_khz) / 1_000_000) as u64
    }

    /// Nanoseconds, rounded up, that a number of ticks takes.
    pub(crate) fn nanoseconds_of(&self, ticks: u64) -> u64 {
        let nanoseconds = (u128::from(ticks) * 1_000_000).div_ceil(u128::from(self.tsc_khz.max(1)));
        u64::try_from(nanoseconds).unwrap_or(u64::MAX)
    }

    pub(crate) fn set(&self, nanoseconds: u64) {
        self.counted.store(nanoseconds, Ordering::Relaxed);
        *self.time() = Time { passed: Duration::from_nanos(nanoseconds), since: Some(Instant::now()) };
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.time().since.is_none()
    }

    fn time(&self) -> MutexGuard<'_, Time> {
        self.time.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VmClock for Clock {
    fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    fn now(&self) -> Result<u64> {
        Ok(self.nanoseconds())
    }

    fn pause(&self) -> Result<()> {
        let mut time = self.time();
        *time = Time { passed: time.now(), since: None };
        Ok(())
    }

    fn resume(&self) -> Result<()> {
        self.time().since.get_or_insert_with(Instant::now);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counted_time_moves_only_when_told() {
        let clock = Clock::new(Some(2_500_000), ClockSource::Deterministic);
        clock.advance(1000);
        assert_eq!((clock.nanoseconds(), clock.ticks(1000)), (1000, 2500));
        assert_eq!((clock.nanoseconds_of(2500), clock.nanoseconds_of(2501)), (1000, 1001));
    }

    #[test]
    fn host_time_stands_still_while_paused() {
        let clock = Clock::new(None, ClockSource::Host);
        clock.pause().unwrap();
        let before = clock.nanoseconds();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(clock.nanoseconds(), before);
        clock.resume().unwrap();
        std::thread::sleep(Duration::from_millis(2));
        assert!(clock.nanoseconds() >= before + 2_000_000);
    }
}
