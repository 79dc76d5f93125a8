//! A hostile guest for the `translate` backend, shared by the robustness test and the fuzz target `translate_guest`.
//!
//! - [`guest`]: what the input describes, as `arbitrary` reads it.
//! - [`code`]: instructions, made of templates and of raw bytes.
//! - [`layout`]: where things lie, and the tables that the guest starts with.
//! - [`arena`]: guest memory between canaries.
//! - [`bus`]: a VMM that answers at random and changes the machine from its callbacks.
//! - [`watchdog`]: kicks long runs, and ends the process at one that does not answer.
//! - [`mutate`]: changes of saved states.
//! - [`exercise`]: all of it together.
//! - [`compare`]: what both tiers make of a guest.
//!
//! Uses nothing but the public API, so that the fuzz target can include it.

// Each of the two uses its own part.
#![allow(dead_code, unreachable_pub)]
// The lint spares test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

pub mod arena;
#[cfg(test)]
mod attacks;
pub mod bus;
pub mod code;
pub mod compare;
pub mod exercise;
#[cfg(test)]
mod flat;
pub mod guest;
pub mod layout;
pub mod mutate;
#[cfg(test)]
mod translated;
pub mod watchdog;

/// Held by whoever takes much memory: tests run in parallel.
pub fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Resident memory of this process in bytes.
pub fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096
}
