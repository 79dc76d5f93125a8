//! BAR 0, rings, and interrupts by message and by pin.

use super::*;
use crate::ManualClock;
use crate::virtio::rate::Rate;

fn pair() -> (Machine, Machine) {
    let hub = Hub::new(region("pair"), 4).unwrap();
    (Machine::ready(join(&hub)), Machine::ready(join(&hub)))
}

#[test]
fn it_is_what_drivers_look_for() {
    let (machine, _other) = pair();
    let header = machine.header();
    assert_eq!(header[..4], [0xf4, 0x1a, 0x10, 0x11]);
    assert_eq!((header[8], &header[9..12]), (1, &[0, 0, 5][..]), "revision 1, memory");
    assert_eq!(header[0x2c..0x30], [0xf4, 0x1a, 0, 0x11]);
    assert_eq!(header[0x18] & 0xf, 0b1100, "64 bits, prefetchable");
    assert_eq!(header[0x3d], 1, "INTA#");
    for (bar, size) in [(0, 0x100), (1, 0x1000), (2, SIZE)] {
        assert_eq!(lock(&machine.function).config_space().bar(bar).unwrap().size(), size);
    }
}

#[test]
fn memory_alone_has_neither_vectors_nor_position() {
    let region = region("plain");
    let (map, _) = rights(&Gatekeeper::new(AllowAll), "plain", Access::ReadWrite);
    let machine = Machine::ready(region.attach(map).unwrap());
    assert!(lock(&machine.function).config_space().bar(1).is_none());
    let header = machine.header();
    assert_eq!((header[0x34], header[0x3d], machine.register(2)), (0, 0, 0));
    machine.ring(0, 0);
    assert_eq!((machine.figures().no_right, machine.register(1)), (1, 0));
}

#[test]
fn rings_are_messages_of_the_vector() {
    let (a, b) = pair();
    assert_eq!((a.register(2), b.register(2)), (0, 1), "positions");
    a.ring(1, 0);
    a.ring(1, 3);
    b.ring(0, 2);
    assert_eq!((a.heard(), b.heard()), (vec![2], vec![0, 3]));
    a.ring(0, 1);
    assert_eq!((a.heard(), b.heard()), (vec![1], vec![]), "oneself");
    assert_eq!((a.figures().rung, a.figures().received), (3, 2));
}

#[test]
fn who_is_not_there_is_counted() {
    let (a, b) = pair();
    for (peer, vector) in [(2, 0), (0xffff, 0xffff), (1, 4), (1, 0xffff)] {
        a.ring(peer, vector);
    }
    assert_eq!((a.figures().no_peer, a.figures().no_vector, a.figures().rung), (2, 2, 0));
    drop(b);
    a.ring(1, 0);
    assert_eq!(a.figures().no_peer, 3, "who has left");
}

#[test]
fn a_vector_that_is_masked_waits() {
    let (a, b) = pair();
    b.set_vector(1, true);
    a.ring(1, 1);
    a.ring(1, 1);
    assert_eq!((b.heard(), u64::from_le_bytes(b.read(1, 0x800))), (vec![], 0b10));
    b.set_vector(1, false);
    assert_eq!((b.heard(), u64::from_le_bytes(b.read(1, 0x800))), (vec![1], 0));
}

#[test]
fn without_messages_there_is_status_and_pin() {
    let (a, b) = pair();
    b.enable_msix(false);
    b.line.take();
    a.ring(1, 3);
    assert_eq!((b.heard(), b.line.take()), (vec![], vec![]), "a driver for revision 1 sees nothing");
    b.set_register(0, 1);
    assert_eq!(b.line.take(), [true]);
    assert_eq!((b.register(1), b.register(1)), (1, 0), "cleared by the load");
    assert_eq!(b.line.take(), [false]);
    a.ring(1, 0);
    assert_eq!(b.line.take(), [true]);
    b.enable_msix(true);
    assert_eq!(b.line.take(), [false], "the pin is none while there are messages");
    a.ring(1, 2);
    assert_eq!(b.heard(), [2]);
    b.enable_msix(false);
    b.set_register(1, 0);
    b.line.take();
    b.set_register(1, 1);
    assert_eq!(b.line.take(), [true], "a driver may set it");
    b.bridge.reset();
    assert_eq!((b.line.take(), b.register(0)), (vec![false], u32::MAX), "decoding is off");
    b.configure(COMMAND, &DECODE.to_le_bytes());
    assert_eq!((b.register(0), b.register(1)), (0, 0));
}

#[test]
fn narrow_stores_are_none_and_any_load_is_one() {
    let (a, b) = pair();
    a.write(0, 12, &[0, 0]);
    a.write(0, 14, &[1, 0]);
    a.write(0, 13, &[0; 4]);
    a.write(0, 12, &[0, 0, 1, 0, 9]);
    assert_eq!((a.figures().malformed, b.heard()), (4, vec![]));
    a.write(0, 8, &[7, 7, 7, 7, 0, 0, 1, 0]);
    assert_eq!((b.heard(), a.register(2)), (vec![0], 0), "both registers");
    b.set_register(0, 0x1234_5678);
    assert_eq!((b.read(0, 1), b.read(0, 2)), ([0x56], [0x34, 0x12]));
    assert_eq!(b.read(0, 6), [0, 0, 1, 0, 0, 0], "Status, then the position");
    for offset in (16..0x100).step_by(4) {
        b.write(0, offset, &[0xff; 4]);
        assert_eq!(b.read(0, offset), [0; 4], "{offset:#x}");
    }
}

#[test]
fn rings_beyond_the_rate_wait_and_none_is_lost() {
    let hub = Hub::new(region("rate"), 2).unwrap();
    let (clock, woken) = (Arc::new(ManualClock::new(0)), Recorder::<bool>::default());
    let tells = woken.clone();
    let limited = Machine::with(join(&hub), |builder| {
        let rate = Rate::new(1000, 2).unwrap();
        builder.ring_rate(rate, clock.clone(), move |deadline| tells.record(deadline == 1_000_000))
    });
    limited.start();
    let peer = Machine::ready(join(&hub));
    for _ in 0..2 {
        limited.ring(1, 0);
    }
    for _ in 0..1000 {
        limited.ring(1, 0);
        limited.ring(1, 1);
    }
    assert_eq!(peer.heard(), [0, 0]);
    assert_eq!(woken.take(), [true], "told once");
    assert_eq!(limited.figures().held, 2000);
    let pacer = lock(&limited.function).pacer().unwrap();
    pacer.service();
    assert_eq!((peer.heard(), pacer.next_deadline()), (vec![], Some(1_000_000)));
    clock.advance(1_000_000);
    pacer.service();
    assert_eq!((peer.heard(), pacer.next_deadline()), (vec![0], Some(2_000_000)));
    clock.advance(1_000_000);
    pacer.service();
    assert_eq!((peer.heard(), pacer.next_deadline()), (vec![1], None));
    limited.ring(7, 0);
    assert_eq!(limited.figures().no_peer, 1, "nobody is kept that is not there");
}

#[test]
fn a_saved_device_goes_on() {
    let (a, b) = pair();
    b.set_vector(2, true);
    a.ring(1, 2);
    b.set_register(0, 1);
    let bars = [b.bar(0), b.bar(2)];
    let state = lock(&b.function).state();
    let hub = Hub::new(region("restored"), 4).unwrap();
    let (map, ring) = rights(&Gatekeeper::new(AllowAll), "restored", Access::ReadWrite);
    let restored = Machine::new(hub.join_at(1, map, Some(ring)).unwrap());
    lock(&restored.function).restore(&state).unwrap();
    restored.bridge.restore(&b.bridge.state()).unwrap();
    assert_eq!([restored.bar(0), restored.bar(2)], bars);
    assert_eq!(lock(&restored.function).mapped_at(), Some(bars[1]), "the guest sees the memory again");
    assert_eq!(lock(&restored.function).state(), state);
    restored.set_vector(2, false);
    assert_eq!(restored.heard(), [2], "what was pending");

    let mut elsewhere = state.clone();
    elsewhere.position = 3;
    let mut plain = state.clone();
    plain.msix = None;
    let mut vectors = state.clone();
    vectors.msix.as_mut().unwrap().entries.pop();
    for wrong in [elsewhere, plain, vectors] {
        let before = lock(&restored.function).state();
        lock(&restored.function).restore(&wrong).unwrap_err();
        assert_eq!(lock(&restored.function).state(), before, "nothing has changed");
    }
}
