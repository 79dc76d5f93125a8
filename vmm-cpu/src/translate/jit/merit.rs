//! Which address spaces have an address window: those whose programs run long for what the window costs.
//!
//! A window makes a program's own work a third faster, and costs microseconds for each page that comes and for each time that
//! the address space is changed for another. So an address space earns a part of the time that its program runs, as
//! samples tell, gets a window for some savings, and keeps it as long as it does not spend more than it has. It earns less and less if
//! what it spent was for pages that went away again.

use std::time::{Duration, Instant};

/// Address spaces that are remembered.
const KNOWN: usize = 16;

/// A sample stands for as much time, at most: that between two ticks of a guest.
const LONGEST: Duration = Duration::from_millis(4);
/// Samples are so far apart, at least.
const SHORTEST: Duration = Duration::from_millis(1);

/// What an address space earns is one part in so many of the time that its program runs.
const SHARE: u32 = 12;
/// The same if it wasted what it had again and again.
const SMALLEST_SHARE: u32 = 12 << 7;
/// The most that it saves.
const SAVINGS: Duration = Duration::from_millis(30);
/// What it must have saved for a window.
const PRICE: Duration = Duration::from_micros(600);

#[derive(Clone, Copy, Debug)]
struct Merit {
    root: u64,
    saved: Duration,
    share: u32,
    used: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Merits {
    known: Vec<Merit>,
    last: Option<Instant>,
    samples: u64,
    /// Some have saved enough.
    any: bool,
}

impl Merits {
    /// Notes that the program with that CR3 runs now, or none.
    pub(super) fn sample(&mut self, root: Option<u64>) {
        self.sample_at(root, Instant::now());
    }

    fn sample_at(&mut self, root: Option<u64>, now: Instant) {
        let passed = self.last.map_or(SHORTEST, |last| now.saturating_duration_since(last));
        if passed < SHORTEST {
            return;
        }
        self.last = Some(now);
        self.samples += 1;
        let Some(root) = root else { return };
        let at = match self.known.iter().position(|merit| merit.root == root) {
            Some(at) => at,
            None => {
                if self.known.len() >= KNOWN {
                    let oldest = (0..).zip(&self.known).min_by_key(|(_, merit)| merit.used);
                    if let Some((oldest, _)) = oldest {
                        self.known.swap_remove(oldest);
                    }
                }
                self.known.push(Merit { root, saved: Duration::ZERO, share: SHARE, used: 0 });
                self.known.len() - 1
            }
        };
        if let Some(merit) = self.known.get_mut(at) {
            merit.saved = (merit.saved + passed.min(LONGEST) / merit.share).min(SAVINGS);
            merit.used = self.samples;
            self.any |= merit.saved >= PRICE;
            if merit.saved == SAVINGS {
                merit.share = SHARE;
            }
        }
    }

    /// Whether the address space with that CR3 is to have a window.
    pub(super) fn deserves(&self, root: u64) -> bool {
        self.any
            && self.known.iter().find(|merit| merit.root == root).is_some_and(|merit| merit.saved >= PRICE)
    }

    /// Takes from its savings what its window has cost; whether it could afford that.
    pub(super) fn charge(&mut self, root: u64, cost: Duration) -> bool {
        let Some(merit) = self.known.iter_mut().find(|merit| merit.root == root) else { return false };
        let left = merit.saved.checked_sub(cost);
        merit.saved = left.unwrap_or_default();
        left.is_some()
    }

    /// What it spent was wasted.
    pub(super) fn reproach(&mut self, root: u64) {
        if let Some(merit) = self.known.iter_mut().find(|merit| merit.root == root) {
            merit.share = (merit.share * 2).min(SMALLEST_SHARE);
        }
    }

    /// Another program has the address space with that CR3.
    pub(super) fn forget(&mut self, root: u64) {
        self.known.retain(|merit| merit.root != root);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(merits: &mut Merits, now: &mut Instant, root: Option<u64>, time: Duration) {
        let end = *now + time;
        while *now < end {
            *now += LONGEST;
            merits.sample_at(root, *now);
        }
    }

    #[test]
    fn who_runs_long_is_the_one_who_deserves() {
        let (mut merits, mut now) = (Merits::default(), Instant::now());
        run(&mut merits, &mut now, Some(1), Duration::from_millis(4));
        assert!(!merits.deserves(1));
        run(&mut merits, &mut now, Some(1), Duration::from_millis(20));
        assert!(merits.deserves(1) && !merits.deserves(2));
        run(&mut merits, &mut now, None, Duration::from_secs(1));
        assert!(merits.deserves(1));
    }

    #[test]
    fn what_windows_cost_is_a_part_of_the_time_at_most() {
        let (mut merits, mut now) = (Merits::default(), Instant::now());
        let (step, cost) = (LONGEST, Duration::from_micros(10));
        let (mut spent, mut ran) = (Duration::ZERO, Duration::ZERO);
        for _ in 0..10_000 {
            run(&mut merits, &mut now, Some(1), step);
            ran += step;
            while merits.deserves(1) {
                while merits.charge(1, cost) {
                    spent += cost;
                }
                spent += cost;
            }
        }
        assert!(spent > Duration::ZERO && spent <= ran / SHARE + ran / 1000, "{spent:?} of {ran:?}");
    }

    #[test]
    fn one_that_wastes_what_it_has_waits_longer_each_time() {
        let (mut merits, mut now) = (Merits::default(), Instant::now());
        let mut waits = Vec::new();
        for _ in 0..10 {
            let start = now;
            while !merits.deserves(1) {
                run(&mut merits, &mut now, Some(1), LONGEST);
            }
            waits.push(now - start);
            assert!(!merits.charge(1, SAVINGS * 2));
            merits.reproach(1);
        }
        assert!(waits.windows(2).all(|pair| pair[0] <= pair[1]), "{waits:?}");
        assert!(waits[9] > waits[0] * 50 && waits[9] <= PRICE * (SMALLEST_SHARE + SHARE), "{waits:?}");
        // Until it has run for long without.
        run(&mut merits, &mut now, Some(1), SAVINGS * (SMALLEST_SHARE + 1));
        assert!(!merits.charge(1, SAVINGS * 2));
        let start = now;
        while !merits.deserves(1) {
            run(&mut merits, &mut now, Some(1), LONGEST);
        }
        assert!(now - start <= waits[0] * 2);
    }

    #[test]
    fn no_more_are_remembered_than_there_is_room_for() {
        let (mut merits, mut now) = (Merits::default(), Instant::now());
        for root in 0..100 {
            run(&mut merits, &mut now, Some(root), LONGEST);
        }
        assert_eq!(merits.known.len(), KNOWN);
        assert!(merits.known.iter().all(|merit| merit.root >= 100 - KNOWN as u64));
        merits.forget(99);
        assert!(!merits.charge(99, Duration::ZERO));
    }
}
