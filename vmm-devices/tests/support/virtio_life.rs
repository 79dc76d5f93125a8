//! A virtio device between a hostile driver, which reaches for registers between its actions, and a monitor that does its part at every
//! doorbell; and what must hold all the same.

use std::cell::{Cell, RefCell};

use arbitrary::Arbitrary;
use vmm_devices::net::{ETHERNET_HEADER, MAX_FRAME};
use vmm_devices::pci::PciLayout;
use vmm_devices::testkit::{Action, Interposed, MIN_MEMORY, Replayed, TestFrame, guest_memory_of, replay};
use vmm_devices::vmm_memory::vm_memory::GuestAddress;

use crate::virtio::{DISK, Guest, Kind, Outside, Socket, Transport, packet};

const REGIONS: [(u64, u64); 3] = [(0, MIN_MEMORY), (MIN_MEMORY, 0x3000), (2 * MIN_MEMORY, 0x1000)];

/// An access to registers, or, with PCI, to configuration space.
#[derive(Clone, Debug, Arbitrary)]
pub(crate) struct Access {
    pub(crate) config: bool,
    pub(crate) offset: u32,
    pub(crate) size: u8,
    pub(crate) value: Option<u64>,
}

/// What happens until the driver begins anew.
#[derive(Clone, Debug, Arbitrary)]
pub(crate) struct Round {
    pub(crate) accesses: Vec<Access>,
    pub(crate) actions: Vec<Action>,
}

/// Headers of the disk's requests, and messages to the console, for chains at [`Place::Data`]: 16 bytes each.
///
/// Packets of a socket device's driver, of 64 bytes each with what is behind them.
pub(crate) fn words(kind: Kind) -> Vec<u8> {
    if kind == Kind::Vsock {
        let ports = (0..4).map(|port| 1 << 30 | port);
        let packets =
            ports.flat_map(|port| (0..9).map(move |op| packet(port, op, if op == 5 { 16 } else { 0 })));
        return packets.flat_map(|packet| [&packet[..], &[b'd'; 20]].concat()).collect();
    }
    let each: Vec<[u8; 16]> = match kind {
        Kind::Block => [0_u64, 1, 1, 4, 8, 11, 13, 99]
            .into_iter()
            .flat_map(|kind| [0, 2, DISK as u64 / 512 - 1, u64::MAX].map(|sector| (kind, sector)))
            .map(|(kind, sector)| u128::to_le_bytes(u128::from(sector) << 64 | u128::from(kind)))
            .collect(),
        Kind::Net => [
            // Headers of frames: nothing, a checksum, TCP, UDP, and one that points beyond.
            [0; 16],
            [1, 0, 0, 0, 0, 0, 14, 0, 2, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 54, 0, 8, 0, 14, 0, 2, 0, 0, 0, 0, 0, 0, 0],
            [1, 5, 20, 0, 1, 0, 14, 0, 2, 0, 0, 0, 0, 0, 0, 0],
            [1, 0x84, 0xff, 0xff, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0],
            // Commands: what it gets, its address, tables, VLANs, an announcement, offloads.
            [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [0, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [1, 1, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0, 0, 0, 0, 0],
            [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [1, 0, 1, 0, 0, 0, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0],
            [1, 0, 0xff, 0xff, 0xff, 0xff, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0],
            [2, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [4, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [5, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            [5, 0, 0x82, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ]
        .to_vec(),
        _ => [
            (0_u32, 0_u32, 1_u32),
            (0, 3, 1),
            (0, 6, 1),
            (0, 6, 0),
            (1, 3, 1),
            (1, 6, 1),
            (9, 6, 1),
            (0, 0, 0),
        ]
        .into_iter()
        .map(|(id, event, value)| u128::to_le_bytes(u128::from(id) | u128::from(event | value << 16) << 32))
        .collect(),
    };
    each.concat()
}

/// Features that a device of that kind accepts: `features`, and those that others of them need.
pub(crate) fn acceptable(kind: Kind, features: u64) -> u64 {
    // Of a network device's: checksums, TSO over IPv4, and the control queue.
    const NEEDED: u64 = 1 | 1 << 1 | 1 << 7 | 1 << 11 | 1 << 17;
    if kind == Kind::Net { features | NEEDED } else { features }
}

/// What a monitor does, a little of it each time.
fn monitor(guest: &Guest, socket: &RefCell<Option<Socket>>, step: u32) {
    guest.pass();
    if let Some(socket) = &mut *socket.borrow_mut() {
        match step % 7 {
            0 => socket.connect(),
            1 => socket.handle.transport_reset(),
            2 => drop(socket.gatekeeper.revoke_all(|_| step.is_multiple_of(2))),
            3 | 4 => drop(socket.take()),
            _ => socket.send(&[b'i'; 3000]),
        }
    }
    match &guest.outside {
        Outside::Block { handle, .. } => {
            handle.set_capacity(DISK as u64 - u64::from(step % 3) * 512).unwrap()
        }
        Outside::Console { port, screen, .. } => match step % 7 {
            0 => port.close(),
            1 => port.open(),
            2 => port.resize(step as u16, 1),
            3 => screen.block(true),
            4 => {
                screen.block(false);
                port.resume();
            }
            5 => {
                port.discard_input();
            }
            _ => {
                port.enqueue(&[b'i'; 100]);
            }
        },
        Outside::Rng | Outside::Vsock { .. } => {}
        Outside::Balloon { handle, .. } => {
            handle.set_target(step);
            handle.request_statistics();
        }
        Outside::Net { network, handle } => {
            for frame in network.take_sent() {
                assert!((ETHERNET_HEADER..=MAX_FRAME).contains(&frame.bytes.len()));
                assert_eq!(frame.info.check(frame.bytes.len(), network.agreed().unwrap().transmit), Ok(()));
            }
            match step % 9 {
                0 => network.set_full(true),
                1 => network.set_full(false),
                2 => handle.set_link(false),
                3 => handle.set_link(true),
                4 => drop(handle.announce()),
                5 => network.set_failing(true),
                6 => network.set_failing(false),
                7 => network.give(TestFrame::new(vec![0x11; 3000])),
                _ => {}
            }
            network.give(TestFrame::new(vec![step as u8; 14 + step as usize % 200]));
        }
    }
}

fn perform(guest: &Guest, access: &Access) {
    let range = if access.config { PciLayout::default().ecam_range() } else { guest.registers };
    let at = GuestAddress(range.base + u64::from(access.offset) % range.size);
    let mut data = vec![0; access.size.into()];
    match access.value {
        Some(value) => {
            for (byte, value) in data.iter_mut().zip(value.to_le_bytes().into_iter().cycle()) {
                *byte = value;
            }
            guest.mmio.write(at, &data);
        }
        None => {
            guest.mmio.read(at, &mut data);
        }
    }
}

/// A whole life, and what must hold whatever it was.
pub(crate) fn live(kind: Kind, transport: Transport, rounds: &[Round]) -> Replayed {
    let memory = guest_memory_of(&REGIONS).unwrap();
    let mut guest = Guest::new(kind, transport, memory.clone(), memory.clone());
    let mut sum = Replayed::default();
    for Round { accesses, actions } in rounds {
        for access in accesses {
            perform(&guest, access);
        }
        let step = Cell::new(0);
        let socket = RefCell::new(guest.lend_socket());
        let driver = Interposed::new(&guest.driver).around_doorbells(|| {
            step.set(step.get() + 1);
            monitor(&guest, &socket, step.get());
        });
        match replay(&driver, &memory, actions) {
            Ok(replayed) => {
                sum.used += replayed.used;
                sum.starts += replayed.starts;
                sum.failures += replayed.failures;
            }
            Err(violation) => panic!("{kind:?}, {transport:?}: {violation}: {violation:?}"),
        }
        drop(driver);
    }
    guest.assert_beyond_untouched();
    match &guest.outside {
        Outside::Block { handle, .. } => handle.set_capacity(DISK as u64).unwrap(),
        Outside::Console { screen, port, .. } => {
            assert!(!port.is_guest_open());
            screen.block(false);
            port.open();
            port.discard_input();
            // And what was written in an emergency.
            assert_eq!(port.counters().output, screen.take().len() as u64);
        }
        Outside::Rng => {}
        Outside::Vsock { monitor } => {
            assert_eq!(monitor.handle.counters().connections, 0);
            assert_eq!(monitor.gatekeeper.open_channels(), []);
        }
        Outside::Balloon { ledger, handle } => {
            assert_eq!((handle.is_active(), handle.actual(), handle.statistics()), (false, 0, None));
            for (page, pages) in ledger.take() {
                let (start, end) = (page * 4096, (page + pages) * 4096);
                let within = |(region, size): (u64, u64)| region <= start && end <= region + size;
                assert!(REGIONS.into_iter().any(within), "{start:#x} to {end:#x}");
            }
        }
        Outside::Net { network, handle } => {
            network.set_failing(false);
            network.set_full(false);
            handle.set_link(true);
            network.take_sent();
        }
    }
    // It works for a driver that begins anew.
    guest.start();
    guest.exchange(0x1_0000);
    sum
}
