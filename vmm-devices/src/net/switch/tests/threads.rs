//! Many senders, a receiver that sleeps, and ports that go while frames are on their way.

use std::sync::atomic::AtomicBool;
use std::sync::mpsc;
use std::thread;

use super::*;

struct Bell(mpsc::Sender<()>);

impl NetEvents for Bell {
    fn ready(&self, _: u16) {
        // Whoever has seen everything listens no more.
        let (Ok(()) | Err(_)) = self.0.send(());
    }

    fn link_changed(&self) {}
}

/// Each sender's frames arrive in their order, whole, and none twice.
#[test]
fn frames_of_several_senders_keep_their_order() {
    const FRAMES: u32 = 4000;
    let lan = Lan::new();
    let backend = lan.try_attach(PortConfig::new("b").mac(mac(2))).unwrap();
    let (bell, rung) = mpsc::channel();
    let agreed = Agreed { receive: Offloads::ALL, ..Agreed::new(1) };
    let mut port = backend.attach(&agreed, Arc::new(Bell(bell))).unwrap().remove(0);
    let done = AtomicBool::new(false);
    let mut senders: Vec<_> = [3, 4].map(|number| (number, lan.plain(&format!("s{number}")))).into();
    let done = &done;
    let got = thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            let mut buffer = vec![0; MAX_FRAME];
            let mut next = [0; 8];
            let mut got = 0_u64;
            loop {
                let received = port.receive(&[VolatileSlice::from(&mut buffer[..])]).unwrap();
                let Some(Received { len, .. }) = received else {
                    if done.load(Ordering::SeqCst) && rung.try_recv().is_err() {
                        return got;
                    }
                    let (Ok(()) | Err(_)) = rung.recv_timeout(std::time::Duration::from_millis(50));
                    continue;
                };
                let from = usize::from(buffer[11]);
                let number = u32::from_le_bytes(buffer[14..18].try_into().unwrap());
                assert!(number >= next[from], "{number} after {}", next[from]);
                next[from] = number + 1;
                assert!(buffer[18..len].iter().all(|byte| *byte == buffer[14]), "a torn frame");
                got += 1;
            }
        });
        let threads: Vec<_> = senders
            .iter_mut()
            .map(|(number, device)| {
                scope.spawn(move || {
                    for count in 0..FRAMES {
                        let bytes = count.to_le_bytes();
                        let text = vec![bytes[0]; usize::try_from(count % 9).unwrap() * 1000];
                        device.send(&frame_of(
                            mac(2),
                            mac(*number),
                            &[&[0x88, 0xb5], &bytes[..], &text].concat(),
                        ));
                    }
                })
            })
            .collect();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
        done.store(true, Ordering::SeqCst);
        receiver.join().unwrap()
    });
    let metrics = lan.port("b").metrics;
    assert_eq!(got, metrics.to_device.frames);
    assert_eq!(got + metrics.dropped(DropReason::QueueFull), u64::from(2 * FRAMES));
    assert!(got > 100, "{got}");
}

/// When a revocation has returned, nothing of the port is delivered any more, and nothing to it, however busy it was.
#[test]
fn a_revocation_waits_for_what_is_on_its_way() {
    for round in 0..200 {
        let lan = Lan::new();
        let [mut a, mut b] = ["a", "b"].map(|name| lan.plain(name));
        let (of_a, of_b) = (lan.port("a").port.grant, lan.port("b").port.grant);
        thread::scope(|scope| {
            let sender = scope.spawn(|| {
                let mut bytes = frame(2, 1, &"x".repeat(5000));
                let slices = [VolatileSlice::from(&mut bytes[..])];
                while a.ports[0].transmit(&PacketInfo::default(), &slices).is_ok() {}
            });
            let revoked = if round % 2 == 0 { of_a } else { of_b };
            while lan.port("b").metrics.to_device.frames < round {
                thread::yield_now();
            }
            let before = round % 2 == 1;
            lan.gatekeeper.revoke(revoked);
            if before {
                assert_eq!(b.receive(), None);
                lan.gatekeeper.revoke(of_a);
            } else {
                b.received();
                thread::yield_now();
                assert_eq!(b.receive(), None, "a frame after the revocation");
            }
            sender.join().unwrap();
        });
        assert!(lan.switch.ports().len() <= 1);
    }
}
