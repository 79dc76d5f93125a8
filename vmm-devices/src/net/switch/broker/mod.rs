//! A switch for devices of several processes: one, the broker, has the switch; the others are clients, each with a port.
//!
//! | part | what |
//! |---|---|
//! | [`SwitchServer`] | listens at a unix socket, asks the gate about each client, and moves frames |
//! | [`SwitchClient`] | a [`NetBackend`](crate::net::NetBackend): the port of a device of this process |
//!
//! A client passes two descriptors when it says hello: memory with two rings of frames, one each way, whose size is sealed, and one end of a pair
//! of sockets by which it is woken. It wakes the broker by a message on the connection, whose end is the end of the port.
//! A frame is copied from the sender's memory into its ring, from there into the receiver's ring, and from there into the
//! receiver's memory; each copy is another process's work. Whoever sleeps is woken, and nobody else.
//!
//! Sockets wake, and not eventfds: both sides have the same eventfd, so that one of them can make it blocking and full, and the
//! other would wait for ever. Whether a socket's message waits is said by who sends it.
//!
//! # Threat model
//! A client is hostile to the broker, and by that to others: it writes what it likes into its memory at any moment ([`RingError`](super::RingError)),
//! passes descriptors of anything, sends any message at any time, or none. It may lose its own port, and cost the broker the time that
//! its share of the frames takes. Who it is the kernel says (SO_PEERCRED); what it says beside that is for the gate to believe or not.
//! What it passes is used when it is known to be a memfd, and a unix socket of datagrams; until then no call is made on it that could wait for whom
//! it is of, and it is closed by a thread that nobody waits for.
//! A client trusts the broker with its frames, and with nothing else: a broker that is dead, or lies, takes the link down. Clients do not know of each other.

mod client;
mod memory;
mod message;
mod server;
mod socket;
#[cfg(test)]
mod tests;

use std::io;

pub use client::{ClientConfig, SwitchClient};
pub use server::{Peer, ServerBuilder, ServerEvent, ServerStopper, SwitchServer};

/// Why there is no line between client and broker.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BrokerError {
    /// A socket cannot be had.
    #[error("socket {path:?}: {what}")]
    Socket {
        /// Where.
        path: std::path::PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the host says.
        source: io::Error,
    },
    /// The broker has refused the client.
    #[error("the broker says no: {reason}")]
    Refused {
        /// As it says.
        reason: String,
    },
    /// The other side does not speak as it should.
    #[error("the other side has sent {what}")]
    Protocol {
        /// What.
        what: &'static str,
    },
    /// It speaks another version.
    #[error("the other side speaks version {theirs}; this is version {own}", own = message::VERSION)]
    Version {
        /// Its version.
        theirs: u8,
    },
    /// A text that is too long to be sent.
    #[error("{what} of {len} bytes; {most} are the most")]
    Text {
        /// Which text.
        what: &'static str,
        /// Its bytes.
        len: usize,
        /// The most.
        most: usize,
    },
    /// The memory is not as it has to be.
    #[error("the memory for frames is not one: {reason}")]
    Memory {
        /// What is wrong.
        reason: String,
    },
    /// The rings in it are not.
    #[error(transparent)]
    Ring(#[from] super::RingError),
    /// The right to be on the network has been taken back.
    #[error("the right to be on the network was taken back")]
    Revoked,
    /// The host refused something.
    #[error(transparent)]
    Host(#[from] io::Error),
}

impl From<rustix::io::Errno> for BrokerError {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Host(error.into())
    }
}
