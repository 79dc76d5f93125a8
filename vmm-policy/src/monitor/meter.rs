//! What has been used of a limit.

use std::sync::Arc;

use crate::sync::{AtomicU64, Ordering};
use crate::syntax::Quantity;

/// What one subject has used of one limit.
///
/// A rate is a level that time lets sink: where all that has been taken would have come in at that rate (the generic cell rate algorithm, ITU-T I.371).
/// Reading a clock takes as long as the rest of a decision, so of a large burst a part, one in [`SHARES`], is taken at a time, which is then
/// used up without looking at the time. The level goes only as far as the burst without that part: both together are never more than the burst.
/// After a pause they can be less by that part.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Meter {
    /// Of requests: how many have been taken and not been used.
    ahead: AtomicU64,
    /// Of what is open: how much. Of a rate: nanoseconds of the clock.
    level: AtomicU64,
    /// What a request takes, whatever its bytes.
    unit: u64,
    /// How far the level may go: above nothing, or above the time.
    most: u64,
    /// How many requests are taken at a time; 0 if it is one by one.
    share: u64,
    quantity: Quantity,
}

/// Parts of a burst.
const SHARES: u64 = 64;
/// Less is not worth it.
const LEAST_SHARE: u64 = 4;

/// Nanoseconds that `count` take at a rate, rounded up.
fn pace(count: u64, per: u64, seconds: u32) -> u64 {
    let all = u128::from(count) * u128::from(seconds) * 1_000_000_000;
    u64::try_from(all.div_ceil(u128::from(per.max(1)))).unwrap_or(u64::MAX)
}

/// Nanoseconds from one request to the next, rounded down so that a burst is whole again after its time; at least one.
fn unit(count: u64, seconds: u32) -> u64 {
    (u64::from(seconds) * 1_000_000_000 / count.max(1)).max(1)
}

impl Meter {
    pub(crate) fn new(quantity: Quantity) -> Self {
        // Here, as divisions take as long as the rest of a decision.
        let (unit, most, share) = match quantity {
            Quantity::Open(most) | Quantity::Pages(most) => (1, most, 0),
            Quantity::Requests { count, seconds, burst } => {
                let unit = unit(count, seconds);
                let share = Some(burst / SHARES).filter(|share| *share >= LEAST_SHARE).unwrap_or(0);
                (unit, (burst - share).saturating_mul(unit), share)
            }
            Quantity::Bytes { count, seconds, burst } => (0, pace(burst, count, seconds), 0),
        };
        Self { ahead: AtomicU64::new(share), level: AtomicU64::new(0), unit, most, share, quantity }
    }

    pub(crate) fn quantity(&self) -> Quantity {
        self.quantity
    }

    /// Whether it is about what is open, and not about how fast.
    pub(crate) fn is_of_channels(&self) -> bool {
        matches!(self.quantity, Quantity::Open(_) | Quantity::Pages(_))
    }

    /// How much of it a request for so many bytes takes.
    fn cost(&self, bytes: u64) -> u64 {
        match self.quantity {
            Quantity::Open(_) | Quantity::Requests { .. } => self.unit,
            Quantity::Pages(_) => bytes.div_ceil(4096),
            Quantity::Bytes { count, seconds, .. } => pace(bytes, count, seconds),
        }
    }

    /// Takes what a request for so many bytes needs; whether that was not too much, nor too fast. The clock, in nanoseconds, is read if need be.
    #[inline]
    pub(crate) fn take(&self, bytes: u64, clock: impl FnOnce() -> u64) -> bool {
        match self.quantity {
            Quantity::Requests { .. } => {
                let used = self
                    .ahead
                    .fetch_update(Ordering::AcqRel, Ordering::Acquire, |ahead| ahead.checked_sub(1));
                used.is_ok() || self.take_share(clock())
            }
            Quantity::Bytes { .. } => self.rise(self.cost(bytes), clock()),
            Quantity::Open(_) | Quantity::Pages(_) => {
                let cost = self.cost(bytes);
                let step = |level: u64| level.checked_add(cost).filter(|level| *level <= self.most);
                self.level.fetch_update(Ordering::AcqRel, Ordering::Acquire, step).is_ok()
            }
        }
    }

    /// Takes requests for later, too, if there are as many; one of them is used.
    #[cold]
    fn take_share(&self, now: u64) -> bool {
        if self.share != 0 && self.rise(self.share.saturating_mul(self.unit), now) {
            // Of two that take a share at once, one is lost: less passes than might.
            self.ahead.store(self.share - 1, Ordering::Release);
            return true;
        }
        self.rise(self.unit, now)
    }

    /// Lets the level of a rate rise, if it is not too high then.
    fn rise(&self, cost: u64, now: u64) -> bool {
        let step = |level: u64| {
            let level = level.max(now).checked_add(cost)?;
            (level - now <= self.most).then_some(level)
        };
        self.level.fetch_update(Ordering::AcqRel, Ordering::Acquire, step).is_ok()
    }

    /// Gives back what was taken for so many bytes.
    pub(crate) fn give_back(&self, bytes: u64) {
        // To where it may have come from: the first ones of a large burst have not made the level rise.
        let step = |ahead: u64| (ahead < self.share).then_some(ahead + 1);
        if self.ahead.fetch_update(Ordering::AcqRel, Ordering::Acquire, step).is_err() {
            // It was taken, and not from what is whole: so it is there.
            self.level.fetch_sub(self.cost(bytes), Ordering::AcqRel);
        }
    }
}

/// What a channel has taken for as long as it is open.
#[derive(Debug)]
pub(crate) struct Charge {
    meter: Arc<Meter>,
    bytes: u64,
}

impl Charge {
    /// Of what has been taken for so many bytes.
    pub(super) fn new(meter: &Arc<Meter>, bytes: u64) -> Self {
        Self { meter: Arc::clone(meter), bytes }
    }

    pub(crate) fn give_back(&self) {
        self.meter.give_back(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn a_rate_lets_a_burst_through_and_then_its_pace() {
        let meter = Meter::new(Quantity::Requests { count: 10, seconds: 1, burst: 3 });
        let now = 5 * SECOND;
        assert!((0..3).all(|_| meter.take(0, || now)));
        assert!(!meter.take(0, || now));
        assert!(!meter.take(0, || now + SECOND / 10 - 1));
        assert!(meter.take(0, || now + SECOND / 10));
        assert!(!meter.take(0, || now + SECOND / 10));
        let passed = (0..100_000).filter(|at| meter.take(0, || now + SECOND + at * SECOND / 10_000)).count();
        assert!((100..=103).contains(&passed), "{passed} in ten seconds");
    }

    #[test]
    fn bytes_count_whole_and_more_than_a_burst_never_passes() {
        let meter = Meter::new(Quantity::Bytes { count: 1 << 40, seconds: 1, burst: 1 << 20 });
        assert!(!meter.take(1 << 21, || SECOND));
        assert!(meter.take(1 << 20, || SECOND));
        assert!(!meter.take(u64::MAX, || u64::MAX));
    }

    #[test]
    fn what_is_open_is_counted_up_and_down() {
        let meter = Meter::new(Quantity::Pages(10));
        assert!(meter.take(6 * 4096 - 1, || 0));
        assert!(!meter.take(5 * 4096, || 0));
        meter.give_back(6 * 4096 - 1);
        assert!(meter.take(10 * 4096, || 0));
        assert!(!meter.take(1, || 0));
        assert!(!meter.take(u64::MAX, || 0));
    }

    #[test]
    fn a_charge_that_is_given_back_was_never_there() {
        let meter = Meter::new(Quantity::Requests { count: 1, seconds: 60, burst: 1 });
        for _ in 0..10 {
            assert!(meter.take(0, || SECOND));
            meter.give_back(0);
        }
        assert!(meter.take(0, || SECOND) && !meter.take(0, || SECOND));
        let meter = Meter::new(Quantity::Requests { count: 1, seconds: 60, burst: 6400 });
        let mut taken = 0;
        for round in 0..20_000 {
            taken += u32::from(meter.take(0, || SECOND));
            if round % 3 == 0 && taken > 0 {
                taken -= 1;
                meter.give_back(0);
            }
        }
        assert_eq!(taken, 6400, "as many as if nothing had been given back");
        assert!(!meter.take(0, || SECOND));
        meter.give_back(0);
        assert!(meter.take(0, || SECOND) && !meter.take(0, || SECOND));
    }

    #[test]
    fn of_a_large_burst_not_more_passes_than_of_a_small_one() {
        let (count, burst) = (10_000, 6400);
        let mut rng = fastrand::Rng::with_seed(1);
        for _ in 0..20 {
            let meter = Meter::new(Quantity::Requests { count, seconds: 1, burst });
            // When each request came that passed, with bursts and pauses between them.
            let (mut now, mut passed, mut read) = (SECOND, Vec::new(), 0);
            for _ in 0..200 {
                now += rng.u64(..SECOND);
                for _ in 0..rng.usize(..2 * burst as usize) {
                    now += rng.u64(..2000);
                    let before = read;
                    let taken = meter.take(0, || {
                        read = before + 1;
                        now
                    });
                    if taken {
                        passed.push(now);
                    } else {
                        read = before;
                    }
                }
            }
            // In no time more than the burst and the rate allow.
            let mut level = 0;
            for at in &passed {
                level = at.max(&level) + SECOND / count;
                assert!(level - at <= burst * SECOND / count, "a request at {at}");
            }
            assert!(
                passed.len() > 400_000 && read < passed.len() / 10,
                "{} passed, {read} read",
                passed.len()
            );
        }
    }

    #[test]
    fn all_of_a_large_burst_passes_at_once_and_after_a_pause_nearly_all() {
        let meter = Meter::new(Quantity::Requests { count: 1000, seconds: 1, burst: 1000 });
        let burst = |now: u64| (0..2000).filter(|_| meter.take(0, || now)).count();
        assert_eq!(burst(SECOND), 1000);
        assert_eq!(burst(2 * SECOND), 985, "without the part that is taken ahead");
        assert!(meter.take(0, || 5 * SECOND));
        assert!((985..=1000).contains(&burst(9 * SECOND)));
    }
}
