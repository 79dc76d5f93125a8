//! Frames of the driver's.

use super::*;
use crate::net::MAX_FRAME;

#[test]
fn a_frame_goes_out_with_what_its_header_says() {
    let mut rig = Rig::new(ALL);
    let bytes = frame(PEER, 60_000);
    for info in [PacketInfo::default(), segmented()] {
        assert_eq!(rig.send(info, &bytes), [TestFrame::new(bytes.clone()).with_info(info)]);
    }
    assert_eq!(rig.network.take_flushes(), 2);
    let counters = rig.handle.counters();
    assert_eq!((counters.sent, counters.sent_bytes, counters.refused), (2, 120_000, 0));
}

#[test]
fn a_frame_may_be_in_any_pieces() {
    let mut rig = Rig::new(ALL);
    let whole = [&PacketInfo::default().to_bytes(0)[..], &frame(PEER, 300)].concat();
    // Across two regions of memory, and with the header in three.
    let start = 0x2_0000 - 100;
    rig.put(start, &whole);
    for cuts in [vec![], vec![12], vec![5, 11, 13], vec![1, 26, 100], (1..20).collect()] {
        let mut chain = rig.tx.chain();
        let mut at = 0;
        for cut in cuts.into_iter().chain([312_u64]) {
            chain = chain.readable(start + at, u32::try_from(cut - at).unwrap());
            at = cut;
        }
        chain.submit().unwrap();
        rig.driver.notify(1);
        assert!(rig.tx.take_used().unwrap().is_some());
        assert_eq!(rig.network.take_sent(), [TestFrame::new(&whole[12..])]);
    }
}

#[test]
fn what_is_no_frame_is_given_back_and_counted() {
    let mut rig = Rig::new(ALL);
    let none = PacketInfo::default().to_bytes(0);
    for len in [0, 1, 13, MAX_FRAME + 1] {
        rig.send_raw(&none, &vec![1; len]);
    }
    for len in [0, 1, 11] {
        rig.send_raw(&none[..len], &[]);
    }
    assert_eq!((rig.network.take_sent(), rig.handle.counters().refused), (vec![], 7));
    for len in [14, MAX_FRAME] {
        assert_eq!(rig.send(PacketInfo::default(), &frame(PEER, len)).len(), 1);
    }
    // In no RAM, header or frame; and one that is to be written alone.
    rig.put(SEND, &none);
    for (header, frame) in [(NOWHERE, SEND), (SEND, NOWHERE)] {
        rig.tx.chain().readable(header, 12).readable(frame, 60).submit().unwrap();
    }
    rig.tx.chain().writable(SEND, 100).submit().unwrap();
    rig.driver.notify(1);
    for _ in 0..3 {
        assert_eq!(rig.tx.take_used().unwrap().map(|(_, len)| len), Some(0));
    }
    assert_eq!((rig.network.take_sent(), rig.handle.counters().refused), (vec![], 10));
    assert_eq!(rig.driver.status(), 0xf);
}

/// Of each header exactly the bytes that are allowed reach the network.
#[test]
fn headers_that_do_not_fit_reach_no_network() {
    let mut rig = Rig::new(ALL);
    let bytes = frame(PEER, 100);
    let good = segmented();
    let sum =
        |start, offset| PacketInfo { checksum: Some(Checksum { start, offset }), ..PacketInfo::default() };
    let gso = |kind, size| PacketInfo { gso: Some(Gso { kind, size, ecn: false }), ..good };
    for info in [
        sum(99, 0),
        sum(0, 50),
        sum(13, 0),
        sum(u16::MAX, u16::MAX),
        sum(34, 65),
        gso(GsoKind::Tcp4, 0),
        PacketInfo { checksum: Some(Checksum { start: 81, offset: 16 }), ..good },
        PacketInfo { checksum: None, ..good },
    ] {
        assert_eq!(rig.send(info, &bytes), [], "{info:?}");
    }
    for kind in [2, 3, 6, 0x7f, 0x80, 0x83, 0x85, 0xff] {
        let mut header = good.to_bytes(0);
        header[1] = kind;
        rig.send_raw(&header, &bytes);
    }
    assert_eq!((rig.network.take_sent(), rig.handle.counters().refused), (vec![], 16));
    // That checksums were found right is nothing that a driver says.
    let vouched = PacketInfo { data_valid: true, ..PacketInfo::default() };
    assert_eq!(rig.send(vouched, &bytes), [TestFrame::new(bytes.clone())]);
    for info in [sum(34, 16), sum(98, 0), gso(GsoKind::Tcp6, 1), gso(GsoKind::Udp, u16::MAX)] {
        assert_eq!(rig.send(info, &bytes).len(), 1, "{info:?}");
    }
}

/// How long the headers are is a hint, and drivers may say more than there is (5.1.6.2).
#[test]
fn headers_may_be_said_to_be_longer_than_the_frame() {
    let mut rig = Rig::new(ALL);
    for (said, told) in [(60, 60), (61, 60), (128, 60), (u16::MAX, 60)] {
        let info = PacketInfo { header_len: said, ..PacketInfo::default() };
        let told = PacketInfo { header_len: told, ..info };
        assert_eq!(rig.send(info, &frame(PEER, 60)), [TestFrame::new(frame(PEER, 60)).with_info(told)]);
    }
    assert_eq!(rig.handle.counters().refused, 0);
}

#[test]
fn what_was_not_agreed_upon_is_left_to_nobody() {
    let csum = Offloads::CSUM;
    let cases = [
        (0, Offloads::NONE, [false, false]),
        (feature::CSUM, csum, [true, false]),
        (feature::CSUM | feature::HOST_TSO4, csum | Offloads::TSO4, [true, true]),
        (feature::CSUM | feature::HOST_TSO6, csum | Offloads::TSO6, [true, false]),
    ];
    for (features, agreed, passes) in cases {
        let mut rig = Rig::new(features);
        assert_eq!(rig.network.agreed().unwrap().transmit, agreed);
        let sum = PacketInfo { gso: None, ..segmented() };
        let sent = [sum, segmented()].map(|info| !rig.send(info, &frame(PEER, 100)).is_empty());
        assert_eq!(sent, passes, "{features:#x}");
    }
}

#[test]
fn a_network_without_room_is_waited_for() {
    let mut rig = Rig::new(ALL);
    rig.network.set_full(true);
    for len in [100_u32, 200] {
        rig.put(SEND, &PacketInfo::default().to_bytes(0));
        rig.tx.chain().readable(SEND, 12).readable(SEND + 0x100, len).submit().unwrap();
        rig.driver.notify(1);
    }
    assert_eq!(rig.tx.take_used().unwrap(), None);
    rig.network.set_full(false);
    assert_eq!(rig.network.take_sent().iter().map(|frame| frame.bytes.len()).collect::<Vec<_>>(), [100, 200]);
    assert!(rig.tx.take_used().unwrap().is_some() && rig.tx.take_used().unwrap().is_some());
    // One that fails loses frames, and the driver goes on.
    rig.network.set_failing(true);
    assert_eq!(rig.send(PacketInfo::default(), &frame(PEER, 100)), []);
    rig.network.set_failing(false);
    assert_eq!(rig.send(PacketInfo::default(), &frame(PEER, 100)).len(), 1);
    assert_eq!(rig.handle.counters().send_dropped, 1);
}

#[test]
fn frames_wait_for_their_rate_in_order() {
    let clock = Arc::new(ManualClock::new(0));
    let mut rig = Rig::with(everything(), ALL, |builder| builder.send_rate(limiter(&clock, 1000)));
    rig.put(SEND, &PacketInfo::default().to_bytes(0));
    for len in [900_u32, 600, 61] {
        rig.tx.chain().readable(SEND, 12).readable(SEND + 0x100, len).submit().unwrap();
        rig.driver.notify(1);
    }
    let lens = |rig: &Rig| rig.network.take_sent().iter().map(|frame| frame.bytes.len()).collect::<Vec<_>>();
    assert_eq!(lens(&rig), [900, 600]);
    rig.driver.notify(1);
    assert!(lens(&rig).is_empty());
    clock.advance(500 * 1_000_000_000 / (1 << 20) + 1000);
    rig.driver.notify(1);
    assert_eq!(lens(&rig), [61]);
    // Other limits hold at once.
    rig.tx.chain().readable(SEND, 12).readable(SEND + 0x100, 5000).submit().unwrap();
    rig.tx.chain().readable(SEND, 12).readable(SEND + 0x100, 70).submit().unwrap();
    rig.driver.notify(1);
    assert!(!lens(&rig).contains(&70));
    assert!(rig.handle.set_send_limits(Limits::default()));
    assert!(lens(&rig).contains(&70));
    assert!(!rig.handle.set_receive_limits(Limits::default()), "there are none");
}
