//! The configuration that a driver reads (Virtio 1.3, 5.1.4), and its feature bits (5.1.3).

use crate::net::{MacAddr, Offloads};

/// Feature bits of network devices (5.1.3).
///
/// There is none for receive-side scaling and hashes (RSS, HASH_REPORT), for statistics, interrupt coalescing, and fragmentation of
/// UDP (UFO): they are not offered.
pub mod feature {
    /// VIRTIO_NET_F_CSUM.
    pub const CSUM: u64 = 1;
    /// VIRTIO_NET_F_GUEST_CSUM.
    pub const GUEST_CSUM: u64 = 1 << 1;
    /// VIRTIO_NET_F_CTRL_GUEST_OFFLOADS.
    pub const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    /// VIRTIO_NET_F_MTU.
    pub const MTU: u64 = 1 << 3;
    /// VIRTIO_NET_F_MAC.
    pub const MAC: u64 = 1 << 5;
    /// VIRTIO_NET_F_GUEST_TSO4.
    pub const GUEST_TSO4: u64 = 1 << 7;
    /// VIRTIO_NET_F_GUEST_TSO6.
    pub const GUEST_TSO6: u64 = 1 << 8;
    /// VIRTIO_NET_F_GUEST_ECN.
    pub const GUEST_ECN: u64 = 1 << 9;
    /// VIRTIO_NET_F_HOST_TSO4.
    pub const HOST_TSO4: u64 = 1 << 11;
    /// VIRTIO_NET_F_HOST_TSO6.
    pub const HOST_TSO6: u64 = 1 << 12;
    /// VIRTIO_NET_F_HOST_ECN.
    pub const HOST_ECN: u64 = 1 << 13;
    /// VIRTIO_NET_F_MRG_RXBUF.
    pub const MRG_RXBUF: u64 = 1 << 15;
    /// VIRTIO_NET_F_STATUS.
    pub const STATUS: u64 = 1 << 16;
    /// VIRTIO_NET_F_CTRL_VQ.
    pub const CTRL_VQ: u64 = 1 << 17;
    /// VIRTIO_NET_F_CTRL_RX.
    pub const CTRL_RX: u64 = 1 << 18;
    /// VIRTIO_NET_F_CTRL_VLAN.
    pub const CTRL_VLAN: u64 = 1 << 19;
    /// VIRTIO_NET_F_CTRL_RX_EXTRA.
    pub const CTRL_RX_EXTRA: u64 = 1 << 20;
    /// VIRTIO_NET_F_GUEST_ANNOUNCE.
    pub const GUEST_ANNOUNCE: u64 = 1 << 21;
    /// VIRTIO_NET_F_MQ.
    pub const MQ: u64 = 1 << 22;
    /// VIRTIO_NET_F_CTRL_MAC_ADDR.
    pub const CTRL_MAC_ADDR: u64 = 1 << 23;
    /// VIRTIO_NET_F_GUEST_USO4.
    pub const GUEST_USO4: u64 = 1 << 54;
    /// VIRTIO_NET_F_GUEST_USO6.
    pub const GUEST_USO6: u64 = 1 << 55;
    /// VIRTIO_NET_F_HOST_USO.
    pub const HOST_USO: u64 = 1 << 56;
    /// VIRTIO_NET_F_SPEED_DUPLEX.
    pub const SPEED_DUPLEX: u64 = 1 << 63;
}

/// What all of them offer, whatever carries the frames.
pub(super) const ALWAYS: u64 = feature::MAC
    | feature::STATUS
    | feature::MRG_RXBUF
    | feature::CTRL_VQ
    | feature::CTRL_RX
    | feature::CTRL_VLAN
    | feature::CTRL_RX_EXTRA
    | feature::GUEST_ANNOUNCE
    | feature::CTRL_MAC_ADDR
    | feature::SPEED_DUPLEX;

/// What a driver leaves to the device, by feature bit.
const TRANSMIT: [(u64, Offloads); 5] = [
    (feature::CSUM, Offloads::CSUM),
    (feature::HOST_TSO4, Offloads::TSO4),
    (feature::HOST_TSO6, Offloads::TSO6),
    (feature::HOST_ECN, Offloads::ECN),
    (feature::HOST_USO, Offloads::USO4.union(Offloads::USO6)),
];

/// What it takes over, by feature bit, which is that of VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET as well (5.1.6.5.6.1).
const RECEIVE: [(u64, Offloads); 6] = [
    (feature::GUEST_CSUM, Offloads::CSUM),
    (feature::GUEST_TSO4, Offloads::TSO4),
    (feature::GUEST_TSO6, Offloads::TSO6),
    (feature::GUEST_ECN, Offloads::ECN),
    (feature::GUEST_USO4, Offloads::USO4),
    (feature::GUEST_USO6, Offloads::USO6),
];

/// The bits for what a backend takes, and gives. All that it has is nothing without checksums.
pub(super) fn offered(transmit: Offloads, receive: Offloads) -> u64 {
    let bits = |table: &[(u64, Offloads)], can: Offloads| {
        let bits =
            table.iter().filter(|(_, offload)| can.contains(*offload)).fold(0, |all, (bit, _)| all | bit);
        if can.contains(Offloads::CSUM) { bits } else { 0 }
    };
    let receive = bits(&RECEIVE, receive);
    bits(&TRANSMIT, transmit) | receive | if receive == 0 { 0 } else { feature::CTRL_GUEST_OFFLOADS }
}

fn offloads(table: &[(u64, Offloads)], features: u64) -> Offloads {
    table.iter().fold(Offloads::NONE, |all, (bit, offload)| all.with(*offload, features & bit != 0))
}

/// What a driver with these features leaves to the device.
pub(super) fn transmit(features: u64) -> Offloads {
    offloads(&TRANSMIT, features)
}

/// What it takes over.
pub(super) fn receive(features: u64) -> Offloads {
    offloads(&RECEIVE, features)
}

/// The bits of what it takes over.
pub(super) fn receive_bits(offloads: Offloads) -> u64 {
    RECEIVE.iter().filter(|(_, offload)| offloads.contains(*offload)).fold(0, |all, (bit, _)| all | bit)
}

/// All bits of [`receive`].
pub(super) const GUEST_OFFLOADS: u64 = feature::GUEST_CSUM
    | feature::GUEST_TSO4
    | feature::GUEST_TSO6
    | feature::GUEST_ECN
    | feature::GUEST_USO4
    | feature::GUEST_USO6;

/// What each feature needs, one of these at least (5.1.3.1).
const NEEDS: [(u64, u64); 16] = [
    (feature::GUEST_TSO4, feature::GUEST_CSUM),
    (feature::GUEST_TSO6, feature::GUEST_CSUM),
    (feature::GUEST_ECN, feature::GUEST_TSO4 | feature::GUEST_TSO6),
    (feature::GUEST_USO4, feature::GUEST_CSUM),
    (feature::GUEST_USO6, feature::GUEST_CSUM),
    (feature::HOST_TSO4, feature::CSUM),
    (feature::HOST_TSO6, feature::CSUM),
    (feature::HOST_ECN, feature::HOST_TSO4 | feature::HOST_TSO6),
    (feature::HOST_USO, feature::CSUM),
    (feature::CTRL_RX, feature::CTRL_VQ),
    (feature::CTRL_VLAN, feature::CTRL_VQ),
    (feature::CTRL_RX_EXTRA, feature::CTRL_VQ),
    (feature::GUEST_ANNOUNCE, feature::CTRL_VQ),
    (feature::MQ, feature::CTRL_VQ),
    (feature::CTRL_MAC_ADDR, feature::CTRL_VQ),
    (feature::CTRL_GUEST_OFFLOADS, feature::CTRL_VQ),
];

/// Whether nothing is missing that one of them needs.
pub(super) fn consistent(features: u64) -> bool {
    NEEDS.iter().all(|(bit, needs)| features & bit == 0 || features & needs != 0)
}

/// Bits of `status`.
pub(super) const LINK_UP: u16 = 1;
pub(super) const ANNOUNCE: u16 = 2;

/// `duplex`: full.
const FULL: u8 = 1;
/// `speed` and `duplex` that are not known.
const UNKNOWN: (u32, u8) = (u32::MAX, u8::MAX);

/// What the configuration says.
#[derive(Clone, Copy, Debug)]
pub(super) struct Config {
    pub(super) mac: MacAddr,
    pub(super) status: u16,
    pub(super) pairs: u16,
    pub(super) mtu: u16,
    /// Megabits a second.
    pub(super) speed: Option<u32>,
}

impl Config {
    /// The fields as bytes; beyond them are zeros.
    pub(super) fn bytes(&self) -> [u8; 17] {
        let MacAddr([a, b, c, d, e, f]) = self.mac;
        let [[s0, s1], [p0, p1], [m0, m1]] = [self.status, self.pairs, self.mtu].map(u16::to_le_bytes);
        let (speed, duplex) = self.speed.map_or(UNKNOWN, |speed| (speed, FULL));
        let [v0, v1, v2, v3] = speed.to_le_bytes();
        [a, b, c, d, e, f, s0, s1, p0, p1, m0, m1, v0, v1, v2, v3, duplex]
    }
}
