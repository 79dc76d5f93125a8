//! The conformance suite: what every backend has to do, as tests that know nothing of any backend.
//!
//! Each case runs against each backend that is compiled in, and against a trivial software backend of the
//! suite's own, as a test of its own name: `kvm::pio::in_and_out_of_every_size`. A case that asks for a
//! capability that a backend does not show ends as `ignored` with the reason.
//!
//! ```text
//! cargo test -p vmm-cpu --test conformance            # all backends
//! cargo test -p vmm-cpu --test conformance kvm::mmio  # one backend, one subject
//! ```
//!
//! Guests are assembled here, run for a few thousand instructions at most, and touch nothing but general
//! registers, so that they also finish where privileged guest code is emulated one instruction at a time.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    missing_docs,
    reason = "the whole crate is tests, which clippy recognises only by an attribute that it does not use"
)]

use std::process::ExitCode;

#[path = "conformance/mod.rs"]
mod suite;

fn main() -> ExitCode {
    suite::run()
}
