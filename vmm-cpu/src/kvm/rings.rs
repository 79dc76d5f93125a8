//! The rings that a virtual machine shares with the host's kernel: gathered writes and dirty pages. All of their `unsafe`.
//!
//! Both sides write, so each word is read and written once, atomically, with the order that the kernel's documentation asks
//! for. The guest cannot reach the rings; how fast they fill is the guest's doing. What is read is checked all the same:
//! an index or a length that cannot be is an error and nothing is accessed by it.
#![allow(unsafe_code, reason = "rings in mappings that the kernel writes to")]

use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};

use kvm_bindings::{KVM_DIRTY_GFN_F_MASK, KVM_DIRTY_LOG_PAGE_OFFSET, kvm_coalesced_mmio, kvm_dirty_gfn};
use kvm_ioctls::VcpuFd;
use vmm_memory::PAGE_SIZE;

/// A shared mapping of part of a vCPU's descriptor.
#[derive(Debug)]
struct Mapping {
    base: NonNull<u8>,
    size: usize,
}

// SAFETY: the mapping is valid for the whole life of the value, on every thread, and all access to it is atomic or volatile.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(vcpu: &VcpuFd, page: u32, size: usize) -> io::Result<Self> {
        let offset = i64::from(page) * PAGE_SIZE.cast_signed();
        let (rights, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        // SAFETY: a fresh shared mapping chosen by the kernel; it aliases no Rust object.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), size, rights, flags, vcpu.as_raw_fd(), offset) };
        Self::of(base, size)
    }

    fn of(base: *mut libc::c_void, size: usize) -> io::Result<Self> {
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base =
            NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap returned the null page"))?;
        Ok(Self { base, size })
    }

    /// Where `len` bytes at `offset` are, which lie inside.
    fn at<T>(&self, offset: usize) -> io::Result<NonNull<T>> {
        let end = offset.checked_add(size_of::<T>()).filter(|end| *end <= self.size);
        if end.is_none() || !offset.is_multiple_of(align_of::<T>()) {
            return Err(io::Error::other(format!("offset {offset:#x} in a ring of {:#x} bytes", self.size)));
        }
        // SAFETY: the offset was just seen to lie inside of the mapping.
        Ok(unsafe { self.base.add(offset) }.cast())
    }

    /// The word at `offset`.
    fn word(&self, offset: usize) -> io::Result<&AtomicU32> {
        let at = self.at::<u32>(offset)?;
        // SAFETY: it is mapped, aligned and writable while self lives, and Rust code accesses it atomically only.
        Ok(unsafe { AtomicU32::from_ptr(at.as_ptr()) })
    }

    /// A copy of what stands at `offset`.
    ///
    /// # Safety
    /// `T` consists of integers, of which every bit pattern is valid.
    unsafe fn copy<T: Copy>(&self, offset: usize) -> io::Result<T> {
        let at = self.at::<T>(offset)?;
        // SAFETY: it is mapped and aligned while self lives. The kernel may write it at the same time, for which reason the
        // access is volatile; the protocols of the rings exclude that for what is used of the copy.
        Ok(unsafe { at.as_ptr().read_volatile() })
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value made the mapping, nobody else knows its address, and no reference into it outlives &self.
        let result = unsafe { libc::munmap(self.base.as_ptr().cast(), self.size) };
        if result != 0 {
            tracing::error!(error = %io::Error::last_os_error(), "kvm: munmap of a ring failed");
        }
    }
}

/// A write that waited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct GatheredWrite {
    pub(super) address: u64,
    pub(super) is_port: bool,
    data: [u8; 8],
    len: usize,
}

impl GatheredWrite {
    pub(super) fn data(&self) -> &[u8] {
        self.data.get(..self.len).unwrap_or(&self.data)
    }
}

/// The ring of gathered writes (Linux `Documentation/virt/kvm/api.rst`, KVM_REGISTER_COALESCED_MMIO), one of each virtual
/// machine: two indices and entries, on one page.
#[derive(Debug)]
pub(super) struct CoalescedRing(Mapping);

impl CoalescedRing {
    /// Entries of the ring, of which one stays free.
    pub(super) const ENTRIES: u32 = 170;
    const FIRST: usize = 0;
    const LAST: usize = 4;
    const START: usize = 8;

    /// Maps the ring, which is at page `page` (KVM_CAP_COALESCED_MMIO) of each vCPU of the machine.
    pub(super) fn map(vcpu: &VcpuFd, page: u32) -> io::Result<Self> {
        Mapping::new(vcpu, page, 4096).map(Self)
    }

    /// Takes the oldest write.
    pub(super) fn take(&mut self) -> io::Result<Option<GatheredWrite>> {
        let (first, last) = (self.0.word(Self::FIRST)?, self.0.word(Self::LAST)?);
        // The kernel writes an entry and then `last`.
        let (index, last) = (first.load(Ordering::Relaxed), last.load(Ordering::Acquire));
        if index == last {
            return Ok(None);
        }
        if index >= Self::ENTRIES || last >= Self::ENTRIES {
            return Err(io::Error::other(format!("entries {index} to {last} of {}", Self::ENTRIES)));
        }
        let offset = Self::START + index as usize * size_of::<kvm_coalesced_mmio>();
        // SAFETY: the structure and the union in it are integers.
        let entry: kvm_coalesced_mmio = unsafe { self.0.copy(offset)? };
        // SAFETY: both members are integers of the same place.
        let is_port = unsafe { entry.__bindgen_anon_1.pio } != 0;
        // After this the kernel may write the entry again.
        first.store((index + 1) % Self::ENTRIES, Ordering::Release);
        match usize::try_from(entry.len) {
            Ok(len @ 1..=8) => {
                Ok(Some(GatheredWrite { address: entry.phys_addr, is_port, data: entry.data, len }))
            }
            _ => Err(io::Error::other(format!("a write of {} bytes", entry.len))),
        }
    }
}

/// An entry of this flags is to be collected.
const DIRTY: u32 = 1;
/// An entry of this flags was collected; KVM_RESET_DIRTY_RINGS makes it free.
const RESET: u32 = 2;

/// A page that a vCPU wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct DirtyEntry {
    /// Number of the memory slot; the address space is in the upper half.
    pub(super) slot: u32,
    /// Page in the slot.
    pub(super) page: u64,
}

/// The ring of the pages that one vCPU wrote (KVM_CAP_DIRTY_LOG_RING).
#[derive(Debug)]
pub(super) struct DirtyRing {
    mapping: Mapping,
    entries: u32,
    /// Entry to be collected next.
    next: u32,
}

impl DirtyRing {
    /// Maps the ring of `vcpu`, which has `entries` entries, a power of two.
    pub(super) fn map(vcpu: &VcpuFd, entries: u32) -> io::Result<Self> {
        let mapping =
            Mapping::new(vcpu, KVM_DIRTY_LOG_PAGE_OFFSET, entries as usize * size_of::<kvm_dirty_gfn>())?;
        Ok(Self { mapping, entries, next: 0 })
    }

    /// Collects what is there; how many entries that was, at most all.
    pub(super) fn collect(&mut self, mut each: impl FnMut(DirtyEntry)) -> io::Result<u32> {
        for taken in 0..self.entries {
            let offset = self.next as usize * size_of::<kvm_dirty_gfn>();
            let flags = self.mapping.word(offset)?;
            // The kernel writes slot and offset and then the flags.
            if flags.load(Ordering::Acquire) & KVM_DIRTY_GFN_F_MASK != DIRTY {
                return Ok(taken);
            }
            // SAFETY: the structure is integers.
            let entry: kvm_dirty_gfn = unsafe { self.mapping.copy(offset)? };
            each(DirtyEntry { slot: entry.slot, page: entry.offset });
            // The kernel looks at the flags when it is told to.
            flags.store(RESET, Ordering::Release);
            self.next = (self.next + 1) % self.entries.max(1);
        }
        Ok(self.entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory in place of a ring, with `words` at its start.
    fn ring(size: usize, words: &[u32]) -> Mapping {
        let (rights, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a fresh mapping.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), size, rights, flags, -1, 0) };
        let mapping = Mapping::of(base, size).unwrap();
        for (index, word) in words.iter().enumerate() {
            mapping.word(index * 4).unwrap().store(*word, Ordering::Relaxed);
        }
        mapping
    }

    /// A ring of gathered writes: indices, then address, length, port, data of the first entries.
    fn gathered(first: u32, last: u32, entries: &[[u32; 6]]) -> CoalescedRing {
        let mut words = vec![first, last];
        entries.iter().for_each(|entry| words.extend(entry));
        CoalescedRing(ring(4096, &words))
    }

    #[test]
    fn writes_are_taken_in_order_and_around_the_end() {
        let mut ring = gathered(0, 2, &[[0x1000, 1, 4, 0, 0x4433_2211, 0], [0x80, 0, 1, 1, 0x55, 0]]);
        let first = ring.take().unwrap().unwrap();
        assert_eq!(
            (first.address, first.is_port, first.data()),
            (0x1_0000_1000, false, &[0x11, 0x22, 0x33, 0x44][..])
        );
        let second = ring.take().unwrap().unwrap();
        assert_eq!((second.address, second.is_port, second.data()), (0x80, true, &[0x55][..]));
        assert_eq!(ring.take().unwrap(), None);
        let mut ring = gathered(169, 1, &[[7, 0, 2, 0, 0, 0]]);
        ring.0.word(CoalescedRing::START + 169 * 24 + 8).unwrap().store(8, Ordering::Relaxed);
        assert_eq!(ring.take().unwrap().unwrap().data().len(), 8);
        assert_eq!(ring.take().unwrap().unwrap().address, 7);
        assert_eq!(ring.take().unwrap(), None);
    }

    #[test]
    fn indices_and_lengths_that_cannot_be_are_errors() {
        for (first, last) in [(170, 0), (0, 170), (u32::MAX, 0), (0, u32::MAX), (u32::MAX, u32::MAX - 1)] {
            let error = gathered(first, last, &[]).take().unwrap_err().to_string();
            assert!(error.contains(&first.to_string()) && error.contains("170"), "{error}");
        }
        for len in [0, 9, u32::MAX] {
            let mut ring = gathered(0, 1, &[[0, 0, len, 0, 0, 0]]);
            let error = ring.take().unwrap_err().to_string();
            assert!(error.contains(&len.to_string()), "{error}");
            assert_eq!(ring.take().unwrap(), None, "it is gone");
        }
    }

    /// A ring of dirty pages with these flags; slot and page say which entry it is.
    fn dirty(flags: &[u32]) -> DirtyRing {
        let entries = u32::try_from(flags.len()).unwrap();
        let words: Vec<u32> =
            (0..entries).zip(flags).flat_map(|(index, flags)| [*flags, index, index + 100, 0]).collect();
        DirtyRing { mapping: ring(4096, &words), entries, next: 0 }
    }

    fn collect(ring: &mut DirtyRing) -> (u32, Vec<DirtyEntry>) {
        let mut pages = Vec::new();
        let taken = ring.collect(|entry| pages.push(entry)).unwrap();
        (taken, pages)
    }

    #[test]
    fn dirty_pages_are_collected_once_and_around_the_end() {
        let mut ring = dirty(&[1, 1, 1, 0]);
        let entry = |slot: u32| DirtyEntry { slot, page: u64::from(slot) + 100 };
        assert_eq!(collect(&mut ring), (3, vec![entry(0), entry(1), entry(2)]));
        assert_eq!(collect(&mut ring), (0, vec![]));
        for index in [3, 0] {
            assert_ne!(ring.mapping.word(index * 16).unwrap().swap(DIRTY, Ordering::Relaxed), DIRTY);
        }
        assert_eq!(collect(&mut ring), (2, vec![entry(3), entry(0)]));
        let flags = |index: usize| ring.mapping.word(index * 16).unwrap().load(Ordering::Relaxed);
        assert_eq!([0, 1, 2, 3].map(flags), [RESET; 4]);
    }

    #[test]
    fn a_ring_that_never_ends_is_collected_once_around() {
        let mut ring = dirty(&[1; 8]);
        let mut seen = 0;
        let mapping = super::Mapping { base: ring.mapping.base, size: ring.mapping.size };
        let taken = ring.collect(|_| {
            seen += 1;
            // A kernel that fills each entry again at once.
            for index in 0..8 {
                mapping.word(index * 16).unwrap().store(DIRTY, Ordering::Relaxed);
            }
        });
        std::mem::forget(mapping);
        assert_eq!((taken.unwrap(), seen), (8, 8));
    }

    #[test]
    fn nothing_outside_of_the_mapping_is_accessed() {
        let mapping = ring(4096, &[]);
        for offset in [4096, 4093, usize::MAX, 2] {
            assert!(mapping.word(offset).is_err(), "{offset}");
        }
        // One entry too many for the mapping.
        let mut ring = DirtyRing { mapping, entries: 512, next: 256 };
        assert!(ring.collect(|_| ()).is_err());
    }
}
