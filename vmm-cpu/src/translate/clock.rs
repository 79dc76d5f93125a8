//! The virtual machine's clock: the host's monotonic time, or one that counts executed instructions.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use crate::error::Result;
use crate::hypervisor::ClockSource;
use crate::vm::VmClock;

/// Rate of the time-stamp counter unless another is asked for: one tick a nanosecond.
pub(crate) const DEFAULT_TSC_KHZ: u32 = 1_000_000;

/// Not a time: the clock runs.
const RUNS: u64 = u64::MAX;

/// See the module.
#[derive(Debug)]
pub(crate) struct Clock {
    tsc_khz: u32,
    /// The counter itself, where programs see one that cannot be another.
    counter: Option<fn() -> u64>,
    source: ClockSource,
    start: Instant,
    /// Guest time less the time since `start`, modulo 2^64, while the clock runs.
    offset: AtomicU64,
    /// Guest time while the clock stands, else [`RUNS`].
    stands_at: AtomicU64,
    /// Odd while the clock is being set. Whoever reads it, as all vCPUs do all the time, takes no lock but reads again if
    /// this has changed.
    sequence: AtomicU64,
    setting: Mutex<()>,
    /// Time of a deterministic clock in nanoseconds: one an instruction, plus what halted vCPUs skipped.
    counted: AtomicU64,
}

impl Clock {
    pub(crate) fn new(tsc_khz: Option<u32>, source: ClockSource) -> Self {
        Self {
            tsc_khz: tsc_khz.unwrap_or(DEFAULT_TSC_KHZ),
            counter: None,
            source,
            start: Instant::now(),
            offset: AtomicU64::new(0),
            stands_at: AtomicU64::new(RUNS),
            sequence: AtomicU64::new(0),
            setting: Mutex::default(),
            counted: AtomicU64::new(0),
        }
    }

    /// A clock of the host whose time-stamp counter is read by `counter` and runs at that rate.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn with_counter(tsc_khz: u32, counter: fn() -> u64) -> Self {
        Self { counter: Some(counter), ..Self::new(Some(tsc_khz), ClockSource::Host) }
    }

    /// The time-stamp counter, where it is not made of the time.
    pub(crate) fn counter(&self) -> Option<u64> {
        self.counter.map(|read| read())
    }

    fn since_start(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    pub(crate) fn is_deterministic(&self) -> bool {
        self.source == ClockSource::Deterministic
    }

    /// Guest time in nanoseconds.
    pub(crate) fn nanoseconds(&self) -> u64 {
        if self.is_deterministic() {
            return self.counted.load(Ordering::Relaxed);
        }
        loop {
            let sequence = self.sequence.load(Ordering::SeqCst);
            let now = self.host_nanoseconds();
            if sequence.is_multiple_of(2) && self.sequence.load(Ordering::SeqCst) == sequence {
                return now;
            }
            std::hint::spin_loop();
        }
    }

    fn host_nanoseconds(&self) -> u64 {
        match self.stands_at.load(Ordering::SeqCst) {
            RUNS => self.since_start().wrapping_add(self.offset.load(Ordering::SeqCst)),
            stands_at => stands_at,
        }
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
        self.change(|clock| clock.run_from(nanoseconds));
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.stands_at.load(Ordering::SeqCst) != RUNS
    }

    /// Sets the clock. What was read before is no later than what `set` reads.
    fn change(&self, set: impl FnOnce(&Self)) {
        let _setting = self.setting.lock().unwrap_or_else(PoisonError::into_inner);
        self.sequence.fetch_add(1, Ordering::SeqCst);
        set(self);
        self.sequence.fetch_add(1, Ordering::SeqCst);
    }

    fn run_from(&self, nanoseconds: u64) {
        self.offset.store(nanoseconds.wrapping_sub(self.since_start()), Ordering::SeqCst);
        self.stands_at.store(RUNS, Ordering::SeqCst);
    }
}

impl VmClock for Clock {
    fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    fn is_host_tsc(&self) -> bool {
        self.counter.is_some()
    }

    fn now(&self) -> Result<u64> {
        Ok(self.nanoseconds())
    }

    fn pause(&self) -> Result<()> {
        self.change(|clock| {
            let now = clock.host_nanoseconds();
            clock.stands_at.store(now.min(RUNS - 1), Ordering::SeqCst);
        });
        Ok(())
    }

    fn resume(&self) -> Result<()> {
        self.change(|clock| clock.run_from(clock.host_nanoseconds()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn counted_time_moves_only_when_told() {
        let clock = Clock::new(Some(2_500_000), ClockSource::Deterministic);
        clock.advance(1000);
        assert_eq!((clock.nanoseconds(), clock.ticks(1000)), (1000, 2500));
        assert_eq!((clock.nanoseconds_of(2500), clock.nanoseconds_of(2501)), (1000, 1001));
    }

    #[test]
    fn host_time_goes_on_from_what_it_is_set_to_and_never_back() {
        let clock = Clock::new(None, ClockSource::Host);
        clock.set(1 << 50);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let mut last = 0;
                for _ in 0..20_000 {
                    let now = clock.nanoseconds();
                    assert!(now >= last, "{now} after {last}");
                    last = now;
                }
                last
            });
            while !reader.is_finished() {
                clock.pause().unwrap();
                clock.resume().unwrap();
            }
            assert!((1 << 50..(1 << 50) + 60_000_000_000).contains(&reader.join().unwrap()));
        });
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
