//! Public flaws of device models, as tests of every virtio device on every transport; `escapes.md` says which flaw is tested where.

// The lint spares test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::cast_possible_truncation)]

// The random test uses the rest.
#[allow(dead_code)]
#[path = "support/virtio.rs"]
mod virtio;

use virtio::{DISK, Guest, HEADER, Kind, LEN, MESSAGE, Outside, RINGS, STATUS, Transport};
use vmm_devices::net::MAX_FRAME;
use vmm_devices::pci::PciLayout;
use vmm_devices::testkit::{
    DriverQueue, FaultyMemory, MemoryRecorder, Racer, TestFrame, guest_memory, guest_memory_of,
};
use vmm_devices::virtio::console::PortConfig;
use vmm_devices::vmm_memory::vm_memory::GuestAddress;

/// Each of these flaws, tried on each device: `block::name`, and so on, for both transports.
macro_rules! tests {
    ($($name:ident),* $(,)?) => {
        tests!(block: Kind::Block, $($name),*);
        tests!(console: Kind::Console, $($name),*);
        tests!(rng: Kind::Rng, $($name),*);
        tests!(balloon: Kind::Balloon, $($name),*);
        tests!(net: Kind::Net, $($name),*);
        tests!(vsock: Kind::Vsock, $($name),*);
    };
    ($device:ident: $kind:expr, $($name:ident),*) => {
        mod $device {
            use super::{Kind, Transport};

            $(#[test]
            fn $name() {
                super::$name($kind, Transport::Mmio);
                super::$name($kind, Transport::Pci);
            })*
        }
    };
}

tests! {
    cve_2021_3929_cve_2024_3446_buffers_tables_and_rings_at_the_registers,
    cve_2015_8550_each_field_is_read_once,
    cve_2015_8550_a_driver_that_races,
    cve_2014_7188_ranges_end_where_they_say,
    cve_2020_27174_a_flood_with_no_reader_is_not_kept,
    cve_2023_5088_nothing_is_touched_after_a_reset,
    cve_2026_45782_a_head_in_flight_is_not_taken_again,
    cve_2024_8612_the_used_length_is_what_was_written,
    cve_2019_18960_data_may_lie_across_regions,
    cve_2023_41051_short_slices_are_not_trusted,
    cve_2026_5747_cve_2020_14364_what_is_refused_changes_nothing,
    cloud_hypervisor_7917_any_queue_can_be_selected,
    crosvm_002cd87a0_every_register_is_swept,
}

const MIB: u64 = 1 << 20;
/// Where data lies, as a rule.
const DATA: u64 = 0x1_0000;

fn guest(kind: Kind, transport: Transport) -> Guest {
    let memory = guest_memory(MIB).unwrap();
    let mut guest = Guest::new(kind, transport, memory.clone(), memory);
    guest.start();
    guest
}

/// Something comes from outside for the driver, if the device is of that kind.
fn come(guest: &Guest) {
    match &guest.outside {
        Outside::Console { port, .. } => {
            port.enqueue(b"input");
        }
        Outside::Net { network, .. } => network.give(TestFrame::new([0x11; 52])),
        _ => {}
    }
}

/// Whether the device looks at the queue: port 1 of the console is not there, and no driver hints at free pages.
fn is_used(kind: Kind, queue: u16) -> bool {
    ![(Kind::Console, 4), (Kind::Balloon, 3)].contains(&(kind, queue))
}

/// What the driver can read of the device without changing anything: registers of MMIO, or the common configuration of PCI for
/// each queue, and the device's own.
fn registers(guest: &Guest) -> Vec<u8> {
    let read = |offset: u64, len: usize| {
        let mut data = vec![0; len];
        guest.mmio.read(GuestAddress(guest.registers.base + offset), &mut data);
        data
    };
    let select = if guest.registers.size == 0x200 { 0x30 } else { 0x16 };
    let mut all = Vec::new();
    for queue in 0..8_u16 {
        let width = if select == 0x30 { 4 } else { 2 };
        let queue = u32::from(queue).to_le_bytes();
        guest.mmio.write(GuestAddress(guest.registers.base + select), &queue[..width]);
        if select == 0x30 {
            // Not the causes of the interrupt, which come with each request.
            all.extend(
                (0..0x100).step_by(4).filter(|offset| *offset != 0x60).flat_map(|offset| read(offset, 4)),
            );
        } else {
            for (offset, len) in [(0x12, 2), (0x14, 1), (0x15, 1), (0x18, 2), (0x1c, 2), (0x1e, 2)] {
                all.extend(read(offset, len));
            }
            all.extend((0x20..0x38).step_by(4).flat_map(|offset| read(offset, 4)));
            // What the driver has accepted.
            for half in 0..2_u32 {
                guest.mmio.write(GuestAddress(guest.registers.base + 8), &half.to_le_bytes());
                all.extend(read(0xc, 4));
            }
        }
    }
    let mut config = [0; 64];
    guest.driver.read_config(0, &mut config);
    all.extend(config);
    all
}

/// CVE-2021-3929, and CVE-2024-3446 as far as it is about buffers: descriptors, tables and rings that lie at the device's own
/// registers, its doorbells among them. Those are no RAM: nothing is read there, nothing rings, and no more is said to be
/// written than was.
fn cve_2021_3929_cve_2024_3446_buffers_tables_and_rings_at_the_registers(kind: Kind, transport: Transport) {
    let mut guest = guest(kind, transport);
    let (base, size) = (guest.registers.base, guest.registers.size);
    let before = registers(&guest);
    let first = guest.doorbell;
    let doorbells = (0..8).map(|queue| first + 4 * queue);
    for at in (base..base + size).step_by((size / 64) as usize).chain(doorbells) {
        for &(queue, write) in guest.requests() {
            come(&guest);
            guest.pass();
            if let Outside::Vsock { monitor } = &mut guest.outside {
                monitor.send(b"input");
            }
            let head = guest.submit(queue, at, write);
            guest.driver.notify(queue);
            if let Outside::Balloon { handle, .. } = &guest.outside {
                handle.request_statistics();
            }
            // Of the disk's two, the one with no data to be written gets its status.
            assert_eq!(
                guest.queues[usize::from(queue)].take_used().unwrap(),
                Some((head.into(), u32::from(write))),
                "{kind:?}, {transport:?}, queue {queue}, {at:#x}"
            );
        }
    }
    guest.assert_outside_untouched();
    if let Outside::Balloon { handle, .. } = &guest.outside {
        assert_eq!(handle.statistics(), None);
    }
    assert!(registers(&guest) == before, "{kind:?}, {transport:?}");
    if kind == Kind::Vsock {
        // With a connection again.
        guest.driver.set_status(0);
        guest.start();
    }
    // Tables: the driver has broken the rules of the queue.
    for queue in (0..guest.queues.len() as u16).filter(|queue| is_used(kind, *queue)) {
        let ring = &mut guest.queues[usize::from(queue)];
        ring.write_descriptor(0, base, 32, 4, 0).unwrap();
        ring.make_available(0).unwrap();
        if let Outside::Console { port, ports, .. } = &guest.outside {
            // What makes it look for a buffer.
            port.enqueue(b"input");
            ports.add(1, PortConfig::console(std::io::sink())).unwrap();
        }
        if let Outside::Vsock { monitor } = &mut guest.outside {
            monitor.send(b"input");
            if queue == 2 {
                monitor.handle.transport_reset();
            }
        }
        guest.driver.notify(queue);
        assert_eq!(guest.driver.status(), 0x4f, "{kind:?}, {transport:?}, queue {queue}");
        if let Outside::Console { ports, .. } = &guest.outside {
            ports.remove(1).unwrap();
        }
        guest.driver.set_status(0);
        guest.start();
    }
    // Rings: the device does not start.
    let failures = guest.failures.lock().unwrap().len();
    for wrong in 0..3 {
        guest.driver.set_status(0);
        guest.driver.set_status(3);
        guest.driver.set_driver_features(1 << 32);
        guest.driver.set_status(0xb);
        let mut rings = guest.queues[0].rings();
        rings[wrong] = base;
        guest.driver.set_queue(0, LEN, rings);
        guest.driver.enable_queue(0);
        guest.driver.set_status(0xf);
        guest.driver.notify(0);
        assert_eq!(guest.driver.status(), 0x4f);
    }
    assert_eq!(guest.failures.lock().unwrap().len(), failures + 3);
    settle(&guest);
    guest.start();
    guest.exchange(DATA);
}

/// CVE-2015-8550: what was checked is what is used, for each field is read once. Every access of the device is written down: of
/// descriptors, of indirect tables, and of all that the driver has put into buffers.
fn cve_2015_8550_each_field_is_read_once(kind: Kind, transport: Transport) {
    for indirect in [false, true] {
        let recorder = MemoryRecorder::new(guest_memory(MIB).unwrap());
        let mut guest = Guest::new(kind, transport, recorder.unrecorded().clone(), recorder.clone());
        guest.start();
        let requests = guest.requests().iter().copied();
        let control = (kind == Kind::Console).then_some((3, false));
        for (queue, write) in requests.chain(control) {
            come(&guest);
            if let Outside::Vsock { monitor } = &mut guest.outside {
                monitor.send(b"input");
            }
            guest.put(DATA, &0x1c_u64.to_le_bytes());
            let ring = &mut guest.queues[usize::from(queue)];
            let descriptors = ring.rings()[0];
            let table = 0x2_0000;
            if indirect && (kind, queue) == (Kind::Block, 0) {
                guest.put(HEADER, &[u64::from(write), 2].map(u64::to_le_bytes).concat());
                let ring = &mut guest.queues[0];
                let chain = ring.chain().readable(HEADER, 16);
                let chain = if write { chain.readable(DATA, 512) } else { chain.writable(DATA, 512) };
                chain.writable(STATUS, 1).submit_indirect(table).unwrap();
            } else if indirect && (kind, queue) == (Kind::Net, 1) {
                guest.put(HEADER, &[0; 12]);
                let chain = guest.queues[1].chain().readable(HEADER, 12);
                chain.readable(DATA, 64).submit_indirect(table).unwrap();
            } else if indirect {
                ring.chain()
                    .readable(DATA, 8)
                    .writable(DATA + 0x1000, 0x1000)
                    .submit_indirect(table)
                    .unwrap();
            } else {
                guest.submit(queue, DATA, write);
            }
            recorder.take();
            guest.driver.notify(queue);
            let head = guest.queues[usize::from(queue)].used_index().unwrap();
            assert!(head > 0 || (kind, queue) == (Kind::Balloon, 2), "{kind:?}, queue {queue}");
            let places = [
                descriptors..descriptors + 16 * u64::from(LEN),
                table..table + 64,
                HEADER..MESSAGE + 8,
                DATA..DATA + 512,
            ];
            for place in places {
                let again = recorder.read_again(place);
                assert_eq!(again, None, "{kind:?}, {transport:?}, queue {queue}, {indirect}");
            }
        }
        assert_eq!(guest.driver.status(), 0xf);
    }
}

/// CVE-2015-8550 again, with another processor of the guest that changes rings, descriptors and data while the device looks at
/// them. Whatever it comes to believe, it stays within what is the guest's, and works again after a reset.
fn cve_2015_8550_a_driver_that_races(kind: Kind, transport: Transport) {
    if transport == Transport::Pci {
        // It has no part in this, and it takes long enough.
        return;
    }
    let mut guest = guest(kind, transport);
    let mut shown = 0;
    // Data alone, which is no reason to give up; then all that there is.
    for structures in [false, true] {
        let rings = (RINGS, RINGS * guest.queues.len() as u64);
        let ranges = [(HEADER, 0x200), (DATA, 0x200), rings];
        let racer = Racer::start(&guest.memory, &ranges[..if structures { 3 } else { 2 }]).unwrap();
        for round in 0..40 {
            racer.wait_for(racer.flips() + 1);
            come(&guest);
            if let Outside::Vsock { monitor } = &mut guest.outside {
                monitor.send(b"input");
            }
            for &(queue, write) in guest.requests() {
                guest.submit(queue, DATA, write);
                guest.driver.notify(queue);
            }
            assert_eq!(guest.driver.status() & !0x40, 0xf);
            assert!(structures || guest.driver.status() == 0xf, "{kind:?}, {transport:?}");
            guest.pass();
            if round % 16 == 0 || guest.driver.status() != 0xf {
                // The driver's own words may be flipped as well.
                guest.queues = (1..)
                    .zip(&guest.queues)
                    .map(|(page, _)| DriverQueue::new(guest.memory.clone(), RINGS * page, LEN).unwrap())
                    .collect();
                let queues: Vec<_> = (0..).zip(&guest.queues).collect();
                let (Ok(()) | Err(_)) = vmm_devices::testkit::Driver::start(
                    &guest.driver,
                    guest.driver.device_features() & !(1 << 29),
                    &queues,
                );
            }
        }
        assert!(racer.stop() >= 40);
        guest.assert_beyond_untouched();
        match &guest.outside {
            Outside::Console { screen, port, .. } => {
                shown += screen.take().len() as u64;
                assert_eq!(port.counters().output, shown);
            }
            Outside::Balloon { ledger, .. } => {
                assert!(ledger.take().iter().all(|(page, pages)| (page + pages) * 4096 <= MIB));
            }
            Outside::Net { network, .. } => {
                assert!(
                    network.take_sent().iter().all(|frame| (14..=MAX_FRAME).contains(&frame.bytes.len()))
                );
            }
            _ => {}
        }
        settle(&guest);
        guest.start();
        guest.exchange(DATA);
        shown += 8;
    }
}

/// CVE-2014-7188: ranges that were a little too wide. Every address around the registers, and with PCI around both ways to
/// configuration space as well, with each size: what lies beyond is all ones, and what is written there changes nothing.
fn cve_2014_7188_ranges_end_where_they_say(kind: Kind, transport: Transport) {
    let guest = guest(kind, transport);
    let mut ranges = vec![guest.registers];
    if transport == Transport::Pci {
        ranges.push(PciLayout::default().ecam_range());
        for port in (0xcf8 - 9..0xcf8).chain(0xd00..0xd00 + 9) {
            for size in [1_u8, 2, 4] {
                let mut data = vec![0; size.into()];
                let inside = |port: u16| (0xcf8..0xd00).contains(&port);
                let whole = (port..port + u16::from(size)).all(inside);
                assert_eq!(guest.pio.read(port, size.into(), &mut data), whole, "{port:#x}, {size}");
                for (port, byte) in (port..).zip(data) {
                    assert!(inside(port) || byte == 0xff, "{port:#x}");
                }
            }
        }
    }
    let before = registers(&guest);
    for range in ranges {
        let end = range.base + range.size;
        for gpa in (range.base - 9..range.base + 1).chain(end - 9..end + 9) {
            for size in 1..=8 {
                let mut data = vec![0; size];
                let inside = |gpa: u64| (range.base..end).contains(&gpa);
                let whole = (gpa..gpa + size as u64).all(inside);
                assert_eq!(guest.mmio.read(GuestAddress(gpa), &mut data), whole, "{gpa:#x}, {size}");
                for (gpa, byte) in (gpa..).zip(data) {
                    assert!(inside(gpa) || byte == 0xff, "{gpa:#x}");
                }
                if !whole && gpa < range.base || gpa >= end {
                    // The last ones of these reach over the edge, by bytes that no register takes.
                    guest.mmio.write(GuestAddress(gpa), &vec![0x55; size]);
                }
            }
        }
    }
    assert!(registers(&guest) == before, "{kind:?}, {transport:?}");
}

/// CVE-2020-27174: what nobody takes is not kept. Requests without end whose answers the driver never looks at, and input for
/// a guest that reads none.
fn cve_2020_27174_a_flood_with_no_reader_is_not_kept(kind: Kind, transport: Transport) {
    let memory = guest_memory(4 * MIB).unwrap();
    let mut guest = Guest::new(kind, transport, memory.clone(), memory);
    guest.start();
    guest.put(DATA, &vec![0x11; 3 << 20]);
    let flood = vec![b'x'; 1 << 18];
    let before = resident();
    for round in 0..400_u32 {
        for queue in 0..guest.queues.len() {
            let mut header = [u64::from(round % 2), 0].map(u64::to_le_bytes).concat();
            if let Outside::Vsock { monitor } = &guest.outside {
                header = monitor.packet(5, 0x1_0000).to_vec();
            }
            guest.put(HEADER, &header);
            let ring = &mut guest.queues[queue];
            let chain = match kind {
                Kind::Block if round % 2 == 1 => {
                    ring.chain().readable(HEADER, 16).readable(DATA, 0x1_0000).writable(STATUS, 1)
                }
                Kind::Block => ring.chain().readable(HEADER, 16).writable(DATA, 0x1_0000).writable(STATUS, 1),
                // The driver has no buffers for what comes in.
                Kind::Console if [0, 2, 4].contains(&queue) => continue,
                Kind::Net if queue == 0 => continue,
                Kind::Net if queue == 1 => {
                    guest.put(HEADER, &[0; 12]);
                    guest.queues[1].chain().readable(HEADER, 12).readable(DATA, 0x1_0000)
                }
                Kind::Net => ring.chain().readable(DATA, 0x4_0000).writable(STATUS, 1),
                Kind::Vsock if queue != 1 => continue,
                Kind::Vsock => ring.chain().readable(HEADER, 44).readable(DATA, 0x1_0000),
                Kind::Balloon if queue == 4 => ring.chain().writable(DATA & !0xfff, 0x10_0000),
                Kind::Balloon => ring.chain().readable(DATA, 0x400),
                Kind::Console => ring.chain().readable(DATA, 0x4_0000),
                Kind::Rng => ring.chain().writable(DATA, 0x1_0000),
            };
            chain.submit().unwrap();
            guest.driver.notify(queue as u16);
        }
        guest.pass();
        match &mut guest.outside {
            Outside::Block { handle, .. } => {
                handle.set_capacity((DISK - 512 * (round as usize % 2)) as u64).unwrap()
            }
            Outside::Console { screen, port, .. } => {
                port.enqueue(&flood);
                port.resize(round as u16, 1);
                screen.take();
            }
            Outside::Rng => {}
            Outside::Vsock { monitor } => monitor.send(&flood),
            Outside::Balloon { ledger, handle } => {
                handle.set_target(round);
                handle.request_statistics();
                ledger.take();
            }
            Outside::Net { network, handle } => {
                network.give(TestFrame::new([0x11; 1514]));
                handle.announce();
                network.take_sent();
            }
        }
    }
    let grown = resident().saturating_sub(before);
    // Tests beside this one need a little as well.
    assert!(grown < 16 << 20, "{kind:?}, {transport:?}: {grown} bytes more");
}

/// Bytes of this process that are in RAM.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap() * 1024
}

/// CVE-2023-5088: a reset with a request in flight, after which the memory is the guest's again. Whatever happens then, nothing
/// of it is read or written, and the request leads to nothing.
fn cve_2023_5088_nothing_is_touched_after_a_reset(kind: Kind, transport: Transport) {
    let recorder = MemoryRecorder::new(guest_memory(MIB).unwrap());
    let mut guest = Guest::new(kind, transport, recorder.unrecorded().clone(), recorder.clone());
    guest.start();
    hold(&mut guest);
    for &(queue, write) in guest.requests() {
        // Made available, and not rung for.
        guest.submit(queue, DATA, write);
    }
    guest.driver.set_status(0);
    recorder.take();
    guest.pass();
    match &mut guest.outside {
        Outside::Block { handle, .. } => handle.set_capacity(512).unwrap(),
        Outside::Console { screen, port, .. } => {
            screen.block(false);
            port.resume();
            port.enqueue(b"input");
            port.close();
            port.open();
            assert_eq!((screen.take(), port.counters().output_discarded), (vec![], 8));
        }
        Outside::Rng => {}
        Outside::Vsock { monitor } => {
            assert_eq!(monitor.take(), []);
            monitor.send(b"input");
            monitor.connect();
            monitor.handle.transport_reset();
        }
        Outside::Balloon { ledger, handle } => {
            assert!(!handle.request_statistics());
            handle.set_target(9);
            assert_eq!(ledger.take(), []);
        }
        Outside::Net { network, handle } => {
            network.give(TestFrame::new([0x11; 60]));
            handle.set_link(false);
            handle.set_link(true);
            assert!(!handle.announce());
        }
    }
    for queue in 0..8 {
        guest.driver.notify(queue);
    }
    registers(&guest);
    guest.driver.write_config(0, &[0xff; 64]);
    assert_eq!(recorder.take(), [], "{kind:?}, {transport:?}");
    guest.assert_outside_untouched();
}

/// Leaves a request in flight that stays there: one that waits for the rate, output that nobody takes, statistics. Queue and
/// head.
fn hold(guest: &mut Guest) -> (u16, u16) {
    guest.put(DATA, &0x1c_u64.to_le_bytes());
    let queue = match &guest.outside {
        Outside::Block { .. } => {
            guest.put(HEADER, &[0; 16]);
            let chain = guest.queues[0].chain().readable(HEADER, 16).writable(0x2_0000, 0x1_0000);
            chain.writable(STATUS, 1).submit().unwrap();
            guest.driver.notify(0);
            0
        }
        Outside::Console { screen, .. } => {
            screen.block(true);
            1
        }
        Outside::Rng => {
            guest.queues[0].chain().writable(0x2_0000, 0x1_0000).submit().unwrap();
            guest.driver.notify(0);
            0
        }
        Outside::Balloon { .. } => 2,
        Outside::Net { network, .. } => {
            guest.put(HEADER, &[0; 12]);
            guest.queues[1].chain().readable(HEADER, 12).readable(0x2_0000, 0x1_0000).submit().unwrap();
            guest.driver.notify(1);
            assert_eq!(network.take_sent().len(), 1);
            1
        }
        Outside::Vsock { monitor } => {
            guest.put(HEADER, &monitor.packet(5, 0x1_0000));
            guest.queues[1].chain().readable(HEADER, 44).readable(0x2_0000, 0x1_0000).submit().unwrap();
            // What pays for it is the one behind the next.
            guest.driver.notify(1);
            guest.submit(1, DATA, true);
            guest.driver.notify(1);
            1
        }
    };
    let head = guest.submit(queue, DATA, true);
    guest.driver.notify(queue);
    let ring = &mut guest.queues[usize::from(queue)];
    while let Some((id, _)) = ring.take_used().unwrap() {
        assert_ne!(id, u32::from(head));
    }
    if let Outside::Vsock { monitor } = &mut guest.outside {
        // What went before it.
        assert_eq!(monitor.take().len(), 0x1_0000 + 8);
    }
    (queue, head)
}

/// CVE-2026-45782: a head that is made available again while its request is in flight. It is refused where the device looks at
/// the next chain meanwhile; where it does not, each ends once, one after the other.
fn cve_2026_45782_a_head_in_flight_is_not_taken_again(kind: Kind, transport: Transport) {
    let mut guest = guest(kind, transport);
    let (queue, head) = hold(&mut guest);
    let ring = &mut guest.queues[usize::from(queue)];
    ring.make_available(head).unwrap();
    guest.driver.notify(queue);
    assert_eq!(ring.take_used().unwrap(), None);
    if kind == Kind::Balloon {
        assert_eq!(guest.driver.status(), 0x4f, "{transport:?}");
        assert!(guest.failures.lock().unwrap()[0].contains("twice"));
        return;
    }
    guest.pass();
    if let Outside::Console { screen, port, .. } = &guest.outside {
        screen.block(false);
        port.resume();
    }
    guest.driver.notify(queue);
    let ring = &mut guest.queues[usize::from(queue)];
    for _ in 0..2 {
        assert_eq!(ring.take_used().unwrap().map(|(id, _)| id), Some(head.into()), "{kind:?}, {transport:?}");
    }
    assert_eq!((ring.take_used().unwrap(), guest.driver.status()), (None, 0xf));
}

/// CVE-2024-8612: the used length is what was written, to the byte, in poisoned buffers that are as large as can be.
fn cve_2024_8612_the_used_length_is_what_was_written(kind: Kind, transport: Transport) {
    const POISON: u8 = 0xee;
    let mut guest = guest(kind, transport);
    for queue in (0..guest.queues.len()).filter(|queue| is_used(kind, *queue as u16)) {
        if let Outside::Console { port, .. } = &guest.outside {
            port.enqueue(&[1; 100]);
            port.resize(queue as u16 + 1, 1);
        } else if queue == 0 {
            come(&guest);
        }
        if let Outside::Vsock { monitor } = &mut guest.outside {
            monitor.send(&[1; 100]);
            if queue == 2 {
                monitor.handle.transport_reset();
            }
        }
        guest.put(DATA, &[POISON; 0x2000]);
        guest.put(HEADER, &[8_u64, 0].map(u64::to_le_bytes).concat());
        guest.put(HEADER + 0x20, &[8_u64, 0].map(u64::to_le_bytes).concat());
        // With something to read in any case: an entropy device and a report do not mind.
        let ring = &mut guest.queues[queue];
        ring.chain().readable(HEADER, 16).writable(DATA, 3).writable(DATA + 3, 0x1000).submit().unwrap();
        guest.driver.notify(queue as u16);
        if let Outside::Balloon { handle, .. } = &guest.outside {
            handle.request_statistics();
        }
        let used = guest.queues[queue].take_used().unwrap();
        let (_, len) = used.unwrap_or_else(|| panic!("{kind:?}: queue {queue} hangs"));
        let bytes = guest.get(DATA, 0x2000);
        let prefix = bytes.iter().position(|byte| *byte == POISON).unwrap_or(bytes.len());
        assert_eq!(len as usize, prefix, "{kind:?}, {transport:?}, queue {queue}");
    }
    assert_eq!(guest.driver.status(), 0xf);
}

/// CVE-2019-18960: data that lies in two regions of memory.
fn cve_2019_18960_data_may_lie_across_regions(kind: Kind, transport: Transport) {
    let memory = guest_memory_of(&[(0, 0x2_0000), (0x2_0000, 0x2_0000)]).unwrap();
    let mut guest = Guest::new(kind, transport, memory.clone(), memory);
    guest.start();
    for at in [0x2_0000 - 3, 0x2_0000 - 63, 0x2_0000 - 7, 0x2_0000 - 511] {
        guest.exchange(at);
    }
}

/// CVE-2023-41051: a memory whose slices are shorter than what was asked for.
fn cve_2023_41051_short_slices_are_not_trusted(kind: Kind, transport: Transport) {
    for piece in [16, 64] {
        let memory = guest_memory(MIB).unwrap();
        let seen = FaultyMemory::new(memory.clone()).in_pieces_of(piece);
        let mut guest = Guest::new(kind, transport, memory, seen);
        guest.start();
        guest.exchange(DATA + 13);
    }
}

/// CVE-2026-5747 and CVE-2020-14364: nothing of a queue, and nothing that was agreed upon, can be changed between DRIVER_OK and
/// reset; what is refused leaves everything as it was.
fn cve_2026_5747_cve_2020_14364_what_is_refused_changes_nothing(kind: Kind, transport: Transport) {
    let mut guest = guest(kind, transport);
    let before = registers(&guest);
    for queue in [0, 1, 2, 4, 7, 0xffff] {
        for (size, rings) in [(0, [0; 3]), (8, [0x2_0000, 0x2_1000, 0x2_2000]), (0x7fff, [u64::MAX; 3])] {
            guest.driver.set_queue(queue, size, rings);
            guest.driver.enable_queue(queue);
        }
    }
    guest.driver.set_driver_features(0);
    guest.driver.set_driver_features(u64::MAX);
    guest.driver.set_status(0x80 | 0x40 | 0x30 | 0xf);
    let mut after = registers(&guest);
    // FAILED is the driver's to set, and says nothing about queues.
    for (after, before) in after.iter_mut().zip(&before) {
        if *after == before | 0x80 {
            *after = *before;
        }
    }
    assert!(after == before, "{kind:?}, {transport:?}");
    // And before it: one that the device does not offer leaves it without FEATURES_OK.
    guest.driver.set_status(0);
    guest.driver.set_status(3);
    guest.driver.set_driver_features(1 << 32 | 1 << 49);
    guest.driver.set_status(0xb);
    assert_eq!(guest.driver.status(), 3);
    guest.start();
    guest.exchange(DATA);
}

/// Cloud Hypervisor #7917: a queue that there is not is selected, and everything of it read and written.
fn cloud_hypervisor_7917_any_queue_can_be_selected(kind: Kind, transport: Transport) {
    let mut guest = guest(kind, transport);
    let count = guest.queues.len() as u16;
    for started in [true, false] {
        if !started {
            guest.driver.set_status(0);
        }
        for queue in [count, count + 1, 0x7f, 0xff, 0x100, 0x7fff, 0x8000, 0xffff] {
            assert_eq!(guest.driver.queue_max_size(queue), 0, "{kind:?}, {transport:?}, {queue}");
            guest.driver.set_queue(queue, 16, [0x1000, 0x2000, 0x3000]);
            guest.driver.enable_queue(queue);
            guest.driver.notify(queue);
            sweep(&guest, false);
        }
    }
    guest.driver.set_status(0);
    settle(&guest);
    guest.start();
    guest.exchange(DATA);
}

/// crosvm 002cd87a0: all that the device answers at, with accesses of each size, in every state.
fn crosvm_002cd87a0_every_register_is_swept(kind: Kind, transport: Transport) {
    let mut guest = guest(kind, transport);
    for started in [true, false] {
        if !started {
            guest.driver.set_status(0);
        }
        sweep(&guest, true);
    }
    guest.driver.set_status(0);
    settle(&guest);
    guest.start();
    guest.exchange(DATA);
}

/// Forgets what came of emergency writes, input that nobody fetched, and frames.
fn settle(guest: &Guest) {
    match &guest.outside {
        Outside::Console { screen, port, .. } => {
            screen.take();
            port.discard_input();
        }
        Outside::Net { network, .. } => drop(network.take_sent()),
        _ => {}
    }
}

/// Reads every register, and writes all but the status and the selector of queues.
fn sweep(guest: &Guest, all_of_them: bool) {
    let mmio = guest.registers.size == 0x200;
    let spared = if mmio { [0x30..0x34, 0x70..0x74] } else { [0x14..0x15, 0x16..0x18] };
    let end = if all_of_them { guest.registers.size } else { 0x100 };
    for size in [1, 2, 4, 8] {
        for offset in 0..end {
            let at = GuestAddress(guest.registers.base + offset);
            guest.mmio.read(at, &mut vec![0; size as usize]);
            if spared.iter().all(|spared| offset >= spared.end || offset + size <= spared.start) {
                guest.mmio.write(at, &vec![0xff; size as usize]);
            }
        }
    }
    for offset in (0..0x200).chain([0xfff, 0x1000, 0xffff, u64::from(u32::MAX), u64::MAX - 8]) {
        let at = offset.min(guest.registers.size);
        let mut data = [0; 16];
        guest.driver.read_config(at, &mut data);
        guest.driver.write_config(at, &data);
    }
}
