//! What a broker does for its clients.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;
use crate::channel::{Refusal, Request};
use crate::net::switch::{DropReason, PortVlans, VlanId};
use crate::net::{Checksum, Gso, GsoKind};

#[test]
fn clients_reach_each_other_and_ports_of_the_broker_s_own() {
    let (_directory, path) = place();
    let broker = Broker::start(&path);
    let mut a = Device::new(&path, "a", 1);
    let mut b = Device::new(&path, "b", 2);
    assert!(a.up() && b.up() && a.client.mtu() == Some(9000));
    talk(&mut a, 2, 1, &mut b);
    talk(&mut b, 1, 2, &mut a);
    let ServerEvent::Attached { peer, .. } = broker.event() else { panic!("nobody came") };
    assert_eq!((&*peer.name, peer.mac), ("a", Some(mac(1))));
    assert_eq!(u32::try_from(peer.pid).unwrap(), std::process::id());

    let grant = grant();
    let own = broker.switch.attach(grant, PortConfig::new("own").mac(mac(9))).unwrap();
    let ears = Arc::<Ears>::default();
    let mut ports = own.attach(&Agreed::new(1), ears).unwrap();
    a.send(&frame(9, 1, b"to the broker's own"));
    let mut buffer = vec![0; MAX_FRAME];
    let received = wait_for("a frame", || ports[0].receive(&[VolatileSlice::from(&mut buffer[..])]).unwrap());
    assert_eq!(buffer[..received.len], frame(9, 1, b"to the broker's own"));
    // One that says it is another one.
    a.send(&frame(2, 2, b"spoofed"));
    wait_for("a drop", || {
        let status = broker.switch.ports().into_iter().find(|port| &*port.port.name == "a").unwrap();
        (status.metrics.dropped(DropReason::Spoofed) == 1).then_some(())
    });
}

/// Much more than rings hold, of all sizes, with what is left to do.
#[test]
fn data_arrives_whole_and_in_order() {
    let (_directory, path) = place();
    let broker = Broker::start(&path);
    let mut a = Device::new(&path, "a", 1);
    let mut b = Device::new(&path, "b", 2);
    talk(&mut a, 2, 1, &mut b);
    let gso = Some(Gso { kind: GsoKind::Tcp4, size: 1000, ecn: false });
    let left =
        PacketInfo { checksum: Some(Checksum { start: 34, offset: 16 }), gso, ..PacketInfo::default() };
    let frame_of = |number: u32| {
        let len = usize::try_from(number.wrapping_mul(7919) % 64_000).unwrap();
        let text: Vec<u8> =
            (0..251).cycle().take(len + 60).map(|byte: u8| byte ^ number.to_le_bytes()[0]).collect();
        frame(2, 1, &[&number.to_le_bytes()[..], &text].concat())
    };
    const FRAMES: u32 = 2000;
    std::thread::scope(|scope| {
        let sender = scope.spawn(|| {
            for number in 0..FRAMES {
                wait_for("room", || a.try_send(&left, &frame_of(number)).then_some(()));
                // No faster than the other takes them: a full queue drops.
                if number % 16 == 15 {
                    std::thread::sleep(Duration::from_millis(3));
                }
            }
        });
        let mut next = 0;
        let started = Instant::now();
        let mut got = 0;
        while next < FRAMES && (!sender.is_finished() || started.elapsed() < LONGEST) {
            let Some((info, frame)) = b.try_receive() else {
                if sender.is_finished() {
                    std::thread::sleep(Duration::from_millis(50));
                    if let Some(last) = b.try_receive() {
                        assert_eq!(last.0, left);
                        continue;
                    }
                    break;
                }
                continue;
            };
            let number = u32::from_le_bytes(frame[14..18].try_into().unwrap());
            assert!(number >= next, "{number} after {next}");
            assert_eq!(frame, frame_of(number));
            assert_eq!(info, left);
            next = number + 1;
            got += 1;
        }
        sender.join().unwrap();
        assert!(got > FRAMES / 2, "{got} of {FRAMES}");
    });
    drop(broker);
}

#[test]
fn a_gate_decides_and_the_client_hears_why() {
    let (_directory, path) = place();
    let gate = |request: &Request| match request.asker() {
        Party::Host(name) if &**name == "a" => Ok(()),
        asker => Err(Refusal::new(format!("{asker} is not on the list"))),
    };
    let broker = Broker::with(&path, gate, |builder| {
        builder.configure(|peer| {
            if peer.token != b"secret" {
                return Err(Refusal::new("a wrong token"));
            }
            let vlan = VlanId::new(7).map_err(|error| Refusal::new(error.to_string()))?;
            Ok(PortConfig::new(Arc::clone(&peer.name)).vlans(PortVlans::Access(vlan)))
        })
    });
    let connect = |name: &str, token: &str| {
        SwitchClient::connect(grant(), &path, ClientConfig::new(name).token(token)).map(drop)
    };
    let refused = |result: Result<(), BrokerError>| match result {
        Err(BrokerError::Refused { reason }) => reason,
        other => panic!("{other:?}"),
    };
    assert_eq!(refused(connect("b", "secret")), "refused: host b is not on the list");
    assert_eq!(broker.reason(), "refused: host b is not on the list");
    assert_eq!(refused(connect("a", "wrong")), "refused: a wrong token");
    connect("a", "secret").unwrap();
    let elsewhere = Gatekeeper::new(AllowAll);
    let elsewhere = elsewhere.open(Party::Host("x".into()), None, NetworkAttach { network: "wan".into() });
    let wrong = SwitchClient::connect(elsewhere.unwrap(), &path, ClientConfig::new("a").token("secret"));
    assert_eq!(refused(wrong.map(drop)), "this is network \"lan\"");
    let _a = SwitchClient::connect(grant(), &path, ClientConfig::new("a").token("secret"));
    let again = refused(wait_for("one that is there", || connect("a", "secret").err().map(Err)));
    assert!(again.contains("has a port called \"a\""), "{again}");
    let long = "x".repeat(97);
    assert!(matches!(connect(&long, ""), Err(BrokerError::Text { len: 97, .. })));
}

#[test]
fn the_default_lets_nobody_in() {
    let (_directory, path) = place();
    let _broker = Broker::with(&path, crate::channel::DenyAll, |builder| builder);
    let refused = SwitchClient::connect(grant(), &path, ClientConfig::new("a"));
    assert!(matches!(refused, Err(BrokerError::Refused { reason }) if reason.contains("no policy")));
}

#[test]
fn a_revocation_takes_the_link_down() {
    let (_directory, path) = place();
    let allowed = Arc::new(AtomicBool::new(true));
    let rule = Arc::clone(&allowed);
    let gate =
        move |_: &Request| if rule.load(Ordering::SeqCst) { Ok(()) } else { Err(Refusal::new("no more")) };
    let broker = Broker::with(&path, gate, |builder| builder);
    let mut a = Device::new(&path, "a", 1);
    let mut b = Device::new(&path, "b", 2);
    talk(&mut a, 2, 1, &mut b);
    allowed.store(false, Ordering::SeqCst);
    let id = broker.switch.ports()[0].port.grant;
    broker.gatekeeper.revoke(id);
    wait_for("the link to go down", || (!a.up()).then_some(()));
    assert_eq!(broker.ports(), ["b"]);
    assert!(broker.reason().contains("taken back") && *a.ears.links.lock().unwrap() > 0);
    assert!(a.try_send(&PacketInfo::default(), &frame(2, 1, b"lost")));
    assert_eq!(b.try_receive(), None);
    // It asks again, and gets in when it may.
    assert_eq!(broker.reason(), "refused: no more");
    assert!(!a.up() && b.up());
    allowed.store(true, Ordering::SeqCst);
    wait_for("the link to come up", || a.up().then_some(()));
    talk(&mut a, 2, 1, &mut b);
    talk(&mut b, 1, 2, &mut a);
}

#[test]
fn a_grant_of_the_client_s_own_process_is_needed_too() {
    let (_directory, path) = place();
    let broker = Broker::start(&path);
    let mut b = Device::new(&path, "b", 2);
    let gatekeeper = Gatekeeper::new(AllowAll);
    let open = || {
        let channel = NetworkAttach { network: "lan".into() };
        gatekeeper.open(Party::Host("a".into()), None, channel).unwrap()
    };
    let grant = open();
    let id = grant.id();
    let client = SwitchClient::connect(grant, &path, ClientConfig::new("a").mac(mac(1))).unwrap();
    let ears = Arc::<Ears>::default();
    let ports = client.attach(&Agreed::new(1), Arc::<Ears>::clone(&ears)).unwrap();
    let mut a = Device { client, ports, ears };
    talk(&mut a, 2, 1, &mut b);
    gatekeeper.revoke(id);
    assert!(!a.up());
    let mut bytes = frame(2, 1, b"too late");
    assert!(a.ports[0].transmit(&PacketInfo::default(), &[VolatileSlice::from(&mut bytes[..])]).is_err());
    b.send(&frame(1, 2, b"to nobody"));
    assert_eq!(a.try_receive(), None);
    // The broker does not go on with it, and its name and address are free.
    wait_for("its port to go", || (broker.ports() == ["b"]).then_some(()));
    let config = ClientConfig::new("a").mac(mac(1));
    let again = SwitchClient::connect(open(), &path, config).unwrap();
    assert!(again.link().up && !a.up());
    drop(again);
    let revoked = open();
    gatekeeper.revoke(revoked.id());
    let refused = SwitchClient::connect(revoked, &path, ClientConfig::new("c"));
    assert!(matches!(refused, Err(BrokerError::Revoked)));
    drop(broker);
}

#[test]
fn a_broker_may_come_back() {
    let (_directory, path) = place();
    let broker = Broker::start(&path);
    let mut a = Device::new(&path, "a", 1);
    let mut b = Device::new(&path, "b", 2);
    talk(&mut a, 2, 1, &mut b);
    let stays = ClientConfig::new("c").reconnect(false);
    let c = SwitchClient::connect(grant(), &path, stays).unwrap();
    drop(broker);
    wait_for("links to go down", || (!a.up() && !b.up() && !c.link().up).then_some(()));
    assert!(a.try_send(&PacketInfo::default(), &frame(2, 1, b"lost")));
    let broker = Broker::start(&path);
    wait_for("links to come up", || (a.up() && b.up()).then_some(()));
    talk(&mut a, 2, 1, &mut b);
    talk(&mut b, 1, 2, &mut a);
    assert!(!c.link().up);
    drop(c);
    assert_eq!(broker.ports().len(), 2);
    // Somebody else's file is not replaced.
    let file = path.with_file_name("file");
    std::fs::write(&file, "somebody's").unwrap();
    let builder = SwitchServer::builder(broker.switch.clone(), broker.gatekeeper.clone());
    assert!(matches!(builder.listen(&file), Err(BrokerError::Socket { .. })));
    let builder = SwitchServer::builder(broker.switch.clone(), broker.gatekeeper.clone());
    assert!(matches!(builder.listen(&path), Err(BrokerError::Socket { .. })), "one that is in use");
}

#[test]
fn a_client_without_room_waits_and_others_do_not() {
    let (_directory, path) = place();
    let broker = Broker::start(&path);
    let config = |name: &str, number| ClientConfig::new(name).mac(mac(number)).queue_bytes(256 << 10);
    let mut a = Device::with(&path, config("a", 1), Offloads::ALL);
    let mut slow = Device::with(&path, config("slow", 2), Offloads::ALL);
    let mut b = Device::new(&path, "b", 3);
    talk(&mut a, 2, 1, &mut slow);
    talk(&mut a, 3, 1, &mut b);
    let text = vec![7; 60_000];
    for _ in 0..50 {
        a.send(&frame(2, 1, &text));
    }
    talk(&mut a, 3, 1, &mut b);
    let kept = std::iter::from_fn(|| slow.try_receive()).filter(|(_, frame)| frame.len() > 1000).count();
    assert_eq!(kept, 4);
    let status = broker.switch.ports().into_iter().find(|port| &*port.port.name == "slow").unwrap();
    assert_eq!(status.metrics.dropped(DropReason::QueueFull), 46);
}

#[test]
fn a_driver_that_can_less_gets_less_and_one_that_is_gone_nothing() {
    let (_directory, path) = place();
    let _broker = Broker::start(&path);
    let mut a = Device::new(&path, "a", 1);
    let mut b = Device::with(&path, ClientConfig::new("b").mac(mac(2)), Offloads::NONE);
    talk(&mut a, 2, 1, &mut b);
    let builder =
        etherparse::PacketBuilder::ethernet2(mac(1).0, mac(2).0).ipv4([10, 0, 0, 1], [10, 0, 0, 2], 9);
    let mut large = Vec::new();
    builder.tcp(1, 2, 3, 4).write(&mut large, &[9; 3000]).unwrap();
    let info = PacketInfo {
        checksum: Some(Checksum { start: 34, offset: 16 }),
        gso: Some(Gso { kind: GsoKind::Tcp4, size: 1000, ecn: false }),
        ..PacketInfo::default()
    };
    a.try_send(&info, &large);
    for _ in 0..3 {
        assert_eq!(b.receive().len(), 54 + 1000);
    }
    b.client.set_receive_offloads(Offloads::ALL).unwrap();
    b.ports.clear();
    let agreed = Agreed { receive: Offloads::ALL, ..Agreed::new(1) };
    a.try_send(&info, &large);
    b.ports = b.client.attach(&agreed, Arc::<Ears>::clone(&b.ears)).unwrap();
    talk(&mut a, 2, 1, &mut b);
    a.try_send(&info, &large);
    assert_eq!(wait_for("it as it was sent", || b.try_receive()), (info, large));
}
