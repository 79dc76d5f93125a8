use super::*;

/// A device with four places and a driver that has said nothing yet.
fn multi() -> (Guest, Ports) {
    let (console, ports) = Console::multiport(4).unwrap();
    let mut guest = Guest::new(console);
    guest.start(SIZE | MULTIPORT);
    (guest, ports)
}

fn channel(name: &str) -> (PortConfig, OutputRecorder, Events) {
    let (output, events) = (OutputRecorder::default(), Events::default());
    (PortConfig::channel(name, output.clone()).events(events.clone()), output, events)
}

/// A port that the driver knows, and serves.
fn known(guest: &mut Guest, ports: &Ports, id: u32, config: PortConfig) -> Port {
    let port = ports.add(id, config).unwrap();
    guest.listen(8);
    guest.say(0, message::DEVICE_READY, 1);
    guest.say(id, message::PORT_READY, 1);
    guest.heard();
    port
}

fn plain(id: u32, event: u16, value: u16) -> (u32, u16, u16, Vec<u8>) {
    (id, event, value, Vec::new())
}

#[test]
fn queues_and_configuration_are_those_of_so_many_ports() {
    for ports in 1..=MAX_PORTS {
        let (console, _) = Console::multiport(ports).unwrap();
        let guest = Guest::new(console);
        assert_eq!(guest.driver.device_features() & 7, 7);
        let queues = (0..100).filter(|index| guest.driver.queue_max_size(*index) == QUEUE_SIZE).count();
        assert_eq!(queues, usize::try_from(2 * ports + 2).unwrap());
        let mut config = [0; 8];
        guest.driver.read_config(4, &mut config[..4]);
        assert_eq!(u32::from_le_bytes(config[..4].try_into().unwrap()), ports);
    }
    for ports in [0, MAX_PORTS + 1, u32::MAX] {
        assert_eq!(Console::multiport(ports).unwrap_err(), ConsoleError::Ports { ports });
    }
}

#[test]
fn a_driver_is_told_of_ports_in_the_order_that_linux_expects() {
    let (mut guest, ports) = multi();
    let (config, ..) = channel("agent");
    ports.add(2, config).unwrap();
    ports.add(0, PortConfig::console(std::io::sink()).name("login").size(80, 25)).unwrap();
    guest.listen(12);
    assert!(guest.heard().is_empty(), "the driver is not ready");
    guest.say(u32::MAX, message::DEVICE_READY, 1);
    assert_eq!(guest.heard(), [plain(0, message::PORT_ADD, 0), plain(2, message::PORT_ADD, 0)]);
    guest.say(0, message::PORT_READY, 1);
    assert_eq!(
        guest.heard(),
        [
            plain(0, message::CONSOLE_PORT, 1),
            (0, message::RESIZE, 0, vec![80, 0, 25, 0]),
            (0, message::PORT_NAME, 1, b"login".to_vec()),
            plain(0, message::PORT_OPEN, 1),
        ]
    );
    guest.say(2, message::PORT_READY, 1);
    assert_eq!(
        guest.heard(),
        [(2, message::PORT_NAME, 1, b"agent".to_vec()), plain(2, message::PORT_OPEN, 1)]
    );
    // 5.3.6.2.1: a port that exists is not added.
    guest.say(0, message::DEVICE_READY, 1);
    assert!(guest.heard().is_empty());
}

#[test]
fn input_waits_until_the_guest_opens_the_port() {
    let (mut guest, ports) = multi();
    let (config, _, events) = channel("agent");
    let port = known(&mut guest, &ports, 1, config);
    guest.give(4, 64);
    assert_eq!(port.enqueue(b"hello"), 5);
    guest.driver.notify(4);
    assert_eq!(guest.taken(4), None);
    guest.say(1, message::PORT_OPEN, 1);
    assert_eq!(guest.taken(4).unwrap(), b"hello");
    assert!(port.is_guest_open());
    guest.say(1, message::PORT_OPEN, 1);
    guest.say(1, message::PORT_OPEN, 0);
    guest.give(4, 64);
    port.enqueue(b"for the next");
    assert_eq!(guest.taken(4), None);
    guest.say(1, message::PORT_OPEN, 1);
    assert_eq!(guest.taken(4).unwrap(), b"for the next");
    guest.driver.set_status(0);
    assert_eq!(events.take(), ["GuestOpened", "GuestClosed", "GuestOpened", "GuestClosed"]);
    assert!(!port.is_guest_open());
}

/// However often and in whatever order: the guest learns the last state, and that there was another one between.
#[test]
fn the_host_opens_and_closes_in_any_order() {
    let (mut guest, ports) = multi();
    let (config, output, _) = channel("agent");
    let port = known(&mut guest, &ports, 1, config);
    let open = |value| plain(1, message::PORT_OPEN, value);
    port.open();
    assert!(guest.heard().is_empty(), "it was open");
    port.close();
    port.close();
    assert_eq!(guest.heard(), [open(0)]);
    assert!(guest.send(5, b"lost"));
    assert!(output.take().is_empty());
    port.open();
    assert_eq!(guest.heard(), [open(1)]);
    // No buffer for a while.
    while guest.queues[2].used_index().unwrap() != guest.queues[2].submitted() {
        port.close();
        port.open();
        guest.heard();
    }
    guest.heard();
    for _ in 0..1000 {
        port.close();
        port.open();
    }
    port.close();
    guest.listen(8);
    assert_eq!(guest.heard().last(), Some(&open(0)));
    while guest.queues[2].used_index().unwrap() != guest.queues[2].submitted() {
        port.open();
        port.close();
        guest.heard();
    }
    for _ in 0..1000 {
        port.open();
        port.close();
    }
    guest.listen(8);
    let heard = guest.heard();
    assert!(heard == [open(1), open(0)] || heard == [open(0), open(1), open(0)], "{heard:?}");
}

#[test]
fn ports_come_and_go() {
    let (mut guest, ports) = multi();
    let (config, output, events) = channel("first");
    let first = known(&mut guest, &ports, 3, config);
    guest.say(3, message::PORT_OPEN, 1);
    output.block(true);
    assert!(!guest.send(9, b"held"));
    first.enqueue(b"never");
    let (config, ..) = channel("second");
    assert_eq!(ports.add(3, config).unwrap_err(), ConsoleError::Taken { id: 3 });
    ports.remove(3).unwrap();
    assert_eq!(guest.heard(), [plain(3, message::PORT_REMOVE, 0)]);
    assert!(guest.queues[9].take_used().unwrap().is_some(), "what was in flight is given back");
    assert_eq!((first.enqueue(b"x"), first.room(), first.is_guest_open()), (0, 0, false));
    assert_eq!((first.counters().output_discarded, first.counters().input_discarded), (4, 5));
    assert!(guest.send(9, b"nobody"));
    assert_eq!(ports.counters().output_discarded, 6);
    assert_eq!(ports.remove(3).unwrap_err(), ConsoleError::Empty { id: 3 });
    assert_eq!(ports.remove(4).unwrap_err(), ConsoleError::NoSuchPort { id: 4, ports: 4 });
    // What is said of the old one means nothing.
    let ignored = ports.counters().ignored;
    guest.say(3, message::PORT_OPEN, 1);
    guest.say(3, message::PORT_READY, 1);
    assert_eq!(ports.counters().ignored, ignored + 2);
    let (config, output, _) = channel("second");
    let second = ports.add(3, config).unwrap();
    assert_eq!(guest.heard(), [plain(3, message::PORT_ADD, 0)]);
    // An old handle does nothing to the new one.
    first.close();
    first.resize(1, 1);
    first.resume();
    assert!(second.is_open());
    guest.say(3, message::PORT_READY, 1);
    assert_eq!(guest.heard().len(), 2);
    guest.say(3, message::PORT_OPEN, 1);
    assert!(guest.send(9, b"text"));
    assert_eq!(output.take(), b"text");
    assert_eq!(events.take(), ["GuestOpened"]);
}

/// The writer of a port that was removed is gone, though somebody keeps the handle, and so is one that comes later.
#[test]
fn a_port_that_is_removed_drops_its_writer() {
    struct Counted(#[expect(dead_code, reason = "counted by being there")] Arc<()>);
    impl std::io::Write for Counted {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            Ok(data.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let (mut guest, ports) = multi();
    let writers = Arc::new(());
    let port = known(&mut guest, &ports, 1, PortConfig::channel("c", Counted(Arc::clone(&writers))));
    port.replace_output(Counted(Arc::clone(&writers)));
    assert_eq!(Arc::strong_count(&writers), 2);
    ports.remove(1).unwrap();
    assert_eq!(Arc::strong_count(&writers), 1);
    port.replace_output(Counted(Arc::clone(&writers)));
    assert_eq!(Arc::strong_count(&writers), 1);
}

/// Linux resets the device when it is suspended, and goes on with the ports that it knows: without DEVICE_READY.
#[test]
fn a_driver_goes_on_after_a_suspension() {
    let (mut guest, ports) = multi();
    let (config, output, events) = channel("agent");
    let port = known(&mut guest, &ports, 1, config);
    guest.say(1, message::PORT_OPEN, 1);
    guest.start(MULTIPORT);
    guest.listen(8);
    guest.say(1, message::PORT_READY, 1);
    guest.say(1, message::PORT_OPEN, 1);
    guest.say(2, message::PORT_READY, 1);
    assert_eq!(ports.counters().ignored, 1, "one that there is not");
    assert_eq!(
        guest.heard(),
        [(1, message::PORT_NAME, 1, b"agent".to_vec()), plain(1, message::PORT_OPEN, 1)]
    );
    guest.give(4, 8);
    port.enqueue(b"in");
    assert_eq!(guest.taken(4).unwrap(), b"in");
    assert!(guest.send(5, b"out"));
    assert_eq!(output.take(), b"out");
    assert_eq!(events.take(), ["GuestOpened", "GuestClosed", "GuestOpened"]);
    port.close();
    ports.remove(1).unwrap();
    let (config, ..) = channel("new");
    ports.add(1, config).unwrap();
    assert_eq!(guest.heard(), [plain(1, message::PORT_OPEN, 0), plain(1, message::PORT_REMOVE, 0)]);
    // It hears of new ones once it asks.
    guest.say(0, message::DEVICE_READY, 1);
    assert_eq!(guest.heard(), [plain(1, message::PORT_ADD, 0)]);
}

/// The guest hears of a removal, and then of the new port, though it gave no buffer between.
#[test]
fn a_port_is_replaced_while_the_guest_does_not_listen() {
    let (mut guest, ports) = multi();
    let (config, ..) = channel("first");
    ports.add(1, config).unwrap();
    guest.say(0, message::DEVICE_READY, 1);
    guest.listen(1);
    assert_eq!(guest.heard(), [plain(1, message::PORT_ADD, 0)]);
    for round in 0..1000 {
        ports.remove(1).unwrap();
        let (config, ..) = channel(&format!("{round}"));
        ports.add(1, config).unwrap();
    }
    guest.listen(8);
    assert_eq!(guest.heard(), [plain(1, message::PORT_REMOVE, 0), plain(1, message::PORT_ADD, 0)]);
    guest.say(1, message::PORT_READY, 1);
    assert_eq!(guest.heard()[0].3, b"999");
    // One that the guest never heard of needs no farewell.
    let (config, ..) = channel("short");
    ports.add(2, config).unwrap();
    let heard = guest.heard();
    assert_eq!(heard, [plain(2, message::PORT_ADD, 0)]);
    guest.driver.set_status(0);
    ports.remove(2).unwrap();
    guest.start(MULTIPORT);
    guest.listen(8);
    guest.say(0, message::DEVICE_READY, 1);
    assert_eq!(guest.heard(), [plain(1, message::PORT_ADD, 0)]);
}

/// Linux would not look.
#[test]
fn a_driver_is_told_that_there_is_a_size() {
    let told = |features, size: Option<(u16, u16)>| {
        let port = PortConfig::console(std::io::sink());
        let port = match size {
            Some((columns, rows)) => port.size(columns, rows),
            None => port,
        };
        let mut guest = Guest::new(Console::new(port).unwrap().0);
        guest.start(features);
        (guest.line.is_asserted(), guest.driver.interrupt_status())
    };
    assert_eq!(told(SIZE, Some((80, 25))), (true, 2));
    assert_eq!(told(SIZE, None), (false, 0));
    assert_eq!(told(0, Some((80, 25))), (false, 0));
}

#[test]
fn sizes_change_at_run_time() {
    let (mut guest, port, ..) = single(|port| port.size(80, 25));
    guest.driver.acknowledge(2);
    let size = |guest: &Guest| {
        let mut size = [0; 4];
        guest.driver.read_config(0, &mut size);
        size
    };
    assert_eq!(size(&guest), [80, 0, 25, 0]);
    let generation = guest.driver.config_generation();
    port.resize(80, 25);
    assert_eq!((guest.driver.config_generation(), guest.line.is_asserted()), (generation, false));
    port.resize(300, 2);
    assert_eq!(size(&guest), [44, 1, 2, 0]);
    assert_ne!(guest.driver.config_generation(), generation);
    assert_eq!((guest.line.is_asserted(), guest.driver.interrupt_status()), (true, 2));
    // It stays over a reset, and without a driver nobody is interrupted.
    guest.driver.set_status(0);
    port.resize(1, 1);
    assert!(!guest.line.is_asserted());
    guest.start(SIZE);
    assert_eq!(size(&guest), [1, 0, 1, 0]);
}

#[test]
fn with_multiport_every_console_is_told_its_size() {
    let (mut guest, ports) = multi();
    let zero = known(&mut guest, &ports, 0, PortConfig::console(std::io::sink()));
    let one = known(&mut guest, &ports, 1, PortConfig::console(std::io::sink()));
    let (config, ..) = channel("agent");
    let agent = known(&mut guest, &ports, 2, config);
    let generation = guest.driver.config_generation();
    one.resize(132, 43);
    assert_eq!(guest.heard(), [(1, message::RESIZE, 0, vec![132, 0, 43, 0])]);
    assert_eq!(guest.driver.config_generation(), generation, "the configuration is port 0's");
    agent.resize(1, 1);
    assert!(guest.heard().is_empty(), "it is no terminal");
    zero.resize(100, 30);
    assert_eq!(guest.heard(), [(0, message::RESIZE, 0, vec![100, 0, 30, 0])]);
    assert_ne!(guest.driver.config_generation(), generation);
}

#[test]
fn older_versions_of_linux_have_rows_first() {
    let (console, ports) = Console::multiport(1).unwrap();
    let mut guest = Guest::new(console.resize_order(ResizeOrder::RowsFirst));
    guest.start(SIZE | MULTIPORT);
    known(&mut guest, &ports, 0, PortConfig::console(std::io::sink())).resize(80, 25);
    assert_eq!(guest.heard(), [(0, message::RESIZE, 0, vec![25, 0, 80, 0])]);
}

/// A driver that knows nothing of ports has the first as a console.
#[test]
fn a_driver_without_multiport_has_port_0() {
    let (console, ports) = Console::multiport(4).unwrap();
    let screen = OutputRecorder::default();
    let port = ports.add(0, PortConfig::console(screen.clone())).unwrap();
    let mut guest = Guest::new(console);
    guest.start(SIZE);
    port.enqueue(b"in");
    guest.give(0, 8);
    guest.driver.notify(0);
    assert_eq!(guest.taken(0).unwrap(), b"in");
    assert!(guest.send(1, b"out"));
    assert_eq!(screen.take(), b"out");
    // Replaced, without a word to anybody.
    ports.remove(0).unwrap();
    guest.give(0, 8);
    let port = ports.add(0, PortConfig::console(screen.clone())).unwrap();
    assert!(port.is_guest_open());
    port.enqueue(b"more");
    guest.driver.notify(0);
    assert_eq!(guest.taken(0).unwrap(), b"more");
}

#[test]
fn queues_that_are_missing() {
    let (console, _) = Console::multiport(2).unwrap();
    let guest = Guest::new(console);
    let queue = |index: u64| DriverQueue::new(guest.memory.clone(), 0x1000 * (index + 1), LEN).unwrap();
    let queues: Vec<_> = (0..6).map(queue).collect();
    for missing in 0..6 {
        let given: Vec<_> = (0..).zip(&queues).filter(|(index, _)| *index != missing).collect();
        let started = guest.driver.start(MULTIPORT, &given);
        assert_eq!(started.is_ok(), missing >= 4, "queue {missing}: {started:?}");
    }
    // Without multiport only the first two count.
    let two: Vec<_> = (0..).zip(&queues[..2]).collect();
    guest.driver.start(0, &two).unwrap();
    guest.driver.start(0, &two[..1]).unwrap_err();
    guest.driver.start(0, &two).unwrap();
}

#[test]
fn ports_that_cannot_be() {
    let (_, ports) = Console::multiport(2).unwrap();
    let console = || PortConfig::console(std::io::sink());
    for (name, len) in [(String::new(), 0), ("a\0b".into(), 3), ("n".repeat(513), 513)] {
        assert_eq!(ports.add(1, console().name(name)).unwrap_err(), ConsoleError::Name { id: 1, len });
    }
    for capacity in [0, (16 << 20) + 1, usize::MAX] {
        let error = Console::new(console().input_capacity(capacity)).unwrap_err();
        assert_eq!(error, ConsoleError::Capacity { id: 0, capacity });
    }
    assert_eq!(ports.add(2, console()).unwrap_err(), ConsoleError::NoSuchPort { id: 2, ports: 2 });
    ports.add(1, console().name("n".repeat(512))).unwrap();
}

/// Short messages, ports and events that there are not, values that mean nothing.
#[test]
fn hostile_messages_are_ignored_and_counted() {
    let (mut guest, ports) = multi();
    let (config, _, events) = channel("agent");
    known(&mut guest, &ports, 1, config);
    let mut ignored = ports.counters().ignored;
    for bytes in [&[][..], &[1], &[1, 0, 0, 0, 6, 0, 1]] {
        assert!(guest.send(CONTROL_TX, bytes));
        ignored += 1;
    }
    for id in [0, 2, 3, 4, 31, 0xffff, 0x1_0001, u32::MAX] {
        for event in [message::PORT_READY, message::PORT_OPEN] {
            guest.say(id, event, 1);
            ignored += 1;
        }
    }
    for event in [1, 2, 4, 5, 7, 8, 0x106, 0xffff] {
        guest.say(1, event, 1);
        ignored += 1;
    }
    for (event, value) in [(message::DEVICE_READY, 2), (message::PORT_READY, 0x101), (message::PORT_OPEN, 2)]
    {
        guest.say(1, event, value);
        ignored += 1;
    }
    // Not in RAM, and to be written rather than read.
    guest.queues[3].chain().readable(0x4000_0000, 8).submit().unwrap();
    guest.queues[3].chain().writable(IN, 8).submit().unwrap();
    guest.driver.notify(3);
    ignored += 2;
    assert_eq!(ports.counters().ignored, ignored);
    assert!(guest.heard().is_empty() && events.take().is_empty() && guest.works());
    // One in pieces, with more behind, is one.
    guest.memory.memory().write_slice(&message::of(1, message::PORT_OPEN, 1), GuestAddress(OUT)).unwrap();
    guest.queues[3].chain().readable(OUT, 3).readable(OUT + 3, 4).readable(OUT + 7, 99).submit().unwrap();
    guest.driver.notify(3);
    assert_eq!(events.take(), ["GuestOpened"]);
}

#[test]
fn a_port_that_the_guest_cannot_add() {
    let (mut guest, ports) = multi();
    let (config, _, events) = channel("agent");
    let port = ports.add(1, config).unwrap();
    guest.listen(8);
    guest.say(0, message::DEVICE_READY, 1);
    guest.say(1, message::PORT_READY, 0);
    assert_eq!(events.take(), ["GuestRefused"]);
    port.close();
    assert_eq!(guest.heard().len(), 1, "PORT_ADD and nothing else");
    // A device that it cannot use.
    guest.say(0, message::DEVICE_READY, 0);
    let (config, ..) = channel("more");
    ports.add(2, config).unwrap();
    assert!(guest.heard().is_empty());
}

/// A message that does not fit is not cut; what comes after it is told.
#[test]
fn small_buffers_get_small_messages() {
    let (mut guest, ports) = multi();
    ports.add(1, PortConfig::console(std::io::sink()).name("name").size(1, 2)).unwrap();
    guest.say(0, message::DEVICE_READY, 1);
    guest.give(2, 7);
    guest.give(2, 8);
    guest.driver.notify(2);
    assert_eq!(guest.taken(2).unwrap(), b"");
    assert_eq!(guest.heard(), [plain(1, message::PORT_ADD, 0)]);
    guest.say(1, message::PORT_READY, 1);
    for _ in 0..4 {
        guest.give(2, 8);
    }
    guest.driver.notify(2);
    assert_eq!(guest.heard(), [plain(1, message::CONSOLE_PORT, 1), plain(1, message::PORT_OPEN, 1)]);
    assert_eq!(ports.counters().undeliverable, 2);
    assert!(guest.works());
}

/// A control buffer that is not in RAM loses its message, and no other.
#[test]
fn control_buffers_that_are_not_in_ram() {
    let (mut guest, ports) = multi();
    let (config, ..) = channel("agent");
    ports.add(1, config).unwrap();
    guest.say(0, message::DEVICE_READY, 1);
    guest.queues[2].chain().writable(END - 5, 64).submit().unwrap();
    guest.driver.notify(2);
    assert_eq!(guest.queues[2].take_used().unwrap().unwrap().1, 5);
    assert_eq!(ports.counters().undeliverable, 1);
    guest.say(1, message::PORT_READY, 1);
    guest.listen(4);
    assert_eq!(guest.heard().len(), 2);
}
