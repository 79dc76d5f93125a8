//! Frames that come.

use super::*;
use crate::net::MAX_FRAME;

const PLAIN: u64 = ALL & !feature::MRG_RXBUF;

#[test]
fn a_frame_comes_with_what_is_said_of_it() {
    for features in [ALL, PLAIN] {
        let mut rig = Rig::new(features);
        let valid = PacketInfo { data_valid: true, ..PacketInfo::default() };
        for info in [PacketInfo::default(), segmented(), valid] {
            let sent = TestFrame::new(frame(MAC, 1500)).with_info(info);
            rig.network.give(sent.clone());
            assert_eq!(rig.received(), None);
            rig.offer(BUFFER);
            assert_eq!(rig.received(), Some(sent));
        }
        let counters = rig.handle.counters();
        assert_eq!((counters.received, counters.received_bytes, counters.receive_dropped), (3, 4500, 0));
    }
}

#[test]
fn a_long_frame_lies_in_as_many_buffers_as_it_needs() {
    let mut rig = Rig::new(ALL);
    (0..50).for_each(|_| rig.offer(BUFFER));
    for len in [14, 1588, 1589, 3188, 3189, 65_549] {
        let sent = TestFrame::new(frame(MAC, len));
        rig.network.give(sent.clone());
        let (info, parts) = rig.receive().unwrap();
        assert_eq!(parts.len(), (len + HEADER).div_ceil(BUFFER as usize), "{len}");
        assert_eq!(TestFrame::new(parts.concat()).with_info(info), sent, "{len}");
    }
    assert_eq!(rig.received(), None);
    assert_eq!((rig.handle.counters().received, rig.driver.status()), (6, 0xf));
}

/// One that is longer than the buffers at hand waits for others, and the next behind it.
#[test]
fn a_frame_that_finds_no_room_waits_for_it() {
    let mut rig = Rig::new(ALL);
    let frames = [9000, 100].map(|len| TestFrame::new(frame(MAC, len)));
    rig.offer(BUFFER);
    frames.iter().for_each(|frame| rig.network.give(frame.clone()));
    for _ in 0..4 {
        rig.offer(BUFFER);
        assert_eq!(rig.received(), None);
    }
    rig.offer(BUFFER);
    assert_eq!(rig.received(), Some(frames[0].clone()));
    assert_eq!(rig.received(), None);
    rig.offer(BUFFER);
    assert_eq!(rig.received(), Some(frames[1].clone()));
    assert_eq!(rig.handle.counters().receive_dropped, 0);
}

/// A driver that has been promised the most that comes, and makes buffers for that (5.1.4.1).
#[test]
fn what_is_longer_than_the_mtu_does_not_come_to_a_driver_that_relies_on_it() {
    let tagged = |len: usize| {
        let mut bytes = frame(MAC, len);
        bytes[12..14].copy_from_slice(&[0x81, 0]);
        bytes
    };
    for (features, relies) in [(feature::MTU, true), (0, false)] {
        let mut rig = Rig::with(TestNetwork::with_mtu(1500), features, |builder| builder);
        (0..8).for_each(|_| rig.offer(2000));
        for (bytes, fits) in [
            (frame(MAC, 1514), true),
            (frame(MAC, 1515), false),
            (frame(MAC, 1600), false),
            (tagged(1518), true),
            (tagged(1519), false),
        ] {
            let before = rig.handle.counters().receive_dropped;
            rig.network.give(TestFrame::new(bytes.clone()));
            let passes = fits || !relies;
            assert_eq!(rig.received().map(|frame| frame.bytes), passes.then_some(bytes));
            assert_eq!(rig.handle.counters().receive_dropped - before, u64::from(!passes));
        }
    }
    // What is to be cut is longer, and its pieces are not.
    let network = TestNetwork::new(1, Offloads::ALL, Offloads::ALL).of_mtu(1500);
    let mut rig = Rig::with(network, ALL | feature::MTU, |builder| builder);
    (0..8).for_each(|_| rig.offer(BUFFER));
    for (info, passes) in [(segmented(), true), (PacketInfo { gso: None, ..segmented() }, false)] {
        rig.network.give(TestFrame::new(frame(MAC, 9000)).with_info(info));
        assert_eq!(rig.received().is_some(), passes);
    }
}

/// Where more buffers do not help it is dropped, and never given in part.
#[test]
fn a_frame_that_fits_nowhere_is_dropped_and_counted() {
    let mut rig = Rig::new(PLAIN);
    rig.offer(BUFFER);
    rig.network.give(TestFrame::new(frame(MAC, 1589)));
    assert_eq!((rig.received(), rig.handle.counters().receive_dropped), (None, 1));
    rig.network.give(TestFrame::new(frame(MAC, 1588)));
    assert_eq!(rig.received().unwrap().bytes.len(), 1588);
    // All that the driver can have is too little: 64 buffers of 13 bytes.
    let mut rig = Rig::new(ALL);
    (0..64).for_each(|_| rig.offer(13));
    rig.network.give(TestFrame::new(frame(MAC, 1000)));
    assert_eq!((rig.received(), rig.handle.counters().receive_dropped), (None, 1));
    rig.network.give(TestFrame::new(frame(MAC, 64 * 13 - HEADER)));
    assert_eq!(rig.receive().unwrap().1.len(), 64);
}

#[test]
fn buffers_that_are_none_are_given_back_unused() {
    for features in [ALL, PLAIN] {
        let mut rig = Rig::new(features);
        let heads = [
            rig.rx.chain().writable(BUFFERS, 11).submit().unwrap(),
            rig.rx.chain().writable(NOWHERE, 2000).submit().unwrap(),
            rig.rx.chain().writable(BUFFERS, 500).writable(NOWHERE, 2000).submit().unwrap(),
            rig.rx.chain().readable(BUFFERS, 2000).submit().unwrap(),
        ];
        rig.driver.notify(0);
        let mut used = vec![];
        while let Some(one) = rig.rx.take_used().unwrap() {
            used.push(one);
        }
        assert_eq!(used, heads.map(|head| (u32::from(head), 0)));
        assert_eq!(rig.handle.counters().bad_buffers, 4);
        rig.offer(BUFFER);
        rig.network.give(TestFrame::new(frame(MAC, 1000)));
        assert_eq!(rig.received().unwrap().bytes.len(), 1000);
    }
}

#[test]
fn a_header_and_a_frame_may_be_in_any_pieces() {
    for features in [ALL, PLAIN] {
        let mut rig = Rig::new(features);
        let sent = TestFrame::new(frame(MAC, 500)).with_info(segmented());
        // Across two regions; what is to be read is not looked at.
        let start = 0x2_0000 - 40;
        rig.put(start, &[POISON; 600]);
        let chain = rig.rx.chain().readable(SEND, 100).writable(start, 5).writable(start + 5, 6);
        let head = chain.writable(start + 11, 20).writable(start + 31, 569).submit().unwrap();
        rig.network.give(sent.clone());
        rig.driver.notify(0);
        assert_eq!(rig.rx.take_used().unwrap(), Some((head.into(), 512)));
        let bytes = rig.get(start, 513);
        assert_eq!(bytes[..12], segmented().to_bytes(1));
        assert!(bytes[12..512] == sent.bytes && bytes[512] == POISON);
    }
}

#[test]
fn what_the_driver_does_not_take_over_does_not_reach_it() {
    let mut rig = Rig::new(feature::GUEST_CSUM | feature::MRG_RXBUF);
    (0..8).for_each(|_| rig.offer(BUFFER));
    rig.network.give(TestFrame::new(frame(MAC, 1000)).with_info(segmented()));
    let sum = PacketInfo { gso: None, ..segmented() };
    rig.network.give(TestFrame::new(frame(MAC, 900)).with_info(sum));
    // A checksum beyond the frame, no frame at all, and one that is too long.
    let beyond = PacketInfo { checksum: Some(Checksum { start: 899, offset: 0 }), ..sum };
    rig.network.give(TestFrame::new(frame(MAC, 900)).with_info(beyond));
    rig.network.give(TestFrame::new(frame(MAC, 13)));
    rig.network.give(TestFrame::new(frame(MAC, MAX_FRAME + 1)));
    assert_eq!(rig.received(), Some(TestFrame::new(frame(MAC, 900)).with_info(sum)));
    assert_eq!((rig.received(), rig.handle.counters().receive_dropped), (None, 4));
    // That checksums are right is for those who look at none.
    let mut rig = Rig::new(0);
    rig.offer(BUFFER);
    let valid = PacketInfo { data_valid: true, ..PacketInfo::default() };
    rig.network.give(TestFrame::new(frame(MAC, 900)).with_info(valid));
    assert_eq!(rig.received().unwrap().info, PacketInfo::default());
}

#[test]
fn frames_wait_for_their_rate() {
    let clock = Arc::new(ManualClock::new(0));
    let mut rig = Rig::with(everything(), ALL, |builder| builder.receive_rate(limiter(&clock, 1000)));
    (0..8).for_each(|_| rig.offer(BUFFER));
    for len in [900, 600, 61] {
        rig.network.give(TestFrame::new(frame(MAC, len)));
    }
    let mut lens =
        || std::iter::from_fn(|| rig.received()).map(|frame| frame.bytes.len()).collect::<Vec<_>>();
    assert_eq!(lens(), [900, 600]);
    clock.advance(500 * 1_000_000_000 / (1 << 20) + 1000);
    rig.driver.notify(0);
    assert_eq!(rig.received().unwrap().bytes, frame(MAC, 61));
}

#[test]
fn nothing_passes_while_the_link_is_down() {
    let mut rig = Rig::new(ALL);
    let pull: [fn(&Rig, bool); 2] = [
        |rig, up| rig.handle.set_link(up),
        |rig, up| rig.network.set_link(if up { Link::UP } else { Link::DOWN }),
    ];
    for pull in pull {
        (0..2).for_each(|_| rig.offer(BUFFER));
        pull(&rig, false);
        rig.network.give(TestFrame::new(frame(MAC, 900)));
        assert_eq!((rig.received(), rig.network.coming()), (None, 0));
        assert_eq!(rig.send(PacketInfo::default(), &frame(PEER, 100)), []);
        pull(&rig, true);
        rig.network.give(TestFrame::new(frame(MAC, 901)));
        assert_eq!(rig.received().unwrap().bytes.len(), 901);
        assert_eq!(rig.send(PacketInfo::default(), &frame(PEER, 100)).len(), 1);
    }
    let counters = rig.handle.counters();
    assert_eq!((counters.receive_dropped, counters.send_dropped), (2, 2));
}

/// Buffers that are of no use now are no reason to look again and again: not while the link is down, not while there are no frames, and
/// not where the network fails.
#[test]
fn a_device_with_nothing_to_do_is_idle() {
    for features in [ALL, PLAIN] {
        let mut rig = Rig::new(features);
        (0..60).for_each(|_| rig.offer(20));
        for state in 0..3 {
            rig.network.set_failing(state == 1);
            rig.handle.set_link(state != 2);
            rig.network.take_looks();
            rig.driver.notify(0);
            rig.driver.notify(1);
            let looks = rig.network.take_looks();
            assert!((1..=4).contains(&looks), "{state}: {looks}");
        }
    }
}

/// One that waits for its rate, or for buffers, when the cable is pulled is not there when it is in again.
#[test]
fn a_frame_that_waits_is_lost_with_its_link() {
    let clock = Arc::new(ManualClock::new(0));
    let mut rig = Rig::with(everything(), ALL, |builder| builder.receive_rate(limiter(&clock, 10)));
    rig.offer(BUFFER);
    rig.network.give(TestFrame::new(frame(MAC, 1000)));
    assert!(rig.received().is_some());
    for len in [1001, 5001] {
        rig.offer(BUFFER);
        rig.network.give(TestFrame::new(frame(MAC, len)));
        assert_eq!(rig.received(), None);
        rig.handle.set_link(false);
        rig.handle.set_link(true);
        clock.advance(10_000_000_000);
        (0..4).for_each(|_| rig.offer(BUFFER));
        assert_eq!(rig.received(), None);
        rig.network.give(TestFrame::new(frame(MAC, 60)));
        assert_eq!(rig.received().unwrap().bytes.len(), 60);
    }
    assert_eq!(rig.handle.counters().receive_dropped, 2);
}
