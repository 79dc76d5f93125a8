//! A hostile driver of any virtio device over MMIO or PCI, on the buses of a machine: registers and configuration space at any width
//! and moment, rings, requests, with a monitor that does its part meanwhile.

#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm_devices::testkit::{Action, Place};

// The tests of vmm-devices use the rest.
#[allow(dead_code)]
#[path = "../../vmm-devices/tests/support/virtio.rs"]
mod virtio;
#[path = "../../vmm-devices/tests/support/virtio_life.rs"]
mod virtio_life;

use virtio::{Kind, Transport};
use virtio_life::{Round, acceptable, live, words};

fuzz_target!(|input: (Kind, Transport, Vec<Round>)| {
    let (kind, transport, mut rounds) = input;
    rounds.truncate(8);
    for (features, round) in (0..).zip(&mut rounds) {
        // A driver that works, most of the time.
        let begin = [
            Action::Start { features: acceptable(kind, !features), size: 4 },
            Action::Memory { at: Place::Data(0), bytes: words(kind) },
        ];
        round.actions.splice(0..0, begin);
    }
    live(kind, transport, &rounds);
});
