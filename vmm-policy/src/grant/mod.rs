//! Rights to channels: given by a [`Monitor`](crate::Monitor) alone, typed, counted in use, and taken back.

pub mod channel;
mod life;
mod registry;
mod right;
#[cfg(test)]
mod tests;

pub(crate) use registry::Registry;
pub use right::{Ends, Grant, GrantId, Hold, OpenChannel, Revocation, RevokeOutcome, Use, Watch};
pub(crate) use right::{OwnedRequest, Right};
