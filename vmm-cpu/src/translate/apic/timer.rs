//! The timer (Intel SDM 3A 12.5.4).
//!
//! One-shot and periodic mode count a bus clock of 1 GHz, so one tick is the divisor in nanoseconds. The count
//! is never stepped: it follows from the time at which it reaches zero.

use super::low_byte;

/// Number of IA32_TSC_DEADLINE.
pub(crate) const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// Bits of the divide configuration register.
pub(super) const DIVIDE_BITS: u32 = 0b1011;

/// A periodic timer wakes the run loop no more often than this. A guest may ask for a period of 1 ns; missed
/// periods merge into one interrupt anyhow.
const MIN_WAKE_NS: u64 = 10_000;

/// What the run loop must wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deadline {
    /// Time of the virtual machine in nanoseconds.
    Ns(u64),
    /// A value of the time-stamp counter.
    Tsc(u64),
    /// Nothing.
    None,
}

/// What the timer's LVT entry makes of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TimerMode {
    OneShot,
    Periodic,
    TscDeadline,
    /// The fourth encoding: nothing runs.
    Reserved,
}

impl TimerMode {
    fn counts(self) -> bool {
        matches!(self, Self::OneShot | Self::Periodic)
    }
}

/// The timer but for its LVT entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Timer {
    divide: u32,
    initial: u32,
    /// When the count reaches zero, in nanoseconds; `None` while it does not run.
    zero_at: Option<u64>,
    /// No periodic deadline is announced before, in nanoseconds.
    quiet_until: u64,
    /// IA32_TSC_DEADLINE; 0 while disarmed.
    tsc_deadline: u64,
}

impl Timer {
    /// The timer of a saved state. `current` ticks are left; a periodic timer without any starts a period.
    pub(super) fn restored(mode: TimerMode, divide: u32, initial: u32, current: u32, now: u64) -> Self {
        let mut timer = Self { divide, ..Self::default() };
        if mode.counts() {
            timer.initial = initial;
            let left = if mode == TimerMode::Periodic && current == 0 { initial } else { current };
            timer.zero_at = (left != 0).then(|| now.saturating_add(timer.nanoseconds(left)));
        }
        timer
    }

    pub(super) fn divide(&self) -> u32 {
        self.divide
    }

    pub(super) fn initial(&self) -> u32 {
        self.initial
    }

    /// Ticks left. It is 0 where nothing counts.
    pub(super) fn current(&self, mode: TimerMode, now: u64) -> u32 {
        let Some(zero_at) = self.zero_at else { return 0 };
        let left = match zero_at.checked_sub(now) {
            Some(left) if left > 0 => left,
            // Fired and not told yet.
            _ if mode != TimerMode::Periodic => return 0,
            _ => {
                let period = self.nanoseconds(self.initial).max(1);
                period - now.saturating_sub(zero_at) % period
            }
        };
        // The clock of a caller that goes back does not show more ticks than there were.
        u32::try_from(left.div_ceil(1 << self.shift())).map_or(self.initial, |ticks| ticks.min(self.initial))
    }

    /// Writes the initial count, which starts the timer; 0 stops it. Ignored where nothing counts.
    pub(super) fn set_initial(&mut self, mode: TimerMode, value: u32, now: u64) {
        if mode.counts() {
            self.initial = value;
            self.zero_at = (value != 0).then(|| now.saturating_add(self.nanoseconds(value)));
            self.quiet_until = 0;
        }
    }

    /// Writes the divide configuration; a running count goes on at the new rate.
    pub(super) fn set_divide(&mut self, mode: TimerMode, value: u32, now: u64) {
        let left = self.current(mode, now);
        self.divide = value & DIVIDE_BITS;
        if self.zero_at.is_some() {
            self.zero_at = Some(now.saturating_add(self.nanoseconds(left)));
        }
    }

    /// Follows a change of mode. Between one-shot and periodic the count goes on, and one that is at zero starts a period;
    /// any other change disarms.
    pub(super) fn change_mode(&mut self, old: TimerMode, new: TimerMode, now: u64) {
        if old != new && !(old.counts() && new.counts()) {
            *self = Self { divide: self.divide, ..Self::default() };
        } else if new == TimerMode::Periodic && self.zero_at.is_none() && self.initial != 0 {
            // A saved state cannot tell it from a periodic one that is just at zero.
            self.set_initial(new, self.initial, now);
        }
    }

    /// IA32_TSC_DEADLINE, which reads as 0 in the other modes.
    pub(super) fn tsc_deadline(&self) -> u64 {
        self.tsc_deadline
    }

    /// Writes IA32_TSC_DEADLINE; 0 disarms. Ignored in the other modes.
    pub(super) fn set_tsc_deadline(&mut self, mode: TimerMode, value: u64) {
        if mode == TimerMode::TscDeadline {
            self.tsc_deadline = value;
        }
    }

    /// Whether the timer has fired since the last call. Any number of periods counts once; the next one ends on the
    /// grid of the first.
    pub(super) fn take_fired(&mut self, mode: TimerMode, now: u64, tsc: u64) -> bool {
        if mode == TimerMode::TscDeadline {
            let fired = self.tsc_deadline != 0 && tsc >= self.tsc_deadline;
            if fired {
                self.tsc_deadline = 0;
            }
            return fired;
        }
        let Some(zero_at) = self.zero_at else { return false };
        let Some(late) = now.checked_sub(zero_at) else { return false };
        self.zero_at = (mode == TimerMode::Periodic).then(|| {
            let period = self.nanoseconds(self.initial).max(1);
            zero_at.saturating_add((late / period + 1).saturating_mul(period))
        });
        self.quiet_until = now.saturating_add(MIN_WAKE_NS);
        true
    }

    /// When [`Timer::take_fired`] should be asked.
    pub(super) fn deadline(&self, mode: TimerMode) -> Deadline {
        match (mode, self.zero_at) {
            (TimerMode::TscDeadline, _) if self.tsc_deadline != 0 => Deadline::Tsc(self.tsc_deadline),
            (TimerMode::OneShot, Some(zero_at)) => Deadline::Ns(zero_at),
            (TimerMode::Periodic, Some(zero_at)) => Deadline::Ns(zero_at.max(self.quiet_until)),
            _ => Deadline::None,
        }
    }

    /// Binary logarithm of the divisor, 0 to 7 (Intel SDM 3A figure 12-10).
    fn shift(&self) -> u8 {
        let encoded = low_byte(self.divide & 0b11 | (self.divide & 0b1000) >> 1);
        (encoded + 1) & 7
    }

    fn nanoseconds(&self, ticks: u32) -> u64 {
        u64::from(ticks) << self.shift()
    }
}

#[cfg(test)]
mod tests {
    use super::TimerMode::{OneShot, Periodic, Reserved, TscDeadline};
    use super::*;

    /// Divides by 1.
    const BY_1: u32 = 0b1011;

    fn counting(mode: TimerMode, divide: u32, initial: u32, now: u64) -> Timer {
        let mut timer = Timer::default();
        timer.set_divide(mode, divide, now);
        timer.set_initial(mode, initial, now);
        timer
    }

    #[test]
    fn divisors_are_those_of_figure_12_10() {
        let table =
            [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1), (4, 2), (0xffff_fff4, 2)];
        for (encoded, divisor) in table {
            let timer = counting(OneShot, encoded, 1000, 50);
            assert_eq!(timer.deadline(OneShot), Deadline::Ns(50 + 1000 * divisor), "{encoded:#x}");
            assert_eq!(timer.current(OneShot, 50), 1000);
            assert_eq!(timer.current(OneShot, 50 + divisor - 1), 1000, "a tick has not passed");
            assert_eq!(timer.current(OneShot, 50 + divisor), 999);
        }
    }

    #[test]
    fn one_shot_fires_once_at_zero() {
        let mut timer = counting(OneShot, BY_1, 10, 100);
        assert_eq!(timer.current(OneShot, 109), 1);
        assert!(!timer.take_fired(OneShot, 109, 0));
        assert_eq!(timer.current(OneShot, 110), 0);
        assert!(timer.take_fired(OneShot, 110, 0));
        assert!(!timer.take_fired(OneShot, 1 << 40, 0));
        assert_eq!((timer.initial(), timer.current(OneShot, 111)), (10, 0));
        assert_eq!(timer.deadline(OneShot), Deadline::None);
    }

    #[test]
    fn periodic_merges_what_was_missed_and_keeps_its_grid() {
        let mut timer = counting(Periodic, BY_1, 1_000_000, 0);
        assert_eq!(timer.deadline(Periodic), Deadline::Ns(1_000_000));
        assert!(!timer.take_fired(Periodic, 999_999, 0));
        assert!(timer.take_fired(Periodic, 1_000_000, 0));
        assert_eq!(timer.deadline(Periodic), Deadline::Ns(2_000_000));
        assert_eq!(timer.current(Periodic, 1_000_000), 1_000_000);
        // Before it is told, the count goes on as well.
        assert_eq!(timer.current(Periodic, 2_000_000), 1_000_000);
        assert_eq!(timer.current(Periodic, 7_300_000), 700_000);
        assert!(timer.take_fired(Periodic, 7_300_000, 0));
        assert!(!timer.take_fired(Periodic, 7_300_000, 0));
        assert_eq!(timer.deadline(Periodic), Deadline::Ns(8_000_000));
        assert_eq!(timer.current(Periodic, 7_300_000), 700_000);
    }

    #[test]
    fn a_period_of_a_nanosecond_does_not_flood() {
        let mut timer = counting(Periodic, BY_1, 1, 0);
        assert_eq!(timer.deadline(Periodic), Deadline::Ns(1), "the first one is exact");
        let (mut now, mut wakes) = (0, 0);
        while let Deadline::Ns(next) = timer.deadline(Periodic)
            && next < 1_000_000
        {
            assert!(next > now);
            now = next;
            assert!(timer.take_fired(Periodic, now, 0));
            wakes += 1;
        }
        assert_eq!(wakes, 100);
    }

    #[test]
    fn zero_stops_and_a_new_count_starts_over() {
        let mut timer = counting(Periodic, BY_1, 100, 0);
        timer.set_initial(Periodic, 0, 50);
        assert_eq!((timer.deadline(Periodic), timer.current(Periodic, 60)), (Deadline::None, 0));
        assert!(!timer.take_fired(Periodic, 1000, 0));
        timer.set_initial(Periodic, 100, 1000);
        timer.set_initial(Periodic, 100, 1050);
        assert_eq!(timer.deadline(Periodic), Deadline::Ns(1150));
    }

    #[test]
    fn a_new_divisor_changes_the_rate_of_what_is_left() {
        let mut timer = counting(OneShot, BY_1, 100, 0);
        timer.set_divide(OneShot, 0, 40);
        assert_eq!(timer.current(OneShot, 40), 60);
        assert_eq!(timer.deadline(OneShot), Deadline::Ns(40 + 2 * 60));
        let mut stopped = counting(OneShot, BY_1, 0, 0);
        stopped.set_divide(OneShot, 0, 40);
        assert_eq!(stopped.deadline(OneShot), Deadline::None);
    }

    #[test]
    fn tsc_deadline_fires_once_and_clears() {
        let mut timer = Timer::default();
        timer.set_tsc_deadline(TscDeadline, 5000);
        assert_eq!(timer.deadline(TscDeadline), Deadline::Tsc(5000));
        assert!(!timer.take_fired(TscDeadline, u64::MAX, 4999));
        assert!(timer.take_fired(TscDeadline, 0, 5000));
        assert_eq!((timer.tsc_deadline(), timer.deadline(TscDeadline)), (0, Deadline::None));
        timer.set_tsc_deadline(TscDeadline, 1);
        assert!(timer.take_fired(TscDeadline, 0, 6000), "one in the past fires at once");
        timer.set_tsc_deadline(TscDeadline, 7000);
        timer.set_tsc_deadline(TscDeadline, 0);
        assert!(!timer.take_fired(TscDeadline, 0, 8000), "0 disarms");
    }

    #[test]
    fn each_mode_ignores_the_registers_of_the_other() {
        let mut timer = Timer::default();
        timer.set_initial(TscDeadline, 100, 0);
        assert_eq!((timer.initial(), timer.current(TscDeadline, 0)), (0, 0));
        for mode in [OneShot, Periodic, Reserved] {
            timer.set_tsc_deadline(mode, 100);
            assert_eq!((timer.tsc_deadline(), timer.deadline(mode)), (0, Deadline::None));
        }
        timer.set_initial(Reserved, 100, 0);
        assert_eq!(timer.deadline(Reserved), Deadline::None);
    }

    #[test]
    fn changing_the_mode_disarms_unless_the_bus_clock_goes_on() {
        let running = counting(OneShot, 0, 100, 0);
        let mut timer = running.clone();
        timer.change_mode(OneShot, Periodic, 10);
        assert_eq!(timer, running);
        for (old, new) in [(OneShot, TscDeadline), (Periodic, TscDeadline), (Periodic, Reserved)] {
            let mut timer = running.clone();
            timer.change_mode(old, new, 10);
            assert_eq!((timer.deadline(old), timer.deadline(new)), (Deadline::None, Deadline::None));
            assert_eq!((timer.initial(), timer.divide()), (0, 0));
        }
        let mut timer = Timer::default();
        timer.set_tsc_deadline(TscDeadline, 5);
        timer.change_mode(TscDeadline, TscDeadline, 10);
        assert_eq!(timer.tsc_deadline(), 5);
        timer.change_mode(TscDeadline, OneShot, 10);
        assert_eq!(timer.tsc_deadline(), 0);
    }

    #[test]
    fn a_count_at_zero_starts_a_period_when_it_becomes_periodic() {
        let mut timer = counting(OneShot, BY_1, 100, 0);
        assert!(timer.take_fired(OneShot, 100, 0));
        timer.change_mode(OneShot, Periodic, 150);
        assert_eq!(timer.deadline(Periodic), Deadline::Ns(250));
        let left = timer.current(Periodic, 150);
        assert_eq!(Timer::restored(Periodic, BY_1, 100, left, 150).deadline(Periodic), Deadline::Ns(250));
        let mut stopped = counting(OneShot, BY_1, 0, 0);
        stopped.change_mode(OneShot, Periodic, 150);
        assert_eq!(stopped.deadline(Periodic), Deadline::None);
    }

    #[test]
    fn the_end_of_time_does_not_overflow() {
        let mut timer = counting(Periodic, 0b1010, u32::MAX, u64::MAX - 1);
        assert_eq!(timer.deadline(Periodic), Deadline::Ns(u64::MAX));
        assert!(timer.take_fired(Periodic, u64::MAX, 0));
        assert_eq!(timer.current(Periodic, 0), u32::MAX);
        let early = counting(OneShot, BY_1, 10, 1000);
        assert_eq!(early.current(OneShot, 0), 10, "time that goes back shows no more than all");
    }
}
