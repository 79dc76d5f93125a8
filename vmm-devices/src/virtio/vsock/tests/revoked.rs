//! Grants that are taken back while the guest runs.

use std::os::unix::net::UnixListener;

use super::*;
use crate::channel::{Refusal, Request};

#[test]
fn a_revoked_connection_is_cut_on_both_sides() {
    let mut hosted = Hosted::new();
    let service = UnixListener::bind(hosted.service(52)).unwrap();
    let keys = [to_host(1, 52), to_host(2, 52)];
    let mut streams = Vec::new();
    for key in keys {
        hosted.guest.connect(key);
        streams.push(service.accept().unwrap().0);
    }
    let first = hosted.gatekeeper.open_channels()[0].id;
    assert!(hosted.gatekeeper.revoke(first));
    // Before the guest does anything.
    assert_eq!(taken(&mut streams[0]), None);
    hosted.guest.send(keys[0], b"too late");
    let (header, _) = hosted.guest.next().unwrap();
    assert_eq!((header.op, header.dst_port), (operation::RST, 1));
    hosted.guest.send(keys[1], b"on");
    assert_eq!(taken(&mut streams[1]).unwrap(), b"on");
    assert_eq!((hosted.guest.open(), hosted.gatekeeper.open_channels().len()), (1, 1));
}

/// A thousand of them, at once, with a guest that gives no buffer meanwhile; each hears of it once.
#[test]
fn a_thousand_are_cut_at_once() {
    const COUNT: u32 = 1000;
    let allowed = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let rule = Arc::clone(&allowed);
    let gatekeeper = Gatekeeper::new(move |request: &Request| {
        let odd = request.object().port().is_some_and(|port| port % 2 == 1);
        if odd || rule.load(std::sync::atomic::Ordering::SeqCst) {
            Ok(())
        } else {
            Err(Refusal::new("odd ones"))
        }
    });
    let mut hosted = Hosted::built(gatekeeper, |builder| builder);
    let services = [52, 53].map(|port| UnixListener::bind(hosted.service(port)).unwrap());
    let mut streams = Vec::new();
    for guest_port in 0..COUNT {
        let which = guest_port % 2;
        hosted.guest.connect(to_host(guest_port, 52 + which));
        streams.push(services[which as usize].accept().unwrap().0);
    }
    assert_eq!((hosted.guest.open(), hosted.gatekeeper.open_channels().len()), (COUNT, COUNT as usize));
    allowed.store(false, std::sync::atomic::Ordering::SeqCst);
    assert_eq!(hosted.gatekeeper.reconsider().len(), COUNT as usize / 2);
    for (index, stream) in streams.iter_mut().enumerate() {
        assert_eq!(taken(stream).is_none(), index % 2 == 0);
    }
    let mut heard = std::collections::BTreeSet::new();
    while let Some((header, _)) = hosted.guest.next() {
        assert_eq!(header.op, operation::RST);
        assert!(heard.insert(header.dst_port) && header.dst_port % 2 == 0);
    }
    assert_eq!(heard.len(), COUNT as usize / 2);
    assert_eq!(hosted.guest.open(), COUNT / 2);
    assert_eq!(hosted.guest.handle.counters().revoked, u64::from(COUNT / 2));
    // Places are free for others.
    hosted.guest.connect(to_host(5000, 53));
    drop(streams);
    hosted.guest.driver.set_status(0);
    assert_eq!(hosted.gatekeeper.open_channels(), []);
}

#[test]
fn revoking_while_the_device_works_loses_nothing_and_hangs_nowhere() {
    let mut hosted = Hosted::new();
    let service = UnixListener::bind(hosted.service(52)).unwrap();
    let done = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let (keeper, ended) = (hosted.gatekeeper.clone(), Arc::clone(&done));
    let revoking = std::thread::spawn(move || {
        let mut revoked = 0;
        while !ended.load(std::sync::atomic::Ordering::SeqCst) {
            revoked += keeper.revoke_all(|_| true);
            std::thread::yield_now();
        }
        revoked
    });
    hosted.guest.give(32, 4096);
    for guest_port in 0..400 {
        let key = to_host(guest_port, 52);
        hosted.guest.say(key, operation::REQUEST);
        let mut stream = service.accept().unwrap().0;
        hosted.guest.send(key, &[1; 100]);
        let (Ok(_) | Err(_)) = stream.write(&[2; 5000]);
        hosted.guest.say(key, operation::RST);
        while hosted.guest.packet().is_some() {
            hosted.guest.give(1, 4096);
        }
    }
    done.store(true, std::sync::atomic::Ordering::SeqCst);
    let revoked = revoking.join().unwrap();
    hosted.guest.give(8, 4096);
    while hosted.guest.next().is_some() {}
    assert_eq!((hosted.guest.open(), hosted.gatekeeper.open_channels().len()), (0, 0));
    assert!(hosted.guest.handle.counters().revoked <= revoked as u64);
    assert_eq!(hosted.guest.driver.status(), 0xf);
}
