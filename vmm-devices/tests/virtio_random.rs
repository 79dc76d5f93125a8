//! A hostile driver of each virtio device on each transport: registers at any width and moment, and between them what
//! [`hostile_queue`] draws, with requests among it that are nearly right, and a monitor that does its part at every doorbell.

// The lint spares test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::cast_possible_truncation)]

// The tests of public flaws use the rest.
#[allow(dead_code)]
#[path = "support/virtio.rs"]
mod virtio;

use std::cell::Cell;

use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use virtio::{DISK, Guest, Kind, Outside, Transport};
use vmm_devices::pci::PciLayout;
use vmm_devices::testkit::{
    Action, Buffer, Interposed, MIN_MEMORY, Place, Replayed, guest_memory_of, hostile_queue, replay,
};
use vmm_devices::vmm_memory::vm_memory::GuestAddress;

const REGIONS: [(u64, u64); 3] = [(0, MIN_MEMORY), (MIN_MEMORY, 0x3000), (2 * MIN_MEMORY, 0x1000)];

/// An access to registers, or, with PCI, to configuration space.
#[derive(Clone, Debug)]
struct Access {
    config: bool,
    offset: u32,
    size: u8,
    value: Option<u64>,
}

/// What happens until the driver begins anew.
#[derive(Clone, Debug)]
struct Round {
    accesses: Vec<Access>,
    actions: Vec<Action>,
}

fn access() -> impl Strategy<Value = Access> {
    // Mostly where registers are, whatever the transport.
    let offset = prop_oneof![
        8 => 0..0x110_u32,
        2 => (0..8_u32, 0..0x40_u32).prop_map(|(page, at)| page * 0x1000 + at),
        1 => any::<u32>(),
    ];
    let size = prop_oneof![8 => prop::sample::select(&[1, 2, 4, 8][..]), 1 => 0..20_u8];
    let value =
        prop_oneof![3 => (0..16_u64).prop_map(Some), 3 => any::<u64>().prop_map(Some), 2 => Just(None)];
    (prop::bool::weighted(0.2), offset, size, value).prop_map(|(config, offset, size, value)| Access {
        config,
        offset,
        size,
        value,
    })
}

/// Headers of the disk's requests, and messages to the console, for chains at [`Place::Data`]: 16 bytes each.
fn words(kind: Kind) -> Vec<u8> {
    let each: Vec<[u8; 16]> = match kind {
        Kind::Block => [0_u64, 1, 1, 4, 8, 11, 13, 99]
            .into_iter()
            .flat_map(|kind| [0, 2, DISK as u64 / 512 - 1, u64::MAX].map(|sector| (kind, sector)))
            .map(|(kind, sector)| u128::to_le_bytes(u128::from(sector) << 64 | u128::from(kind)))
            .collect(),
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

/// A request that is nearly one.
fn request(kind: Kind) -> BoxedStrategy<Vec<Action>> {
    let chain = |queue, buffers| Action::Chain { queue, buffers, table: None };
    let buffer = |at, len, writable| Buffer { at: Place::Data(at), len, writable };
    match kind {
        Kind::Block => (0..32_u16, 0..4_u32, any::<bool>(), 0..8_u32)
            .prop_map(move |(header, sectors, writable, odd)| {
                let buffers = vec![
                    buffer(16 * header, 16, false),
                    buffer(0x1000, 512 * sectors + if odd == 0 { 1 } else { 0 }, writable),
                    buffer(0x3000, 1, true),
                ];
                vec![chain(0, buffers), Action::Kick(0)]
            })
            .boxed(),
        Kind::Console => (0..8_u16, 0..40_u32)
            .prop_map(move |(message, room)| {
                vec![
                    chain(2, vec![buffer(0x1000, room, true)]),
                    chain(3, vec![buffer(16 * message, 8, false)]),
                    Action::Kick(3),
                    Action::Kick(2),
                ]
            })
            .boxed(),
        Kind::Rng | Kind::Balloon => (0..5_u8, 0..0x2000_u16, 0..64_u32)
            .prop_map(move |(queue, at, len)| {
                let request = vec![buffer(at, 4 * len, false), buffer(0x1000, 0x1000, true)];
                vec![chain(queue, request), Action::Kick(queue)]
            })
            .boxed(),
    }
}

fn rounds(kind: Kind) -> impl Strategy<Value = Vec<Round>> {
    let steps = prop::collection::vec(
        prop_oneof![
            2 => request(kind),
            1 => hostile_queue(16).prop_map(|mut actions| {
                // The rest of it is for a device that works.
                actions.drain(..1);
                actions.truncate(8);
                actions
            }),
        ],
        1..24,
    );
    let round = (any::<u64>(), prop::collection::vec(access(), 0..40), steps).prop_map(
        move |(features, accesses, steps)| {
            let mut actions = vec![
                Action::Start { features: features | 3, size: 4 },
                Action::Memory { at: Place::Data(0), bytes: words(kind) },
            ];
            actions.extend(steps.into_iter().flatten());
            Round { accesses, actions }
        },
    );
    prop::collection::vec(round, 1..4)
}

/// What a monitor does, a little of it each time.
fn monitor(guest: &Guest, step: u32) {
    guest.pass();
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
        Outside::Rng => {}
        Outside::Balloon { handle, .. } => {
            handle.set_target(step);
            handle.request_statistics();
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
fn live(kind: Kind, transport: Transport, rounds: &[Round]) -> Replayed {
    let memory = guest_memory_of(&REGIONS).unwrap();
    let mut guest = Guest::new(kind, transport, memory.clone(), memory.clone());
    let mut sum = Replayed::default();
    for Round { accesses, actions } in rounds {
        for access in accesses {
            perform(&guest, access);
        }
        let step = Cell::new(0);
        let driver = Interposed::new(&guest.driver).around_doorbells(|| {
            step.set(step.get() + 1);
            monitor(&guest, step.get());
        });
        match replay(&driver, &memory, actions) {
            Ok(replayed) => {
                sum.used += replayed.used;
                sum.starts += replayed.starts;
                sum.failures += replayed.failures;
            }
            Err(violation) => panic!("{kind:?}, {transport:?}: {violation}: {violation:?}"),
        }
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
        Outside::Balloon { ledger, handle } => {
            assert_eq!((handle.is_active(), handle.actual(), handle.statistics()), (false, 0, None));
            for (page, pages) in ledger.take() {
                let (start, end) = (page * 4096, (page + pages) * 4096);
                let within = |(region, size): (u64, u64)| region <= start && end <= region + size;
                assert!(REGIONS.into_iter().any(within), "{start:#x} to {end:#x}");
            }
        }
    }
    // It works for a driver that begins anew.
    guest.start();
    guest.exchange(0x1_0000);
    sum
}

macro_rules! tests {
    ($($name:ident: $kind:ident, $transport:ident;)*) => {
        proptest! {
            #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

            $(#[test]
            fn $name(rounds in rounds(Kind::$kind)) {
                live(Kind::$kind, Transport::$transport, &rounds);
            })*
        }
    };
}

tests! {
    nothing_a_driver_does_breaks_a_disk_on_mmio: Block, Mmio;
    nothing_a_driver_does_breaks_a_disk_on_pci: Block, Pci;
    nothing_a_driver_does_breaks_a_console_on_mmio: Console, Mmio;
    nothing_a_driver_does_breaks_a_console_on_pci: Console, Pci;
    nothing_a_driver_does_breaks_an_entropy_device_on_mmio: Rng, Mmio;
    nothing_a_driver_does_breaks_an_entropy_device_on_pci: Rng, Pci;
    nothing_a_driver_does_breaks_a_balloon_on_mmio: Balloon, Mmio;
    nothing_a_driver_does_breaks_a_balloon_on_pci: Balloon, Pci;
}

/// What is drawn reaches each device: chains come back, it gives up, and is started again.
#[test]
fn lives_reach_deep() {
    for kind in [Kind::Block, Kind::Console, Kind::Rng, Kind::Balloon] {
        let (mut runner, strategy) = (TestRunner::deterministic(), rounds(kind));
        for transport in [Transport::Mmio, Transport::Pci] {
            let mut sum = Replayed::default();
            for _ in 0..24 {
                let one = live(kind, transport, &strategy.new_tree(&mut runner).unwrap().current());
                sum.used += one.used;
                sum.starts += one.starts;
                sum.failures += one.failures;
            }
            assert!(
                sum.used > 100 && sum.starts > 40 && sum.failures > 5,
                "{kind:?}, {transport:?}: {sum:?}"
            );
        }
    }
}
