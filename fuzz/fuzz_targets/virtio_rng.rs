//! A hostile driver of an entropy device over MMIO, from a source that fails now and then, with a rate limit.

#![no_main]

use std::io::{self, Read};
use std::sync::{Arc, Mutex};

use libfuzzer_sys::fuzz_target;
use vmm_devices::ManualClock;
use vmm_devices::testkit::{Action, MIN_MEMORY, MmioDriver, guest_memory_of, replay};
use vmm_devices::virtio::Rng;
use vmm_devices::virtio::metrics::DeviceMetrics;
use vmm_devices::virtio::rate::{Limits, Rate, RateLimiter};

/// Time passes with every read, and each read is another one: whole, short, interrupted, failed, the end.
struct Source {
    clock: Arc<ManualClock>,
    reads: u64,
    given: Arc<Mutex<u64>>,
}

impl Read for Source {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        self.clock.advance(1000);
        self.reads = self.reads.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let len = match self.reads >> 60 {
            0..8 => room.len(),
            8..13 => room.len().min(5),
            13 => 0,
            14 => return Err(io::ErrorKind::Interrupted.into()),
            _ => return Err(io::ErrorKind::Other.into()),
        };
        room[..len].fill(0x5a);
        *self.given.lock().unwrap() += len as u64;
        Ok(len)
    }
}

fuzz_target!(|input: (u64, Option<u32>, Vec<Action>)| {
    let (features, burst, mut actions) = input;
    actions.insert(0, Action::Start { features, size: 4 });
    let regions = [(0, MIN_MEMORY), (MIN_MEMORY, 0x3000), (2 * MIN_MEMORY, 0x1000)];
    let memory = guest_memory_of(&regions).expect("so little memory there is");
    let clock = Arc::new(ManualClock::new(0));
    let (given, metrics) = (Arc::<Mutex<u64>>::default(), Arc::new(DeviceMetrics::default()));
    let source = Source { clock: Arc::clone(&clock), reads: features, given: Arc::clone(&given) };
    let limits =
        Limits { bytes: burst.and_then(|burst| Rate::new(1_000_000, burst.into())), ..Limits::default() };
    let rng = Rng::new(source)
        .rate(RateLimiter::new(Arc::clone(&clock), limits))
        .metrics(Arc::clone(&metrics) as Arc<_>, clock);
    let (driver, _) = MmioDriver::of(rng, &memory).expect("its queue can be");
    if let Err(violation) = replay(&driver, &memory, &actions) {
        panic!("{violation}: {violation:?}");
    }
    // No byte that the source did not give.
    assert!(metrics.snapshot().read.bytes <= *given.lock().unwrap());
});
