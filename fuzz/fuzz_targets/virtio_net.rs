//! A hostile driver of a network device over MMIO or PCI: registers, rings, frames and commands, on a network that sends, is full, fails and
//! goes away meanwhile.

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

fuzz_target!(|input: (Transport, Vec<(u64, Round)>)| {
    let (transport, mut rounds) = input;
    rounds.truncate(8);
    let rounds = rounds.into_iter().map(|(features, mut round)| {
        // A driver that works, most of the time.
        let begin = [
            Action::Start { features: acceptable(Kind::Net, !features), size: 4 },
            Action::Memory { at: Place::Data(0), bytes: words(Kind::Net) },
        ];
        round.actions.splice(0..0, begin);
        round
    });
    live(Kind::Net, transport, &rounds.collect::<Vec<_>>());
});
