//! Guest memory that comes in small pieces, and fails where it said that it would not.

use std::iter::FusedIterator;
use std::ops::Range;
use std::sync::Arc;

use vmm_memory::GuestMemoryMap;
use vmm_memory::vm_memory::bitmap::BS;
use vmm_memory::vm_memory::guest_memory::GuestMemorySliceIterator;
use vmm_memory::vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryError, GuestMemoryLoadGuard, GuestMemoryResult,
    Permissions, VolatileSlice,
};

use super::Memory;

type Bitmap = <GuestMemoryMap as GuestMemory>::Bitmap;

/// The memory of [`guest_memory`](super::guest_memory), with faults: for a device that takes the first piece of a buffer for all of it
/// (CVE-2023-41051), or what was checked for what works.
///
/// ```
/// use vmm_devices::testkit::{FaultyMemory, guest_memory};
/// use vmm_devices::vmm_memory::vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
///
/// let memory = FaultyMemory::new(guest_memory(1 << 20)?).in_pieces_of(64).failing_at(0x8000..0x9000);
/// let mut bytes = [0; 1000];
/// memory.memory().read_slice(&mut bytes, GuestAddress(0x2000))?; // in 17 pieces
/// assert!(memory.memory().read_slice(&mut bytes, GuestAddress(0x7f00)).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct FaultyMemory {
    memory: Memory,
    faults: Arc<Faults>,
}

#[derive(Clone, Debug)]
struct Faults {
    piece: u64,
    failing: Vec<Range<u64>>,
}

impl FaultyMemory {
    /// Without a fault so far.
    pub fn new(memory: Memory) -> Self {
        Self { memory, faults: Arc::new(Faults { piece: u64::MAX, failing: Vec::new() }) }
    }

    /// No slice crosses a multiple of `bytes`, which is made a power of two of 16 at least: fields of rings stay whole.
    #[must_use]
    pub fn in_pieces_of(mut self, bytes: u64) -> Self {
        Arc::make_mut(&mut self.faults).piece = bytes.max(16).checked_next_power_of_two().unwrap_or(u64::MAX);
        self
    }

    /// Accesses to these addresses fail, though they are RAM for whoever asks. May be called any number of times.
    #[must_use]
    pub fn failing_at(mut self, gpas: Range<u64>) -> Self {
        Arc::make_mut(&mut self.faults).failing.push(gpas);
        self
    }
}

impl GuestAddressSpace for FaultyMemory {
    type M = FaultyMap;
    type T = Arc<FaultyMap>;

    fn memory(&self) -> Arc<FaultyMap> {
        Arc::new(FaultyMap { map: self.memory.memory(), faults: Arc::clone(&self.faults) })
    }
}

/// A snapshot of [`FaultyMemory`].
#[derive(Debug)]
pub struct FaultyMap {
    map: GuestMemoryLoadGuard<GuestMemoryMap>,
    faults: Arc<Faults>,
}

impl GuestMemory for FaultyMap {
    type PhysicalMemory = GuestMemoryMap;
    type Bitmap = Bitmap;

    fn check_range(&self, gpa: GuestAddress, count: usize, access: Permissions) -> bool {
        GuestMemory::check_range(&*self.map, gpa, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        gpa: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, BS<'a, Bitmap>>> {
        let slices = GuestMemory::get_slices(&*self.map, gpa, count, access)?;
        Ok(Pieces { slices, faults: &self.faults, at: gpa.0, rest: None, ended: false })
    }

    fn physical_memory(&self) -> Option<&GuestMemoryMap> {
        Some(&self.map)
    }
}

struct Pieces<'a, I> {
    slices: I,
    faults: &'a Faults,
    /// Where the next piece begins.
    at: u64,
    /// What is left of a slice.
    rest: Option<VolatileSlice<'a, BS<'a, Bitmap>>>,
    ended: bool,
}

type Slice<'a> = VolatileSlice<'a, BS<'a, Bitmap>>;

impl<'a, I: GuestMemorySliceIterator<'a, BS<'a, Bitmap>>> Pieces<'a, I> {
    fn take(&mut self) -> GuestMemoryResult<Option<Slice<'a>>> {
        let slice = match self.rest.take() {
            Some(rest) => rest,
            None => match self.slices.next().transpose()? {
                Some(slice) => slice,
                None => return Ok(None),
            },
        };
        let room = self.faults.piece - self.at % self.faults.piece;
        let len = slice.len().min(usize::try_from(room).unwrap_or(usize::MAX));
        let end = self.at.saturating_add(len as u64);
        if self.faults.failing.iter().any(|range| range.start < end && self.at < range.end) {
            return Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(self.at)));
        }
        if len < slice.len() {
            self.rest = Some(slice.subslice(len, slice.len() - len)?);
        }
        self.at = end;
        Ok(Some(slice.subslice(0, len)?))
    }
}

impl<'a, I: GuestMemorySliceIterator<'a, BS<'a, Bitmap>>> Iterator for Pieces<'a, I> {
    type Item = GuestMemoryResult<Slice<'a>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let piece = self.take().transpose();
        self.ended = !matches!(piece, Some(Ok(_)));
        piece
    }
}

impl<'a, I: GuestMemorySliceIterator<'a, BS<'a, Bitmap>>> FusedIterator for Pieces<'a, I> {}

impl<'a, I: GuestMemorySliceIterator<'a, BS<'a, Bitmap>>> GuestMemorySliceIterator<'a, BS<'a, Bitmap>>
    for Pieces<'a, I>
{
}

#[cfg(test)]
mod tests {
    use vmm_memory::vm_memory::Bytes as _;

    use super::*;
    use crate::testkit::{Driver, DriverQueue, MmioDriver, guest_memory, guest_memory_of};
    use crate::virtio::balloon::{Balloon, MemoryRelease};
    use crate::virtio::{Rng, VirtioDevice};

    #[test]
    fn pieces_make_up_the_whole() {
        let memory = guest_memory_of(&[(0, 0x2000), (0x2000, 0x1000)]).unwrap();
        let faulty = FaultyMemory::new(memory.clone()).in_pieces_of(64).failing_at(0x2800..0x2801);
        let map = faulty.memory();
        let slices = map.get_slices(GuestAddress(0x1ff0), 0x100, Permissions::Write).unwrap();
        let lens: Vec<_> = slices.map(|slice| slice.unwrap().len()).collect();
        assert_eq!(lens, [16, 64, 64, 64, 48]);
        let bytes: Vec<u8> = (0..=255).collect();
        map.write_slice(&bytes, GuestAddress(0x1ff0)).unwrap();
        let mut found = [0; 256];
        memory.memory().read_slice(&mut found, GuestAddress(0x1ff0)).unwrap();
        assert_eq!(found[..], bytes);
        assert!(map.check_range(GuestAddress(0x2800), 1, Permissions::Read));
        map.read_obj::<u8>(GuestAddress(0x2800)).unwrap_err();
        map.read_obj::<u8>(GuestAddress(0x27ff)).unwrap();
        let mut slices = map.get_slices(GuestAddress(0x27c0), 0x100, Permissions::Read).unwrap();
        assert!(slices.next().unwrap().is_ok() && slices.next().unwrap().is_err() && slices.next().is_none());
    }

    fn mmio(device: impl VirtioDevice<FaultyMemory> + 'static, memory: &FaultyMemory) -> MmioDriver {
        MmioDriver::of(device, memory).unwrap().0
    }

    /// CVE-2023-41051: all of a buffer is written, whatever the pieces, and no more is said than was written.
    #[test]
    fn the_entropy_device_in_pieces() {
        let memory = guest_memory(1 << 20).unwrap();
        let faulty = FaultyMemory::new(memory.clone()).in_pieces_of(16).failing_at(0x9000..0xa000);
        let driver = mmio(Rng::new(std::io::repeat(7)), &faulty);
        let mut queue = DriverQueue::new(faulty, 0x1000, 8).unwrap();
        driver.start(0, &[(0, &queue)]).unwrap();
        for (gpa, len, given) in [(0x8001, 1000, 1000), (0x8ff8, 16, 8), (0x9000, 16, 0), (0x8001, 10, 10)] {
            let head = queue.chain().writable(gpa, len).submit().unwrap();
            driver.notify(0);
            assert_eq!(queue.take_used().unwrap(), Some((head.into(), given)), "{gpa:#x}");
        }
        let mut bytes = [0; 0x1000];
        memory.memory().read_slice(&mut bytes, GuestAddress(0x8000)).unwrap();
        assert!(bytes[1..=1000] == [7; 1000] && bytes[0] == 0 && bytes[1001..0xff8] == [0; 0xc0f]);
        assert_eq!(bytes[0xff8..], [7; 8], "and no more than what was said");
        assert_eq!(driver.status(), 0xf);
    }

    #[test]
    fn rings_that_fail_stop_the_device() {
        let memory = guest_memory(1 << 20).unwrap();
        let good = DriverQueue::new(memory.clone(), 0x1000, 8).unwrap();
        let [descriptors, available, used] = good.rings();
        for failing in [descriptors, available + 2, available + 4, used + 2, used + 4] {
            let faulty = FaultyMemory::new(memory.clone()).failing_at(failing..failing + 1);
            let driver = mmio(Rng::new(std::io::repeat(7)), &faulty);
            // The driver's own memory is good.
            let mut queue = DriverQueue::new(memory.clone(), 0x1000, 8).unwrap();
            driver.start(0, &[(0, &queue)]).unwrap();
            queue.chain().writable(0x8000, 8).submit().unwrap();
            driver.notify(0);
            assert_eq!(driver.status(), 0x4f, "{failing:#x}");
            driver.set_status(0);
            assert_eq!(driver.status(), 0);
        }
    }

    struct Nowhere;

    impl MemoryRelease for Nowhere {
        fn release(&self, _gpa: GuestAddress, _len: u64) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn the_balloon_reads_numbers_in_pieces() {
        let faulty =
            FaultyMemory::new(guest_memory(1 << 20).unwrap()).in_pieces_of(17).failing_at(0x9000..0xa000);
        let balloon = Balloon::new(Nowhere);
        let handle = balloon.handle();
        let driver = mmio(balloon, &faulty);
        let mut queue = DriverQueue::new(faulty.clone(), 0x1000, 8).unwrap();
        let other = DriverQueue::new(faulty.clone(), 0x2000, 8).unwrap();
        driver.start(0, &[(0, &queue), (1, &other)]).unwrap();
        for number in 0..100_u32 {
            faulty
                .memory()
                .write_obj((0x40 + number).to_le(), GuestAddress(0x8000 + 4 * u64::from(number)))
                .unwrap();
        }
        for (gpa, len) in [(0x8000, 400), (0x8f00, 0x200)] {
            queue.chain().readable(gpa, len).submit().unwrap();
            driver.notify(0);
            assert!(queue.take_used().unwrap().is_some());
        }
        assert_eq!((handle.counters().inflated, handle.counters().unreadable), (100, 1));
    }
}
