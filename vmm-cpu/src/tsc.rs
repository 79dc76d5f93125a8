//! The host's time-stamp counter.

#![allow(unsafe_code, reason = "the instruction that reads it")]

/// Reads it.
pub(crate) fn host_tsc() -> u64 {
    // SAFETY: RDTSC is part of every x86-64 processor, and Linux leaves it to user programs.
    unsafe { core::arch::x86_64::_rdtsc() }
}
