//! TSC rate, pause and resume.
//!
//! KVM has no pause: guest time is the host's plus an offset. A pause is therefore an account of
//! the host ticks that passed meanwhile; each vCPU subtracts what it has not subtracted yet when it
//! next runs, and the KVM clock is set back to where it stopped.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use kvm_bindings::kvm_clock_data;

use super::vm::VmInner;
use super::{host, sys};
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

    pub(super) fn set_tsc_khz(&self, khz: u32) {
        self.tsc_khz.store(khz, Ordering::Relaxed);
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
            *slot = Some(Pause { guest_ns: clock.clock, host_tsc: sys::host_tsc() });
            self.account().paused.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn resume(&self) -> Result<()> {
        let mut slot = self.pause_slot();
        if let Some(pause) = *slot {
            let clock = kvm_clock_data { clock: pause.guest_ns, ..Default::default() };
            self.0.fd.set_clock(&clock).map_err(|errno| host("KVM_SET_CLOCK", errno))?;
            let ticks = sys::host_tsc().wrapping_sub(pause.host_tsc);
            self.account().paused_ticks.fetch_add(ticks, Ordering::AcqRel);
            *slot = None;
            self.account().paused.store(false, Ordering::Release);
        }
        Ok(())
    }
}
