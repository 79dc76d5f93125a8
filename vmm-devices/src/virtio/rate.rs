//! Rate limits: token buckets of bytes and of operations, by the machine's clock.
//!
//! A bucket fills at a steady rate up to its burst. A request that finds a token goes on at once and takes out what it costs, into
//! debt if there are too few: so no request is too large, and the rate holds over any longer time. One that finds none takes
//! them out as well, and goes on when what others owed before it is paid: it has its place in line, which none that comes later
//! takes from it, however small.

use std::fmt;
use std::num::NonZeroU64;
use std::sync::{Arc, Mutex, Weak};

use super::doorbell::Doorbells;
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

    /// Takes `cost` tokens out, into debt if there are too few. Whoever takes them goes on now if that is `None`, else at that
    /// nanosecond, at which the bucket would hold one again if nothing had been taken out.
    pub fn take(&mut self, now_ns: u64, cost: u64) -> Option<u64> {
        self.fill(now_ns);
        let missing = billionths(1).saturating_sub(self.level);
        self.level = self.level.saturating_sub(billionths(cost));
        let missing = u128::try_from(missing).ok().filter(|missing| *missing > 0)?;
        let wait = missing.div_ceil(self.rate.per_second.get().into());
        Some(self.at_ns.saturating_add(u64::try_from(wait).unwrap_or(u64::MAX)))
    }

    /// Puts back what was taken out and is not needed.
    pub fn put_back(&mut self, cost: u64) {
        let full = billionths(self.rate.burst.get());
        self.level = self.level.saturating_add(billionths(cost)).min(full);
    }
}

fn billionths(tokens: u64) -> i128 {
    i128::from(tokens) * i128::from(NANOSECONDS)
}

/// The limits of one device, or of several that share them. Clones are the same limiter.
#[derive(Clone)]
pub struct RateLimiter {
    clock: Arc<dyn Clock>,
    state: Arc<Mutex<State>>,
}

struct State {
    bytes: Option<TokenBucket>,
    operations: Option<TokenBucket>,
    /// How often there were others.
    era: u64,
    /// Who may wait.
    listeners: Vec<Weak<Doorbells>>,
}

impl fmt::Debug for RateLimiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RateLimiter").field("limits", &self.limits()).finish_non_exhaustive()
    }
}

impl RateLimiter {
    /// Limits by `clock`, with full buckets. Executors call workers at deadlines of that clock.
    pub fn new(clock: impl Clock + 'static, limits: Limits) -> Self {
        let mut state = State { bytes: None, operations: None, era: 0, listeners: Vec::new() };
        state.fill(limits, clock.now_ns());
        Self { clock: Arc::new(clock), state: Arc::new(Mutex::new(state)) }
    }

    /// What is limited now.
    pub fn limits(&self) -> Limits {
        let state = lock(&self.state);
        let rate = |bucket: &Option<TokenBucket>| bucket.as_ref().map(|bucket| bucket.rate);
        Limits { bytes: rate(&state.bytes), operations: rate(&state.operations) }
    }

    /// Other limits from now on, with full buckets. What waits is looked at again, of all devices that share them.
    pub fn set_limits(&self, limits: Limits) {
        let mut state = lock(&self.state);
        state.fill(limits, self.clock.now_ns());
        let listeners = Vec::from_iter(state.listeners.iter().filter_map(Weak::upgrade));
        drop(state);
        // They may serve their queues on this thread.
        listeners.iter().for_each(|doorbells| doorbells.ring_all());
    }

    /// Rings these doorbells, as long as they are there, when limits are set: for a device whose requests may wait, at each
    /// activation.
    pub fn register(&self, doorbells: &Arc<Doorbells>) {
        let mut state = lock(&self.state);
        state.listeners.retain(|listener| listener.strong_count() > 0);
        state.listeners.push(Arc::downgrade(doorbells));
    }

    /// Lets one operation of `bytes` bytes in, and charges both buckets for it.
    ///
    /// # Errors
    /// [`Throttled`] if one of them holds nothing: its place in line.
    pub fn admit(&self, bytes: u64) -> Result<(), Throttled> {
        let mut state = lock(&self.state);
        let now = self.clock.now_ns();
        let until = state.buckets(bytes).filter_map(|(bucket, cost)| bucket.take(now, cost)).max();
        match until {
            None => Ok(()),
            Some(until_ns) => {
                Err(Throttled { limiter: self.clone(), bytes, until_ns, era: state.era, paid: true })
            }
        }
    }
}

impl State {
    fn fill(&mut self, limits: Limits, now: u64) {
        let full = |rate| TokenBucket::new(rate, now);
        (self.bytes, self.operations) = (limits.bytes.map(full), limits.operations.map(full));
        self.era = self.era.wrapping_add(1);
    }

    /// The buckets, and what an operation of `bytes` bytes costs in each.
    fn buckets(&mut self, bytes: u64) -> impl Iterator<Item = (&mut TokenBucket, u64)> {
        let each = [(self.bytes.as_mut(), bytes), (self.operations.as_mut(), 1)];
        each.into_iter().filter_map(|(bucket, cost)| Some((bucket?, cost)))
    }
}

/// A request that has to wait: its place in line. It is paid for; who drops it gives the place up, and what was paid is put back.
#[must_use]
pub struct Throttled {
    limiter: RateLimiter,
    bytes: u64,
    until_ns: u64,
    /// By whose limits.
    era: u64,
    paid: bool,
}

impl fmt::Debug for Throttled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Throttled").field("until_ns", &self.until_ns).finish_non_exhaustive()
    }
}

impl Throttled {
    /// It goes on at this nanosecond of the limiter's clock: what [`Worker::deadline`](super::Worker::deadline) says.
    pub fn until_ns(&self) -> u64 {
        self.until_ns
    }

    /// Goes on, if it is time. Where the limits are others than those by which it waits, it asks anew.
    ///
    /// # Errors
    /// It still has to wait.
    pub fn retry(mut self) -> Result<(), Self> {
        if lock(&self.limiter.state).era != self.era {
            self.paid = false;
            return self.limiter.admit(self.bytes);
        }
        if self.limiter.clock.now_ns() < self.until_ns {
            return Err(self);
        }
        self.paid = false;
        Ok(())
    }
}

impl Drop for Throttled {
    fn drop(&mut self) {
        let mut state = lock(&self.limiter.state);
        if self.paid && state.era == self.era {
            state.buckets(self.bytes).for_each(|(bucket, cost)| bucket.put_back(cost));
        }
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

    fn waiting(limiter: &RateLimiter, bytes: u64) -> Throttled {
        limiter.admit(bytes).expect_err("it has to wait")
    }

    #[test]
    fn a_burst_goes_at_once_and_the_rest_at_the_rate() {
        let (limiter, clock) = limiter(Rate::new(1_000_000, 4096), None);
        limiter.admit(4000).unwrap();
        // What is left of the burst lets one more in, which owes 512 bytes at a byte a microsecond. The next owes those as well.
        limiter.admit(96 + 512).unwrap();
        let first = waiting(&limiter, 100);
        assert_eq!(first.until_ns(), 1000 + 513_000);
        let second = waiting(&limiter, 1);
        assert_eq!(second.until_ns(), 1000 + 613_000);
        clock.advance(512_999);
        let first = first.retry().unwrap_err();
        clock.advance(1);
        first.retry().unwrap();
        let second = second.retry().unwrap_err();
        clock.advance(100_000);
        second.retry().unwrap();
        // However long nobody asks, no more than a burst gathers.
        clock.advance(u64::MAX / 2);
        limiter.admit(4096).unwrap();
        assert_eq!(waiting(&limiter, 1).until_ns(), clock.now_ns() + 1000);
    }

    #[test]
    fn what_is_larger_than_the_burst_is_paid_for_later() {
        let (limiter, clock) = limiter(Rate::new(1000, 10), None);
        limiter.admit(1010).unwrap();
        let next = waiting(&limiter, 1);
        assert_eq!(next.until_ns(), 1000 + NANOSECONDS + 1_000_000);
        clock.set(next.until_ns());
        next.retry().unwrap();
    }

    /// Whoever comes first is called first, as loops do, and asks again at once. The other wants as much as there is.
    #[test]
    fn a_large_request_has_its_turn_among_small_ones() {
        for (small, large) in [(100, 4096), (100, 1 << 20), (4096, 4096)] {
            let (limiter, clock) = limiter(Rate::new(1_000_000, 4096), None);
            let mut waits = [None, None];
            let mut done = [0_u64; 2];
            for _ in 0..1000 {
                for (who, cost) in [small, large].into_iter().enumerate() {
                    let asked = match waits[who].take() {
                        Some(waits) => Throttled::retry(waits),
                        None => limiter.admit(cost),
                    };
                    match asked {
                        Ok(()) => done[who] += 1,
                        Err(throttled) => waits[who] = Some(throttled),
                    }
                }
                if let [Some(a), Some(b)] = &waits {
                    clock.set(clock.now_ns().max(a.until_ns().min(b.until_ns())));
                }
            }
            assert!(done[1] > 100 && done[0] >= done[1], "{small}, {large}: {done:?}");
        }
    }

    #[test]
    fn who_gives_up_has_not_paid() {
        let (limiter, _) = limiter(Rate::new(1000, 1000), Rate::new(1, 1));
        limiter.admit(500).unwrap();
        for _ in 0..5 {
            assert_eq!(waiting(&limiter, 500).until_ns(), 1000 + NANOSECONDS);
        }
        // Who has not waits behind who has.
        let next = waiting(&limiter, 5000);
        assert_eq!(waiting(&limiter, 1).until_ns(), 1000 + 4_501_000_000);
        drop(next);
        assert_eq!(waiting(&limiter, 1).until_ns(), 1000 + NANOSECONDS);
        // What was put back is not put into other buckets.
        let next = waiting(&limiter, 500);
        limiter.set_limits(Limits { bytes: Rate::new(1000, 400), operations: None });
        limiter.admit(400).unwrap();
        drop(next);
        assert!(limiter.admit(1).is_err());
    }

    #[test]
    fn other_limits_are_asked_anew_and_rung_for() {
        let (limiter, clock) = limiter(None, Rate::new(1, 1));
        let doorbells = [2, 1].map(|queues| Arc::new(Doorbells::new(queues)));
        let heard = Arc::new(Mutex::new(Vec::new()));
        for (device, doorbells) in doorbells.iter().enumerate() {
            let ears = Arc::clone(&heard);
            doorbells.connect(move |queue| ears.lock().unwrap().push((device, queue)));
            limiter.register(doorbells);
        }
        limiter.register(&Arc::new(Doorbells::new(1)));
        limiter.admit(1).unwrap();
        let (first, second) = (waiting(&limiter, 1), waiting(&limiter, 1));
        limiter.clone().set_limits(Limits { bytes: None, operations: Rate::new(2, 1) });
        assert_eq!(*heard.lock().unwrap(), [(0, 0), (0, 1), (1, 0)]);
        second.retry().unwrap();
        let first = first.retry().unwrap_err();
        assert_eq!(first.until_ns(), clock.now_ns() + NANOSECONDS / 2);
        limiter.set_limits(Limits::default());
        first.retry().unwrap();
        assert_eq!(limiter.limits(), Limits::default());
    }

    #[test]
    fn a_rate_of_nothing_is_none() {
        assert_eq!((Rate::new(0, 1), Rate::new(1, 0)), (None, None));
        let (limiter, _) = limiter(None, None);
        limiter.admit(u64::MAX).unwrap();
    }

    #[test]
    fn extremes_do_not_overflow() {
        let (limiter, clock) = limiter(Rate::new(u64::MAX, u64::MAX), Rate::new(1, u64::MAX));
        limiter.admit(u64::MAX).unwrap();
        clock.set(u64::MAX);
        limiter.admit(u64::MAX).unwrap();
        let mut slow = TokenBucket::new(Rate::new(1, u64::MAX).unwrap(), u64::MAX);
        assert_eq!(slow.take(u64::MAX, u64::MAX), None);
        for _ in 0..3 {
            assert_eq!(slow.take(0, u64::MAX), Some(u64::MAX));
        }
        slow.put_back(u64::MAX);
    }

    proptest! {
        /// Whoever comes at the deadline is let in, in the order of asking, and nobody gets more than burst and rate give, but for
        /// one request's debt.
        #[test]
        fn deadlines_hold_and_so_does_the_rate(
            per_second in 1u64..1 << 40,
            burst in 1u64..1 << 30,
            costs in prop::collection::vec((0u64..1 << 31, 0u64..10_000_000, any::<bool>()), 1..60),
        ) {
            let (limiter, clock) = limiter(Rate::new(per_second, burst), None);
            let (mut total, mut largest, mut line) = (0u128, 0u128, Vec::new());
            for (cost, pause, waits) in costs {
                match limiter.admit(cost) {
                    Ok(()) => prop_assert!(line.is_empty()),
                    Err(throttled) => {
                        prop_assert!(throttled.until_ns() > clock.now_ns());
                        line.push(throttled);
                    }
                }
                total += u128::from(cost);
                largest = largest.max(cost.into());
                if !waits {
                    let mut last = 0;
                    for throttled in line.drain(..) {
                        let until_ns = throttled.until_ns();
                        prop_assert!(until_ns >= last);
                        last = until_ns;
                        let throttled = if clock.now_ns() < until_ns {
                            clock.set(until_ns - 1);
                            throttled.retry().unwrap_err()
                        } else {
                            throttled
                        };
                        clock.set(until_ns.max(clock.now_ns()));
                        prop_assert!(throttled.retry().is_ok());
                    }
                    let earned = u128::from(clock.now_ns() - 1000) * u128::from(per_second);
                    prop_assert!(total <= u128::from(burst) + earned / 1_000_000_000 + 1 + largest);
                    clock.advance(pause);
                }
            }
        }
    }
}
