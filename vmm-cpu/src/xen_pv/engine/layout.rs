//! Where things lie in guest-physical memory: the domain's RAM from 0, above it what belongs to the engine.

use std::ops::Range;

use vmm_memory::PAGE_SIZE;
use vmm_memory::vm_memory::GuestAddress;

use crate::error::{Error, Result};

/// Slot of the top-level table under which the engine's pages lie. Xen reserves the slots 256 to 271.
pub const PRIVATE_SLOT: usize = 258;

/// The guest-virtual address of [`PRIVATE_SLOT`].
pub const PRIVATE_VA: u64 = 0xffff_8100_0000_0000;

/// Large pages are the alignment of what is not the domain's RAM.
const ALIGN: u64 = 2 << 20;

/// Frames that the ABI shares with its domain: shared information, then grant tables.
const ABI_FRAMES: u64 = 1 + 32;

/// Least RAM of a domain, in bytes: room for a small kernel with its tables.
const MIN_RAM: u64 = 4 << 20;

/// Most RAM of a domain, in bytes. The machine-to-physical table maps at most this much through one top-level slot.
const MAX_RAM: u64 = 1 << 40;

/// The parts of guest-physical memory.
///
/// | from | what | who |
/// |---|---|---|
/// | 0 | RAM: machine frames 0 to [`Layout::frames`] | the domain |
/// | [`Layout::abi_frames`] | shared information, grant tables | both |
/// | [`Layout::m2p`] | machine-to-physical table, 8 bytes a frame | the ABI writes, the guest kernel reads |
/// | [`Layout::marks`] | what the ABI knows of each frame as a page table, a byte a frame | the ABI writes, the engine reads |
/// | [`Layout::private`] | stubs, descriptor tables, stacks, page tables | the engine |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    ram: u64,
}

impl Layout {
    /// A domain of `ram` bytes.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] unless it is a multiple of a page from 4 MiB to 1 TiB.
    pub fn new(ram: u64) -> Result<Self> {
        if !(MIN_RAM..=MAX_RAM).contains(&ram) || !ram.is_multiple_of(PAGE_SIZE) {
            let allowed = "a multiple of 4096 bytes from 4 MiB to 1 TiB";
            return Err(Error::invalid("RAM of a paravirtual domain", ram, allowed));
        }
        Ok(Self { ram })
    }

    /// Bytes of the domain's RAM, which starts at 0.
    pub fn ram(&self) -> u64 {
        self.ram
    }

    /// Machine frames of the domain: 0 up to this number.
    pub fn frames(&self) -> u64 {
        self.ram / PAGE_SIZE
    }

    /// Machine frames above the RAM that the ABI shares with the domain, which may map them: one for the shared
    /// information, the others for grant tables.
    pub fn abi_frames(&self) -> Range<u64> {
        self.frames()..self.frames() + ABI_FRAMES
    }

    /// Start of the machine-to-physical table.
    pub fn m2p(&self) -> GuestAddress {
        GuestAddress((self.abi_frames().end * PAGE_SIZE).next_multiple_of(ALIGN))
    }

    /// Bytes of the machine-to-physical table, whole large pages.
    pub fn m2p_size(&self) -> u64 {
        (self.frames() * 8).next_multiple_of(ALIGN)
    }

    /// Where the machine-to-physical entry of `frame` lies, `None` if the domain has no such frame.
    pub fn m2p_entry(&self, frame: u64) -> Option<GuestAddress> {
        (frame < self.frames()).then(|| GuestAddress(self.m2p().0 + frame * 8))
    }

    /// Start of the marks of frames.
    pub fn marks(&self) -> GuestAddress {
        GuestAddress(self.m2p().0 + self.m2p_size())
    }

    /// Where the mark of `frame` lies, `None` if the domain has no such frame.
    pub fn mark(&self, frame: u64) -> Option<GuestAddress> {
        (frame < self.frames()).then(|| GuestAddress(self.marks().0 + frame))
    }

    /// Start of the engine's own memory.
    pub fn private(&self) -> GuestAddress {
        GuestAddress((self.marks().0 + self.frames()).next_multiple_of(ALIGN))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_overlap() {
        for ram in [MIN_RAM, MIN_RAM + PAGE_SIZE, 256 << 20, (5 << 30) + 3 * PAGE_SIZE, MAX_RAM] {
            let layout = Layout::new(ram).unwrap();
            let last = layout.m2p_entry(layout.frames() - 1).unwrap();
            assert!(
                layout.m2p().0 >= layout.abi_frames().end * PAGE_SIZE && last.0 + 8 <= layout.private().0,
                "{layout:?}"
            );
            assert_eq!(layout.m2p_entry(layout.frames()), None);
            assert!(last.0 + 8 <= layout.marks().0);
            assert!(layout.mark(layout.frames() - 1).unwrap().0 < layout.private().0);
            assert_eq!(layout.mark(layout.frames()), None);
            assert!(layout.private().0.is_multiple_of(ALIGN));
        }
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        for ram in [0, MIN_RAM - PAGE_SIZE, MIN_RAM + 1, MAX_RAM + PAGE_SIZE, u64::MAX] {
            let error = Layout::new(ram).unwrap_err().to_string();
            assert!(error.contains(&ram.to_string()), "{error}");
        }
    }
}
