//! Rights to channels: given by a [`Monitor`](crate::Monitor) alone, typed, counted in use, and taken back.

pub mod channel;
mod hold;
mod life;
mod open;
mod registry;
mod right;
#[cfg(test)]
mod tests;

pub use hold::{Grant, Hold, Use, Watch};
pub use open::{OpenChannel, Revocation};
pub(crate) use registry::Registry;
pub use right::{Ends, GrantId, RevokeOutcome};
pub(crate) use right::{OwnedRequest, Right};
