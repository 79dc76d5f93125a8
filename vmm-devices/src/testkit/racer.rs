//! A driver that changes its memory while the device works.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestMemory as _, GuestMemoryError, Permissions};

use crate::virtio::DeviceMemory;

/// A second processor of a hostile guest: it flips bits of what lies in some ranges and puts them back, over and over, as long
/// as it lives. A device that reads a field twice sees two values of it (CVE-2015-8550); each value that it checked must be the
/// one that it uses.
///
/// ```
/// use vmm_devices::testkit::{DriverQueue, Racer, guest_memory};
///
/// let memory = guest_memory(1 << 20)?;
/// let queue = DriverQueue::new(memory.clone(), 0x1000, 8)?;
/// let racer = Racer::start(&memory, &[(0x1000, queue.end() - 0x1000)])?; // descriptors, rings, indices
/// racer.wait_for(1000); // in the place of a device at work
/// assert!(racer.stop() >= 1000);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Racer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    flips: AtomicU64,
}

impl fmt::Debug for Racer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Racer").field("flips", &self.flips()).finish_non_exhaustive()
    }
}

impl Racer {
    /// Starts to change what lies in `ranges`: address and length in bytes of each, at least 8 and aligned to 8.
    ///
    /// # Errors
    /// If one of them is not in RAM, or too short: nothing would be changed.
    pub fn start<M: DeviceMemory>(memory: &M, ranges: &[(u64, u64)]) -> Result<Self, GuestMemoryError> {
        let snapshot = memory.memory();
        for (gpa, len) in ranges {
            let bytes = usize::try_from(*len).unwrap_or(usize::MAX);
            let usable = gpa.is_multiple_of(8) && *len >= 8;
            if !usable || !snapshot.check_range(GuestAddress(*gpa), bytes, Permissions::ReadWrite) {
                return Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(*gpa)));
            }
        }
        let (memory, ranges) = (memory.clone(), ranges.to_vec());
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let thread = (!ranges.is_empty()).then(|| thread::spawn(move || race(&memory, &ranges, &theirs)));
        Ok(Self { shared, thread })
    }

    /// How often something was changed so far.
    pub fn flips(&self) -> u64 {
        self.shared.flips.load(Ordering::Relaxed)
    }

    /// Waits until so much was changed. Without a range that is at once.
    pub fn wait_for(&self, flips: u64) {
        while self.flips() < flips && self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            thread::yield_now();
        }
    }

    /// Ends it; how often something was changed.
    pub fn stop(mut self) -> u64 {
        self.end();
        self.flips()
    }

    fn end(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has no way to panic, and a test that ends by a panic of its own needs no second one.
            let (Ok(()) | Err(_)) = thread.join();
        }
    }
}

impl Drop for Racer {
    fn drop(&mut self) {
        self.end();
    }
}

fn race<M: DeviceMemory>(memory: &M, ranges: &[(u64, u64)], shared: &Shared) {
    let mut random = Xorshift(0x9e37_79b9_7f4a_7c15);
    while !shared.stop.load(Ordering::Relaxed) {
        let which = usize::try_from(random.below(ranges.len() as u64)).unwrap_or(0);
        let Some((gpa, len)) = ranges.get(which) else { return };
        let place = GuestAddress(gpa + 8 * random.below(len / 8));
        let flip = match random.below(4) {
            0 => 1 << random.below(64),
            1 => 0xffff << (16 * random.below(4)),
            2 => u64::MAX,
            _ => random.next(),
        };
        let memory = memory.memory();
        // One that is gone meanwhile is not changed.
        if let Ok(value) = memory.load::<u64>(place, Ordering::Relaxed) {
            let (Ok(()) | Err(_)) = memory.store(value ^ flip, place, Ordering::Relaxed);
            for _ in 0..random.below(32) {
                std::hint::spin_loop();
            }
            let (Ok(()) | Err(_)) = memory.store(value, place, Ordering::Relaxed);
            shared.flips.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Marsaglia's generator: enough to be everywhere, the same each time.
struct Xorshift(u64);

impl Xorshift {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.next().checked_rem(limit).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::guest_memory;
    use vmm_memory::vm_memory::GuestAddressSpace as _;

    #[test]
    fn it_changes_its_ranges_and_nothing_else() {
        let memory = guest_memory(0x3000).unwrap();
        let racer = Racer::start(&memory, &[(0x1000, 0x10), (0x2008, 0x8)]).unwrap();
        let mut seen = [false; 3];
        while seen != [true; 3] {
            for (seen, place) in seen.iter_mut().zip([0x1000, 0x1008, 0x2008]) {
                *seen |= memory.memory().load::<u64>(GuestAddress(place), Ordering::Relaxed).unwrap() != 0;
            }
        }
        assert!(racer.stop() > 0);
        let mut bytes = [0; 0x3000];
        memory.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
        assert_eq!(bytes, [0; 0x3000], "all was put back, and the rest never touched");
    }

    #[test]
    fn ranges_that_it_could_not_change_are_refused() {
        let memory = guest_memory(0x3000).unwrap();
        for range in [(0x2ff8, 16), (0x3000, 8), (0x1004, 8), (0x1000, 4), (u64::MAX - 7, 8)] {
            assert!(Racer::start(&memory, &[(0x1000, 8), range]).is_err(), "{range:x?}");
        }
        let idle = Racer::start(&memory, &[]).unwrap();
        idle.wait_for(1);
        assert_eq!(idle.stop(), 0);
    }
}
