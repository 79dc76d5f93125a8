//! A judge sees each frame between two ports.

use std::net::IpAddr;

use super::*;

#[test]
fn a_judge_decides_for_each_receiver() {
    let lan = Lan::new();
    let [mut a, mut b, mut c] = ["a", "b", "c"].map(|name| lan.plain(name));
    let seen = Arc::new(Mutex::new(Vec::new()));
    let writes = Arc::clone(&seen);
    lan.switch.set_judge(Some(Arc::new(move |flow: &Flow<'_>| {
        let entry = (flow.from.name.to_string(), flow.to.name.to_string(), flow.flooded, flow.len);
        writes.lock().unwrap().push(entry);
        if &*flow.to.name == "c" { Verdict::Drop } else { Verdict::Pass }
    })));
    a.send(&frame(2, 1, "to all"));
    assert_eq!((b.received(), c.received()), (1, 0));
    b.send(&frame(1, 2, "to one"));
    assert_eq!(a.received(), 1);
    let entry = |from: &str, to: &str, flooded| (from.to_owned(), to.to_owned(), flooded, 20);
    assert_eq!(*seen.lock().unwrap(), [entry("a", "b", true), entry("a", "c", true), entry("b", "a", false)]);
    assert_eq!(lan.dropped("a", DropReason::Judged), 1);
    lan.switch.set_judge(None);
    a.send(&frame(9, 1, "to all"));
    assert_eq!(c.received(), 1);
}

#[test]
fn a_judge_sees_ports_of_tcp() {
    let lan = Lan::new();
    let mut a = lan.plain("a");
    let mut b = lan.device(PortConfig::new("b").mac(mac(2)));
    lan.switch.set_judge(Some(Arc::new(|flow: &Flow<'_>| {
        match (flow.headers.network, flow.headers.transport) {
            (Some(Network::Ip { source, .. }), Some(Transport::Tcp { destination: 80, .. }))
                if source == IpAddr::from([10, 0, 0, 1]) =>
            {
                Verdict::Pass
            }
            _ => Verdict::Drop,
        }
    })));
    let packet = |source: u8, port| {
        let builder = etherparse::PacketBuilder::ethernet2(mac(1).0, mac(2).0);
        let mut frame = Vec::new();
        let ip = builder.ipv4([10, 0, 0, source], [10, 0, 0, 2], 9);
        ip.tcp(4000, port, 1, 1).write(&mut frame, &[1; 1000]).unwrap();
        frame
    };
    for (source, port, passes) in [(1, 80, 1), (1, 81, 0), (2, 80, 0)] {
        a.send(&packet(source, port));
        assert_eq!(b.received(), passes, "{source}, {port}");
    }
    a.send(&frame(2, 1, "no IP at all"));
    assert_eq!(b.received(), 0);
}

/// CVE-2021-27853: what a guard against ARP looks for is hidden behind one more tag. Receivers look through tags of VLAN 0.
#[test]
fn cve_2021_27853_stacked_tags_do_not_pass_for_something_harmless() {
    let lan = Lan::new();
    let [mut a, mut b] = ["a", "b"].map(|name| lan.plain(name));
    lan.switch.set_judge(Some(Arc::new(|flow: &Flow<'_>| match flow.headers.ether_type {
        // One that lets experiments pass, and knows that nobody has looked behind another tag.
        0x88b5 => Verdict::Pass,
        _ => Verdict::Drop,
    })));
    a.send(&tagged(2, 1, &[0], "one tag, which is taken off"));
    assert_eq!(b.receive().unwrap(), frame(2, 1, "one tag, which is taken off"));
    for tags in [&[0, 0][..], &[0, 0, 0], &[0xe000, 0]] {
        a.send(&tagged(2, 1, tags, "more"));
        assert_eq!(b.receive(), None, "{tags:?}");
    }
    // Nor does a service tag.
    a.send(&frame_of(mac(2), mac(1), &[0x88, 0xa8, 0, 0, 0x88, 0xb5]));
    assert_eq!((b.receive(), lan.dropped("a", DropReason::Judged)), (None, 4));
}
