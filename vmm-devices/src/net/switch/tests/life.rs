//! Ports come and go.

use super::*;
use crate::net::{Link, NetError};

#[test]
fn a_port_needs_the_right_to_that_network() {
    let lan = Lan::new();
    let error = lan.switch.attach(lan.grant("wan"), PortConfig::new("a")).unwrap_err();
    assert_eq!(error, SwitchError::Network { granted: "wan".into(), network: "lan".into() });
    let grant = lan.grant("lan");
    lan.gatekeeper.revoke(grant.id());
    let error = lan.switch.attach(grant, PortConfig::new("a")).unwrap_err();
    assert_eq!(error, SwitchError::Revoked { network: "lan".into() });
    assert!(lan.switch.ports().is_empty() && lan.gatekeeper.open_channels().is_empty());
}

#[test]
fn each_port_has_a_name_and_there_are_so_many() {
    let lan = Lan::with(|builder| builder.max_ports(2));
    let _a = lan.try_attach(PortConfig::new("a")).unwrap();
    assert!(matches!(lan.try_attach(PortConfig::new("a")), Err(SwitchError::Name { .. })));
    let b = lan.try_attach(PortConfig::new("b")).unwrap();
    assert_eq!(
        lan.try_attach(PortConfig::new("c")).unwrap_err(),
        SwitchError::Ports { network: "lan".into(), most: 2 }
    );
    drop(b);
    lan.try_attach(PortConfig::new("c")).unwrap();
    assert_eq!(lan.gatekeeper.open_channels().len(), 1, "what was refused or dropped is closed");
}

/// The switch forgets all of a port: what waits in its queues, its addresses, and whoever sends to it.
#[test]
fn cve_2023_5088_a_revoked_port_is_gone_at_once() {
    let lan = Lan::new();
    let mut a = lan.device(PortConfig::new("a").mac(mac(1)));
    let [mut b, mut c] = ["b", "c"].map(|name| lan.plain(name));
    b.send(&frame(1, 2, "waits"));
    a.send(&frame(2, 1, "goes"));
    let id = lan.port("a").port.grant;
    assert_eq!(a.backend.link(), Link::UP);
    assert!(lan.gatekeeper.revoke(id));
    assert_eq!((a.backend.link(), a.ears.links.load(Ordering::SeqCst)), (Link::DOWN, 1));
    assert_eq!(a.receive(), None, "what waited is gone");
    let mut bytes = frame(2, 1, "too late");
    let sent = a.ports[0].transmit(&PacketInfo::default(), &[VolatileSlice::from(&mut bytes[..])]);
    assert!(matches!(sent, Err(NetError::Revoked)));
    assert_eq!(b.received(), 1, "what was sent before");
    assert!(!lan.switch.macs().iter().any(|entry| entry.mac == mac(1)));
    c.received();
    b.send(&frame(1, 2, "to whom?"));
    assert_eq!((c.received(), a.receive()), (1, None), "it is unknown now");
    assert_eq!(lan.switch.ports().len(), 2);
    // Its name and address are free.
    let mut again = lan.device(PortConfig::new("a").mac(mac(1)));
    b.send(&frame(1, 2, "welcome"));
    assert_eq!(again.receive().unwrap(), frame(1, 2, "welcome"));
    drop(a);
    assert_eq!(lan.switch.ports().len(), 3);
}

#[test]
fn a_cable_can_be_pulled() {
    let lan = Lan::new();
    let [mut a, mut b] = ["a", "b"].map(|name| lan.plain(name));
    assert!(lan.switch.set_link(a.backend.id(), false));
    assert!(!lan.port("a").up && !a.backend.link().up);
    a.send(&frame(2, 1, ""));
    b.send(&frame(1, 2, ""));
    assert_eq!((a.received(), b.received()), (0, 0));
    assert!(lan.switch.set_link(a.backend.id(), true) && lan.switch.set_link(a.backend.id(), true));
    assert_eq!(a.ears.links.load(Ordering::SeqCst), 2);
    b.send(&frame(1, 2, ""));
    assert_eq!(a.received(), 1);
    let id = a.backend.id();
    drop(a);
    assert!(!lan.switch.set_link(id, true));
}

#[test]
fn a_driver_gets_nothing_that_was_for_the_one_before() {
    let lan = Lan::new();
    let [mut a, mut b] = ["a", "b"].map(|name| lan.plain(name));
    a.send(&frame(2, 1, "for the first"));
    b.ports.clear();
    a.send(&frame(2, 1, "for nobody"));
    assert_eq!(lan.dropped("b", DropReason::NoDriver), 1);
    b.drive(1, Offloads::ALL);
    assert_eq!(b.receive(), None);
    a.send(&frame(2, 1, "for the second"));
    assert_eq!(b.receive().unwrap(), frame(2, 1, "for the second"));
}

#[test]
fn a_full_queue_drops_for_itself_alone() {
    let lan = Lan::new();
    let mut a = lan.plain("a");
    let mut slow = lan.device(PortConfig::new("slow").queue_bytes(256 << 10));
    let mut quick = lan.plain("quick");
    let text = "x".repeat(60_000);
    for _ in 0..100 {
        a.send(&frame(9, 1, &text));
        assert_eq!(quick.received(), 1);
    }
    let kept = slow.received();
    assert_eq!(kept, 4, "frames of 60 000 bytes in 256 KiB");
    assert_eq!(lan.dropped("slow", DropReason::QueueFull), 96);
    let metrics = lan.port("slow").metrics;
    assert_eq!((metrics.to_device.frames, metrics.to_device.bytes), (4, 4 * 60_014));
    assert_eq!(lan.port("a").metrics.from_device.frames, 100);
}

#[test]
fn who_sleeps_is_woken_once() {
    let lan = Lan::new();
    let [mut a, mut b] = ["a", "b"].map(|name| lan.plain(name));
    for _ in 0..3 {
        a.send(&frame(2, 1, ""));
    }
    assert_eq!(b.heard(), [0]);
    assert_eq!(b.received(), 3);
    a.send(&frame(2, 1, ""));
    assert_eq!(b.heard(), [0]);
    // Until it says that no more comes, nobody is woken; but then also if its port is dropped meanwhile.
    assert_eq!(b.received(), 1);
    let mut bytes = frame(2, 1, "");
    let slices = [VolatileSlice::from(&mut bytes[..])];
    assert_eq!(a.ports[0].transmit(&PacketInfo::default(), &slices).unwrap(), Sent::Done);
    assert!(b.heard().is_empty());
    drop(a);
    assert_eq!((b.heard(), b.received()), (vec![0], 1));
}

#[test]
fn a_switch_outlives_its_last_handle_as_long_as_it_has_ports() {
    let lan = Lan::new();
    let [mut a, mut b] = ["a", "b"].map(|name| lan.plain(name));
    let (switch, gatekeeper) = (Arc::downgrade(&lan.switch.inner), lan.gatekeeper.clone());
    drop(lan);
    a.send(&frame(2, 1, "still"));
    b.send(&frame(1, 2, "here"));
    assert_eq!((a.received(), b.received()), (1, 1));
    drop((a, b));
    assert!(switch.upgrade().is_none(), "and no longer, though ports knew each other");
    assert!(gatekeeper.open_channels().is_empty());
}
