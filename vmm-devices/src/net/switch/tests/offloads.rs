//! What is left to receivers, and what is done for them.

use etherparse::{LaxSlicedPacket, PacketBuilder, TransportSlice};

use super::*;
use crate::net::{Checksum, Gso, GsoKind};

fn tcp(payload: &[u8], size: u16) -> (PacketInfo, Vec<u8>) {
    let builder = PacketBuilder::ethernet2(mac(1).0, mac(2).0).ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64);
    let mut frame = Vec::new();
    builder.tcp(4000, 80, 7, 1000).write(&mut frame, payload).unwrap();
    let info = PacketInfo {
        checksum: Some(Checksum { start: 34, offset: 16 }),
        gso: (size > 0).then_some(Gso { kind: GsoKind::Tcp4, size, ecn: false }),
        data_valid: false,
        header_len: 54,
    };
    (info, frame)
}

fn payload(frame: &[u8]) -> Vec<u8> {
    let packet = LaxSlicedPacket::from_ethernet(frame).unwrap();
    let Some(TransportSlice::Tcp(tcp)) = packet.transport else { panic!("no TCP: {frame:x?}") };
    let Some(etherparse::LaxNetSlice::Ipv4(ip)) = packet.net else { panic!("no IPv4") };
    let sum = tcp.calc_checksum_ipv4(ip.header().source(), ip.header().destination());
    assert_eq!(tcp.checksum(), sum.unwrap());
    tcp.payload().to_vec()
}

fn data(len: usize) -> Vec<u8> {
    (0..253).cycle().take(len).collect()
}

#[test]
fn a_driver_that_can_gets_it_as_it_was_sent() {
    let lan = Lan::new();
    let mut a = lan.plain("a");
    let mut b = lan.device(PortConfig::new("b").mac(mac(2)));
    let mut all = lan.device(PortConfig::new("all").vlans(trunk(None, &[1])));
    let (info, large) = tcp(&data(60_000), 1448);
    a.send_as(&info, &large);
    assert_eq!(b.receive_at(0), Some((info, large.clone())));
    assert_eq!(lan.port("b").metrics.segmented, 0);
    // What is left to do moves with the tag, there and back.
    let mut to_all = large;
    to_all[5] = 9;
    a.send_as(&info, &to_all);
    let (moved, with_tag) = all.receive_at(0).unwrap();
    assert_eq!((moved.checksum, moved.header_len), (Some(Checksum { start: 38, offset: 16 }), 58));
    assert_eq!(with_tag, [&to_all[..12], &[0x81, 0, 0, 1], &to_all[12..]].concat());
    b.received();
    let mut back = with_tag;
    back[..6].copy_from_slice(&mac(2).0);
    back[6..12].copy_from_slice(&mac(9).0);
    all.send_as(&moved, &back);
    let (info_back, _) = b.receive_at(0).unwrap();
    assert_eq!(info_back, info);
}

#[test]
fn for_one_that_cannot_it_is_cut_and_summed_up() {
    let lan = Lan::new();
    let mut a = lan.plain("a");
    for (receives, vlans, expected) in [
        (Offloads::NONE, access(1), 42),
        (Offloads::CSUM, access(1), 42),
        (Offloads::CSUM | Offloads::TSO6, trunk(None, &[1]), 42),
        (Offloads::CSUM | Offloads::TSO4, access(1), 1),
    ] {
        let tags = if vlans == access(1) { 0 } else { 4 };
        let mut b = lan.device_with(PortConfig::new("b").vlans(vlans), receives);
        b.send(&if tags == 0 { frame(1, 2, "") } else { tagged(1, 2, &[1], "") });
        let (info, large) = tcp(&data(60_000), 1448);
        a.send_as(&info, &large);
        let mut stream = Vec::new();
        let mut count = 0;
        while let Some((got, frame)) = b.receive_at(0) {
            count += 1;
            assert!(receives.contains(got.wants()), "{got:?}");
            if expected > 1 {
                assert!(frame.len() <= 54 + 1448 + tags);
                stream.extend(payload(&frame));
            }
        }
        assert_eq!(count, expected, "{receives:?}");
        if expected > 1 {
            assert_eq!(stream, data(60_000));
            assert_eq!(lan.port("b").metrics.segmented, 1);
        }
    }
    let mut b = lan.device_with(PortConfig::new("b"), Offloads::NONE);
    b.send(&frame(1, 2, ""));
    let (info, mut short) = tcp(&data(100), 0);
    // The sum of the pseudo-header, which is what a sender leaves there.
    let pseudo: u32 = 0x0a00 * 2 + 1 + 2 + 6 + 120;
    short[50..52].copy_from_slice(&u16::try_from(pseudo).unwrap().to_be_bytes());
    a.send_as(&info, &short);
    let (got, frame) = b.receive_at(0).unwrap();
    assert_eq!((got, payload(&frame)), (PacketInfo::default(), data(100)));
}

/// A driver that changes its mind gets what it takes from then on.
#[test]
fn what_a_driver_takes_may_change() {
    let lan = Lan::new();
    let mut a = lan.plain("a");
    let mut b = lan.device(PortConfig::new("b").mac(mac(2)));
    let (info, large) = tcp(&data(3000), 1000);
    b.backend.set_receive_offloads(Offloads::NONE).unwrap();
    a.send_as(&info, &large);
    assert_eq!(b.received(), 3);
    b.backend.set_receive_offloads(Offloads::ALL).unwrap();
    a.send_as(&info, &large);
    assert_eq!(b.received(), 1);
}

/// CVE-2019-11477: tiny segments, and headers that are none, cost the sender alone.
#[test]
fn cve_2019_11477_frames_that_cannot_be_cut_are_dropped() {
    let lan = Lan::new();
    let mut a = lan.plain("a");
    let mut b = lan.device_with(PortConfig::new("b").mac(mac(2)), Offloads::NONE);
    let (info, large) = tcp(&data(60_000), 8);
    a.send_as(&info, &large);
    let (info, mut wrong) = tcp(&data(2000), 1000);
    wrong[14] = 0x4f;
    a.send_as(&info, &wrong);
    assert_eq!((b.received(), lan.dropped("b", DropReason::Offload)), (0, 2));
    // The most that there can be.
    let (info, large) = tcp(&data(60_000), 59);
    a.send_as(&info, &large);
    assert_eq!(b.received(), 60_000_usize.div_ceil(59));
}
