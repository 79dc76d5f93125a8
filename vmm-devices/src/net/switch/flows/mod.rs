//! Flows: a policy is asked once for each, and the frames that belong to it pass.
//!
//! [`FlowTable`] is a [`FlowJudge`] for [`Switch::set_judge`](super::Switch::set_judge). It asks a [`FlowPolicy`] about the frame that begins
//! something, keeps what was allowed, and lets pass what goes with it, answers as well. When the policy changes
//! ([`FlowPolicy::epoch`]), each flow is asked about again at its next frame.
//!
//! | frame | is |
//! |---|---|
//! | TCP | [`FlowKind::Tcp`] of the receiver's port, begun by a SYN alone; what belongs to no flow is dropped |
//! | UDP | [`FlowKind::Udp`] of the receiver's port; an answer is what comes back between the same addresses and ports |
//! | ICMP, ICMPv6 | [`FlowKind::Icmp`]; an echo reply answers an echo request and begins nothing; everything else is asked about both ways, errors too |
//! | another protocol of IP | [`FlowKind::Ip`], each way by itself |
//! | ARP | [`FlowKind::Ethernet`] 0x0806, each way by itself |
//! | another type | [`FlowKind::Ethernet`], each way by itself |
//!
//! Neighbour discovery of IPv6 is ICMPv6 of types 133 to 137; nobody looks at the addresses in it.
//!
//! # What passes under no policy
//! Nobody is asked about a frame that receivers may take for another one than it was judged as, or that says no more than a part:
//!
//! * fragments of IP packets, the first as well: the others have no ports. TCP finds packet sizes that need none;
//! * a tag behind a tag, and a length (below 0x0600) in the place of a type, behind which LLC and SNAP may hide anything (CVE-2021-27853,
//!   CVE-2021-27862);
//! * what is called IP, ARP, TCP, UDP or ICMP and whose header is not there as a whole, or not within the bytes that are looked at;
//! * ARP whose sender is not the frame's, or that neither asks nor answers;
//! * an address that is not the port's, by [`FlowPolicy::owns`].
//!
//! # Threat model
//! Frames are chosen by hostile guests. Flows are kept for a pair of ports, so many for each ([`FlowTableBuilder::flows`]), the least recently
//! used making room: who opens many displaces those between the same two alone. There are so many pairs. What is refused is not
//! kept. A frame costs a lookup, and a question where it begins something.

mod kind;
mod table;
#[cfg(test)]
mod tests;

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

pub use kind::FlowKind;
pub use table::{FlowTable, FlowTableBuilder, FlowTotals};

#[cfg(doc)]
use super::judge::FlowJudge;
use super::judge::FlowPort;
use super::vlan::VlanId;
use crate::virtio::rate::Rate;

/// Decides about flows. [`FlowTable`] calls it on the thread that serves the sender's queue, with that port and the pair of ports locked: it is
/// to be quick, and to call neither the switch nor the table.
pub trait FlowPolicy: Send + Sync {
    /// Another number whenever what [`decide`](Self::decide) or [`owns`](Self::owns) says may be another: what is kept is then asked about again. It is read for
    /// each frame.
    fn epoch(&self) -> u64;

    /// Whether the flow may be, or go on being.
    fn decide(&self, flow: &NewFlow<'_>) -> FlowVerdict;

    /// Whether a port may send from an address of IP. Asked where a flow of IP or ARP begins, and again when the epoch is another.
    fn owns(&self, port: &FlowPort, address: IpAddr) -> bool {
        let (_, _) = (port, address);
        true
    }
}

impl<P: FlowPolicy + ?Sized> FlowPolicy for Arc<P> {
    fn epoch(&self) -> u64 {
        (**self).epoch()
    }

    fn decide(&self, flow: &NewFlow<'_>) -> FlowVerdict {
        (**self).decide(flow)
    }

    fn owns(&self, port: &FlowPort, address: IpAddr) -> bool {
        (**self).owns(port, address)
    }
}

/// A flow that a policy is asked about.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct NewFlow<'a> {
    /// Who begins it.
    pub from: &'a FlowPort,
    /// Whom it leads to.
    pub to: &'a FlowPort,
    /// Its VLAN.
    pub vlan: VlanId,
    /// What it is.
    pub kind: FlowKind,
    /// The address of IP from which it comes, if it has one.
    pub source: Option<IpAddr>,
    /// And to which it goes.
    pub destination: Option<IpAddr>,
    /// It was allowed before, and the policy has changed since.
    pub again: bool,
}

/// What becomes of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum FlowVerdict {
    /// Its frames pass.
    Pass,
    /// They pass as long as there are tokens, one a byte, both ways together; the others are dropped. All flows that one port begins to another
    /// with the same `rule` share them. Of two ports, 64 limits are kept at a time: the oldest makes room for another one, and begins anew.
    Limited {
        /// How fast.
        rate: Rate,
        /// Which limit it is.
        rule: u32,
    },
    /// They do not.
    Drop,
}

impl fmt::Display for FlowVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pass => f.write_str("pass"),
            Self::Limited { rate, .. } => write!(f, "pass, {} bytes a second", rate.per_second),
            Self::Drop => f.write_str("drop"),
        }
    }
}
