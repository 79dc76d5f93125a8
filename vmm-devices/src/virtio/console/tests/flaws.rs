//! Public flaws of device models that this one could have had.

use super::*;
use crate::testkit::guest_memory_of;

/// Bytes of this process that are in RAM.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024
}

/// Floods in both directions with no reader. 256 MiB are offered; tests beside this one need a little memory too.
#[test]
fn cve_2020_27174_a_flood_with_no_reader_is_not_kept() {
    let (console, ports) = Console::multiport(2).unwrap();
    let screen = OutputRecorder::default();
    let port = ports.add(0, PortConfig::console(screen.clone())).unwrap();
    let mut guest = Guest::new(console);
    guest.start(MULTIPORT);
    screen.block(true);
    let flood = vec![b'x'; 1 << 20];
    let before = resident();
    let mut taken = 0;
    for _ in 0..256 {
        taken += port.enqueue(&flood);
    }
    // Output of 4 GiB - 1 in all, for a writer that is full, rung for again and again.
    for _ in 0..16 {
        guest.queues[1].chain().readable(0, u32::try_from(END).unwrap()).submit().unwrap();
    }
    // And questions, for the answers to which there is never a buffer.
    for _ in 0..20_000 {
        guest.say(0, message::DEVICE_READY, 1);
        guest.say(0, message::PORT_READY, 1);
        guest.driver.notify(1);
        port.resize(1, 1);
        port.close();
        port.open();
    }
    assert_eq!((taken, port.room()), (64 << 10, 0));
    let grown = resident().saturating_sub(before);
    assert!(grown < 64 << 20, "{grown} bytes more");
    // What there was to say is a few messages.
    guest.listen(32);
    guest.say(0, message::PORT_READY, 1);
    assert!(guest.heard().len() <= 8);
}

/// Buffers whose addresses are the device's own registers, the doorbell's among them: they are no RAM, so nothing rings.
#[test]
fn cve_2024_3446_buffers_at_the_device_s_own_registers() {
    const AT: u64 = 0x1000_0000;
    let screen = OutputRecorder::default();
    let (console, port) = Console::new(PortConfig::console(screen.clone())).unwrap();
    let memory = guest_memory(END).unwrap();
    let line = LineRecorder::default();
    let transport = Arc::new(Mutex::new(VirtioMmio::new(console, memory.clone(), line.clone()).unwrap()));
    let bus = crate::MmioBus::new();
    let range = crate::BusRange::new(AT, VirtioMmio::<Memory>::SIZE);
    bus.insert("console", range, Arc::clone(&transport) as Arc<_>).unwrap();
    let driver = MmioDriver::new(transport);
    let mut guest = Guest { memory, line, driver, queues: Vec::new() };
    guest.start(0);
    for offset in (0..0x200).step_by(4) {
        guest.queues[0].chain().writable(AT + offset, 4).submit().unwrap();
        guest.queues[1].chain().readable(AT + offset, 4).submit().unwrap();
        port.enqueue(&[0; 4]);
        guest.driver.notify(0);
        guest.driver.notify(1);
        for queue in 0..2 {
            assert_eq!(guest.queues[queue].take_used().unwrap().unwrap().1, 0);
        }
    }
    assert!(screen.take().is_empty());
    assert_eq!(guest.driver.status(), 0xf);
}

/// And a writer whose output is input again: the worker is entered once, and ends.
#[test]
fn cve_2024_3446_an_echo_does_not_enter_the_device_again() {
    struct Echo(Arc<Mutex<Option<Port>>>);
    impl std::io::Write for Echo {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            let port = self.0.lock().unwrap().clone().unwrap();
            // All that a handle can do that is allowed to a writer.
            port.resume();
            port.resize(3, 4);
            port.close();
            port.open();
            match port.enqueue(data) {
                0 => Err(std::io::ErrorKind::WouldBlock.into()),
                taken => Ok(taken),
            }
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let echo = Arc::new(Mutex::new(None));
    let config = PortConfig::console(Echo(Arc::clone(&echo))).input_capacity(8);
    let (console, port) = Console::new(config).unwrap();
    *echo.lock().unwrap() = Some(port.clone());
    let mut guest = Guest::new(console);
    guest.start(0);
    assert!(!guest.send(1, b"0123456789"));
    assert_eq!(port.room(), 0);
    guest.give(0, 64);
    guest.driver.notify(0);
    port.resume();
    assert_eq!(guest.taken(0).unwrap(), b"01234567");
    guest.give(0, 64);
    guest.driver.notify(0);
    assert_eq!(guest.taken(0).unwrap(), b"89");
}

/// What is said to be written is what was written, to the byte, in every queue.
#[test]
fn cve_2024_8612_the_used_length_is_what_was_written() {
    let (console, ports) = Console::multiport(2).unwrap();
    let mut guest = Guest::new(console);
    guest.start(MULTIPORT);
    let poison = vec![0xee; usize::try_from(END - IN).unwrap()];
    guest.memory.memory().write_slice(&poison, GuestAddress(IN)).unwrap();
    let port = ports.add(0, PortConfig::console(std::io::sink()).name("name")).unwrap();
    guest.listen(8);
    guest.say(0, message::DEVICE_READY, 1);
    guest.say(0, message::PORT_READY, 1);
    guest.say(0, message::PORT_OPEN, 1);
    for len in [1, 7, 4096] {
        guest.give(0, len);
    }
    port.enqueue(&[1; 100]);
    // Buffers of output that the device could write to, and does not.
    guest.memory.memory().write_slice(b"out", GuestAddress(OUT)).unwrap();
    guest.queues[1].chain().readable(OUT, 3).writable(place(1, 0), 64).submit().unwrap();
    guest.driver.notify(1);
    assert_eq!(guest.queues[1].take_used().unwrap().unwrap().1, 0);
    let mut said = 0;
    for queue in [0, 2] {
        while let Some((head, len)) = guest.queues[usize::from(queue)].take_used().unwrap() {
            let mut bytes = [0; 4096];
            let gpa = GuestAddress(place(queue, head.into()));
            guest.memory.memory().read_slice(&mut bytes, gpa).unwrap();
            let written = bytes.iter().position(|byte| *byte == 0xee).unwrap_or(bytes.len());
            assert_eq!(u32::try_from(written).unwrap(), len, "queue {queue}");
            said += written;
        }
    }
    let mut all = poison;
    guest.memory.memory().read_slice(&mut all, GuestAddress(IN)).unwrap();
    assert_eq!(all.iter().filter(|byte| **byte != 0xee).count(), said);
    assert_eq!(said, 100 + 8 * 4 + 4);
}

/// Buffers that lie in two regions, for each direction and for control.
#[test]
fn cve_2019_18960_buffers_across_regions() {
    let screen = OutputRecorder::default();
    let (console, ports) = Console::multiport(1).unwrap();
    let port = ports.add(0, PortConfig::console(screen.clone())).unwrap();
    let memory = guest_memory_of(&[(0, 0x10_0000), (0x10_0000, 0x10_0000), (0x40_0000, 0x1000)]).unwrap();
    let line = LineRecorder::default();
    let transport = VirtioMmio::new(console, memory.clone(), line.clone()).unwrap();
    let driver = MmioDriver::new(Arc::new(Mutex::new(transport)));
    let mut guest = Guest { memory, line, driver, queues: Vec::new() };
    guest.start(MULTIPORT);
    let border = 0x10_0000;
    let read = |guest: &Guest, gpa: u64, len: usize| {
        let mut bytes = vec![0; len];
        guest.memory.memory().read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    };
    let say = |guest: &mut Guest, message: &[u8]| {
        guest.memory.memory().write_slice(message, GuestAddress(border - 5)).unwrap();
        guest.queues[3].chain().readable(border - 5, 8).submit().unwrap();
        guest.driver.notify(3);
    };
    guest.queues[2].chain().writable(border - 3, 8).submit().unwrap();
    say(&mut guest, &message::of(0, message::DEVICE_READY, 1));
    assert_eq!(guest.queues[2].take_used().unwrap().unwrap().1, 8);
    assert_eq!(read(&guest, border - 3, 8), message::of(0, message::PORT_ADD, 0));
    say(&mut guest, &message::of(0, message::PORT_OPEN, 1));
    port.enqueue(b"0123456789");
    guest.queues[0].chain().writable(border - 4, 10).submit().unwrap();
    guest.driver.notify(0);
    assert_eq!(guest.queues[0].take_used().unwrap().unwrap().1, 10);
    assert_eq!(read(&guest, border - 4, 10), b"0123456789");
    // To the end of the second region, behind which there is nothing.
    guest.queues[1].chain().readable(border - 4, 10).readable(0x20_0000 - 2, 4).submit().unwrap();
    guest.driver.notify(1);
    assert_eq!(screen.take(), b"0123456789\0\0");
    assert_eq!(port.counters().output_discarded, 2);
}

/// Every buffer is overfilled, in every state of the port: there is a driver or not, with multiport or not, the guest has it open
/// or not, and so has the host; with buffers of the guest and without; before and after a reset.
#[test]
fn cve_2015_3456_input_is_overfilled_in_every_state() {
    for state in 0..64_u32 {
        let [driver, multiport, guest_open, host_open, buffers, reset] =
            [0, 1, 2, 3, 4, 5].map(|bit| state >> bit & 1 == 1);
        let (console, ports) = Console::multiport(1).unwrap();
        let port = ports.add(0, PortConfig::console(std::io::sink()).input_capacity(100)).unwrap();
        let mut guest = Guest::new(console);
        let fill = |port: &Port| {
            for len in [1, 98, 2, 100, 101, 10_000] {
                let (room, taken) = (port.room(), port.enqueue(&vec![b'x'; len]));
                assert!(room <= 100 && taken <= len.min(room), "state {state:#x}");
                assert!(port.is_open() || taken == 0);
            }
        };
        fill(&port);
        if driver {
            guest.start(if multiport { MULTIPORT } else { 0 });
            if multiport {
                guest.say(0, message::DEVICE_READY, 1);
                guest.listen(8);
                guest.say(0, message::PORT_READY, 1);
                guest.say(0, message::PORT_OPEN, guest_open.into());
            }
        }
        if !host_open {
            port.close();
        }
        for _ in 0..if driver && buffers { 5 } else { 0 } {
            guest.give(0, 30);
            guest.driver.notify(0);
            fill(&port);
        }
        fill(&port);
        if reset {
            guest.driver.set_status(0);
            fill(&port);
            guest.start(0);
            guest.give(0, 64);
            guest.driver.notify(0);
            fill(&port);
        }
        assert!(guest.works());
        assert!(port.room() <= 100);
    }
}
