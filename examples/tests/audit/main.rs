//! The audit log of a machine: of one that boots, and of a device whose log's disk stands still.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test may panic, also in functions that it calls")]

mod back_pressure;
mod boot;

use std::sync::{Mutex, MutexGuard, PoisonError};

/// One test at a time: latencies are compared, and a guest that has little of the processor loses its timer.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}
