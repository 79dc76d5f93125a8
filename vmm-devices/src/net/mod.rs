//! Networks: what carries the frames of a network device, whatever the device is.
//!
//! | part | what |
//! |---|---|
//! | [`NetBackend`], [`NetPort`] | what a network is to a device: the whole, and one pair of queues |
//! | [`NetEvents`] | what a device is to its backend: who hears that frames came, or that the link is another |
//! | [`PacketInfo`], [`Offloads`] | what is left to the other side of a frame: checksums, segmentation |
//! | [`RxFilter`], [`MacAddr`] | which frames a driver wants |
//! | [`Tap`] | a tap device of the host |
//! | [`FrameSocket`] | frames on a unix socket, one a message |
//! | [`Membership`] | a grant that is held for a network, for those who write a backend |
//!
//! # Threat model
//! What a driver says of a frame is checked before a backend sees it ([`PacketInfo::check`]); the frame's bytes are the guest's, may
//! change at any moment, and are to be believed in nothing. Frames that come from the network are as hostile: a device looks at their
//! Ethernet header alone, and gives its driver what its buffers hold. A backend belongs to one device.

mod backend;
mod error;
mod filter;
mod mac;
mod membership;
mod packet;
mod socket;
pub mod switch;
mod tap;

pub use backend::{Agreed, Link, NetBackend, NetEvents, NetPort, Received, Sent};
pub use error::NetError;
pub(crate) use filter::is_tagged;
pub use filter::{MAX_MAC_ENTRIES, MacTable, RxFilter, VLANS};
pub use mac::{MacAddr, MacAddrError};
pub use membership::Membership;
pub use packet::{Checksum, Gso, GsoKind, HEADER, Offloads, PacketError, PacketInfo};
pub use socket::FrameSocket;
pub use tap::Tap;

/// Bytes of the longest frame: an IPv6 packet of 65 535 bytes behind its own header of 40, as segmentation leaves it to the other
/// side, an Ethernet header of 14, and two VLAN tags of 4 each.
pub const MAX_FRAME: usize = 65_535 + 40 + 14 + 8;

/// Bytes of an Ethernet header, which every frame has.
pub const ETHERNET_HEADER: usize = 14;
