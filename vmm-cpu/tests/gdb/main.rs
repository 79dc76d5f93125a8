//! The GDB stub by its protocol: small guests on the translate backend, and a client that knows just bytes.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs,
    reason = "the whole crate is tests, which clippy recognises only by an attribute that it does not use"
)]

mod client;
mod ending;
mod hostile;
mod inspecting;
mod machine;
mod stopping;
