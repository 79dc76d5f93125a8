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
