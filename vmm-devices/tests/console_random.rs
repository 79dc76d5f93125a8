//! A hostile driver of a console, with a monitor that adds, removes, opens, closes and feeds ports meanwhile.

// The lint spares test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing)]

#[path = "support/console.rs"]
mod console;

use proptest::prelude::*;
use vmm_devices::testkit::{Action, Buffer, Place, hostile_queue};

/// A control message of a driver that knows how: with a buffer for the answer.
fn control() -> impl Strategy<Value = Vec<Action>> {
    (0..console::MESSAGES, 0..40_u32).prop_map(|(message, room)| {
        let at = Place::Data(8 * message);
        let chain = |queue, at, len, writable| Action::Chain {
            queue,
            buffers: vec![Buffer { at, len, writable }],
            table: None,
        };
        vec![
            chain(2, Place::Data(0x1000), room, true),
            chain(3, at, 8, false),
            Action::Kick(3),
            Action::Kick(2),
        ]
    })
}

fn actions() -> impl Strategy<Value = Vec<Action>> {
    let parts = prop_oneof![
        2 => control(),
        1 => hostile_queue(16).prop_map(|mut actions| {
            // The rest of it is for a device that works.
            actions.drain(..1);
            actions.truncate(8);
            actions
        }),
    ];
    (any::<u64>(), prop::collection::vec(parts, 1..40)).prop_map(|(features, parts)| {
        let mut actions = vec![Action::Start { features: features | 3, size: 4 }, console::messages()];
        actions.extend(parts.into_iter().flatten());
        actions
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn nothing_a_driver_does_breaks_a_console(actions in actions(), steps in prop::collection::vec(any::<u16>(), 0..200)) {
        console::run(&actions, steps);
    }
}

/// What is drawn reaches the device: a fair driver's first words are understood, and chains come back.
#[test]
fn the_words_are_understood() {
    let chain = |queue, at, len, writable| Action::Chain {
        queue,
        buffers: vec![Buffer { at: Place::Data(at), len, writable }],
        table: None,
    };
    let mut actions = vec![Action::Start { features: 3, size: 4 }, console::messages()];
    for message in 0..3 {
        actions.extend([chain(2, 0x1000, 64, true), chain(3, 8 * message, 8, false), Action::Kick(3)]);
    }
    let (replayed, counters) = console::run(&actions, Vec::new());
    assert_eq!((replayed.starts, replayed.failures, replayed.used), (1, 0, 6));
    assert_eq!(counters.ignored, 0);
}
