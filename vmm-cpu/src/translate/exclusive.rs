//! Moments in which one vCPU runs alone: for locked accesses that the host cannot make atomic, those that are not aligned.
//!
//! Whoever wants such a moment leaves the guest, takes its turn, says so, and waits until all others are out of the guest.
//! A vCPU that enters says so first and looks second, both sequentially consistent, so that one of the two sees the other.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::core::Core;

/// Shared by the vCPUs of a virtual machine.
#[derive(Debug, Default)]
pub(crate) struct Exclusive {
    taken: AtomicBool,
    turn: Mutex<()>,
}

/// One vCPU's turn, until dropped.
struct Turn<'a> {
    taken: &'a AtomicBool,
    _turn: MutexGuard<'a, ()>,
}

impl Exclusive {
    fn is_taken(&self) -> bool {
        self.taken.load(Ordering::SeqCst)
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Turn<'_> {
        let turn = self.lock();
        self.taken.store(true, Ordering::SeqCst);
        Turn { taken: &self.taken, _turn: turn }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.taken.store(false, Ordering::SeqCst);
    }
}

impl Core {
    /// Guest memory may be accessed from here on.
    pub(crate) fn enter_guest(&mut self) {
        self.signals.enter_guest();
        self.give_way();
        self.see_epoch();
    }

    /// Stays out of the guest while another vCPU wants to be alone there.
    pub(crate) fn give_way(&mut self) {
        while self.shared.exclusive.is_taken() {
            self.signals.leave_guest();
            drop(self.shared.exclusive.lock());
            self.signals.enter_guest();
            self.see_epoch();
        }
    }

    /// Does something while no other vCPU accesses guest memory. What was known of the memory map before may have
    /// changed when `f` is called, and `f` calls nobody outside.
    pub(crate) fn alone<T>(&mut self, f: impl FnOnce(&mut Self) -> T) -> T {
        let shared = std::sync::Arc::clone(&self.shared);
        if shared.max_vcpus == 1 {
            return f(self);
        }
        self.signals.leave_guest();
        let turn = shared.exclusive.take();
        shared.wait_until_outside(self.index);
        self.signals.enter_guest();
        self.see_epoch();
        let result = f(self);
        drop(turn);
        result
    }
}
