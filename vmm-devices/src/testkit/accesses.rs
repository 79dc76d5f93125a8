//! Guest memory that writes down who read and wrote what.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use vmm_memory::GuestMemoryMap;
use vmm_memory::vm_memory::bitmap::BS;
use vmm_memory::vm_memory::guest_memory::GuestMemorySliceIterator;
use vmm_memory::vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryLoadGuard, GuestMemoryResult, Permissions,
};

use super::Memory;
use crate::interrupt::lock;

/// An access to guest memory. One that found no RAM is one as well.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    /// Guest-physical addresses.
    pub gpas: Range<u64>,
    /// Whether it was one to write.
    pub writes: bool,
}

/// The memory of [`guest_memory`](super::guest_memory), which remembers each access to it: for what a device must read once
/// (CVE-2015-8550), must not write, or must not touch any more. Clones are the same memory. What a device maps, to read it
/// later, counts when it is looked up.
///
/// ```
/// use vmm_devices::testkit::{Access, MemoryRecorder, guest_memory};
/// use vmm_devices::vmm_memory::vm_memory::{Bytes, GuestAddress, GuestAddressSpace};
///
/// let memory = MemoryRecorder::new(guest_memory(1 << 20)?);
/// let length: u32 = memory.memory().read_obj(GuestAddress(0x1000))?; // checked
/// let again: u32 = memory.memory().read_obj(GuestAddress(0x1000))?; // and used, though it may be another one by now
/// assert_eq!(memory.read_again(0x1000..0x1010), Some(0x1000));
/// assert_eq!(memory.take()[1], Access { gpas: 0x1000..0x1004, writes: false });
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct MemoryRecorder {
    memory: Memory,
    accesses: Accesses,
}

type Accesses = Arc<Mutex<Vec<Access>>>;

impl MemoryRecorder {
    /// Nothing was accessed so far.
    pub fn new(memory: Memory) -> Self {
        Self { memory, accesses: Accesses::default() }
    }

    /// The memory itself, whose accesses nobody writes down: the driver's, as a rule.
    pub fn unrecorded(&self) -> &Memory {
        &self.memory
    }

    /// The accesses since the last call, in their order.
    pub fn take(&self) -> Vec<Access> {
        std::mem::take(&mut lock(&self.accesses))
    }

    /// The first byte of `gpas` that was read more than once since the last [`MemoryRecorder::take`], by the order of the
    /// accesses.
    pub fn read_again(&self, gpas: Range<u64>) -> Option<u64> {
        let accesses = lock(&self.accesses);
        let reads: Vec<_> = accesses
            .iter()
            .filter(|access| !access.writes)
            .map(|Access { gpas: read, .. }| read.start.max(gpas.start)..read.end.min(gpas.end))
            .filter(|part| !part.is_empty())
            .collect();
        reads.iter().enumerate().find_map(|(index, again)| {
            let before = reads.get(..index).unwrap_or_default();
            let common = before.iter().map(|first| first.start.max(again.start)..first.end.min(again.end));
            common.filter(|common| !common.is_empty()).map(|common| common.start).min()
        })
    }
}

impl GuestAddressSpace for MemoryRecorder {
    type M = RecordedMap;
    type T = Arc<RecordedMap>;

    fn memory(&self) -> Arc<RecordedMap> {
        Arc::new(RecordedMap { map: self.memory.memory(), accesses: Arc::clone(&self.accesses) })
    }
}

/// A snapshot of [`MemoryRecorder`].
#[derive(Debug)]
pub struct RecordedMap {
    map: GuestMemoryLoadGuard<GuestMemoryMap>,
    accesses: Accesses,
}

impl GuestMemory for RecordedMap {
    type PhysicalMemory = GuestMemoryMap;
    type Bitmap = <GuestMemoryMap as GuestMemory>::Bitmap;

    fn check_range(&self, gpa: GuestAddress, count: usize, access: Permissions) -> bool {
        GuestMemory::check_range(&*self.map, gpa, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        gpa: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> GuestMemoryResult<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        let gpas = gpa.0..gpa.0.saturating_add(count as u64);
        let writes = matches!(access, Permissions::Write | Permissions::ReadWrite);
        lock(&self.accesses).push(Access { gpas, writes });
        GuestMemory::get_slices(&*self.map, gpa, count, access)
    }

    fn physical_memory(&self) -> Option<&GuestMemoryMap> {
        Some(&self.map)
    }
}

#[cfg(test)]
mod tests {
    use vmm_memory::vm_memory::Bytes as _;

    use super::*;
    use crate::testkit::guest_memory;

    #[test]
    fn accesses_are_written_down_in_their_order() {
        let memory = MemoryRecorder::new(guest_memory(0x3000).unwrap());
        memory.unrecorded().memory().write_obj(7_u8, GuestAddress(5)).unwrap();
        let map = memory.clone().memory();
        map.write_slice(&[1; 16], GuestAddress(0x10)).unwrap();
        map.read_slice(&mut [0; 4], GuestAddress(0x18)).unwrap();
        map.read_obj::<u64>(GuestAddress(0x2fff)).unwrap_err();
        let access = |gpas, writes| Access { gpas, writes };
        assert_eq!(
            memory.take(),
            [access(0x10..0x20, true), access(0x18..0x1c, false), access(0x2fff..0x3007, false)]
        );
        assert_eq!(memory.take(), []);
    }

    #[test]
    fn what_is_read_again_is_found() {
        let memory = MemoryRecorder::new(guest_memory(0x3000).unwrap());
        let read = |gpa, len| memory.memory().read_slice(&mut vec![0; len], GuestAddress(gpa)).unwrap();
        read(0x100, 16);
        read(0x110, 16);
        memory.memory().write_obj(1_u64, GuestAddress(0x100)).unwrap();
        assert_eq!(memory.read_again(0..0x3000), None, "side by side, and written");
        read(0x11f, 2);
        read(0x108, 1);
        assert_eq!(memory.read_again(0..0x3000), Some(0x11f));
        assert_eq!(memory.read_again(0x100..0x110), Some(0x108));
        assert_eq!(memory.read_again(0x120..0x3000), None);
        memory.take();
        assert_eq!(memory.read_again(0..0x3000), None);
    }
}
