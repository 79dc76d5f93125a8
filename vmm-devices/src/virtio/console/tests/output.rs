use std::io::{self, Write};
use std::sync::mpsc;

use super::*;

#[test]
fn output_arrives_and_is_flushed_once() {
    let (mut guest, port, screen, _) = single(|port| port);
    assert_eq!(screen.take_flushes(), 0);
    guest.put(1, b"ab");
    guest.put(1, b"cd");
    assert_eq!(screen.take_calls(), 0, "nothing happens before the doorbell");
    guest.driver.notify(1);
    // Both lie in the same place.
    assert_eq!((screen.take(), screen.take_flushes()), (b"cdcd".to_vec(), 1));
    assert_eq!((guest.line.is_asserted(), guest.driver.interrupt_status()), (true, 1));
    guest.driver.notify(1);
    assert_eq!(screen.take_flushes(), 0, "nothing new");
    let counters = PortCounters { output: 4, ..PortCounters::default() };
    assert_eq!(port.counters(), counters);
}

#[test]
fn a_writer_may_take_a_part_and_be_interrupted() {
    let (mut guest, _, screen, _) = single(|port| port);
    let text: Vec<u8> = (0..=255).cycle().take(10_000).collect();
    screen.answer([Ok(1), Err(io::ErrorKind::Interrupted), Ok(4000), Ok(95), Ok(1)]);
    assert!(guest.send(1, &text));
    assert_eq!(screen.take(), text);
}

/// Nothing is lost, and nobody spins: the writer is asked once for each reason to.
#[test]
fn output_waits_for_a_writer_that_is_full() {
    let (mut guest, port, screen, events) = single(|port| port);
    events.take();
    screen.answer([Ok(3)]);
    screen.block(false);
    screen.answer([Err(io::ErrorKind::WouldBlock)]);
    assert!(!guest.send(1, b"0123456789"));
    assert_eq!((screen.take(), screen.take_calls(), screen.take_flushes()), (b"012".to_vec(), 2, 0));
    screen.block(true);
    port.resume();
    port.enqueue(b"not the same queue");
    assert!(screen.take_calls() <= 2);
    assert_eq!(guest.queues[1].take_used().unwrap(), None);
    screen.block(false);
    port.resume();
    assert_eq!(screen.take(), b"3456789");
    assert!(guest.queues[1].take_used().unwrap().is_some());
    assert_eq!(guest.queues[1].used_flags().unwrap(), 0, "the device wants to hear of the next");
    assert_eq!((port.counters().output, port.counters().output_discarded), (10, 0));
    assert!(events.take().is_empty());
}

#[test]
fn a_port_may_rather_discard_than_wait() {
    let (mut guest, port, screen, _) = single(|port| port.when_full(WhenFull::Discard));
    screen.answer([Ok(3), Err(io::ErrorKind::WouldBlock)]);
    assert!(guest.send(1, b"0123456789"));
    assert!(guest.send(1, b"next"));
    assert_eq!(screen.take(), b"012next");
    assert_eq!((port.counters().output, port.counters().output_discarded), (7, 7));
}

#[test]
fn a_writer_that_fails_is_asked_no_more() {
    for (answer, word) in
        [(Err(io::ErrorKind::BrokenPipe), "OutputFailed(BrokenPipe)"), (Ok(0), "OutputFailed(WriteZero)")]
    {
        let (mut guest, port, screen, events) = single(|port| port);
        events.take();
        screen.answer([Ok(4), answer]);
        assert!(guest.send(1, b"0123456789"), "the guest does not wait for it");
        assert!(guest.send(1, b"abc"));
        assert_eq!(events.take(), [word], "once");
        assert_eq!((screen.take(), screen.take_calls()), (b"0123".to_vec(), 2));
        assert_eq!((port.counters().output, port.counters().output_discarded), (4, 9));
        let new = OutputRecorder::default();
        port.replace_output(new.clone());
        assert!(guest.send(1, b"def"));
        assert_eq!(new.take(), b"def");
    }
}

/// A monitor that reconnects in time loses nothing.
#[test]
fn a_writer_put_in_at_once_goes_on() {
    let (first, second) = (OutputRecorder::default(), OutputRecorder::default());
    let handle = Arc::new(Mutex::new(None::<Port>));
    let (spare, theirs) = (second.clone(), Arc::clone(&handle));
    let events = move |event: PortEvent<'_>| {
        if let (PortEvent::OutputFailed(_), Some(port)) = (event, &*theirs.lock().unwrap()) {
            port.replace_output(spare.clone());
        }
    };
    let (console, port) = Console::new(PortConfig::console(first.clone()).events(events)).unwrap();
    *handle.lock().unwrap() = Some(port.clone());
    let mut guest = Guest::new(console);
    guest.start(0);
    first.answer([Ok(2), Err(io::ErrorKind::BrokenPipe)]);
    assert!(guest.send(1, b"0123456789"));
    assert_eq!((first.take(), second.take()), (b"01".to_vec(), b"23456789".to_vec()));
    assert_eq!(port.counters().output_discarded, 0);
}

#[test]
fn a_closed_port_discards_and_says_how_much() {
    let (mut guest, port, screen, _) = single(|port| port.closed());
    assert!(guest.send(1, b"0123"));
    port.open();
    screen.answer([Err(io::ErrorKind::WouldBlock)]);
    assert!(!guest.send(1, b"45"));
    port.close();
    assert!(guest.queues[1].take_used().unwrap().is_some(), "what waited for the writer waits no more");
    assert!(screen.take().is_empty());
    assert_eq!(port.counters().output_discarded, 6);
}

/// In flight when the guest resets the device: its memory is not read any more.
#[test]
fn a_reset_gives_up_what_waits_for_the_writer() {
    let (mut guest, port, screen, events) = single(|port| port);
    let before = guest.queues[1].used_index().unwrap();
    screen.answer([Ok(2), Err(io::ErrorKind::WouldBlock)]);
    assert!(!guest.send(1, &[7; 5000]));
    guest.driver.set_status(0);
    port.resume();
    assert_eq!((screen.take(), screen.take_calls()), (vec![7; 2], 2));
    assert_eq!(guest.queues[1].used_index().unwrap(), before, "nothing is used behind the driver's back");
    assert_eq!(port.counters().output_discarded, 4998);
    assert_eq!(events.take(), ["GuestOpened", "GuestClosed"]);
    guest.start(0);
    assert!(guest.send(1, b"anew"));
    assert_eq!(screen.take(), b"anew");
}

/// What is in RAM of a broken buffer is output, the rest is counted.
#[test]
fn buffers_that_are_not_in_ram() {
    let (mut guest, port, screen, _) = single(|port| port);
    let memory = guest.memory.memory();
    memory.write_slice(b"ends", GuestAddress(END - 4)).unwrap();
    drop(memory);
    let queue = &mut guest.queues[1];
    queue.chain().readable(END - 4, 100).readable(OUT, 10).submit().unwrap();
    queue.chain().readable(u64::MAX - 1, 10).submit().unwrap();
    queue.chain().writable(IN, 10).submit().unwrap();
    queue.chain().readable(OUT, 0).submit().unwrap();
    guest.driver.notify(1);
    for _ in 0..4 {
        assert_eq!(guest.queues[1].take_used().unwrap().unwrap().1, 0);
    }
    assert_eq!(screen.take(), b"ends");
    assert_eq!(port.counters().output_discarded, 96 + 10 + 10);
    assert!(guest.works());
}

#[test]
fn emergency_writes_need_no_driver() {
    let screen = OutputRecorder::default();
    let (console, port) = Console::new(PortConfig::console(screen.clone())).unwrap();
    let guest = Guest::new(console);
    assert_eq!(guest.driver.device_features() & 7, 5, "F_SIZE and F_EMERG_WRITE");
    guest.driver.write_config(8, &u32::from_le_bytes(*b"Oxxx").to_le_bytes());
    guest.driver.write_config(8, b"o");
    assert_eq!((screen.take(), screen.take_calls(), screen.take_flushes()), (b"Oo".to_vec(), 2, 2));
    // Not where anything else is, and nothing is there to be read.
    for (offset, len) in [(0, 4), (4, 4), (4, 8), (7, 4), (9, 4), (12, 4), (0xff, 1)] {
        guest.driver.write_config(offset, &b"abcdefgh"[..len]);
    }
    assert_eq!(screen.take_calls(), 0);
    let mut word = [7; 4];
    guest.driver.read_config(8, &mut word);
    assert_eq!(word, [0; 4]);
    // It waits for nobody.
    screen.block(true);
    guest.driver.write_config(8, b"x");
    screen.block(false);
    port.close();
    guest.driver.write_config(8, b"x");
    assert_eq!((screen.take_calls(), port.counters().output_discarded), (1, 2));
    port.open();
    screen.answer([Err(io::ErrorKind::Interrupted), Ok(1), Err(io::ErrorKind::BrokenPipe)]);
    guest.driver.write_config(8, b"1");
    guest.driver.write_config(8, b"2");
    guest.driver.write_config(8, b"3");
    assert_eq!((screen.take(), port.counters().output_discarded), (b"1".to_vec(), 4));
}

/// Blocks until it is let go, as a pipe does that nobody reads.
struct Blocking {
    entered: mpsc::Sender<()>,
    leave: mpsc::Receiver<()>,
}

impl Write for Blocking {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.entered.send(()).unwrap();
        self.leave.recv().unwrap();
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// While one queue's worker is in its writer, others can be served, and the handle works.
#[test]
fn a_writer_that_blocks_holds_its_own_queue_only() {
    let (entered, has_entered) = mpsc::channel();
    let (leave, may_leave) = mpsc::channel();
    let (console, ports) = Console::multiport(2).unwrap();
    let slow = ports.add(0, PortConfig::console(Blocking { entered, leave: may_leave })).unwrap();
    let screen = OutputRecorder::default();
    ports.add(1, PortConfig::channel("fast", screen.clone())).unwrap();
    let memory = guest_memory(1 << 20).unwrap();
    let link = Arc::new(crate::testkit::LinkRecorder::default());
    let mut queues: Vec<_> =
        (0..6).map(|index| DriverQueue::new(memory.clone(), 0x1000 * (index + 1), LEN).unwrap()).collect();
    let device_side = |(index, queue): (u16, &DriverQueue<Memory>)| {
        let queue = queue.device_side().unwrap();
        Some(
            crate::virtio::Virtqueue::new(queue, index, memory.clone(), Arc::clone(&link) as Arc<_>).unwrap(),
        )
    };
    let activation = Activation {
        features: MULTIPORT,
        queues: (0..).zip(&queues).map(device_side).collect(),
        link: link.clone(),
        doorbells: Arc::new(crate::virtio::Doorbells::new(6)),
    };
    let mut device = console;
    let mut workers = device.activate(activation).unwrap();
    let at = |workers: &mut Vec<Box<dyn Worker>>, queue| {
        let index = workers.iter().position(|worker| worker.queues() == [queue]).unwrap();
        workers.remove(index)
    };
    let (mut slow_tx, mut fast_tx, mut slow_rx) =
        (at(&mut workers, 1), at(&mut workers, 5), at(&mut workers, 0));
    memory.memory().write_slice(b"text", GuestAddress(0x8000)).unwrap();
    for queue in [1, 5] {
        queues[queue].chain().readable(0x8000, 4).submit().unwrap();
    }
    std::thread::scope(|scope| {
        let worker = scope.spawn(move || {
            let (Ok(_) | Err(_)) = slow_tx.process();
        });
        has_entered.recv().unwrap();
        assert_eq!(fast_tx.process().unwrap(), crate::virtio::Progress::Idle);
        assert_eq!(screen.take(), b"text");
        assert_eq!(slow.enqueue(b"input"), 5);
        slow.resize(80, 25);
        slow.close();
        slow.open();
        slow.resume();
        assert_eq!(slow_rx.process().unwrap(), crate::virtio::Progress::Idle);
        assert_eq!(queues[1].take_used().unwrap(), None);
        leave.send(()).unwrap();
        worker.join().unwrap();
    });
    assert!(queues[1].take_used().unwrap().is_some());
    assert!(link.failures().is_empty());
}

#[test]
fn buffers_are_counted_with_their_latency() {
    let (screen, clock) = (OutputRecorder::default(), Arc::new(crate::ManualClock::new(100)));
    let metrics = Arc::new(crate::virtio::metrics::DeviceMetrics::default());
    let (console, port) = Console::new(PortConfig::console(screen.clone())).unwrap();
    let mut guest = Guest::new(console.metrics(Arc::clone(&metrics) as Arc<_>, Arc::clone(&clock)));
    guest.start(0);
    assert!(guest.send(1, b"0123"));
    screen.answer([Ok(1), Err(io::ErrorKind::WouldBlock)]);
    assert!(!guest.send(1, b"456"));
    clock.advance(7000);
    port.close();
    port.open();
    port.enqueue(b"input");
    guest.give(0, 3);
    guest.driver.notify(0);
    let counted = metrics.snapshot();
    assert_eq!((counted.write.requests, counted.write.bytes, counted.write.errors), (2, 5, 1));
    assert_eq!((counted.read.requests, counted.read.bytes, counted.read.errors), (1, 3, 0));
    assert_eq!((counted.other.requests, counted.latency_total_ns), (0, 7000));
}
