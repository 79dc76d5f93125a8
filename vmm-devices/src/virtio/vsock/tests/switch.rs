//! Guests that are joined by a switch.

use super::super::packet::boundary;
use super::*;
use crate::channel::{Refusal, Request};

/// Two guests of one process, 3 and 4.
struct Pair {
    guests: [Guest; 2],
    clock: Arc<ManualClock>,
    switch: Switch,
    gatekeeper: Gatekeeper,
}

impl Pair {
    fn new() -> Self {
        Self::with(Gatekeeper::new(AllowAll))
    }

    fn with(gatekeeper: Gatekeeper) -> Self {
        let (switch, clock) = (Switch::new(), Arc::new(ManualClock::new(0)));
        let allowed = Gatekeeper::new(AllowAll);
        let guests = [3, 4].map(|cid| {
            let seat = switch.join(cid, reachable(&allowed, cid)).unwrap();
            let builder = Vsock::builder(cid, Arc::clone(&clock)).gatekeeper(vm(cid), gatekeeper.clone());
            Guest::new(builder.switch(seat).build().unwrap())
        });
        Self { guests, clock, switch, gatekeeper }
    }

    /// The first connects to port 80 of the second.
    fn connect(&mut self, kind: Kind) -> [Ends; 2] {
        let [a, b] = &mut self.guests;
        let key = Ends { guest_port: 1000, cid: b.cid, port: 80, kind };
        a.say(key, operation::REQUEST);
        let theirs = b.accept();
        assert_eq!(theirs, Ends { guest_port: 80, cid: a.cid, port: 1000, kind });
        a.poll();
        assert_eq!(a.next_op(), Some(operation::RESPONSE));
        [key, theirs]
    }
}

#[test]
fn two_guests_speak() {
    let mut pair = Pair::new();
    let keys = pair.connect(Kind::Stream);
    for (from, text) in [(0, &b"hello"[..]), (1, b"who is there?"), (0, b"me")] {
        pair.guests[from].send(keys[from], text);
        pair.guests[1 - from].poll();
        let (header, data) = pair.guests[1 - from].next().unwrap();
        assert_eq!((header.op, &data[..]), (operation::RW, text));
    }
    assert_eq!(pair.switch.cids(), [3, 4]);
    // One side has the right to connect, the other that to accept.
    let asked: Vec<_> =
        pair.gatekeeper.open_channels().iter().map(|channel| channel.request.to_string()).collect();
    let [a, b] = [3, 4].map(|cid| format!("vm 00000000-0000-0000-0000-00000000000{cid}#1"));
    assert_eq!(
        asked,
        [format!("{a}: connect vsock port 80 of {b}"), format!("{b}: accept vsock port 80 of {a}")]
    );
}

#[test]
fn messages_keep_their_ends_and_records_too() {
    let mut pair = Pair::new();
    let [key, _] = pair.connect(Kind::SeqPacket);
    let [a, b] = &mut pair.guests;
    let sent = [
        (vec![1; 50_000], 0),
        (vec![2; 14], boundary::MESSAGE),
        (vec![], boundary::MESSAGE),
        (vec![3], boundary::MESSAGE | boundary::RECORD),
    ];
    for (data, flags) in &sent {
        let header = Header { flags: *flags, ..a.header(key, operation::RW, data.len()) };
        a.send_raw(&header, data);
    }
    let mut messages = vec![(Vec::new(), 0)];
    b.poll();
    while let Some((header, data)) = b.next() {
        assert_eq!(header.op, operation::RW);
        let last = messages.last_mut().unwrap();
        last.0.extend(data);
        last.1 = header.flags;
        if header.flags & boundary::MESSAGE != 0 {
            messages.push((Vec::new(), 0));
        }
        b.poll();
    }
    assert_eq!(
        messages,
        [
            ([&[1; 50_000][..], &[2; 14]].concat(), boundary::MESSAGE),
            (vec![], boundary::MESSAGE),
            (vec![3], boundary::MESSAGE | boundary::RECORD),
            (vec![], 0)
        ]
    );
}

#[test]
fn halves_ends_and_deaths_are_told_apart() {
    // In order.
    let mut pair = Pair::new();
    let [key, theirs] = pair.connect(Kind::Stream);
    let [a, b] = &mut pair.guests;
    a.send(key, b"the last");
    a.shut(key, shutdown::SEND);
    b.poll();
    assert_eq!(b.next().unwrap().1, b"the last");
    assert_eq!(
        b.next().map(|(header, _)| (header.op, header.flags)),
        Some((operation::SHUTDOWN, shutdown::SEND))
    );
    b.send(theirs, b"answer");
    a.poll();
    assert_eq!(a.next().unwrap().1, b"answer");
    a.shut(key, shutdown::BOTH);
    assert_eq!(a.next_op(), Some(operation::RST));
    b.poll();
    assert_eq!(
        b.next().map(|(header, _)| (header.op, header.flags)),
        Some((operation::SHUTDOWN, shutdown::RECEIVE))
    );
    b.say(theirs, operation::RST);
    assert_eq!((a.open(), b.open()), (0, 0));

    // By a reset of the connection, of the device, and by the death of the other.
    for how in 0..3 {
        let mut pair = Pair::new();
        let [key, _] = pair.connect(Kind::Stream);
        let [mut a, mut b] = pair.guests;
        a.send(key, b"x");
        match how {
            0 => a.say(key, operation::RST),
            1 => a.driver.set_status(0),
            _ => drop(a),
        }
        b.poll();
        assert_eq!(b.next().unwrap().1, b"x", "{how}: what was sent is there");
        assert_eq!(b.next_op(), Some(operation::RST), "{how}");
        assert_eq!(b.open(), 0);
    }
}

#[test]
fn who_refuses_is_heard() {
    let mut pair = Pair::new();
    let [a, b] = &mut pair.guests;
    // The guest itself.
    let key = Ends { guest_port: 1, cid: 4, port: 80, kind: Kind::Stream };
    a.say(key, operation::REQUEST);
    let theirs = b.hear_request();
    b.say(theirs, operation::RST);
    a.poll();
    assert_eq!(a.next_op(), Some(operation::RST));
    // Nobody there, and nobody that can be.
    for cid in [0, 1, 3, 5, u32::MAX] {
        a.say(Ends { cid, ..key }, operation::REQUEST);
        assert_eq!(a.next_op(), Some(operation::RST), "{cid}");
    }
    // One that never answers.
    a.say(key, operation::REQUEST);
    let _ = b.hear_request();
    pair.clock.advance(2_000_000_000);
    a.poll();
    assert_eq!(a.next_op(), Some(operation::RST));
    b.poll();
    assert_eq!(b.next_op(), Some(operation::RST));
    assert_eq!((a.open(), b.open()), (0, 0));
    // One whose driver is gone.
    b.driver.set_status(0);
    a.say(key, operation::REQUEST);
    pair.clock.advance(2_000_000_000);
    a.poll();
    assert_eq!(a.next_op(), Some(operation::RST));
}

#[test]
fn both_gates_are_asked() {
    for refused in ["connect", "accept"] {
        let gatekeeper = Gatekeeper::new(move |request: &Request| {
            if request.action().to_string() == refused { Err(Refusal::new("not so")) } else { Ok(()) }
        });
        let mut pair = Pair::with(gatekeeper);
        let [a, b] = &mut pair.guests;
        a.say(Ends { guest_port: 1, cid: 4, port: 80, kind: Kind::Stream }, operation::REQUEST);
        b.no_more();
        a.poll();
        assert_eq!(a.next_op(), Some(operation::RST), "{refused}");
        assert_eq!((a.open(), b.open(), pair.gatekeeper.open_channels().len()), (0, 0, 0));
    }
}

#[test]
fn either_grant_ends_it_on_both_sides() {
    for which in 0..2 {
        let mut pair = Pair::new();
        let keys = pair.connect(Kind::Stream);
        let id = pair.gatekeeper.open_channels()[which].id;
        assert!(pair.gatekeeper.revoke(id));
        for (guest, key) in pair.guests.iter_mut().zip(keys) {
            guest.send(key, b"too late");
            assert_eq!(guest.next_op(), Some(operation::RST), "{which}");
            guest.no_more();
            assert_eq!(guest.open(), 0);
        }
        assert_eq!(pair.gatekeeper.open_channels(), []);
    }
}

#[test]
fn an_identifier_is_one_device_s_and_free_after_it() {
    let (switch, gatekeeper) = (Switch::new(), Gatekeeper::new(AllowAll));
    let seat = switch.join(3, reachable(&gatekeeper, 3)).unwrap();
    let error = switch.join(3, reachable(&gatekeeper, 3)).unwrap_err();
    assert!(matches!(error, VsockError::Taken { cid: 3 }), "{error}");
    drop(seat);
    let seat = switch.join(3, reachable(&gatekeeper, 3)).unwrap();
    assert!(matches!(switch.join(2, reachable(&gatekeeper, 2)).unwrap_err(), VsockError::Cid { cid: 2 }));
    // The right to be there can be taken back.
    let mut other = Guest::new(
        Vsock::builder(4, || 0)
            .gatekeeper(vm(4), gatekeeper.clone())
            .switch(switch.join(4, reachable(&gatekeeper, 4)).unwrap())
            .build()
            .unwrap(),
    );
    gatekeeper.revoke_all(|request| request.asker() == &vm(3));
    other.say(Ends { guest_port: 1, cid: 3, port: 80, kind: Kind::Stream }, operation::REQUEST);
    assert_eq!(other.next_op(), Some(operation::RST));
    drop(seat);
}

/// Another device that does not keep to what records are: its guest hears of none of it.
#[test]
fn bits_of_records_that_mean_nothing_are_not_told() {
    use super::super::fabric::{Delivery, Dial, Fabric as _};

    let pair = Pair::new();
    let seat = pair.switch.join(5, reachable(&pair.gatekeeper, 5)).unwrap();
    seat.attend(true);
    let wanted = Arc::new(());
    let kind = Kind::SeqPacket;
    let dial = Dial { tag: 1, cid: 3, port: 80, from_port: 9, kind, wanted: Arc::downgrade(&wanted) };
    assert!(seat.dial(dial));
    let Some(Delivery::Dialed { socket: Some(socket), .. }) = seat.next() else { panic!("no socket") };
    let [mut guest, _] = pair.guests;
    guest.accept();
    rustix::net::send(&socket, b"\x1fdata", rustix::net::SendFlags::NOSIGNAL).unwrap();
    guest.poll();
    let (header, data) = guest.next().unwrap();
    assert_eq!((header.op, header.flags, &data[..]), (operation::RW, 3, &b"data"[..]));
}

/// It connects to others as any, and others to it as to nobody, though its own gate would let them.
#[test]
fn who_is_there_to_connect_alone_is_not_reached() {
    let (switch, gatekeeper) = (Switch::new(), Gatekeeper::new(AllowAll));
    let guest = |cid, seat| {
        Guest::new(
            Vsock::builder(cid, || 0).gatekeeper(vm(cid), gatekeeper.clone()).switch(seat).build().unwrap(),
        )
    };
    let mut one = guest(3, switch.join_to_connect(3, vm(3)).unwrap());
    let mut two = guest(4, switch.join(4, reachable(&gatekeeper, 4)).unwrap());
    two.say(Ends { guest_port: 1, cid: 3, port: 80, kind: Kind::Stream }, operation::REQUEST);
    assert_eq!(two.next_op(), Some(operation::RST));
    one.poll();
    one.no_more();
    one.say(Ends { guest_port: 1, cid: 4, port: 80, kind: Kind::Stream }, operation::REQUEST);
    assert_eq!(two.accept(), Ends { guest_port: 80, cid: 3, port: 1, kind: Kind::Stream });
    one.poll();
    assert_eq!(one.next_op(), Some(operation::RESPONSE));
    assert!(matches!(switch.join_to_connect(4, vm(4)).unwrap_err(), VsockError::Taken { cid: 4 }));
}
