//! Requests that are not to be believed: those of guests, and those of managers.
//!
//! | part | for |
//! |---|---|
//! | [`Protocol`], [`Session`] | what may be asked for after what: a device's or a connection's state machine |
//! | [`Mediator`] | a guest's request from its bytes to its effect: fetched once, decoded, in order, allowed, within limits, then carried out |
//! | [`Standing`] | what follows from requests that were none: throttle, device reset, pause, kill |
//! | [`Desk`] | management verbs, and those that a second person has to confirm |
//!
//! All of them ask the same [`Monitor`](crate::Monitor) that channels ask.

mod desk;
mod mediator;
mod protocol;
mod standing;
#[cfg(test)]
mod tests;

pub use crate::syntax::Step;
pub use desk::{Desk, DeskError, DeskEvent, Proposal, Ticket, TicketId};
pub use mediator::{Mediator, Rejected};
pub use protocol::{OutOfOrder, Protocol, ProtocolBuilder, ProtocolError, Session};
pub use standing::Standing;
