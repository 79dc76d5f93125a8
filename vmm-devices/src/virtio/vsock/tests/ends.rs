//! How connections end.

use std::net::Shutdown;
use std::os::unix::net::UnixListener;

use super::*;
use crate::channel::Request;

fn connected(hosted: &mut Hosted) -> (Ends, UnixStream) {
    let service = UnixListener::bind(hosted.service(52)).unwrap();
    let key = to_host(1000, 52);
    hosted.guest.connect(key);
    let stream = service.accept().unwrap().0;
    std::fs::remove_file(hosted.service(52)).unwrap();
    (key, stream)
}

#[test]
fn a_guest_that_sends_no_more_still_reads() {
    let mut hosted = Hosted::new();
    let (key, mut stream) = connected(&mut hosted);
    hosted.guest.send(key, b"the last");
    hosted.guest.shut(key, shutdown::SEND);
    assert_eq!(taken(&mut stream).unwrap(), b"the last");
    assert_eq!(taken(&mut stream), None);
    stream.write_all(b"answer").unwrap();
    assert_eq!(hosted.guest.next().unwrap().1, b"answer");
    drop(stream);
    hosted.guest.poll();
    let (header, _) = hosted.guest.next().unwrap();
    assert_eq!((header.op, header.flags), (operation::SHUTDOWN, shutdown::BOTH));
    hosted.guest.say(key, operation::RST);
    hosted.guest.no_more();
    assert_eq!(hosted.guest.open(), 0);
}

#[test]
fn a_program_that_sends_no_more_still_reads() {
    let mut hosted = Hosted::new();
    let (key, mut stream) = connected(&mut hosted);
    stream.write_all(b"the last").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(hosted.guest.next().unwrap().1, b"the last");
    let (header, _) = hosted.guest.next().unwrap();
    assert_eq!((header.op, header.flags), (operation::SHUTDOWN, shutdown::SEND));
    hosted.guest.send(key, b"answer");
    assert_eq!(taken(&mut stream).unwrap(), b"answer");
    hosted.guest.shut(key, shutdown::BOTH);
    assert_eq!(hosted.guest.next_op(), Some(operation::RST));
    assert_eq!(taken(&mut stream), None);
    assert_eq!(hosted.guest.open(), 0);
}

#[test]
fn a_guest_that_reads_no_more_stops_the_writer() {
    let mut hosted = Hosted::new();
    let (key, mut stream) = connected(&mut hosted);
    hosted.guest.shut(key, shutdown::RECEIVE);
    assert_eq!(stream.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    hosted.guest.send(key, b"still here");
    assert_eq!(taken(&mut stream).unwrap(), b"still here");
}

#[test]
fn a_program_that_is_gone_takes_nothing() {
    let mut hosted = Hosted::new();
    let (key, stream) = connected(&mut hosted);
    drop(stream);
    hosted.guest.send(key, b"lost");
    let mut flags = 0;
    while let Some((header, _)) = hosted.guest.next() {
        assert_eq!(header.op, operation::SHUTDOWN);
        flags |= header.flags;
    }
    assert_eq!(flags, shutdown::BOTH);
    // The guest never confirms.
    hosted.clock.advance(9_999_999_999);
    hosted.guest.no_more();
    assert_eq!(hosted.guest.open(), 1);
    hosted.clock.advance(1);
    hosted.guest.poll();
    assert_eq!(hosted.guest.next_op(), Some(operation::RST));
    assert_eq!((hosted.guest.open(), hosted.guest.handle.counters().discarded), (0, 4));
}

/// What the guest has sent before it closed arrives, though nobody reads for a while.
#[test]
fn what_was_sent_before_the_end_arrives() {
    for orderly in [true, false] {
        let mut hosted = Hosted::new();
        let (key, mut stream) = connected(&mut hosted);
        // More than the socket holds, but credit for all of it.
        let mut sent = 0_usize;
        let mut free = CREDIT as usize;
        let mut received = Vec::new();
        while free > 0 {
            let part = free.min(60_000);
            hosted.guest.send(key, &vec![(sent / 1000) as u8; part]);
            (sent, free) = (sent + part, free - part);
        }
        hosted.guest.give(4, 100);
        while let Some((header, _)) = hosted.guest.packet() {
            free = header.buf_alloc as usize - (sent - header.fwd_cnt as usize);
        }
        while free > 0 {
            let part = free.min(60_000);
            hosted.guest.send(key, &vec![(sent / 1000) as u8; part]);
            (sent, free) = (sent + part, free - part);
        }
        hosted.guest.shut(key, if orderly { shutdown::BOTH } else { shutdown::SEND });
        if !orderly {
            hosted.guest.say(key, operation::RST);
        } else {
            while hosted.guest.next_op() != Some(operation::RST) {}
        }
        // The ports may be another connection's at once.
        hosted.guest.say(key, operation::REQUEST);
        assert_eq!(hosted.guest.next_op(), Some(operation::RST), "nobody listens");
        for _ in 0..40 {
            match taken(&mut stream) {
                Some(bytes) => received.extend(bytes),
                None => break,
            }
            hosted.clock.advance(5_000_000_000);
            hosted.guest.poll();
        }
        assert_eq!(received.len(), sent, "{orderly}");
        assert_eq!((hosted.guest.open(), taken(&mut stream)), (0, None));

        // One that never reads is not waited for without end.
        let (key, stream) = connected(&mut hosted);
        for _ in 0..8 {
            hosted.guest.send(key, &vec![1; 32 << 10]);
        }
        hosted.guest.shut(key, shutdown::BOTH);
        while hosted.guest.next_op() != Some(operation::RST) {}
        hosted.clock.advance(10_000_000_000);
        hosted.guest.poll();
        assert_eq!(hosted.guest.open(), 0);
        drop(stream);
    }
}

#[test]
fn a_reset_of_the_device_ends_all() {
    let mut hosted = Hosted::new();
    let (_, mut stream) = connected(&mut hosted);
    let mut waiting = hosted.client(80);
    let _ = hosted.guest.hear_request();
    hosted.guest.driver.set_status(0);
    assert_eq!((taken(&mut stream), taken(&mut waiting)), (None, None));
    assert_eq!((hosted.guest.open(), hosted.gatekeeper.open_channels().len()), (0, 0));
    // Who comes meanwhile waits for the next driver.
    let _client = hosted.client(81);
    hosted.guest.start(7);
    assert_eq!(hosted.guest.hear_request().guest_port, 81);
}

#[test]
fn a_guest_that_was_restored_is_told() {
    let mut hosted = Hosted::new();
    let (key, mut stream) = connected(&mut hosted);
    hosted.guest.handle.transport_reset();
    assert_eq!((taken(&mut stream), hosted.guest.open()), (None, 0));
    // It hears when it has a buffer, once; new connections are not ended by that.
    let (key, mut stream) = {
        let again = connected(&mut hosted);
        assert_eq!(again.0, key);
        again
    };
    let place = 0x8000;
    hosted.guest.queues[2].chain().writable(place, 16).submit().unwrap();
    hosted.guest.driver.notify(EVENT);
    assert_eq!(hosted.guest.queues[2].take_used().unwrap(), Some((0, 4)));
    assert_eq!(hosted.guest.queues[2].get(place, 4).unwrap(), [0; 4]);
    hosted.guest.queues[2].chain().writable(place, 16).submit().unwrap();
    hosted.guest.driver.notify(EVENT);
    assert_eq!(hosted.guest.queues[2].take_used().unwrap(), None);
    hosted.guest.send(key, b"on");
    assert_eq!(taken(&mut stream).unwrap(), b"on");
}

/// A monitor that says so while the device is at work, after it has looked: the connections end all the same.
#[test]
fn a_reset_that_comes_while_the_device_works_loses_nothing() {
    let handle = Arc::new(std::sync::OnceLock::<VsockHandle>::new());
    let told = Arc::clone(&handle);
    let gatekeeper = Gatekeeper::new(move |request: &Request| {
        if request.object().port() == Some(81) {
            told.get().unwrap().transport_reset();
        }
        Ok(())
    });
    let mut hosted = Hosted::built(gatekeeper, |builder| builder);
    handle.set(hosted.guest.handle.clone()).unwrap();
    let (_, mut stream) = connected(&mut hosted);
    let place = 0x8000;
    hosted.guest.queues[2].chain().writable(place, 16).submit().unwrap();
    let _client = hosted.client(81);
    hosted.guest.poll();
    hosted.guest.poll();
    assert_eq!((taken(&mut stream), hosted.guest.open()), (None, 0));
    assert_eq!(hosted.guest.queues[2].take_used().unwrap(), Some((0, 4)));
}

/// Of what nobody takes any more nothing is left to wait for.
#[test]
fn a_program_that_reads_no_more_is_not_waited_for() {
    let mut hosted = Hosted::new();
    let (key, stream) = connected(&mut hosted);
    stream.shutdown(std::net::Shutdown::Read).unwrap();
    hosted.guest.send(key, b"too late");
    hosted.guest.shut(key, shutdown::SEND);
    hosted.guest.say(key, operation::RST);
    assert_eq!((hosted.guest.open(), hosted.gatekeeper.open_channels().len()), (0, 0));
}
