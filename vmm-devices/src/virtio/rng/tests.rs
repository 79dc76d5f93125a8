use std::io;
use std::sync::{Arc, Mutex};

use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};

use super::*;
use crate::ManualClock;
use crate::testkit::{
    Driver, DriverQueue, LineRecorder, LinkRecorder, MmioDriver, Racer, guest_memory, guest_memory_of,
};
use crate::virtio::VirtioMmio;
use crate::virtio::metrics::DeviceMetrics;
use crate::virtio::rate::{Limits, Rate};

/// Counts, and ends after so many bytes.
struct Counting(u8, usize);

impl Read for Counting {
    fn read(&mut self, room: &mut [u8]) -> io::Result<usize> {
        // In small pieces, as a pipe may.
        let len = room.len().min(self.1).min(7);
        for byte in &mut room[..len] {
            self.0 = self.0.wrapping_add(1);
            *byte = self.0;
        }
        self.1 -= len;
        Ok(len)
    }
}

fn device(source: impl Read + Send + 'static, memory: &crate::testkit::Memory) -> (MmioDriver, LineRecorder) {
    let line = LineRecorder::default();
    let transport = VirtioMmio::new(Rng::new(source), memory.clone(), line.clone()).unwrap();
    (MmioDriver::new(Arc::new(Mutex::new(transport))), line)
}

#[test]
fn requests_are_filled() {
    let memory = guest_memory(1 << 20).unwrap();
    let (driver, line) = device(Counting(0, usize::MAX), &memory);
    let mut queue = DriverQueue::new(memory.clone(), 0x1000, 8).unwrap();
    driver.start(0, &[(0, &queue)]).unwrap();
    let head = queue.chain().writable(0x8000, 3).writable(0x9000, 20).submit().unwrap();
    assert!(!line.is_asserted(), "nothing happens before the doorbell");
    driver.notify(0);
    assert_eq!(queue.take_used().unwrap(), Some((head.into(), 23)));
    let mut bytes = [0; 20];
    memory.memory().read_slice(&mut bytes, GuestAddress(0x9000)).unwrap();
    assert_eq!(bytes[..], Vec::from_iter(4..24)[..]);
    assert_eq!((line.is_asserted(), driver.interrupt_status()), (true, 1));
    driver.acknowledge(1);
    assert!(!line.is_asserted());
}

#[test]
fn a_source_that_ends_gives_what_it_has() {
    let memory = guest_memory(1 << 20).unwrap();
    let (driver, _) = device(Counting(0, 10), &memory);
    let mut queue = DriverQueue::new(memory, 0x1000, 8).unwrap();
    driver.start(0, &[(0, &queue)]).unwrap();
    for (wanted, given) in [(8, 8), (8, 2), (8, 0)] {
        let head = queue.chain().writable(0x8000, wanted).submit().unwrap();
        driver.notify(0);
        assert_eq!(queue.take_used().unwrap(), Some((head.into(), given)));
    }
}

#[test]
fn one_request_takes_no_more_than_its_share() {
    let memory = guest_memory(4 << 20).unwrap();
    let (driver, _) = device(io::repeat(7), &memory);
    let mut queue = DriverQueue::new(memory, 0x1000, 8).unwrap();
    driver.start(0, &[(0, &queue)]).unwrap();
    let head = queue.chain().writable(0x8000, 2 << 20).submit().unwrap();
    driver.notify(0);
    let share = u32::try_from(MAX_REQUEST).unwrap();
    assert_eq!(queue.take_used().unwrap(), Some((head.into(), share)));
}

/// What is said to be written is what was written.
#[test]
fn cve_2024_8612_the_used_length_is_what_was_written() {
    let memory = guest_memory_of(&[(0, 0x10000), (0x10000, 0x10000)]).unwrap();
    let (driver, _) = device(io::repeat(7), &memory);
    let mut queue = DriverQueue::new(memory.clone(), 0x1000, 8).unwrap();
    driver.start(0, &[(0, &queue)]).unwrap();
    let poison = vec![0xee; 0x10000];
    memory.memory().write_slice(&poison, GuestAddress(0x8000)).unwrap();
    // Across two regions, then one that is in no RAM, then one to read alone.
    for (chain, given) in [
        (queue.chain().writable(0xfff8, 16).submit(), 16),
        (queue.chain().writable(0x4000_0000, 16).submit(), 0),
        (queue.chain().readable(0x9000, 16).submit(), 0),
        (queue.chain().writable(u64::MAX - 3, 16).submit(), 0),
        // As far as there is RAM.
        (queue.chain().writable(0x1fff0, 8).writable(0x1fffc, 16).writable(0x9000, 16).submit(), 12),
    ] {
        let head = chain.unwrap();
        driver.notify(0);
        assert_eq!(queue.take_used().unwrap(), Some((head.into(), given)));
    }
    let mut bytes = vec![0; 0x10000];
    memory.memory().read_slice(&mut bytes, GuestAddress(0x8000)).unwrap();
    assert_eq!(bytes.iter().filter(|byte| **byte != 0xee).count(), 16);
    assert_eq!(driver.status() & 0x40, 0, "the device still works");
}

/// CVE-2015-8550: descriptors and rings change while the device looks at them.
#[test]
fn a_driver_that_races() {
    let memory = guest_memory(1 << 20).unwrap();
    let (driver, _) = device(io::repeat(7), &memory);
    let mut queue = DriverQueue::new(memory.clone(), 0x1000, 8).unwrap();
    let racer = Racer::start(&memory, &[(0x1000, 0x100)]).unwrap();
    for round in 0..400 {
        if round % 8 == 0 || driver.status() & 0x40 != 0 {
            queue = DriverQueue::new(memory.clone(), 0x1000, 8).unwrap();
            driver.set_status(0);
            let (Ok(()) | Err(_)) = driver.start(0, &[(0, &queue)]);
        }
        racer.wait_for(racer.flips() + 1);
        queue.chain().writable(0x8000, 3).writable(0x9000, 20).submit().unwrap();
        driver.notify(0);
        assert_eq!(driver.status() & !0x40, 0xf);
    }
    assert!(racer.stop() >= 400);
    // What it did meanwhile is forgotten.
    let mut queue = DriverQueue::new(memory, 0x1000, 8).unwrap();
    driver.start(0, &[(0, &queue)]).unwrap();
    let head = queue.chain().writable(0x8000, 3).submit().unwrap();
    driver.notify(0);
    assert_eq!(queue.take_used().unwrap(), Some((head.into(), 3)));
}

/// A worker, its driver's queue, and what its limit and figures go by.
type Limited = (
    Box<dyn Worker>,
    DriverQueue<crate::testkit::Memory>,
    Arc<ManualClock>,
    Arc<DeviceMetrics>,
    LinkRecorder,
);

/// A worker alone, with a clock that goes as far as it is told.
fn limited(limits: Limits) -> Limited {
    let memory = guest_memory(1 << 20).unwrap();
    let (clock, metrics) = (Arc::new(ManualClock::new(5000)), Arc::new(DeviceMetrics::default()));
    let link = LinkRecorder::default();
    let mut device = Rng::new(io::repeat(7))
        .rate(RateLimiter::new(Arc::clone(&clock), limits))
        .metrics(Arc::clone(&metrics) as Arc<_>, Arc::clone(&clock));
    let driver = DriverQueue::new(memory.clone(), 0x1000, 8).unwrap();
    let queue = Virtqueue::new(driver.device_side().unwrap(), 0, memory, Arc::new(link.clone())).unwrap();
    let activation = Activation {
        features: 0,
        queues: vec![Some(queue)],
        link: Arc::new(link.clone()),
        doorbells: Arc::new(crate::virtio::Doorbells::new(1)),
    };
    let worker = device.activate(activation).unwrap().pop().unwrap();
    (worker, driver, clock, metrics, link)
}

/// A request that the limit holds up is done at the deadline, and those behind it after it.
#[test]
fn requests_wait_for_the_limit() {
    // A byte a microsecond, 100 at once.
    let limits = Limits { bytes: Rate::new(1_000_000, 100), ..Limits::default() };
    let (mut worker, mut driver, clock, metrics, link) = limited(limits);
    let heads: Vec<_> =
        [100, 30, 40].map(|len| driver.chain().writable(0x8000, len).submit().unwrap()).into_iter().collect();
    assert_eq!(worker.process().unwrap(), Progress::Idle);
    assert_eq!(driver.take_used().unwrap(), Some((heads[0].into(), 100)));
    assert_eq!((driver.take_used().unwrap(), link.take_used()), (None, vec![0]));
    assert_eq!(worker.deadline(), Some(5000 + 1000));
    // A driver that rings meanwhile changes nothing.
    clock.advance(999);
    assert_eq!(worker.process().unwrap(), Progress::Idle);
    assert_eq!((driver.take_used().unwrap(), link.take_used()), (None, vec![]));
    clock.advance(1);
    assert_eq!(worker.process().unwrap(), Progress::Idle);
    assert_eq!(driver.take_used().unwrap(), Some((heads[1].into(), 30)));
    assert_eq!(worker.deadline(), Some(5000 + 31_000));
    clock.advance(30_000);
    assert_eq!(worker.process().unwrap(), Progress::Idle);
    assert_eq!(driver.take_used().unwrap(), Some((heads[2].into(), 40)));
    assert_eq!(worker.deadline(), None);
    let counted = metrics.snapshot();
    assert_eq!((counted.read.requests, counted.read.bytes, counted.read.errors), (3, 170, 0));
    assert_eq!((counted.throttled, counted.latency_total_ns), (2, 1000 + 30_000));
    assert_eq!(driver.used_flags().unwrap(), 0, "the device wants to hear of the next");
}

/// A buffer is charged for what it can get; one larger than the burst is paid for later rather than never.
#[test]
fn large_requests_are_charged_and_not_refused() {
    let limits = Limits { bytes: Rate::new(1_000_000, 100), ..Limits::default() };
    let (mut worker, mut driver, clock, metrics, _) = limited(limits);
    driver.chain().writable(0x8000, 0xf_0000).submit().unwrap();
    driver.chain().writable(0x4000_0000, 1).submit().unwrap();
    assert_eq!(worker.process().unwrap(), Progress::Idle);
    assert_eq!(driver.take_used().unwrap().unwrap().1, 0x1_0000);
    let debt = 0x1_0000 - 100 + 1;
    assert_eq!(worker.deadline(), Some(5000 + debt * 1000));
    // It is in flight when the worker stops, and is not touched again.
    worker.stop();
    assert_eq!(worker.deadline(), None);
    clock.advance(debt * 1000);
    assert_eq!(worker.process().unwrap(), Progress::Idle);
    assert_eq!(driver.take_used().unwrap(), None);
    driver.chain().writable(0x4000_0000, 1).submit().unwrap();
    assert_eq!(worker.process().unwrap(), Progress::Idle);
    assert_eq!(metrics.snapshot().read.errors, 1);
}

/// Where memory is exchanged meanwhile, as when some is plugged in, the old is held by nobody.
#[test]
fn a_request_that_waits_holds_no_memory() {
    let memory = guest_memory(1 << 20).unwrap();
    let clock = Arc::new(ManualClock::new(0));
    let limits = Limits { bytes: Rate::new(1_000_000, 100), ..Limits::default() };
    let rng = Rng::new(io::repeat(7)).rate(RateLimiter::new(Arc::clone(&clock), limits));
    let (driver, _) = MmioDriver::of(rng, &memory).unwrap();
    let mut queue = DriverQueue::new(memory.clone(), 0x1000, 8).unwrap();
    driver.start(0, &[(0, &queue)]).unwrap();
    for len in [100, 50] {
        queue.chain().writable(0x8000, len).submit().unwrap();
    }
    driver.notify(0);
    assert_eq!(queue.used_index().unwrap(), 1);
    let old = memory.memory().into_inner();
    memory.lock().unwrap().replace(vmm_memory::GuestMemoryMap::clone(&old));
    assert_eq!(Arc::strong_count(&old), 1);
    clock.advance(1_000_000);
    driver.notify(0);
    assert_eq!((queue.take_used().unwrap(), queue.take_used().unwrap()), (Some((0, 100)), Some((1, 50))));
}
