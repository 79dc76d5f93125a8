//! Chains that were taken from the available ring before their device was saved, and are taken again where it goes on: from the
//! descriptor table, as the ring may have other entries by now.

use virtio_queue::desc::split::Descriptor;
use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestMemory};

/// Bytes of a descriptor.
const DESCRIPTOR: u32 = 16;

/// The descriptors of one chain, as `virtio-queue` walks those that it finds in the ring: no more than the table has, 4 GiB at most, and
/// with one table within the table.
pub(super) struct Again<'a, G: ?Sized> {
    memory: &'a G,
    table: u64,
    size: u16,
    next: u16,
    left: u16,
    bytes: u32,
    indirect: bool,
}

impl<'a, G: GuestMemory + ?Sized> Again<'a, G> {
    pub(super) fn new(memory: &'a G, table: u64, size: u16, head: u16) -> Self {
        Self { memory, table, size, next: head, left: size, bytes: 0, indirect: false }
    }

    fn read(&self) -> Option<Descriptor> {
        if self.left == 0 || self.next >= self.size {
            return None;
        }
        let place = self.table.checked_add(u64::from(DESCRIPTOR) * u64::from(self.next))?;
        self.memory.read_obj(GuestAddress(place)).ok()
    }
}

impl<G: GuestMemory + ?Sized> Iterator for Again<'_, G> {
    type Item = Descriptor;

    fn next(&mut self) -> Option<Descriptor> {
        let mut descriptor = self.read()?;
        if descriptor.refers_to_indirect_table() {
            let len = descriptor.len();
            let entries = u16::try_from(len / DESCRIPTOR).ok()?;
            if self.indirect || !len.is_multiple_of(DESCRIPTOR) {
                return None;
            }
            (self.table, self.size, self.left, self.next) = (descriptor.addr().0, entries, entries, 0);
            self.indirect = true;
            descriptor = self.read()?;
            if descriptor.refers_to_indirect_table() {
                return None;
            }
        }
        self.bytes = self.bytes.checked_add(descriptor.len())?;
        (self.next, self.left) =
            if descriptor.has_next() { (descriptor.next(), self.left - 1) } else { (self.next, 0) };
        Some(descriptor)
    }
}
