//! Rate limits: token buckets of bytes and of operations, by the machine's clock.
//!
//! A bucket fills at a steady rate up to its burst. A request is let in when the bucket holds what it costs, and then takes
//! that out. One that costs more than the burst is let in by a full bucket, which is then in debt: so the rate holds over
//! any longer time, and no request waits for ever.

use std::fmt;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex};

use crate::clock::{Clock, NANOSECONDS};
use crate::interrupt::lock;

/// How fast a bucket fills, and how much it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// Tokens (bytes or operations) a second.
    pub per_second: NonZeroU64,
    /// Tokens that it holds at most, and at the beginning.
    pub burst: NonZeroU64,
}

impl Rate {
    /// `None` if one of both is 0, with which nothing would ever go on.
    pub fn new(per_second: u64, burst: u64) -> Option<Self> {
        Some(Self { per_second: NonZeroU64::new(per_second)?, burst: NonZeroU64::new(burst)? })
    }
}

/// What is limited; `None` is without a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Bytes that requests move.
    pub bytes: Option<Rate>,
    /// Requests.
    pub operations: Option<Rate>,
}

/// One bucket. It knows no clock: each call says what time it is.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    rate: Rate,
    /// Billionths of a token, so that nothing is lost to rounding. Below 0 in debt.
    level: i128,
    at_ns: u64,
}

impl TokenBucket {
    /// A full one.
    pub fn new(rate: Rate, now_ns: u64) -> Self {
        Self { rate, level: billionths(rate.burst.get()), at_ns: now_ns }
    }

    /// Fills it for the time that has passed; time that runs backwards fills nothing.
    fn fill(&mut self, now_ns: u64) {
        let passed = u128::from(now_ns.saturating_sub(self.at_ns));
        let full = billionths(self.rate.burst.get());
        let gained = passed.saturating_mul(self.rate.per_second.get().into());
        let gained = i128::try_from(gained).unwrap_or(i128::MAX);
        self.level = self.level.saturating_add(gained).min(full);
        self.at_ns = self.at_ns.max(now_ns);
    }

    /// When `cost` tokens can be had: `None` if now, else the nanosecond.
    pub fn ready_at(&mut self, now_ns: u64, cost: u64) -> Option<u64> {
        self.fill(now_ns);
        let needed = billionths(cost.min(self.rate.burst.get())) - self.level;
        let needed = u128::try_from(needed).ok().filter(|needed| *needed > 0)?;
        let wait = needed.div_ceil(self.rate.per_second.get().into());
        Some(self.at_ns.saturating_add(u64::try_from(wait).unwrap_or(u64::MAX)))
    }

    /// Takes `cost` tokens out, into debt if they are not there.
    pub fn take(&mut self, cost: u64) {
        self.level = self.level.saturating_sub(billionths(cost));
    }
}

fn billionths(tokens: u64) -> i128 {
    i128::from(tokens) * i128::from(NANOSECONDS)
}

/// A request has to wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Throttled {
    /// Until this nanosecond of the limiter's clock: what [`Worker::deadline`](super::Worker::deadline) says.
    pub until_ns: u64,
}

/// The limits of one device, or of several that share them. Clones are the same limiter.
#[derive(Clone)]
pub struct RateLimiter {
    clock: Arc<dyn Clock>,
    buckets: Arc<Mutex<Buckets>>,
}

struct Buckets {
    limits: Limits,
    bytes: Option<TokenBucket>,
    operations: Option<TokenBucket>,
}

impl fmt::Debug for RateLimiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RateLimiter").field("limits", &self.limits()).finish_non_exhaustive()
    }
}

impl RateLimiter {
    /// Limits by `clock`, with full buckets. Executors call workers at deadlines of that clock.
    pub fn new(clock: impl Clock + 'static, limits: Limits) -> Self {
        let buckets = Buckets::new(limits, clock.now_ns());
        Self { clock: Arc::new(clock), buckets: Arc::new(Mutex::new(buckets)) }
    }

    /// What is limited now.
    pub fn limits(&self) -> Limits {
        lock(&self.buckets).limits
    }

    /// Other limits from now on, with full buckets. Who waits goes by the old ones until it is called again, for which
    /// whoever changes them rings the device's doorbells.
    pub fn set_limits(&self, limits: Limits) {
        *lock(&self.buckets) = Buckets::new(limits, self.clock.now_ns());
    }

    /// Lets one operation of `bytes` bytes in, and charges both buckets for it.
    ///
    /// # Errors
    /// [`Throttled`] if one of them does not hold enough; nothing is charged.
    pub fn admit(&self, bytes: u64) -> Result<(), Throttled> {
        let mut buckets = lock(&self.buckets);
        let now = self.clock.now_ns();
        let Buckets { bytes: of_bytes, operations, .. } = &mut *buckets;
        let mut until = None;
        for (bucket, cost) in [(&mut *of_bytes, bytes), (&mut *operations, 1)] {
            until = until.max(bucket.as_mut().and_then(|bucket| bucket.ready_at(now, cost)));
        }
        if let Some(until_ns) = until {
            return Err(Throttled { until_ns });
        }
        for (bucket, cost) in [(of_bytes, bytes), (operations, 1)] {
            if let Some(bucket) = bucket {
                bucket.take(cost);
            }
        }
        Ok(())
    }
}

impl Buckets {
    fn new(limits: Limits, now: u64) -> Self {
        let full = |rate| TokenBucket::new(rate, now);
        Self { limits, bytes: limits.bytes.map(full), operations: limits.operations.map(full) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ManualClock;

    fn limiter(bytes: Option<Rate>, operations: Option<Rate>) -> (RateLimiter, Arc<ManualClock>) {
        let clock = Arc::new(ManualClock::new(1000));
        (RateLimiter::new(Arc::clone(&clock), Limits { bytes, operations }), clock)
    }

    #[test]
    fn a_burst_goes_at_once_and_the_rest_at_the_rate() {
        let (limiter, clock) = limiter(Rate::new(1_000_000, 4096), None);
        assert_eq!(limiter.admit(4096), Ok(()));
        // 512 bytes at a byte a microsecond.
        assert_eq!(limiter.admit(512), Err(Throttled { until_ns: 1000 + 512_000 }));
        clock.advance(511_999);
        assert_eq!(limiter.admit(512), Err(Throttled { until_ns: 1000 + 512_000 }));
        clock.advance(1);
        assert_eq!(limiter.admit(512), Ok(()));
        assert!(limiter.admit(1).is_err());
        // However long nobody asks, no more than a burst gathers.
        clock.advance(u64::MAX / 2);
        assert_eq!(limiter.admit(4096), Ok(()));
        assert!(limiter.admit(1).is_err());
    }

    #[test]
    fn what_is_larger_than_the_burst_is_paid_for_later() {
        let (limiter, clock) = limiter(Rate::new(1000, 10), None);
        assert_eq!(limiter.admit(1010), Ok(()));
        // A debt of 1000 and then one token.
        assert_eq!(limiter.admit(1), Err(Throttled { until_ns: 1000 + 1_001_000_000 }));
        clock.advance(1_001_000_000);
        assert_eq!(limiter.admit(1), Ok(()));
    }

    #[test]
    fn who_is_refused_by_one_bucket_pays_to_neither() {
        let (limiter, clock) = limiter(Rate::new(1000, 1000), Rate::new(1, 1));
        assert_eq!(limiter.admit(500), Ok(()));
        for _ in 0..5 {
            assert_eq!(limiter.admit(500), Err(Throttled { until_ns: 1000 + NANOSECONDS }));
        }
        limiter.set_limits(Limits { operations: None, ..limiter.limits() });
        assert_eq!(limiter.admit(1000), Ok(()));
        assert!(limiter.admit(1000).is_err());
        clock.advance(NANOSECONDS);
        assert_eq!(limiter.admit(1000), Ok(()));
        assert_eq!(limiter.clone().admit(1), Err(Throttled { until_ns: 1000 + NANOSECONDS + 1_000_000 }));
    }

    #[test]
    fn a_rate_of_nothing_is_none() {
        assert_eq!((Rate::new(0, 1), Rate::new(1, 0)), (None, None));
        let (limiter, _) = limiter(None, None);
        assert_eq!(limiter.admit(u64::MAX), Ok(()));
    }

    #[test]
    fn extremes_do_not_overflow() {
        let (limiter, clock) = limiter(Rate::new(u64::MAX, u64::MAX), Rate::new(1, u64::MAX));
        assert_eq!(limiter.admit(u64::MAX), Ok(()));
        clock.set(u64::MAX);
        assert_eq!(limiter.admit(u64::MAX), Ok(()));
        let mut slow = TokenBucket::new(Rate::new(1, u64::MAX).unwrap(), u64::MAX);
        slow.take(u64::MAX);
        assert_eq!(slow.ready_at(0, u64::MAX), Some(u64::MAX));
    }

    proptest! {
        /// Whoever comes at the deadline is let in, and nobody gets more than burst and rate give, but for one request's debt.
        #[test]
        fn deadlines_hold_and_so_does_the_rate(
            per_second in 1u64..1 << 40,
            burst in 1u64..1 << 30,
            costs in prop::collection::vec((0u64..1 << 31, 0u64..10_000_000), 1..60),
        ) {
            let (limiter, clock) = limiter(Rate::new(per_second, burst), None);
            let (mut total, mut largest) = (0u128, 0u128);
            for (cost, pause) in costs {
                if let Err(Throttled { until_ns }) = limiter.admit(cost) {
                    prop_assert!(until_ns > clock.now_ns());
                    clock.set(until_ns - 1);
                    prop_assert!(limiter.admit(cost).is_err());
                    clock.set(until_ns);
                    prop_assert_eq!(limiter.admit(cost), Ok(()));
                }
                total += u128::from(cost);
                largest = largest.max(cost.into());
                let earned = u128::from(clock.now_ns() - 1000) * u128::from(per_second);
                prop_assert!(total <= u128::from(burst) + earned / 1_000_000_000 + 1 + largest);
                clock.advance(pause);
            }
        }
    }
}
