//! Which programs run on KVM: those that compute, and those that software cannot run.
//!
//! A stay on KVM has its price, tens of microseconds, and a program in software, translated, takes a fraction of one to its kernel
//! and back. So programs begin in software. One that is found to have run for a while without asking its kernel gets credit, and
//! with that it runs on KVM. There a program computes about twice as fast: a stay that lasts for more than twice its price earns
//! what it lasts beyond that, and a shorter one costs what it lacks. The price is what the shortest stays of late have lasted for,
//! all that goes before and behind them included.
//!
//! A program that comes to an instruction that software does not have, which it has by another way than CPUID or was told of on
//! KVM, gets much. A program here is an address space: a value of CR3, and the table that the top of its half leads to, where the
//! next program with that CR3 has another.

use std::time::{Duration, Instant};

/// What a stay is taken to cost before there was one, and at most.
const PRICE: Duration = Duration::from_micros(200);
/// The price rises by this part of itself with each stay that does not lower it.
const RISE: u32 = 1 << 14;
/// Time in software, without the kernel, that earns credit.
const LONG: Duration = Duration::from_micros(500);
/// What it earns.
const EARNED: Duration = Duration::from_millis(2);
/// What an instruction that software does not have earns, and the most that there is.
const MOST: Duration = Duration::from_millis(20);
/// Programs that are remembered.
const KNOWN: usize = 64;

/// What a program is known by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Space {
    pub(super) root: u64,
    /// The last entry of its half.
    pub(super) top: u64,
}

#[derive(Clone, Copy, Debug)]
struct Program {
    space: Space,
    credit: Duration,
    used: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Pace {
    /// All programs run on KVM.
    always: bool,
    price: Duration,
    known: Vec<Program>,
    asked: u64,
    /// Which one has gone on in software since when.
    software: Option<(Space, Instant)>,
}

impl Pace {
    pub(super) fn new(always: bool) -> Self {
        Self { always, price: PRICE, known: Vec::new(), asked: 0, software: None }
    }

    /// Whether the program, which begins or goes on behind its kernel now, does so on KVM.
    pub(super) fn is_for_kvm(&mut self, space: Space) -> bool {
        self.asked += 1;
        let asked = self.asked;
        let known = self.known.iter_mut().find(|program| program.space == space);
        let has_credit = known.is_some_and(|program| {
            program.used = asked;
            !program.credit.is_zero()
        });
        self.software = None;
        if has_credit || self.always {
            return true;
        }
        self.software = Some((space, Instant::now()));
        false
    }

    /// The program is still running in software, and has not left for its kernel.
    pub(super) fn goes_on(&mut self, space: Space) {
        if let Some((of, since)) = self.software
            && of == space
            && since.elapsed() >= LONG
        {
            self.give(space, EARNED);
        }
    }

    /// It has come to an instruction that software does not have.
    pub(super) fn needs_kvm(&mut self, space: Space) {
        self.give(space, MOST);
    }

    /// A stay on KVM has lasted for so long, with all that goes before and behind it; whether it was not cut short.
    pub(super) fn stayed(&mut self, space: Space, lasted: Duration, is_whole: bool) {
        if is_whole {
            self.price = lasted.min(self.price + self.price / RISE).min(PRICE);
        }
        let worth = 2 * self.price;
        if let Some(program) = self.known.iter_mut().find(|program| program.space == space) {
            program.credit = (program.credit + lasted.saturating_sub(worth)).min(MOST);
            program.credit = program.credit.saturating_sub(worth.saturating_sub(lasted));
        }
    }

    fn give(&mut self, space: Space, credit: Duration) {
        let used = self.asked;
        if let Some(program) = self.known.iter_mut().find(|program| program.space == space) {
            program.credit = program.credit.max(credit);
            return;
        }
        if self.known.len() >= KNOWN
            && let Some((oldest, _)) = (0..).zip(&self.known).min_by_key(|(_, program)| program.used)
        {
            self.known.swap_remove(oldest);
        }
        self.known.push(Program { space, credit, used });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_micros(50);

    fn space(root: u64) -> Space {
        Space { root, top: 7 }
    }

    fn computes(pace: &mut Pace, space: Space) {
        assert!(!pace.is_for_kvm(space));
        pace.software = pace.software.map(|(space, since)| (space, since - LONG));
        pace.goes_on(space);
    }

    #[test]
    fn programs_that_ask_their_kernel_all_the_time_stay_in_software() {
        let mut pace = Pace::new(false);
        for _ in 0..100 {
            assert!(!pace.is_for_kvm(space(1)));
            pace.goes_on(space(1));
        }
        assert!(Pace::new(true).is_for_kvm(space(1)));
    }

    #[test]
    fn one_that_computes_goes_to_kvm_and_comes_back_when_it_does_not_any_more() {
        let mut pace = Pace::new(false);
        computes(&mut pace, space(1));
        pace.goes_on(space(2));
        assert!(pace.is_for_kvm(space(1)) && !pace.is_for_kvm(space(2)));
        assert!(!pace.is_for_kvm(Space { top: 8, ..space(1) }), "the next program there");
        // The price is known, and stays are worth it.
        pace.stayed(space(1), SHORT, true);
        for _ in 0..1000 {
            pace.stayed(space(1), 3 * SHORT, true);
        }
        assert!(pace.is_for_kvm(space(1)));
        // Nothing but the price.
        let stays = (0..).take_while(|_| {
            pace.stayed(space(1), SHORT, true);
            pace.is_for_kvm(space(1))
        });
        let most = (MOST.as_micros() / SHORT.as_micros()) as usize;
        assert!((most - 2..=most + 2).contains(&stays.count()));
    }

    #[test]
    fn the_price_is_that_of_the_shortest_stays_of_late() {
        let mut pace = Pace::new(false);
        pace.stayed(space(1), SHORT, true);
        assert_eq!(pace.price, SHORT);
        pace.stayed(space(1), 4 * SHORT, true);
        assert!((SHORT..SHORT * 101 / 100).contains(&pace.price));
        pace.stayed(space(1), SHORT / 10, false);
        assert!(pace.price >= SHORT);
        // On a machine that has become slower.
        for _ in 0..40_000 {
            pace.stayed(space(1), 3 * SHORT, true);
        }
        assert_eq!(pace.price, 3 * SHORT);
        for _ in 0..40_000 {
            pace.stayed(space(1), 10 * PRICE, true);
        }
        assert_eq!(pace.price, PRICE);
    }

    #[test]
    fn what_software_lacks_brings_a_program_to_kvm_and_few_are_remembered() {
        let mut pace = Pace::new(false);
        for root in 0..200 {
            assert!(!pace.is_for_kvm(space(root)));
            pace.needs_kvm(space(root));
            assert!(pace.is_for_kvm(space(root)));
        }
        assert_eq!(pace.known.len(), KNOWN);
        assert!(pace.is_for_kvm(space(199)) && !pace.is_for_kvm(space(0)));
    }
}
