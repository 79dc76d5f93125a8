//! The toy backend's clock: the host's monotonic one, which also drives the time-stamp counter.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_cpu::{Result, VmClock};

/// Rate of the time-stamp counter unless another is asked for: one tick a nanosecond.
const DEFAULT_TSC_KHZ: u32 = 1_000_000;

/// See the module.
#[derive(Debug)]
pub(super) struct ToyClock {
    time: Mutex<Time>,
    tsc_khz: u32,
}

#[derive(Debug)]
struct Time {
    /// Guest time when the clock was last set going or stopped.
    passed: Duration,
    /// When it was set going; `None` while it stands.
    since: Option<Instant>,
}

impl ToyClock {
    pub(super) fn new(tsc_khz: Option<u32>) -> Self {
        let time = Time { passed: Duration::ZERO, since: Some(Instant::now()) };
        Self { time: Mutex::new(time), tsc_khz: tsc_khz.unwrap_or(DEFAULT_TSC_KHZ) }
    }

    pub(super) fn set(&self, nanoseconds: u64) {
        *self.time() = Time { passed: Duration::from_nanos(nanoseconds), since: Some(Instant::now()) };
    }

    /// The time-stamp counter of a vCPU with offset 0.
    pub(super) fn tsc(&self) -> u64 {
        let ticks = u128::from(self.nanoseconds()) * u128::from(self.tsc_khz) / 1_000_000;
        // It wraps, after centuries.
        ticks as u64
    }

    /// Guest time.
    pub(super) fn nanoseconds(&self) -> u64 {
        u64::try_from(self.time().now().as_nanos()).unwrap_or(u64::MAX)
    }

    pub(super) fn is_paused(&self) -> bool {
        self.time().since.is_none()
    }

    fn time(&self) -> MutexGuard<'_, Time> {
        self.time.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Time {
    fn now(&self) -> Duration {
        self.passed + self.since.map_or(Duration::ZERO, |since| since.elapsed())
    }
}

impl VmClock for ToyClock {
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
