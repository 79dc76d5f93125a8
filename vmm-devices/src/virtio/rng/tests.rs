use std::io;
use std::sync::{Arc, Mutex};

use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestAddressSpace as _};

use super::*;
use crate::testkit::{Driver, DriverQueue, LineRecorder, MmioDriver, Racer, guest_memory, guest_memory_of};
use crate::virtio::VirtioMmio;

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
