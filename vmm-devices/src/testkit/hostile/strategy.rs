//! Sequences of actions that reach a device: mostly a driver that works, with something wrong at every step.

use proptest::prelude::*;

use super::{Action, Buffer, Entry, Place};

/// Sequences of what a hostile driver does to a device whose queues have `size` descriptors, a power of two up to 256.
pub fn hostile_queue(size: u16) -> impl Strategy<Value = Vec<Action>> {
    let size = u8::try_from(size.max(1).ilog2()).unwrap_or(8);
    let steps = prop::collection::vec(step(size), 1..40);
    (any::<u64>(), steps).prop_map(move |(features, steps)| {
        let mut actions = vec![Action::Start { features, size }];
        actions.extend(steps.into_iter().flatten());
        actions
    })
}

/// A few actions that belong together.
fn step(size: u8) -> BoxedStrategy<Vec<Action>> {
    let one = |action: BoxedStrategy<Action>| action.prop_map(|action| vec![action]).boxed();
    prop_oneof![
        12 => chain().prop_map(|chain| {
            let queue = if let Action::Chain { queue, .. } = &chain { *queue } else { 0 };
            vec![chain, Action::Kick(queue)]
        }),
        4 => one(chain().boxed()),
        2 => one(queue_byte().prop_map(Action::Kick).boxed()),
        2 => one(queue().prop_map(Action::Notify).boxed()),
        3 => (place(), prop::collection::vec(any::<u8>(), 0..64), chain())
            .prop_map(|(at, bytes, chain)| vec![Action::Memory { at, bytes }, chain]),
        4 => one(ring(size)),
        3 => one(config()),
        2 => one(setup(size)),
        2 => (any::<u64>(), 0..=size).prop_map(|(features, size)| vec![Action::Start { features, size }]),
        2 => (any::<u64>(), queue()).prop_map(move |(features, queue)| {
            vec![Action::Reset, Action::Notify(queue), Action::Start { features, size }]
        }),
    ]
    .boxed()
}

/// Numbers of queues that there are, as a rule.
fn queue() -> impl Strategy<Value = u16> {
    prop_oneof![20 => 0..5_u16, 1 => any::<u16>()]
}

fn queue_byte() -> impl Strategy<Value = u8> {
    0..5_u8
}

fn place() -> impl Strategy<Value = Place> {
    prop_oneof![
        50 => any::<u16>().prop_map(Place::Data),
        6 => (any::<u8>(), 0..64_u16).prop_map(|(region, bytes)| Place::BeforeEnd { region, bytes }),
        1 => (queue_byte(), any::<u16>()).prop_map(|(queue, offset)| Place::Rings { queue, offset }),
        1 => any::<u16>().prop_map(Place::Tables),
        1 => prop_oneof![
            any::<u64>(),
            Just(0),
            Just(0xd000_0000),
            (0..64_u64).prop_map(|bytes| u64::MAX - bytes),
        ]
        .prop_map(Place::Anywhere),
    ]
}

fn len() -> impl Strategy<Value = u32> {
    prop_oneof![
        6 => 0..64_u32,
        6 => prop::sample::select(&[1, 4, 8, 10, 16, 64, 512, 4096][..]),
        3 => 0..0x3000_u32,
        1 => prop_oneof![Just(u32::MAX), any::<u32>()],
    ]
}

fn buffer() -> impl Strategy<Value = Buffer> {
    (place(), len(), any::<bool>()).prop_map(|(at, len, writable)| Buffer { at, len, writable })
}

/// Readable buffers come first, but for a few times.
fn chain() -> impl Strategy<Value = Action> {
    let table = prop_oneof![3 => Just(None), 1 => any::<u16>().prop_map(|at| Some(at & !15))];
    (queue_byte(), prop::collection::vec(buffer(), 0..6), table, 0..10_u8).prop_map(
        |(queue, mut buffers, table, disorder)| {
            if disorder > 0 {
                buffers.sort_by_key(|buffer| buffer.writable);
            }
            Action::Chain { queue, buffers, table }
        },
    )
}

fn entry(size: u8) -> impl Strategy<Value = Entry> {
    let next = prop_oneof![8 => 0..1_u16 << size, 1 => any::<u16>()];
    let flags = prop_oneof![8 => 0..8_u16, 1 => any::<u16>()];
    (place(), len(), flags, next).prop_map(|(at, len, flags, next)| Entry { at, len, flags, next })
}

/// What is done to rings behind the back of a device.
fn ring(size: u8) -> BoxedStrategy<Action> {
    let index = move || prop_oneof![8 => 0..1_u16 << size, 1 => any::<u16>()];
    prop_oneof![
        (queue_byte(), index(), entry(size)).prop_map(|(queue, index, entry)| Action::Descriptor {
            queue,
            index,
            entry
        }),
        (any::<u16>(), entry(size)).prop_map(|(offset, entry)| Action::Table { offset: offset & !15, entry }),
        (queue_byte(), index()).prop_map(|(queue, head)| Action::Available { queue, head }),
        (queue_byte(), prop_oneof![4 => 0..3_u16, 1 => any::<u16>()])
            .prop_map(|(queue, by)| Action::Jump { queue, by }),
        (queue_byte(), 0..2_u16, any::<u16>()).prop_map(|(queue, flags, event)| Action::Suppress {
            queue,
            flags,
            event
        }),
    ]
    .boxed()
}

fn config() -> BoxedStrategy<Action> {
    let offset = || prop_oneof![8 => 0..80_u16, 1 => any::<u16>()];
    prop_oneof![
        (offset(), 0..17_u8).prop_map(|(offset, len)| Action::ReadConfig { offset, len }),
        (offset(), any::<[u8; 16]>(), 0..17_u8).prop_map(|(offset, data, len)| Action::WriteConfig {
            offset,
            data,
            len
        }),
    ]
    .boxed()
}

/// Steps of the start, at a moment that is none.
fn setup(size: u8) -> BoxedStrategy<Action> {
    let size = prop_oneof![4 => Just(1_u16 << size), 1 => any::<u16>()];
    prop_oneof![
        any::<u8>().prop_map(Action::Status),
        any::<u64>().prop_map(Action::Features),
        queue().prop_map(Action::Enable),
        (queue(), size, [place(), place(), place()]).prop_map(|(queue, size, rings)| Action::Configure {
            queue,
            size,
            rings
        }),
    ]
    .boxed()
}
