//! A hostile driver of each virtio device on each transport: registers at any width and moment, and between them what
//! [`hostile_queue`] draws, with requests among it that are nearly right, and a monitor that does its part at every doorbell.

// The lint spares test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::cast_possible_truncation)]

// The tests of public flaws use the rest.
#[allow(dead_code)]
#[path = "support/virtio.rs"]
mod virtio;
#[path = "support/virtio_life.rs"]
mod virtio_life;

use proptest::prelude::*;
use proptest::strategy::ValueTree as _;
use proptest::test_runner::TestRunner;
use virtio::{Kind, Transport};
use virtio_life::{Access, Round, acceptable, live, words};
use vmm_devices::testkit::{Action, Buffer, Place, Replayed, hostile_queue};

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
        Kind::Net => (0..16_u16, 0..3_u8, 0..200_u32, any::<bool>())
            .prop_map(move |(word, queue, len, apart)| {
                let (header, rest) = (buffer(16 * word, 12, false), buffer(16 * word + 12, 4, false));
                let buffers = match queue {
                    0 => vec![buffer(0x1000, 16 * len, true)],
                    1 if apart => vec![header, buffer(0x800, len, false)],
                    1 => vec![buffer(16 * word, 12 + len, false)],
                    _ => vec![header, rest, buffer(0x3000, 1, true)],
                };
                vec![chain(queue, buffers), Action::Kick(queue)]
            })
            .boxed(),
        Kind::Vsock => (0..36_u16, 0..40_u32, 0..3000_u32)
            .prop_map(move |(packet, data, room)| {
                vec![
                    chain(0, vec![buffer(0x3000, room, true)]),
                    chain(1, vec![buffer(64 * packet, 44, false), buffer(0x1000, data, false)]),
                    Action::Kick(1),
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
                Action::Start { features: acceptable(kind, features | 3), size: 4 },
                Action::Memory { at: Place::Data(0), bytes: words(kind) },
            ];
            actions.extend(steps.into_iter().flatten());
            Round { accesses, actions }
        },
    );
    prop::collection::vec(round, 1..4)
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
    nothing_a_driver_does_breaks_a_network_device_on_mmio: Net, Mmio;
    nothing_a_driver_does_breaks_a_network_device_on_pci: Net, Pci;
    nothing_a_driver_does_breaks_a_socket_device_on_mmio: Vsock, Mmio;
    nothing_a_driver_does_breaks_a_socket_device_on_pci: Vsock, Pci;
}

/// What is drawn reaches each device: chains come back, it gives up, and is started again.
#[test]
fn lives_reach_deep() {
    for kind in [Kind::Block, Kind::Console, Kind::Rng, Kind::Balloon, Kind::Net, Kind::Vsock] {
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
