use std::sync::atomic::AtomicUsize;

use super::*;

#[test]
fn input_fills_the_buffers_that_there_are() {
    let (mut guest, port, ..) = single(|port| port);
    guest.give(0, 4);
    guest.driver.notify(0);
    assert_eq!(guest.taken(0), None, "a buffer alone is nothing to give back");
    assert_eq!(port.enqueue(b"0123456"), 7);
    assert_eq!(guest.taken(0).unwrap(), b"0123");
    assert_eq!((guest.line.is_asserted(), guest.driver.interrupt_status()), (true, 1));
    guest.give(0, 100);
    assert_eq!(guest.taken(0), None);
    guest.driver.notify(0);
    assert_eq!(guest.taken(0).unwrap(), b"456");
    assert_eq!(port.counters().input, 7);
}

/// What the driver is asked to ring for is what the device waits for.
#[test]
fn the_driver_rings_for_buffers_only_when_input_waits() {
    let (mut guest, port, ..) = single(|port| port);
    assert_eq!(guest.queues[0].used_flags().unwrap(), 1);
    port.enqueue(b"x");
    assert_eq!(guest.queues[0].used_flags().unwrap(), 0);
    guest.give(0, 1);
    guest.driver.notify(0);
    assert_eq!(guest.queues[0].used_flags().unwrap(), 1);
}

#[test]
fn whoever_has_too_much_is_told_when_there_is_room() {
    let (mut guest, port, _, events) = single(|port| port.input_capacity(8));
    assert_eq!(events.take(), ["GuestOpened"]);
    assert_eq!(port.room(), 8);
    assert_eq!(port.enqueue(b"01234567"), 8);
    assert_eq!((port.enqueue(b""), port.room()), (0, 0));
    guest.give(0, 8);
    guest.driver.notify(0);
    assert!(events.take().is_empty(), "nobody was refused");
    assert_eq!(guest.taken(0).unwrap(), b"01234567");
    assert_eq!(port.enqueue(b"abcdefghij"), 8);
    guest.give(0, 3);
    guest.driver.notify(0);
    assert!(events.take().is_empty(), "3 bytes are not worth the trouble");
    guest.give(0, 1);
    guest.driver.notify(0);
    assert_eq!(events.take(), ["InputRoom"]);
    assert_eq!(port.enqueue(b"ijklmn"), 4);
    assert_eq!(port.discard_input(), 8);
    assert_eq!(events.take(), ["InputRoom"]);
    assert_eq!(port.counters().input_discarded, 8);
}

/// From the event itself, as an event loop without a loop.
#[test]
fn more_can_come_from_the_event() {
    let text: Vec<u8> = (0..200).collect();
    let source = Arc::new(Mutex::new(None::<(Port, Vec<u8>)>));
    let theirs = Arc::clone(&source);
    let feed = move || {
        let mut source = theirs.lock().unwrap();
        if let Some((port, rest)) = source.as_mut() {
            let taken = port.enqueue(rest);
            rest.drain(..taken);
        }
    };
    let again = feed.clone();
    let events = move |event: PortEvent<'_>| {
        if matches!(event, PortEvent::InputRoom) {
            again();
        }
    };
    let config = PortConfig::console(std::io::sink()).input_capacity(16).events(events);
    let (console, port) = Console::new(config).unwrap();
    let mut guest = Guest::new(console);
    guest.start(0);
    *source.lock().unwrap() = Some((port, text.clone()));
    feed();
    let mut received = Vec::new();
    while received.len() < text.len() {
        guest.give(0, 9);
        guest.driver.notify(0);
        while let Some(bytes) = guest.taken(0) {
            assert!(!bytes.is_empty());
            received.extend(bytes);
        }
    }
    assert_eq!(received, text);
}

/// Somebody types while the machine starts, or starts again.
#[test]
fn input_waits_for_a_driver_and_outlives_a_reset() {
    let (console, port) = Console::new(PortConfig::console(std::io::sink())).unwrap();
    let mut guest = Guest::new(console);
    assert_eq!(port.enqueue(b"early "), 6);
    assert!(!port.is_guest_open());
    guest.start(0);
    assert!(port.is_guest_open());
    guest.give(0, 3);
    guest.driver.notify(0);
    assert_eq!(guest.taken(0).unwrap(), b"ear");
    // Buffers of a driver that is gone are not touched.
    guest.give(0, 64);
    guest.driver.set_status(0);
    assert!(!port.is_guest_open());
    assert_eq!(port.enqueue(b"bird"), 4);
    assert_eq!(guest.taken(0), None);
    guest.start(0);
    guest.give(0, 64);
    guest.driver.notify(0);
    assert_eq!(guest.taken(0).unwrap(), b"ly bird");
}

#[test]
fn a_closed_port_takes_nothing_and_delivers_what_it_took() {
    let (mut guest, port, ..) = single(|port| port);
    port.enqueue(b"before");
    port.close();
    assert_eq!((port.is_open(), port.enqueue(b"after")), (false, 0));
    guest.give(0, 64);
    guest.driver.notify(0);
    assert_eq!(guest.taken(0).unwrap(), b"before");
    port.open();
    assert_eq!(port.enqueue(b"again"), 5);
}

/// Buffers that hold nothing are given back with nothing; the input stays for one that does.
#[test]
fn buffers_without_room_cost_no_input() {
    let (mut guest, port, ..) = single(|port| port);
    guest.queues[0].chain().readable(OUT, 16).submit().unwrap();
    guest.queues[0].chain().writable(0x4000_0000, 16).submit().unwrap();
    guest.queues[0].chain().writable(IN, 0).submit().unwrap();
    // 4 bytes before the end of the RAM.
    let last = guest.queues[0].chain().writable(END - 4, 16).submit().unwrap();
    let good = guest.give(0, 16);
    port.enqueue(b"0123456789");
    for _ in 0..3 {
        assert_eq!(guest.queues[0].take_used().unwrap().unwrap().1, 0);
    }
    assert_eq!(guest.queues[0].take_used().unwrap(), Some((last.into(), 4)));
    assert_eq!(guest.queues[0].take_used().unwrap(), Some((good.into(), 6)));
    let mut bytes = [0; 4];
    guest.memory.memory().read_slice(&mut bytes, GuestAddress(END - 4)).unwrap();
    assert_eq!(&bytes, b"0123");
    assert!(guest.works());
}

/// Several threads give input while the guest reads. What each of them gave is there, in its order.
#[test]
fn handles_work_from_any_thread() {
    const EACH: usize = 3000;
    let (mut guest, port, ..) = single(|port| port.input_capacity(64));
    let done = Arc::new(AtomicUsize::new(0));
    let threads: Vec<_> = (0..3_u8)
        .map(|who| {
            let (port, done) = (port.clone(), Arc::clone(&done));
            std::thread::spawn(move || {
                for count in 0..EACH {
                    let byte = who << 6 | u8::try_from(count % 64).unwrap();
                    while port.enqueue(&[byte]) == 0 {
                        std::thread::yield_now();
                    }
                }
                done.fetch_add(1, Ordering::SeqCst);
            })
        })
        .collect();
    let mut received = [const { Vec::new() }; 3];
    while received.iter().map(Vec::len).sum::<usize>() < 3 * EACH {
        guest.give(0, 50);
        guest.driver.notify(0);
        while let Some(bytes) = guest.taken(0) {
            bytes.iter().for_each(|byte| received[usize::from(byte >> 6)].push(byte & 63));
        }
        // At most one buffer is with the device where it has nothing for it.
        while guest.queues[0].used_index().unwrap() != guest.queues[0].submitted() {
            match guest.taken(0) {
                Some(bytes) => {
                    bytes.iter().for_each(|byte| received[usize::from(byte >> 6)].push(byte & 63));
                }
                None if done.load(Ordering::SeqCst) == 3 && port.room() == 64 => break,
                None => std::thread::yield_now(),
            }
        }
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    let expected: Vec<u8> = (0..EACH).map(|count| u8::try_from(count % 64).unwrap()).collect();
    assert!(received.iter().all(|bytes| *bytes == expected));
}
