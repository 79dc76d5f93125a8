//! What goes wrong on a network.

use std::io;

use super::mac::MacAddrError;
use super::packet::PacketError;

/// Why a network is not there, or does not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NetError {
    /// The right to be on the network has been taken back.
    #[error("the right to be on the network was taken back")]
    Revoked,
    /// More pairs of queues than the backend carries.
    #[error("{pairs} pairs of queues were asked for; this backend carries {most} at most")]
    Pairs {
        /// Those asked for.
        pairs: u16,
        /// The most.
        most: u16,
    },
    /// The frame is longer than frames are, or shorter than an Ethernet header.
    #[error("a frame of {len} bytes; allowed are 14 to {most}", most = super::MAX_FRAME)]
    Frame {
        /// Its length in bytes.
        len: usize,
    },
    /// What is said of a frame does not fit it.
    #[error(transparent)]
    Packet(#[from] PacketError),
    /// An address that none can have.
    #[error(transparent)]
    Mac(#[from] MacAddrError),
    /// A tap device cannot be opened.
    #[error("tap device {name:?}: {what}: {source}")]
    Tap {
        /// Its name.
        name: String,
        /// What was tried, and what to do where that is known.
        what: &'static str,
        /// What the host says.
        source: io::Error,
    },
    /// The name is none that network devices have.
    #[error(
        "{name:?} is no name of a network device; allowed are 1 to 15 bytes without '/', ':', '%' or white space"
    )]
    Name {
        /// What it was.
        name: String,
    },
    /// The host refused something.
    #[error(transparent)]
    Host(#[from] io::Error),
}
