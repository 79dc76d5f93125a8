//! What a frame is to a policy, and which flow it belongs to.

use std::fmt;
use std::net::IpAddr;

use super::super::judge::{Headers, Network, Transport};
use super::super::vlan::VlanId;

const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;
const IPV6: u16 = 0x86dd;
/// What is below is a length (IEEE 802.3, 3.2.6).
const FIRST_TYPE: u16 = 0x0600;
/// Tags: of a customer, of a service, and what was used before there was one for that.
const TAGS: [u16; 3] = [0x8100, 0x88a8, 0x9100];

/// Protocols of IP whose headers are looked at.
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMPV6: u8 = 58;

/// Echo requests and their replies: RFC 792, RFC 4443.
const ECHO: [(u8, u8); 2] = [(8, 0), (128, 129)];

/// What a flow is, by what it wants of the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FlowKind {
    /// A connection to a port.
    Tcp {
        /// The receiver's.
        port: u16,
    },
    /// Datagrams to a port.
    Udp {
        /// The receiver's.
        port: u16,
    },
    /// Messages of ICMP or ICMPv6.
    Icmp {
        /// Their type.
        kind: u8,
    },
    /// Packets of another protocol.
    Ip {
        /// Its number.
        protocol: u8,
    },
    /// Frames of another type, ARP among them.
    Ethernet {
        /// The type.
        ether_type: u16,
    },
}

impl FlowKind {
    /// Nanoseconds of silence after which it is over: RFC 5382 (REQ-5), RFC 4787 (REQ-5), RFC 5508 (REQ-2).
    pub(super) fn patience_ns(self) -> u64 {
        const SECOND: u64 = 1_000_000_000;
        match self {
            Self::Tcp { .. } => (2 * 60 + 4) * 60 * SECOND,
            Self::Udp { .. } => 2 * 60 * SECOND,
            Self::Icmp { .. } | Self::Ip { .. } | Self::Ethernet { .. } => 60 * SECOND,
        }
    }
}

impl fmt::Display for FlowKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { port } => write!(f, "tcp {port}"),
            Self::Udp { port } => write!(f, "udp {port}"),
            Self::Icmp { kind } => write!(f, "icmp {kind}"),
            Self::Ip { protocol } => write!(f, "ip {protocol}"),
            Self::Ethernet { ether_type } => write!(f, "ethernet {ether_type:#06x}"),
        }
    }
}

/// What tells the flows between two ports apart. It is the same whichever way a frame goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    vlan: VlanId,
    /// The side that began it, where answers do not look like questions.
    begun_by: Option<Side>,
    protocol: u16,
    /// Of the first and the second port of the pair.
    ends: [End; 2],
}

/// Address and port of one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct End {
    address: Option<IpAddr>,
    port: u16,
}

/// Which port of a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Side {
    First,
    Second,
}

/// A frame that a policy can be asked about.
#[derive(Clone, Copy, Debug)]
pub(super) struct Seen {
    pub(super) kind: FlowKind,
    pub(super) source: Option<IpAddr>,
    pub(super) destination: Option<IpAddr>,
    ports: [u16; 2],
    protocol: u16,
    way: Way,
    /// Whether it can begin something.
    pub(super) begins: Begins,
}

/// By what a frame tells who began its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    /// By nothing: questions and answers look alike.
    Both,
    /// Whoever sends this.
    Question,
    /// The other one.
    Answer,
}

/// What a frame is to its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begins {
    /// It begins one, even where one is.
    Always,
    /// It does where none is.
    IfNone,
    /// It does not.
    Never,
}

impl Seen {
    /// `None` for what may be something else than it seems; see the module.
    pub(super) fn of(headers: &Headers) -> Option<Self> {
        let ether_type = headers.ether_type;
        if ether_type < FIRST_TYPE || TAGS.contains(&ether_type) {
            return None;
        }
        match (&headers.network, ether_type) {
            (Some(Network::Ip { source, destination, protocol, fragment: false }), IPV4 | IPV6)
                // The parser goes by the packet's own version, receivers by the type.
                if source.is_ipv4() == (ether_type == IPV4) =>
            {
                Self::of_ip(headers.transport.as_ref(), *source, *destination, *protocol)
            }
            (Some(Network::Arp { operation: 1 | 2, sender_mac, sender, .. }), ARP) => {
                // A probe (RFC 5227) has no address yet.
                let source = (!sender.is_unspecified()).then_some(*sender);
                (*sender_mac == headers.source).then_some(Self { source, ..Self::of_type(ARP) })
            }
            (_, IPV4 | IPV6 | ARP) => None,
            (None, other) => Some(Self::of_type(other)),
            (Some(_), _) => None,
        }
    }

    fn of_type(ether_type: u16) -> Self {
        Self {
            kind: FlowKind::Ethernet { ether_type },
            source: None,
            destination: None,
            ports: [0; 2],
            protocol: ether_type,
            way: Way::Question,
            begins: Begins::IfNone,
        }
    }

    fn of_ip(
        transport: Option<&Transport>,
        source: IpAddr,
        destination: IpAddr,
        protocol: u8,
    ) -> Option<Self> {
        let seen = |kind, ports, way, begins| Self {
            kind,
            source: Some(source),
            destination: Some(destination),
            ports,
            protocol: protocol.into(),
            way,
            begins,
        };
        Some(match (transport, protocol) {
            (Some(Transport::Tcp { source, destination, syn, ack }), TCP) => {
                let begins = if *syn && !*ack { Begins::Always } else { Begins::Never };
                seen(FlowKind::Tcp { port: *destination }, [*source, *destination], Way::Both, begins)
            }
            (Some(Transport::Udp { source, destination }), UDP) => {
                seen(FlowKind::Udp { port: *destination }, [*source, *destination], Way::Both, Begins::IfNone)
            }
            (Some(Transport::Icmp { kind, .. }), ICMP | ICMPV6) => {
                let (way, begins, asked) = match ECHO.iter().find(|(_, reply)| reply == kind) {
                    Some((request, _)) => (Way::Answer, Begins::Never, *request),
                    None => (Way::Question, Begins::IfNone, *kind),
                };
                seen(FlowKind::Icmp { kind: *kind }, [asked.into(); 2], way, begins)
            }
            (_, TCP | UDP | ICMP | ICMPV6) => return None,
            (None, _) => seen(FlowKind::Ip { protocol }, [0; 2], Way::Question, Begins::IfNone),
            (Some(_), _) => return None,
        })
    }

    /// As if the other side had sent it.
    pub(super) fn turned(&self) -> Self {
        let [source, destination] = self.ports;
        Self { source: self.destination, destination: self.source, ports: [destination, source], ..*self }
    }

    /// Of the flow, for a frame that comes from that side of a pair.
    pub(super) fn key(&self, vlan: VlanId, from: Side) -> Key {
        let [source, destination] = self.ports;
        let ends = [
            End { address: self.source, port: source },
            End { address: self.destination, port: destination },
        ];
        let ends = match (from, ends) {
            (Side::First, ends) => ends,
            (Side::Second, [source, destination]) => [destination, source],
        };
        let begun_by = match (self.way, from) {
            (Way::Both, _) => None,
            (Way::Question, side) => Some(side),
            (Way::Answer, Side::First) => Some(Side::Second),
            (Way::Answer, Side::Second) => Some(Side::First),
        };
        Key { vlan, begun_by, protocol: self.protocol, ends }
    }
}
