//! What one takes of what is for all: places, descriptors, and time.

use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use super::*;

/// A guest at a switch.
fn guest(switch: &Switch, cid: u32, with: impl FnOnce(VsockBuilder) -> VsockBuilder) -> Guest {
    let gatekeeper = Gatekeeper::new(AllowAll);
    let seat = switch.join(cid, reachable(&gatekeeper, cid)).unwrap();
    let builder = Vsock::builder(cid, || 0).gatekeeper(vm(cid), gatekeeper).switch(seat);
    Guest::new(with(builder).build().unwrap())
}

fn to_guest(guest_port: u32, cid: u32) -> Ends {
    Ends { guest_port, cid, port: 80, kind: Kind::Stream }
}

/// Calls `to` `calls` times, each with another port. How many of them it took, with `to` accepting all that it hears of.
fn call(from: &mut Guest, to: &mut Guest, calls: u32) -> usize {
    for guest_port in 0..calls {
        from.say(to_guest(guest_port, to.cid), operation::REQUEST);
        to.poll();
        while let Some((header, _)) = to.next() {
            assert_eq!((header.op, header.src_cid), (operation::REQUEST, from.cid.into()));
            to.say(Ends { port: header.src_port, ..to_guest(80, from.cid) }, operation::RESPONSE);
        }
        from.poll();
    }
    std::iter::from_fn(|| from.next_op()).filter(|op| *op == operation::RESPONSE).count()
}

#[test]
fn a_guest_that_calls_leaves_places_for_others() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("v");
    let host = HostSockets::listen(&path, reachable(&Gatekeeper::new(AllowAll), 3)).unwrap();
    let service = UnixListener::bind(directory.path().join("v_52")).unwrap();
    let switch = Switch::new();
    let mut called = guest(&switch, 3, |builder| builder.host(host).connections(16));
    let [mut greedy, mut other, mut third] = [4, 5, 6].map(|cid| guest(&switch, cid, |builder| builder));
    // A quarter for one, a half for all, and some for the host.
    assert_eq!(call(&mut greedy, &mut called, 20), 4);
    assert_eq!(call(&mut other, &mut called, 2), 2);
    assert_eq!(call(&mut third, &mut called, 20), 2);
    let mut clients: Vec<_> = (0..6).map(|_| client(&path, 80)).collect();
    called.poll();
    for _ in 0..4 {
        let key = called.hear_request();
        called.say(key, operation::RESPONSE);
    }
    let heard = clients.iter_mut().filter_map(taken).count();
    assert_eq!(heard, 4);
    // The rest is the guest's own.
    let mut programs = Vec::new();
    for guest_port in 0..4 {
        called.connect(to_host(guest_port, 52));
        programs.push(service.accept().unwrap());
    }
    called.say(to_host(4, 52), operation::REQUEST);
    assert_eq!(called.next_op(), Some(operation::RST));
    // A place that is left is free for its caller again.
    greedy.say(to_guest(0, 3), operation::RST);
    called.poll();
    assert_eq!(called.next_op(), Some(operation::RST));
    assert_eq!(call(&mut greedy, &mut called, 1), 1);
}

/// Descriptors of this process. Other tests open and close theirs meanwhile.
fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn no_more_than(most: usize) {
    let begun = Instant::now();
    while descriptors() > most {
        assert!(begun.elapsed() < Duration::from_secs(20), "{} descriptors of {most}", descriptors());
        std::thread::yield_now();
    }
}

#[test]
fn calls_that_nobody_looks_at_keep_no_descriptors() {
    let switch = Switch::new();
    let without_driver = switch.join(4, reachable(&Gatekeeper::new(AllowAll), 4)).unwrap();
    let [mut caller, mut slow, mut other] = [3, 5, 6].map(|cid| guest(&switch, cid, |builder| builder));
    let before = descriptors();
    for cid in [4, 5] {
        for guest_port in 0..5000 {
            caller.say(to_guest(guest_port, cid), operation::REQUEST);
            caller.say(to_guest(guest_port, cid), operation::RST);
            while caller.next().is_some() {}
        }
        no_more_than(before + 100);
    }
    // Calls that are not given up have some places, and leave some for others.
    for guest_port in 0..500 {
        caller.say(to_guest(guest_port, 5), operation::REQUEST);
        while caller.next().is_some() {}
    }
    no_more_than(before + 100);
    assert!(caller.open() > 0);
    other.say(to_guest(1, 5), operation::REQUEST);
    while let Some((header, _)) = slow.next() {
        if header.src_cid == 6 {
            drop(without_driver);
            return;
        }
    }
    panic!("the other guest's call is not heard");
}

/// With data for more connections than there are turns in a call.
#[cfg(feature = "event-loop")]
#[test]
fn a_loop_sleeps_while_a_rate_holds_hundreds_of_connections() {
    use std::sync::Mutex;

    use crate::channel::VsockConnect;
    use crate::testkit::LineRecorder;
    use crate::virtio::rate::{Limits, Rate, RateLimiter};
    use crate::virtio::{EventLoop, VirtioMmio};

    let gatekeeper = Gatekeeper::new(AllowAll);
    let limits = Limits { bytes: Rate::new(1000, 1000), operations: None };
    let builder = Vsock::builder(3, || 0).gatekeeper(vm(3), gatekeeper.clone());
    let vsock = builder.rate(RateLimiter::new(|| 0, limits)).build().unwrap();
    let (handle, memory) = (vsock.handle(), guest_memory(END).unwrap());
    let mut event_loop = EventLoop::new(|| 0).unwrap();
    let builder = VirtioMmio::builder(vsock, memory.clone(), LineRecorder::default());
    let transport = builder.executor(event_loop.executor()).build().unwrap();
    let driver = MmioDriver::new(Arc::new(Mutex::new(transport)));
    let mut guest = Guest { cid: 3, driver, queues: Vec::new(), handle: handle.clone(), memory };
    guest.start(7);
    let mut rest = || {
        let calls = (0..50).take_while(|_| event_loop.run_once(Some(Duration::ZERO)).unwrap() > 0).count();
        assert!(calls < 20, "it does not sleep");
    };
    let mut streams = Vec::new();
    for _ in 0..300 {
        let asker = Party::Host("m".into());
        let grant = gatekeeper.open(asker, Some(vm(3)), VsockConnect { port: 80 }).unwrap();
        streams.push(UnixStream::from(handle.connect(grant, Kind::Stream).unwrap()));
        guest.give(1, 4096);
        rest();
        let (header, _) = guest.packet().unwrap();
        let key = Ends { guest_port: 80, port: header.src_port, ..to_host(80, 0) };
        guest.say(key, operation::RESPONSE);
        rest();
    }
    guest.give(LEN, 4096);
    rest();
    for stream in &mut streams {
        stream.write_all(&[7; 5000]).unwrap();
    }
    rest();
    let came: usize = std::iter::from_fn(|| guest.packet()).map(|(_, data)| data.len()).sum();
    // What the burst is for, and what is in debt.
    assert_eq!(came, 10_000);
}
