//! TSC rate, pause and resume.
//!
//! KVM has no pause: guest time is the host's plus an offset. A pause is therefore an account of
//! the host ticks that passed meanwhile; each vCPU subtracts what it has not subtracted yet when it
//! next runs, and the KVM clock is set back to where it stopped.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::kvm_clock_data;

use super::host;
use super::vm::VmInner;
use crate::error::Result;
use crate::vm::VmClock;

/// What stood still when the clock was paused.
#[derive(Clone, Copy, Debug)]
struct Pause {
    guest_ns: u64,
    host_tsc: u64,
}

/// The clock account of one VM.
#[derive(Debug, Default)]
pub(super) struct ClockAccount {
    tsc_khz: AtomicU32,
    host_khz: AtomicU32,
    pause: Mutex<Option<Pause>>,
    paused: AtomicBool,
    /// Host ticks of all pauses so far.
    paused_ticks: AtomicU64,
}

impl ClockAccount {
    pub(super) fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Acquire)
    }

    pub(super) fn paused_ticks(&self) -> u64 {
        self.paused_ticks.load(Ordering::Acquire)
    }

    /// Host ticks of all pauses, with that of a pause that still lasts.
    pub(super) fn paused_ticks_now(&self) -> u64 {
        let pause = self.pause.lock().unwrap_or_else(PoisonError::into_inner);
        let lasting = pause.map_or(0, |pause| crate::tsc::host_tsc().wrapping_sub(pause.host_tsc));
        self.paused_ticks().wrapping_add(lasting)
    }

    /// `host_ticks` at the guest's rate.
    pub(super) fn guest_ticks(&self, host_ticks: u64) -> u64 {
        let (guest, host) = (self.tsc_khz(), self.host_khz.load(Ordering::Relaxed));
        if guest == host || host == 0 {
            return host_ticks;
        }
        let scaled = u128::from(host_ticks) * u128::from(guest) / u128::from(host);
        u64::try_from(scaled).unwrap_or(u64::MAX)
    }

    /// The rates of the guest's counter and of the host's.
    pub(super) fn set_rates(&self, guest_khz: u32, host_khz: u32) {
        self.tsc_khz.store(guest_khz, Ordering::Relaxed);
        self.host_khz.store(host_khz, Ordering::Relaxed);
    }

    pub(super) fn tsc_khz(&self) -> u32 {
        self.tsc_khz.load(Ordering::Relaxed)
    }
}

/// The clock as the trait shows it.
#[derive(Debug)]
pub(super) struct KvmClock(pub(super) Arc<VmInner>);

impl KvmClock {
    fn account(&self) -> &ClockAccount {
        &self.0.clock
    }

    fn pause_slot(&self) -> std::sync::MutexGuard<'_, Option<Pause>> {
        self.account().pause.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl VmClock for KvmClock {
    fn tsc_khz(&self) -> u32 {
        self.account().tsc_khz()
    }

    fn now(&self) -> Result<u64> {
        match *self.pause_slot() {
            Some(pause) => Ok(pause.guest_ns),
            None => Ok(self.0.fd.get_clock().map_err(|errno| host("KVM_GET_CLOCK", errno))?.clock),
        }
    }

    fn pause(&self) -> Result<()> {
        let mut slot = self.pause_slot();
        if slot.is_none() {
            let clock = self.0.fd.get_clock().map_err(|errno| host("KVM_GET_CLOCK", errno))?;
            *slot = Some(Pause { guest_ns: clock.clock, host_tsc: crate::tsc::host_tsc() });
            self.account().paused.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn resume(&self) -> Result<()> {
        let mut slot = self.pause_slot();
        if let Some(pause) = *slot {
            let clock = kvm_clock_data { clock: pause.guest_ns, ..Default::default() };
            self.0.fd.set_clock(&clock).map_err(|errno| host("KVM_SET_CLOCK", errno))?;
            let ticks = crate::tsc::host_tsc().wrapping_sub(pause.host_tsc);
            self.account().paused_ticks.fetch_add(ticks, Ordering::AcqRel);
            *slot = None;
            self.account().paused.store(false, Ordering::Release);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_count_at_the_guests_rate() {
        let account = ClockAccount::default();
        assert_eq!(account.guest_ticks(1_000), 1_000);
        account.set_rates(1_500_000, 3_000_000);
        assert_eq!(account.guest_ticks(3_000_000_000), 1_500_000_000);
        account.set_rates(3_000_000, 1_500_000);
        assert_eq!(account.guest_ticks(u64::MAX), u64::MAX);
    }

    #[test]
    fn a_pause_counts_while_it_lasts() {
        let account = ClockAccount::default();
        assert_eq!(account.paused_ticks_now(), 0);
        *account.pause.lock().unwrap() =
            Some(Pause { guest_ns: 0, host_tsc: crate::tsc::host_tsc().wrapping_sub(1_000) });
        assert!(account.paused_ticks_now() >= 1_000);
        assert_eq!(account.paused_ticks(), 0);
    }
}
