//! Guest memory as the ABI sees it: by frame, by guest-physical address, and by guest-virtual address through the guest's
//! own page tables.
//!
//! Threat model: every address and frame number was chosen by the guest, page tables included, and all of it may change
//! between two reads. Nothing outside of the domain's RAM and its shared frames can be reached, and a bad address is an
//! error number, never a panic.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

use vmm_memory::vm_memory::{AtomicInteger, Bytes, GuestAddress, GuestMemoryBackend, VolatileMemory};
use vmm_memory::{GuestMemoryMap, GuestRam};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::abi::errno::Errno;
use super::abi::mmu::entry;
use super::abi::{PAGE_SIZE, shared_info};
use super::engine::Layout;
use crate::error::{Error, Result};

/// Entries of a page table.
pub(crate) const ENTRIES: usize = 512;

/// A page table's entries.
pub(crate) type Table = [u64; ENTRIES];

/// What an access wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
}

/// The domain's memory.
#[derive(Clone, Debug)]
pub(crate) struct DomainMemory {
    map: GuestMemoryMap,
    layout: Layout,
}

impl DomainMemory {
    /// # Errors
    /// [`Error::InvalidArgument`] if `ram` does not hold what `layout` says.
    pub(crate) fn new(ram: &GuestRam, layout: Layout) -> Result<Self> {
        let map = GuestMemoryMap::clone(&ram.memory());
        let parts = [(0, layout.abi_frames().end * PAGE_SIZE), (layout.m2p().0, layout.m2p_size())];
        for (gpa, size) in parts {
            if !map.check_range(GuestAddress(gpa), usize::try_from(size).unwrap_or(usize::MAX)) {
                let allowed = "RAM of the domain, shared frames and machine-to-physical table without a gap";
                return Err(Error::invalid(
                    "guest memory",
                    format_args!("{gpa:#x}+{size:#x} is missing"),
                    allowed,
                ));
            }
        }
        Ok(Self { map, layout })
    }

    pub(crate) fn map(&self) -> &GuestMemoryMap {
        &self.map
    }

    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    /// Whether `frame` is RAM of the domain.
    pub(crate) fn is_ram(&self, frame: u64) -> bool {
        frame < self.layout.frames()
    }

    /// Whether the guest may map `frame`: RAM or one of the frames that it shares with the ABI.
    pub(crate) fn may_map(&self, frame: u64) -> bool {
        frame < self.layout.abi_frames().end
    }

    /// The page with the shared information.
    pub(crate) fn shared_info(&self) -> u64 {
        self.layout.abi_frames().start * PAGE_SIZE
    }

    /// Where the `vcpu_info` of a virtual processor is until the guest moves it.
    pub(crate) fn legacy_info(&self, vcpu: u32) -> u64 {
        self.shared_info() + shared_info::VCPU_INFO + u64::from(vcpu) * shared_info::VCPU_INFO_SIZE
    }

    /// First frame of the grant table, and how many there are.
    pub(crate) fn grant_frames(&self) -> (u64, u64) {
        let frames = self.layout.abi_frames();
        (frames.start + 1, frames.end - frames.start - 1)
    }

    fn check(&self, gpa: u64, len: usize) -> Result<GuestAddress, Errno> {
        let end = u64::try_from(len).ok().and_then(|len| gpa.checked_add(len)).ok_or(Errno::EFAULT)?;
        if end > self.layout.abi_frames().end * PAGE_SIZE {
            return Err(Errno::EFAULT);
        }
        Ok(GuestAddress(gpa))
    }

    /// Copies from guest-physical memory.
    pub(crate) fn read(&self, gpa: u64, data: &mut [u8]) -> Result<(), Errno> {
        let gpa = self.check(gpa, data.len())?;
        self.map.read_slice(data, gpa).map_err(|_| Errno::EFAULT)
    }

    /// Copies to guest-physical memory.
    pub(crate) fn write(&self, gpa: u64, data: &[u8]) -> Result<(), Errno> {
        let gpa = self.check(gpa, data.len())?;
        self.map.write_slice(data, gpa).map_err(|_| Errno::EFAULT)
    }

    fn atomic<T: AtomicInteger, R>(&self, gpa: u64, f: impl FnOnce(&T) -> R) -> Result<R, Errno> {
        let gpa = self.check(gpa, size_of::<T>())?;
        let slice = self.map.get_slice(gpa, size_of::<T>()).map_err(|_| Errno::EFAULT)?;
        let cell = slice.get_atomic_ref::<T>(0).map_err(|_| Errno::EFAULT)?;
        Ok(f(cell))
    }

    /// Loads an aligned word in one access.
    pub(crate) fn load(&self, gpa: u64) -> Result<u64, Errno> {
        self.atomic(gpa, |cell: &AtomicU64| cell.load(Ordering::SeqCst))
    }

    /// Stores an aligned word in one access.
    pub(crate) fn store(&self, gpa: u64, value: u64) -> Result<(), Errno> {
        self.atomic(gpa, |cell: &AtomicU64| cell.store(value, Ordering::Release))
    }

    /// Sets bits of an aligned word and returns what it was.
    pub(crate) fn set_bits(&self, gpa: u64, bits: u64) -> Result<u64, Errno> {
        self.atomic(gpa, |cell: &AtomicU64| cell.fetch_or(bits, Ordering::SeqCst))
    }

    /// Clears bits of an aligned word and returns what it was.
    pub(crate) fn clear_bits(&self, gpa: u64, bits: u64) -> Result<u64, Errno> {
        self.atomic(gpa, |cell: &AtomicU64| cell.fetch_and(!bits, Ordering::SeqCst))
    }

    /// Loads a byte.
    pub(crate) fn load_byte(&self, gpa: u64) -> Result<u8, Errno> {
        self.atomic(gpa, |cell: &AtomicU8| cell.load(Ordering::SeqCst))
    }

    /// Stores a byte and returns what it was.
    pub(crate) fn swap_byte(&self, gpa: u64, value: u8) -> Result<u8, Errno> {
        self.atomic(gpa, |cell: &AtomicU8| cell.swap(value, Ordering::SeqCst))
    }

    /// Loads an aligned 32-bit word in one access.
    pub(crate) fn load_u32(&self, gpa: u64) -> Result<u32, Errno> {
        self.atomic(gpa, |cell: &AtomicU32| cell.load(Ordering::SeqCst))
    }

    /// Stores an aligned 32-bit word in one access.
    pub(crate) fn store_u32(&self, gpa: u64, value: u32) -> Result<(), Errno> {
        self.atomic(gpa, |cell: &AtomicU32| cell.store(value, Ordering::SeqCst))
    }

    /// Stores `new` in an aligned half word if it is `old`; else gives what it is.
    pub(crate) fn exchange_u16(&self, gpa: u64, old: u16, new: u16) -> Result<Result<u16, u16>, Errno> {
        self.atomic(gpa, |cell: &AtomicU16| {
            cell.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst)
        })
    }

    /// Reads a whole page table of the domain's RAM.
    pub(crate) fn table(&self, frame: u64) -> Result<Box<Table>, Errno> {
        if !self.is_ram(frame) {
            return Err(Errno::EINVAL);
        }
        let mut table = Box::new([0; ENTRIES]);
        self.read(frame * PAGE_SIZE, table.as_mut_bytes())?;
        Ok(table)
    }

    /// Writes the machine-to-physical entry of a frame of RAM.
    pub(crate) fn set_m2p(&self, frame: u64, value: u64) -> Result<(), Errno> {
        let gpa = self.layout.m2p_entry(frame).ok_or(Errno::EINVAL)?;
        self.map.store(value, gpa, Ordering::Release).map_err(|_| Errno::EFAULT)
    }

    /// Copies from the machine-to-physical table, `offset` bytes from its start on.
    pub(crate) fn read_m2p(&self, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        let end = u64::try_from(data.len()).ok().and_then(|len| offset.checked_add(len));
        if end.is_none_or(|end| end > self.layout.m2p_size()) {
            return Err(Errno::EFAULT);
        }
        let gpa = GuestAddress(self.layout.m2p().0 + offset);
        self.map.read_slice(data, gpa).map_err(|_| Errno::EFAULT)
    }

    /// What the guest's page tables under `root` say of `va`.
    pub(crate) fn walk(&self, root: u64, va: u64) -> Walk {
        let mut walk = Walk { entries: [(0, 0); 4], depth: 0, rights: Access::Write, user: true };
        let mut table = root;
        for (slot, level) in walk.entries.iter_mut().zip((1..=4_u32).rev()) {
            if !self.is_ram(table) {
                break;
            }
            let index = (va >> (12 + 9 * (level - 1))) & 511;
            let gpa = table * PAGE_SIZE + index * 8;
            let Ok(value) = self.load(gpa) else { break };
            *slot = (gpa, value);
            walk.depth += 1;
            // A large page cannot be built by way of the ABI. One that the guest stored itself is its own affair.
            if value & entry::PRESENT == 0 || (matches!(level, 2 | 3) && value & entry::LARGE != 0) {
                break;
            }
            if value & entry::WRITABLE == 0 {
                walk.rights = Access::Read;
            }
            walk.user &= value & entry::USER != 0;
            table = frame_of(value);
        }
        walk
    }

    /// The guest-physical address behind `va` for an access within one page.
    fn translate(&self, root: u64, va: u64, access: Access) -> Result<u64, Errno> {
        if !may_access(va) {
            return Err(Errno::EFAULT);
        }
        let walk = self.walk(root, va);
        let leaf = walk.leaf().ok_or(Errno::EFAULT)?;
        if access == Access::Write && walk.rights != Access::Write {
            return Err(Errno::EFAULT);
        }
        Ok(frame_of(leaf) * PAGE_SIZE + va % PAGE_SIZE)
    }

    /// An address space of the guest.
    pub(crate) fn space(&self, root: GuestAddress) -> AddressSpace<'_> {
        AddressSpace { memory: self, root: root.0 / PAGE_SIZE }
    }
}

/// The frame that an entry names.
pub(crate) fn frame_of(value: u64) -> u64 {
    (value & entry::FRAME) / PAGE_SIZE
}

/// Whether hypercalls may name this address: canonical, and not in the hole that Xen keeps for itself.
pub(crate) fn may_access(va: u64) -> bool {
    const HOLE: std::ops::Range<u64> = 0xffff_8000_0000_0000..0xffff_8800_0000_0000;
    is_canonical(va) && !HOLE.contains(&va)
}

/// Whether the bits from 47 up are equal.
pub(crate) fn is_canonical(va: u64) -> bool {
    let top = va.cast_signed() >> 47;
    top == 0 || top == -1
}

/// The entries that a walk met, from the top.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Walk {
    entries: [(u64, u64); 4],
    depth: usize,
    /// Whether all of them allow writing.
    pub(crate) rights: Access,
    /// Whether all of them that are present have the user bit.
    pub(crate) user: bool,
}

impl Walk {
    /// The entries met: where they lie and their values. The last may be absent.
    pub(crate) fn entries(&self) -> &[(u64, u64)] {
        self.entries.get(..self.depth).unwrap_or_default()
    }

    /// Where the level 1 entry lies, and its value, which may be absent.
    pub(crate) fn level1(&self) -> Option<(u64, u64)> {
        self.entries().get(3).copied()
    }

    /// The level 1 entry if all levels are present.
    pub(crate) fn leaf(&self) -> Option<u64> {
        self.level1().map(|(_, value)| value).filter(|value| value & entry::PRESENT != 0)
    }
}

/// Guest-virtual memory under one root.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AddressSpace<'a> {
    memory: &'a DomainMemory,
    root: u64,
}

impl AddressSpace<'_> {
    /// Calls `f` for each piece of the range that lies in one page, with its guest-physical address and its part of
    /// the range. Nothing was done to a piece whose translation fails, but the pieces before it are done.
    fn pieces(
        &self,
        va: u64,
        len: usize,
        access: Access,
        mut f: impl FnMut(u64, std::ops::Range<usize>) -> Result<(), Errno>,
    ) -> Result<(), Errno> {
        let mut done = 0;
        while done < len {
            let at = u64::try_from(done).ok().and_then(|done| va.checked_add(done)).ok_or(Errno::EFAULT)?;
            let in_page = usize::try_from(PAGE_SIZE - at % PAGE_SIZE).map_err(|_| Errno::EFAULT)?;
            let piece = in_page.min(len - done);
            f(self.memory.translate(self.root, at, access)?, done..done + piece)?;
            done += piece;
        }
        Ok(())
    }

    /// Copies from the guest.
    pub(crate) fn read_bytes(&self, va: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.pieces(va, data.len(), Access::Read, |gpa, range| {
            self.memory.read(gpa, data.get_mut(range).ok_or(Errno::EFAULT)?)
        })
    }

    /// Copies to the guest.
    pub(crate) fn write_bytes(&self, va: u64, data: &[u8]) -> Result<(), Errno> {
        self.pieces(va, data.len(), Access::Write, |gpa, range| {
            self.memory.write(gpa, data.get(range).ok_or(Errno::EFAULT)?)
        })
    }

    /// Reads a structure.
    pub(crate) fn read<T: FromBytes + IntoBytes>(&self, va: u64) -> Result<T, Errno> {
        let mut value = T::new_zeroed();
        self.read_bytes(va, value.as_mut_bytes())?;
        Ok(value)
    }

    /// Writes a structure.
    pub(crate) fn write<T: IntoBytes + Immutable>(&self, va: u64, value: &T) -> Result<(), Errno> {
        self.write_bytes(va, value.as_bytes())
    }
}

/// Address of element `index` of an array of `T` at `va`.
pub(crate) fn element<T>(va: u64, index: u64) -> Result<u64, Errno> {
    let size = u64::try_from(size_of::<T>()).map_err(|_| Errno::EFAULT)?;
    index.checked_mul(size).and_then(|offset| va.checked_add(offset)).ok_or(Errno::EFAULT)
}

#[cfg(feature = "snapshot")]
mod saved;
#[cfg(test)]
mod tests;
