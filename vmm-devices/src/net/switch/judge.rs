//! What a policy sees of each frame between two ports.

use std::net::IpAddr;
use std::sync::Arc;

use etherparse::{EtherType, LaxNetSlice, LaxSlicedPacket, TransportSlice};

use super::head::Head;
use super::table::PortId;
use super::vlan::VlanId;
use crate::channel::GrantId;
use crate::net::MacAddr;

/// Decides about each frame from one port to another. A policy for flows (layers 2 to 4) implements it; without one nothing is asked, and
/// nothing parsed.
///
/// It is called by the thread that serves the sender's queue, for each receiver, before anything is copied there, with the sender's
/// port locked: it is to be quick, and not to call the switch. What it wants to be revoked, another thread revokes.
pub trait FlowJudge: Send + Sync {
    /// Whether the frame may go there.
    fn judge(&self, flow: &Flow<'_>) -> Verdict;
}

impl<F: Fn(&Flow<'_>) -> Verdict + Send + Sync> FlowJudge for F {
    fn judge(&self, flow: &Flow<'_>) -> Verdict {
        self(flow)
    }
}

/// What becomes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Verdict {
    /// It goes there.
    Pass,
    /// It does not, and nobody is told.
    Drop,
}

/// One side of a flow.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FlowPort {
    /// The port.
    pub id: PortId,
    /// Its name.
    pub name: Arc<str>,
    /// The right by which it is there.
    pub grant: GrantId,
}

/// A frame on its way.
#[derive(Debug)]
#[non_exhaustive]
pub struct Flow<'a> {
    /// Where it comes from.
    pub from: &'a FlowPort,
    /// Where it would go.
    pub to: &'a FlowPort,
    /// Its VLAN.
    pub vlan: VlanId,
    /// Its bytes, without a tag; a large one counts as it is.
    pub len: usize,
    /// Whether it goes to others as well.
    pub flooded: bool,
    /// What time it is, by the switch's clock, in nanoseconds.
    pub now_ns: u64,
    /// What it says of itself.
    pub headers: &'a Headers,
}

/// A frame's headers, as far as they were understood; what was not is `None`, and not to be taken for harmless. They are what the receiver
/// gets, whatever the sender does meanwhile.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Headers {
    /// Whose frame it is.
    pub source: MacAddr,
    /// For whom.
    pub destination: MacAddr,
    /// Type of what is in it; 0x8100 or 0x88a8 where there is one more tag, behind which nobody has looked.
    pub ether_type: u16,
    /// ARP or IP.
    pub network: Option<Network>,
    /// TCP, UDP or ICMP, of a packet that is no fragment.
    pub transport: Option<Transport>,
}

/// Of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Network {
    /// IPv4 or IPv6.
    Ip {
        /// Whose packet.
        source: IpAddr,
        /// For whom.
        destination: IpAddr,
        /// Protocol of the payload, behind the extension headers that were understood.
        protocol: u8,
        /// Whether it is a part of a packet, whose transport header nobody has looked for.
        fragment: bool,
    },
    /// ARP for IPv4 over Ethernet.
    Arp {
        /// 1 asks, 2 answers.
        operation: u16,
        /// The address that the sender says it has.
        sender_mac: MacAddr,
        /// The same.
        sender: IpAddr,
        /// Whom it looks for, or answers.
        target: IpAddr,
    },
}

/// Of the transport.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Transport {
    /// TCP.
    Tcp {
        /// Port of the sender.
        source: u16,
        /// Port of the receiver.
        destination: u16,
        /// Whether a connection is to begin.
        syn: bool,
        /// Whether it answers something.
        ack: bool,
    },
    /// UDP.
    Udp {
        /// Port of the sender.
        source: u16,
        /// Port of the receiver.
        destination: u16,
    },
    /// ICMP or ICMPv6.
    Icmp {
        /// Its type.
        kind: u8,
        /// Its code.
        code: u8,
    },
}

impl Headers {
    pub(super) fn parse(head: &Head) -> Self {
        let ether_type = head.ether_type();
        let mut headers = Self {
            source: head.source(),
            destination: head.destination(),
            ether_type,
            network: None,
            transport: None,
        };
        if head.has_inner_tag() {
            return headers;
        }
        let packet = LaxSlicedPacket::from_ether_type(EtherType(ether_type), head.payload());
        headers.network = packet.net.as_ref().and_then(network);
        headers.transport = packet.transport.as_ref().and_then(transport);
        headers
    }
}

fn network(net: &LaxNetSlice<'_>) -> Option<Network> {
    Some(match net {
        LaxNetSlice::Ipv4(ip) => Network::Ip {
            source: ip.header().source_addr().into(),
            destination: ip.header().destination_addr().into(),
            protocol: ip.payload_ip_number().0,
            fragment: ip.is_payload_fragmented(),
        },
        LaxNetSlice::Ipv6(ip) => Network::Ip {
            source: ip.header().source_addr().into(),
            destination: ip.header().destination_addr().into(),
            protocol: ip.payload().ip_number.0,
            fragment: ip.is_payload_fragmented(),
        },
        LaxNetSlice::Arp(arp) => {
            let address = |bytes: &[u8]| bytes.first_chunk::<4>().map(|bytes| IpAddr::from(*bytes));
            Network::Arp {
                operation: arp.operation().0,
                sender_mac: MacAddr(*arp.sender_hw_addr().first_chunk()?),
                sender: address(arp.sender_protocol_addr())?,
                target: address(arp.target_protocol_addr())?,
            }
        }
    })
}

fn transport(slice: &TransportSlice<'_>) -> Option<Transport> {
    Some(match slice {
        TransportSlice::Tcp(tcp) => Transport::Tcp {
            source: tcp.source_port(),
            destination: tcp.destination_port(),
            syn: tcp.syn(),
            ack: tcp.ack(),
        },
        TransportSlice::Udp(udp) => {
            Transport::Udp { source: udp.source_port(), destination: udp.destination_port() }
        }
        TransportSlice::Icmpv4(icmp) => Transport::Icmp { kind: icmp.type_u8(), code: icmp.code_u8() },
        TransportSlice::Icmpv6(icmp) => Transport::Icmp { kind: icmp.type_u8(), code: icmp.code_u8() },
        TransportSlice::Igmp(_) => return None,
    })
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;
    use vmm_memory::vm_memory::VolatileSlice;

    use super::*;

    fn parse(mut frame: Vec<u8>) -> Headers {
        let mut head = Head::new();
        head.read(&[VolatileSlice::from(&mut frame[..])]).unwrap();
        Headers::parse(&head)
    }

    #[test]
    fn what_is_there_is_seen_through_a_tag_and_no_further() {
        let ethernet = || PacketBuilder::ethernet2([2; 6], [4; 6]);
        let mut frame = Vec::new();
        ethernet()
            .ipv4([10, 0, 0, 1], [10, 0, 0, 2], 9)
            .tcp(5, 80, 1, 1)
            .syn()
            .write(&mut frame, &[0; 400])
            .unwrap();
        let seen = parse(frame);
        assert_eq!(
            (seen.source, seen.destination, seen.ether_type),
            (MacAddr([2; 6]), MacAddr([4; 6]), 0x800)
        );
        let ip = |last| IpAddr::from([10, 0, 0, last]);
        let tcp = Network::Ip { source: ip(1), destination: ip(2), protocol: 6, fragment: false };
        assert_eq!(seen.network, Some(tcp));
        let syn = Transport::Tcp { source: 5, destination: 80, syn: true, ack: false };
        assert_eq!(seen.transport, Some(syn));

        let mut frame = Vec::new();
        let tagged =
            ethernet().single_vlan(etherparse::VlanId::try_new(7).unwrap()).ipv6([1; 16], [2; 16], 9);
        tagged.udp(53, 54).write(&mut frame, &[0; 9]).unwrap();
        assert_eq!(parse(frame.clone()).transport, Some(Transport::Udp { source: 53, destination: 54 }));
        let twice = [&frame[..12], &[0x81, 0, 0, 1], &frame[12..]].concat();
        let seen = parse(twice);
        assert_eq!((seen.ether_type, seen.network, seen.transport), (0x8100, None, None));
    }

    #[test]
    fn arp_and_what_is_cut_off() {
        let arp = [0, 1, 8, 0, 6, 4, 0, 2, 9, 9, 9, 9, 9, 9, 10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, 2];
        let frame = [&[4; 6][..], &[2; 6], &[8, 6], &arp].concat();
        let Some(Network::Arp { operation: 2, sender_mac, sender, target }) = parse(frame.clone()).network
        else {
            panic!("no ARP")
        };
        assert_eq!(sender_mac, MacAddr([9; 6]));
        assert_eq!((sender, target), (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2])));
        for end in 14..frame.len() {
            assert_eq!(parse(frame[..end].to_vec()).network, None);
        }
        // A part of a packet that is not the first has no ports, whatever stands there.
        let mut frame = Vec::new();
        let ip = PacketBuilder::ethernet2([2; 6], [4; 6]).ipv4([10, 0, 0, 1], [10, 0, 0, 2], 9);
        ip.udp(1, 2).write(&mut frame, &[]).unwrap();
        frame[21] = 1;
        let seen = parse(frame);
        assert!(matches!(seen.network, Some(Network::Ip { fragment: true, .. })) && seen.transport.is_none());
    }
}
