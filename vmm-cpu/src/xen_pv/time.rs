//! System time: nanoseconds since the domain started, computed from the time-stamp counter with the very formula that the
//! guest uses (public/xen.h, `struct vcpu_time_info`), so that both always agree.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::abi::vcpu::TimeInfo;
use crate::error::{Error, Result};

/// `XEN_PVCLOCK_TSC_STABLE_BIT`: the counters of all virtual processors agree.
const TSC_STABLE: u8 = 1;

const NS: u128 = 1_000_000_000;

/// The domain's clock.
#[derive(Debug)]
pub struct Clock {
    multiplier: u32,
    shift: i8,
    /// System time when the counter was at the base: that of before the domain was restored.
    start: AtomicU64,
    /// The counter when the domain started, or went on.
    base: OnceLock<u64>,
    /// Wall-clock time of system time 0, since the Unix epoch.
    boot: OnceLock<Duration>,
}

impl Clock {
    /// # Errors
    /// [`Error::InvalidArgument`] for a rate of 0.
    pub(crate) fn new(tsc_khz: u32, boot: Option<Duration>) -> Result<Self> {
        if tsc_khz == 0 {
            return Err(Error::invalid("rate of the time-stamp counter", 0, "1 kHz or more"));
        }
        // The multiplier is (10^9 << 32) / rate / 2^shift, with its top bit set for precision.
        let hz = u128::from(tsc_khz) * 1000;
        let mut shift: i8 = 0;
        let mut scaled = (NS << 32) / hz;
        while scaled > u128::from(u32::MAX) {
            shift += 1;
            scaled = (NS << 32) / (hz << shift);
        }
        while scaled < 1 << 31 {
            shift -= 1;
            scaled = (NS << (32 - i32::from(shift))) / hz;
        }
        let clock = Self {
            multiplier: u32::try_from(scaled).unwrap_or(u32::MAX),
            shift,
            start: AtomicU64::new(0),
            base: OnceLock::new(),
            boot: OnceLock::new(),
        };
        if let Some(boot) = boot {
            clock.boot.get_or_init(|| boot);
        }
        Ok(clock)
    }

    /// System time in nanoseconds at the moment when the counter stood at `tsc`. The first call is time 0, or that at which a
    /// restored domain goes on.
    pub fn system_time(&self, tsc: u64) -> u64 {
        let base = *self.base.get_or_init(|| tsc);
        self.start().saturating_add(self.scale(tsc.saturating_sub(base)))
    }

    fn start(&self) -> u64 {
        self.start.load(Ordering::Relaxed)
    }

    fn scale(&self, ticks: u64) -> u64 {
        let ticks = u128::from(ticks);
        let shifted = if self.shift < 0 {
            ticks >> self.shift.unsigned_abs()
        } else {
            // Beyond 64 bits the guest's arithmetic wraps, after centuries.
            (ticks << self.shift) & u128::from(u64::MAX)
        };
        u64::try_from((shifted * u128::from(self.multiplier)) >> 32).unwrap_or(u64::MAX)
    }

    /// Wall-clock time of system time 0, to be asked for when the clock starts or goes on.
    pub(crate) fn boot_time(&self) -> Duration {
        let now = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        *self.boot.get_or_init(|| now().saturating_sub(Duration::from_nanos(self.start())))
    }

    /// What the guest computes system time from. Holds until the domain is restored elsewhere, since rate and base never change.
    pub(crate) fn info(&self, tsc: u64) -> TimeInfo {
        TimeInfo {
            version: 2,
            tsc_timestamp: *self.base.get_or_init(|| tsc),
            system_time: self.start(),
            tsc_to_system_mul: self.multiplier,
            tsc_shift: self.shift,
            flags: TSC_STABLE,
            ..TimeInfo::default()
        }
    }
}

#[cfg(feature = "snapshot")]
impl Clock {
    /// System time as [`Clock::system_time`], without starting the clock.
    pub(crate) fn stands_at(&self, tsc: u64) -> u64 {
        if self.base.get().is_some() { self.system_time(tsc) } else { self.start() }
    }

    /// Lets the clock go on from that system time, when it is first asked. Of several the latest counts: nobody sees a time from
    /// before one that was seen.
    pub(crate) fn go_on_from(&self, system_time: u64) {
        self.start.fetch_max(system_time, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(feature = "snapshot")]
    #[test]
    fn a_restored_clock_goes_on_at_another_rate_and_in_another_year() {
        let before = Clock::new(1_000_000, None).unwrap();
        assert_eq!(before.stands_at(1 << 40), 0, "it did not start");
        before.system_time(1 << 40);
        let (first, second) = (before.stands_at((1 << 40) + 5_000), before.stands_at((1 << 40) + 9_000));
        let after = Clock::new(3_000_000, None).unwrap();
        after.go_on_from(second);
        after.go_on_from(first);
        assert_eq!(after.stands_at(77), 9_000, "it stands until it is asked");
        let info = after.info(1_000);
        assert_eq!((info.tsc_timestamp, info.system_time), (1_000, 9_000));
        assert!((1_008_999..=1_009_000).contains(&after.system_time(1_000 + 3_000_000)));
        let wall = after.boot_time() + Duration::from_nanos(9_000);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
        assert!(now - wall < Duration::from_secs(60), "{now:?}, {wall:?}");
    }

    #[test]
    fn rates_are_exact_to_a_millionth() {
        for khz in [1, 1000, 999_999, 1_000_000, 1_000_001, 2_400_000, 3_999_999, u32::MAX] {
            let clock = Clock::new(khz, None).unwrap();
            clock.system_time(5);
            let hour = 3600 * 1000 * u64::from(khz);
            let ns = clock.system_time(5 + hour);
            let off = ns.abs_diff(3_600_000_000_000);
            assert!(off < 3_600_000, "{khz} kHz: off by {off} ns in an hour");
        }
    }

    #[test]
    fn guest_formula_gives_the_same() {
        let clock = Clock::new(2_999_998, None).unwrap();
        let info = clock.info(1000);
        assert_eq!(info.tsc_timestamp, 1000);
        let ticks: u64 = 123_456_789_012;
        let shifted = if info.tsc_shift < 0 { ticks >> -info.tsc_shift } else { ticks << info.tsc_shift };
        let guest = (u128::from(shifted) * u128::from(info.tsc_to_system_mul)) >> 32;
        assert_eq!(u128::from(clock.system_time(1000 + ticks)), guest);
    }

    #[test]
    fn a_counter_before_the_start_is_time_0() {
        let clock = Clock::new(1_000_000, None).unwrap();
        assert_eq!(clock.system_time(1 << 40), 0);
        assert_eq!(clock.system_time(0), 0);
        assert!(clock.system_time(u64::MAX) > 0);
    }

    #[test]
    fn no_rate_is_refused() {
        assert!(Clock::new(0, None).is_err());
    }
}
