//! Who gets which frames.

use super::*;
use crate::virtio::rate::{Limits, Rate};

#[test]
fn addresses_are_learned_and_forgotten() {
    let lan = Lan::with(|builder| builder.aging(10_000_000_000));
    let [mut a, mut b, mut c] = ["a", "b", "c"].map(|name| lan.plain(name));
    a.send(&frame(2, 1, "where is 2?"));
    assert_eq!((b.received(), c.received(), a.received()), (1, 1, 0), "nobody knows");
    b.send(&frame(1, 2, "here"));
    assert_eq!(a.receive().unwrap(), frame(1, 2, "here"));
    assert_eq!(c.received(), 0);
    a.send(&frame(2, 1, "ah"));
    assert_eq!((b.received(), c.received()), (1, 0));
    let entry = |number, port: &Device| MacEntry {
        vlan: 1,
        mac: mac(number),
        port: port.backend.id(),
        pinned: false,
    };
    assert_eq!(lan.switch.macs(), [entry(1, &a), entry(2, &b)]);
    assert_eq!(lan.port("a").metrics.flooded, 1);

    // It has moved.
    c.send(&frame(1, 2, "here now"));
    a.send(&frame(2, 1, "hello"));
    assert_eq!((b.received(), c.received(), a.received()), (0, 1, 1));
    assert_eq!(lan.port("c").metrics.moved_here, 1);
    lan.clock.advance(10_000_000_000);
    assert_eq!(lan.switch.macs(), []);
    a.send(&frame(2, 1, "where?"));
    assert_eq!((b.received(), c.received()), (1, 1));
}

#[test]
fn everybody_hears_what_is_for_groups() {
    let lan = Lan::new();
    let [mut a, mut b, mut c] = ["a", "b", "c"].map(|name| lan.plain(name));
    for to in [MacAddr::BROADCAST, MacAddr([0x33, 0x33, 0, 0, 0, 1]), MacAddr([1, 0x80, 0xc2, 0, 0, 0x10])] {
        a.send(&frame_of(to, mac(1), &[8, 6, 0]));
        assert_eq!((a.received(), b.received(), c.received()), (0, 1, 1), "{to}");
    }
    // But for what is for the next bridge.
    for last in 0..16 {
        a.send(&frame_of(MacAddr([1, 0x80, 0xc2, 0, 0, last]), mac(1), &[8, 6, 0]));
    }
    assert_eq!((b.received(), lan.dropped("a", DropReason::Reserved)), (0, 16));
}

#[test]
fn a_source_is_a_device_s() {
    let lan = Lan::new();
    let [mut a, mut b] = ["a", "b"].map(|name| lan.plain(name));
    for source in [MacAddr::BROADCAST, MacAddr([3, 0, 0, 0, 0, 1]), MacAddr([0; 6])] {
        a.send(&frame_of(mac(2), source, &[8, 0, 0]));
    }
    assert_eq!((b.received(), lan.dropped("a", DropReason::Source)), (0, 3));
    assert_eq!(lan.switch.macs(), []);
    // What is for where it came from stays there.
    a.send(&frame(9, 1, ""));
    b.received();
    a.send(&frame(1, 1, ""));
    assert_eq!((b.received(), lan.dropped("a", DropReason::Local)), (0, 1));
}

#[test]
fn a_locked_address_is_nobody_else_s() {
    let lan = Lan::new();
    let mut a = lan.device(PortConfig::new("a").mac(mac(1)));
    let [mut b, mut c] = ["b", "c"].map(|name| lan.plain(name));
    // Known from the beginning.
    b.send(&frame(1, 2, "hello"));
    assert_eq!((a.received(), c.received()), (1, 0));
    a.send(&frame(2, 3, "I am 3"));
    c.send(&frame(2, 1, "I am 1"));
    assert_eq!(b.received(), 0);
    assert_eq!((lan.dropped("a", DropReason::Spoofed), lan.dropped("c", DropReason::Spoofed)), (1, 1));
    b.send(&frame(1, 2, "still there?"));
    assert_eq!((a.received(), c.received()), (1, 0));
    let taken = lan.try_attach(PortConfig::new("d").mac(mac(1))).unwrap_err();
    assert!(matches!(&taken, SwitchError::MacTaken { owner, .. } if &**owner == "a"), "{taken}");
    // In another VLAN it is another one's.
    lan.try_attach(PortConfig::new("d").mac(mac(1)).vlans(access(2))).unwrap();
}

#[test]
fn cve_2020_27174_a_port_that_is_full_of_addresses_takes_nobody_s() {
    let lan = Lan::with(|builder| builder.max_macs(40));
    let mut a = lan.device(PortConfig::new("a").learned_macs(30));
    let [mut b, mut c] = ["b", "c"].map(|name| lan.plain(name));
    for number in 0..255 {
        a.send(&frame_of(mac(2), MacAddr([2, 1, 0, 0, 0, number]), &[8, 0]));
    }
    assert_eq!((lan.switch.macs().len(), lan.port("a").metrics.not_learned), (30, 225));
    b.send(&frame(9, 2, ""));
    b.received();
    c.received();
    c.send(&frame(2, 3, "to b alone"));
    assert_eq!((a.received(), b.received()), (1, 1), "a has the first one of b's alone");
}

#[test]
fn vlans_are_apart() {
    let lan = Lan::new();
    let port = |name: &str, vlans| lan.device(PortConfig::new(name).vlans(vlans));
    let [mut a7, mut b7, mut c8] = [port("a7", access(7)), port("b7", access(7)), port("c8", access(8))];
    let [mut all, mut some] = [port("all", trunk(Some(8), &[7, 9])), port("some", trunk(None, &[8, 9]))];
    a7.send(&frame(99, 1, "seven"));
    assert_eq!(b7.receive().unwrap(), frame(99, 1, "seven"));
    assert_eq!(all.receive().unwrap(), tagged(99, 1, &[7], "seven"));
    assert_eq!((c8.received(), some.received()), (0, 0));
    c8.send(&frame(99, 1, "eight"));
    assert_eq!(all.receive().unwrap(), frame(99, 1, "eight"));
    assert_eq!(some.receive().unwrap(), tagged(99, 1, &[8], "eight"));
    assert_eq!((a7.received(), b7.received()), (0, 0));
    // With its priority, from trunk to trunk.
    all.send(&tagged(99, 4, &[0xe009], "nine"));
    assert_eq!(some.receive().unwrap(), tagged(99, 4, &[0xe009], "nine"));
    some.send(&tagged(4, 5, &[0x2009], "nine"));
    assert_eq!(all.receive().unwrap(), tagged(4, 5, &[0x2009], "nine"));
    assert_eq!((a7.received(), b7.received(), c8.received()), (0, 0, 0));
    // The same address in several VLANs is several.
    let seen: Vec<_> = lan.switch.macs().iter().map(|entry| (entry.vlan, entry.mac)).collect();
    assert_eq!(seen, [(7, mac(1)), (8, mac(1)), (9, mac(4)), (9, mac(5))]);
    for (device, name, vlan) in [(&mut a7, "a7", 7), (&mut all, "all", 8), (&mut some, "some", 7)] {
        device.send(&tagged(99, 1, &[vlan], "not mine"));
        assert_eq!(lan.dropped(name, DropReason::Vlan), 1, "{name}");
    }
    some.send(&frame(99, 1, "no VLAN"));
    assert_eq!(lan.dropped("some", DropReason::Vlan), 2);
    assert_eq!([a7, b7, c8, all, some].map(|mut device| device.received()), [0; 5]);
}

/// CVE-2021-27853: stacked tags. The hop into another VLAN by two of them.
#[test]
fn cve_2021_27853_two_tags_lead_nowhere_else() {
    let lan = Lan::new();
    let port = |name: &str, vlans| lan.device(PortConfig::new(name).vlans(vlans));
    let [mut a, mut trunk_a] = [port("a", access(1)), port("ta", trunk(Some(1), &[1, 2]))];
    let [mut trunk_b, mut target] = [port("tb", trunk(Some(1), &[2])), port("target", access(2))];
    a.send(&tagged(99, 1, &[1, 2], "hop"));
    assert_eq!(lan.dropped("a", DropReason::Vlan), 1, "an access port has no tags");
    trunk_a.send(&tagged(99, 1, &[1, 2], "hop"));
    assert_eq!(a.receive().unwrap(), tagged(99, 1, &[2], "hop"), "what is below is payload");
    assert_eq!((trunk_b.received(), target.received()), (0, 0), "it would have become a frame of VLAN 2");
    trunk_b.send(&tagged(99, 3, &[2, 1], "inside"));
    assert_eq!(target.receive().unwrap(), tagged(99, 3, &[1], "inside"));
    assert_eq!(trunk_a.receive().unwrap(), tagged(99, 3, &[2, 1], "inside"));
}

#[test]
fn isolated_ports_reach_promiscuous_ones_alone() {
    let lan = Lan::new();
    let port = |name: &str, isolation| lan.device(PortConfig::new(name).isolation(isolation));
    let mut router = port("router", Isolation::Promiscuous);
    let [mut a, mut b] = ["a", "b"].map(|name| port(name, Isolation::Isolated));
    let [mut x, mut y] = ["x", "y"].map(|name| port(name, Isolation::Community(1)));
    a.send(&frame_of(MacAddr::BROADCAST, mac(1), &[8, 6]));
    assert_eq!([&mut router, &mut b, &mut x].map(Device::received), [1, 0, 0]);
    x.send(&frame_of(MacAddr::BROADCAST, mac(4), &[8, 6]));
    assert_eq!([&mut router, &mut y, &mut a].map(Device::received), [1, 1, 0]);
    b.send(&frame(1, 2, "I know you"));
    assert_eq!((a.received(), lan.dropped("b", DropReason::Isolated)), (0, 1));
    router.send(&frame(1, 9, "but I may"));
    assert_eq!(a.received(), 1);
}

#[test]
fn who_sends_too_much_is_cut() {
    let lan = Lan::new();
    let limits = Limits { bytes: Rate::new(1000, 1000), operations: Rate::new(5, 5) };
    let mut a = lan.device(PortConfig::new("a").limits(limits).flood_limit(Rate::new(1, 2)));
    let mut b = lan.device(PortConfig::new("b").mac(mac(2)));
    for _ in 0..4 {
        a.send(&frame(9, 1, "to everybody"));
    }
    assert_eq!((b.received(), lan.dropped("a", DropReason::Storm)), (2, 2));
    a.send(&frame(2, 1, "to one"));
    a.send(&frame(2, 1, "too many"));
    assert_eq!((b.received(), lan.dropped("a", DropReason::RateLimit)), (1, 1));
    lan.clock.advance(1_000_000_000);
    a.send(&frame(2, 1, &"x".repeat(2000)));
    a.send(&frame(2, 1, "too much"));
    assert_eq!((b.received(), lan.dropped("a", DropReason::RateLimit)), (1, 2));
    // What was refused has cost nothing.
    lan.clock.advance(2_000_000_000);
    for _ in 0..5 {
        a.send(&frame(2, 1, ""));
    }
    assert_eq!(b.received(), 5);
}

#[test]
fn flows_go_to_several_queues_and_keep_to_one() {
    let lan = Lan::new();
    let mut a = lan.plain("a");
    let mut b = lan.device(PortConfig::new("b").mac(mac(2)).queues(4));
    let packet = |port: u16| {
        let builder = etherparse::PacketBuilder::ethernet2(mac(1).0, mac(2).0);
        let builder = builder.ipv4([10, 0, 0, 1], [10, 0, 0, 2], 9).udp(port, 7);
        let mut frame = Vec::new();
        builder.write(&mut frame, &[0; 10]).unwrap();
        frame
    };
    a.send(&packet(1));
    assert_eq!((b.heard(), b.received()), (vec![0], 1), "a driver uses one at first");
    b.backend.set_pairs(4).unwrap();
    let mut queues = Vec::new();
    for port in 0..200 {
        for _ in 0..2 {
            a.send(&packet(port));
        }
        let got: Vec<_> = (0..4).filter(|pair| b.receive_at(*pair).is_some()).collect();
        assert_eq!(got.len(), 1);
        assert!(b.receive_at(got[0]).is_some(), "both in the same");
        queues.push(got[0]);
    }
    assert!((0..4).all(|pair| queues.iter().filter(|queue| **queue == pair).count() > 20), "{queues:?}");
    assert!(b.backend.set_pairs(5).is_err() && b.backend.set_pairs(0).is_err());
    assert!(b.backend.attach(&Agreed::new(5), Arc::<Ears>::default()).is_err());
}
