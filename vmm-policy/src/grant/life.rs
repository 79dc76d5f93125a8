//! Whether a right is there, and who is using it: one word, so that nobody begins to use what has been revoked.

use std::time::{Duration, Instant};

use crate::sync::{AtomicU64, Condvar, Mutex, Ordering, lock};

/// The upper bit says that the right is gone, the others count those who use it.
const REVOKED: u64 = 1 << 63;

/// See the module.
#[derive(Debug)]
pub(crate) struct Life {
    word: AtomicU64,
    /// Held by who waits for the last one while it looks.
    asleep: Mutex<()>,
    left: Condvar,
}

impl Life {
    pub(crate) fn new() -> Self {
        Self { word: AtomicU64::new(0), asleep: Mutex::new(()), left: Condvar::new() }
    }

    /// Begins a use, if the right is there; [`leave`](Self::leave) ends it.
    pub(crate) fn enter(&self) -> bool {
        let mut word = self.word.load(Ordering::Relaxed);
        while word & REVOKED == 0 {
            // Acquire: what the use finds is no older than the right.
            match self.word.compare_exchange_weak(word, word + 1, Ordering::Acquire, Ordering::Relaxed) {
                Ok(_) => return true,
                Err(now) => word = now,
            }
        }
        false
    }

    /// Ends a use.
    pub(crate) fn leave(&self) {
        // Release: who takes the channel away comes after all that the use did.
        if self.word.fetch_sub(1, Ordering::Release) == REVOKED | 1 {
            // Who waits has either seen this or sleeps.
            drop(lock(&self.asleep));
            self.left.notify_all();
        }
    }

    /// Ends the right; whether it was there. No use begins from then on; some may not have ended.
    pub(crate) fn revoke(&self) -> bool {
        self.word.fetch_or(REVOKED, Ordering::AcqRel) & REVOKED == 0
    }

    pub(crate) fn is_live(&self) -> bool {
        self.word.load(Ordering::Acquire) & REVOKED == 0
    }

    /// Whether the right is gone and nobody uses it any more.
    pub(crate) fn is_idle(&self) -> bool {
        self.word.load(Ordering::Acquire) == REVOKED
    }

    /// Waits until nobody uses what has been revoked; whether that has come within `most`, or at all.
    pub(crate) fn wait_idle(&self, most: Option<Duration>) -> bool {
        let until = most.and_then(|most| Instant::now().checked_add(most));
        let mut guard = lock(&self.asleep);
        // Acquire: after all that the uses did.
        while self.word.load(Ordering::Acquire) != REVOKED {
            let Some(until) = until else {
                guard = self.left.wait(guard).unwrap_or_else(crate::sync::PoisonError::into_inner);
                continue;
            };
            let Some(left) = until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())
            else {
                return false;
            };
            guard = match self.left.wait_timeout(guard, left) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        true
    }
}
