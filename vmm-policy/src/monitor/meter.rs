//! What has been used of a limit.

use std::sync::Arc;

use crate::sync::{AtomicU64, Ordering};
use crate::syntax::Quantity;

/// What one subject has used of one limit.
#[derive(Debug)]
pub(crate) struct Meter {
    quantity: Quantity,
    /// Of what is open: how much. Of a rate: when, in nanoseconds of the clock, all that has been taken would have come in at that
    /// rate (the generic cell rate algorithm, ITU-T I.371).
    level: AtomicU64,
}

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
        Self { quantity, level: AtomicU64::new(0) }
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
            Quantity::Open(_) => 1,
            Quantity::Pages(_) => bytes.div_ceil(4096),
            Quantity::Requests { count, seconds, .. } => unit(count, seconds),
            Quantity::Bytes { count, seconds, .. } => pace(bytes, count, seconds),
        }
    }

    /// Takes what a request for so many bytes needs, at a time in nanoseconds; whether that was not too much, nor too fast.
    pub(crate) fn take(&self, bytes: u64, now: u64) -> bool {
        let cost = self.cost(bytes);
        let step = |level: u64| match self.quantity {
            Quantity::Open(most) | Quantity::Pages(most) => {
                level.checked_add(cost).filter(|level| *level <= most)
            }
            Quantity::Requests { count, seconds, burst } | Quantity::Bytes { count, seconds, burst } => {
                let level = level.max(now).checked_add(cost)?;
                let most = match self.quantity {
                    Quantity::Requests { .. } => burst.saturating_mul(unit(count, seconds)),
                    _ => pace(burst, count, seconds),
                };
                (level - now <= most).then_some(level)
            }
        };
        self.level.fetch_update(Ordering::AcqRel, Ordering::Acquire, step).is_ok()
    }

    /// Gives back what was taken for so many bytes.
    pub(crate) fn give_back(&self, bytes: u64) {
        // It was taken, so it is there.
        self.level.fetch_sub(self.cost(bytes), Ordering::AcqRel);
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
        assert!((0..3).all(|_| meter.take(0, now)));
        assert!(!meter.take(0, now));
        assert!(!meter.take(0, now + SECOND / 10 - 1));
        assert!(meter.take(0, now + SECOND / 10));
        assert!(!meter.take(0, now + SECOND / 10));
        let passed = (0..100_000).filter(|at| meter.take(0, now + SECOND + at * SECOND / 10_000)).count();
        assert!((100..=103).contains(&passed), "{passed} in ten seconds");
    }

    #[test]
    fn bytes_count_whole_and_more_than_a_burst_never_passes() {
        let meter = Meter::new(Quantity::Bytes { count: 1 << 40, seconds: 1, burst: 1 << 20 });
        assert!(!meter.take(1 << 21, SECOND));
        assert!(meter.take(1 << 20, SECOND));
        assert!(!meter.take(u64::MAX, u64::MAX));
    }

    #[test]
    fn what_is_open_is_counted_up_and_down() {
        let meter = Meter::new(Quantity::Pages(10));
        assert!(meter.take(6 * 4096 - 1, 0));
        assert!(!meter.take(5 * 4096, 0));
        meter.give_back(6 * 4096 - 1);
        assert!(meter.take(10 * 4096, 0));
        assert!(!meter.take(1, 0));
        assert!(!meter.take(u64::MAX, 0));
    }

    #[test]
    fn a_charge_that_is_given_back_was_never_there() {
        let meter = Meter::new(Quantity::Requests { count: 1, seconds: 60, burst: 1 });
        for _ in 0..10 {
            assert!(meter.take(0, SECOND));
            meter.give_back(0);
        }
        assert!(meter.take(0, SECOND) && !meter.take(0, SECOND));
    }
}
