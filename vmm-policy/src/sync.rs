//! What revocation is built on. `tests/revoke_loom.rs` puts loom's in its place and tries all interleavings.

pub(crate) use std::sync::atomic::{AtomicU64, Ordering};
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// The guard, also where a thread has panicked with it: what is behind these locks holds at each step.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
