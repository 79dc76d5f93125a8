//! A hostile kernel on the ABI of `xen_pv`, shared by the robustness test and the fuzz target `xen_pv_hypercalls`.
//!
//! - [`guest`]: what the input describes, as `arbitrary` reads it.
//! - [`engine`]: an engine that executes nothing, and checks what it is told.
//! - [`exercise`]: all of it together.
//!
//! Uses nothing but the public API, so that the fuzz target can include it.

// Each of the two uses its own part.
#![allow(dead_code, unreachable_pub)]
// The lint spares test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]
#![allow(clippy::cast_possible_truncation)]

pub mod engine;
pub mod exercise;
pub mod guest;
