//! What reaches a vCPU of the toy backend from other threads.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_cpu::{Result, VcpuHandle};

/// Shared by a vCPU and its handles.
#[derive(Debug, Default)]
pub(super) struct Signals {
    pins: Mutex<Pins>,
    changed: Condvar,
    /// Set after every change of the pins, so that the interpreter takes the lock only then.
    attention: AtomicBool,
}

#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Pins {
    pub(super) kick: bool,
    pub(super) nmi: bool,
    pub(super) intr: bool,
}

impl Signals {
    /// Changes the pins.
    pub(super) fn change(&self, change: impl FnOnce(&mut Pins)) {
        change(&mut self.pins());
        self.attention.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// Whether the pins have changed since the last call.
    pub(super) fn take_attention(&self) -> bool {
        self.attention.swap(false, Ordering::Acquire)
    }

    /// The pins, to look at or to change without attention.
    pub(super) fn pins(&self) -> MutexGuard<'_, Pins> {
        self.pins.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for a kick, an NMI or, if the vCPU takes them, an interrupt, at most for `timeout`; whether
    /// there is one.
    pub(super) fn wait(&self, timeout: Option<Duration>, takes_interrupts: bool) -> bool {
        let asleep = |pins: &mut Pins| !(pins.kick || pins.nmi || pins.intr && takes_interrupts);
        let guard = self.pins();
        match timeout {
            None => {
                drop(self.changed.wait_while(guard, asleep).unwrap_or_else(PoisonError::into_inner));
                true
            }
            Some(timeout) => {
                let waited = self.changed.wait_timeout_while(guard, timeout, asleep);
                !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
            }
        }
    }
}

impl VcpuHandle for Signals {
    fn kick(&self) {
        self.change(|pins| pins.kick = true);
    }

    fn nmi(&self) -> Result<()> {
        self.change(|pins| pins.nmi = true);
        Ok(())
    }

    fn set_intr(&self, asserted: bool) -> Result<()> {
        self.change(|pins| pins.intr = asserted);
        Ok(())
    }
}
