//! A hostile driver of a balloon over MMIO: registers, rings, page numbers, reports, statistics, configuration. The monitor meanwhile
//! asks for other sizes and for statistics whenever memory comes back, which is in the middle of a request.

#![no_main]

use std::io;
use std::sync::{Arc, OnceLock};

use libfuzzer_sys::fuzz_target;
use vmm_devices::testkit::{Action, MIN_MEMORY, MmioDriver, guest_memory_of, replay};
use vmm_devices::virtio::balloon::{Balloon, BalloonHandle, MemoryRelease, PAGE};
use vmm_devices::vmm_memory::vm_memory::GuestAddress;

/// Regions that touch, and one behind a hole.
const REGIONS: [(u64, u64); 3] = [(0, MIN_MEMORY), (MIN_MEMORY, 0x3000), (2 * MIN_MEMORY, 0x1000)];

#[derive(Clone, Default)]
struct Host(Arc<OnceLock<BalloonHandle>>);

impl MemoryRelease for Host {
    fn release(&self, gpa: GuestAddress, len: u64) -> io::Result<()> {
        assert!(gpa.0 % PAGE == 0 && len % PAGE == 0 && len > 0);
        let is_within = |(start, size): (u64, u64)| gpa.0 >= start && gpa.0 + len <= start + size;
        assert!(REGIONS.into_iter().any(is_within), "{gpa:?} {len:#x}");
        if let Some(handle) = self.0.get() {
            handle.set_target(handle.actual() ^ 1);
            handle.request_statistics();
        }
        if gpa.0 & PAGE == 0 { Ok(()) } else { Err(io::ErrorKind::Unsupported.into()) }
    }

    fn reclaim(&self, gpa: GuestAddress, len: u64) -> io::Result<()> {
        self.release(gpa, len)
    }
}

fuzz_target!(|input: (u64, Vec<Action>)| {
    let (features, mut actions) = input;
    // With VIRTIO_BALLOON_F_MUST_TELL_HOST, without which the device does not start.
    actions.insert(0, Action::Start { features: features | 1, size: 4 });
    let memory = guest_memory_of(&REGIONS).expect("so little memory there is");
    let host = Host::default();
    let balloon = Balloon::builder(host.clone()).must_tell_host(true).build();
    let handle = balloon.handle();
    host.0.get_or_init(|| handle.clone());
    let (driver, _) = MmioDriver::of(balloon, &memory).expect("its queues can be");
    if let Err(violation) = replay(&driver, &memory, &actions) {
        panic!("{violation}: {violation:?}");
    }
    assert_eq!((handle.is_active(), handle.actual(), handle.statistics()), (false, 0, None));
});
