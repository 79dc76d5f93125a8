//! Guest memory: regions that lie in one host mapping with canaries between them.

#![allow(
    unsafe_code,
    reason = "a region must lie exactly between two canaries, so its mapping is made by hand"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_cpu::{GuestAccess, Vm};
use vmm_memory::vm_memory::mmap::MmapRegionBuilder;
use vmm_memory::vm_memory::{
    Bytes, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MemoryRegionAddress, MmapRegion, VolatileMemory,
};
use vmm_memory::{GuestRegion, PageBitmap};

/// A region of the guest: base and size in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    pub gpa: u64,
    pub size: u64,
}

impl Extent {
    pub fn contains(&self, gpa: u64) -> bool {
        gpa.wrapping_sub(self.gpa) < self.size
    }
}

/// The whole first MiB and the 64 KiB that real mode reaches beyond.
pub const RAM: Extent = Extent { gpa: 0, size: 0x11_0000 };
/// Unmapped and mapped again while the guest runs.
pub const MOVABLE: Extent = Extent { gpa: 0x20_0000, size: 0x1_0000 };
/// Read-only.
pub const ROM: Extent = Extent { gpa: 0x30_0000, size: 0x4000 };
/// The last before 4 GiB.
pub const BELOW_4G: Extent = Extent { gpa: 0xffff_0000, size: 0x1_0000 };
/// The last that page tables reach.
pub const LAST: Extent = Extent { gpa: (1 << 46) - 0x1_0000, size: 0x1_0000 };

pub const EXTENTS: [Extent; 5] = [RAM, MOVABLE, ROM, BELOW_4G, LAST];
const ROM_INDEX: usize = 2;

/// Bytes of a canary.
const CANARY: usize = 0x4000;
const FILL: u8 = 0xc5;

/// The regions and what is between them.
pub struct Arena {
    // In this order: the regions must go before the mapping that they lie in.
    regions: Vec<Arc<GuestRegion>>,
    canaries: Vec<(usize, usize)>,
    movable_mapped: AtomicBool,
    mapping: MmapRegion<()>,
}

impl Arena {
    /// Memory of zeros, ROM filled with a pattern.
    pub fn new() -> Self {
        let sizes = EXTENTS.map(|extent| extent.size as usize);
        // Shared, as the address window needs it.
        let flags = libc::MAP_ANONYMOUS | libc::MAP_SHARED | libc::MAP_NORESERVE;
        let mapping = MmapRegionBuilder::new(sizes.iter().sum::<usize>() + CANARY * (sizes.len() + 1))
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags)
            .build()
            .unwrap();
        let mut at = 0;
        let mut canaries = vec![(at, CANARY)];
        at += CANARY;
        let regions = EXTENTS.iter().zip(sizes).map(|(extent, size)| {
            // SAFETY: `at` and `size` bytes from there are within the mapping: that is how its size was computed.
            let start = unsafe { mapping.as_ptr().add(at) };
            let builder = MmapRegionBuilder::new_with_bitmap(size, None)
                .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                .with_mmap_flags(flags);
            // SAFETY: those bytes are mapped with that protection, for as long as the arena lives, which outlives all
            // that use its regions: see `exercise`.
            let part = unsafe { builder.with_raw_mmap_pointer(start) }.build().unwrap();
            at += size;
            canaries.push((at, CANARY));
            at += CANARY;
            Arc::new(GuestRegionMmap::new(part, GuestAddress(extent.gpa)).unwrap())
        });
        let regions = regions.collect();
        let arena = Self { regions, canaries, movable_mapped: AtomicBool::new(false), mapping };
        for &(at, size) in &arena.canaries {
            let slice = arena.mapping.get_slice(at, size).unwrap();
            slice.copy_from(&[FILL; CANARY]);
        }
        arena.regions[ROM_INDEX].write_slice(&rom(), MemoryRegionAddress(0)).unwrap();
        arena
    }

    /// Lets a virtual machine see all of it.
    pub fn map(&self, vm: &dyn Vm) {
        for (index, region) in self.regions.iter().enumerate() {
            let access = if index == ROM_INDEX { GuestAccess::ReadOnly } else { GuestAccess::ReadWrite };
            vm.map_memory(Arc::clone(region), access).unwrap();
        }
        self.movable_mapped.store(true, Ordering::SeqCst);
    }

    /// Takes the movable region away, if it is there, and returns what it holds then.
    pub fn take_movable(&self, vm: &dyn Vm) -> Option<Vec<u8>> {
        if !self.movable_mapped.swap(false, Ordering::SeqCst) {
            return None;
        }
        vm.unmap_memory(GuestAddress(MOVABLE.gpa)).unwrap();
        Some(self.bytes(MOVABLE))
    }

    /// Puts the movable region back, if it is away.
    pub fn put_movable(&self, vm: &dyn Vm) {
        if !self.movable_mapped.swap(true, Ordering::SeqCst) {
            vm.map_memory(Arc::clone(self.region(MOVABLE)), GuestAccess::ReadWrite).unwrap();
        }
    }

    /// Whether the guest has memory there, for a write or for a read.
    pub fn is_memory(&self, gpa: u64, write: bool) -> bool {
        EXTENTS.iter().enumerate().any(|(index, extent)| {
            extent.contains(gpa)
                && (extent.gpa != MOVABLE.gpa || self.movable_mapped.load(Ordering::SeqCst))
                && !(write && index == ROM_INDEX)
        })
    }

    pub fn region(&self, extent: Extent) -> &Arc<GuestRegion> {
        let index = EXTENTS.iter().position(|other| other.gpa == extent.gpa).unwrap();
        &self.regions[index]
    }

    /// Writes as a device would; what does not fit is cut off.
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        for (extent, region) in EXTENTS.iter().zip(&self.regions) {
            if extent.contains(gpa) && extent.gpa != ROM.gpa {
                let room = (extent.gpa + extent.size - gpa).min(bytes.len() as u64) as usize;
                region.write_slice(&bytes[..room], MemoryRegionAddress(gpa - extent.gpa)).unwrap();
            }
        }
    }

    /// The contents of a region.
    pub fn bytes(&self, extent: Extent) -> Vec<u8> {
        let mut bytes = vec![0; extent.size as usize];
        self.region(extent).read_slice(&mut bytes, MemoryRegionAddress(0)).unwrap();
        bytes
    }

    /// Nothing but the regions that the guest may write has changed.
    pub fn check(&self) {
        let mut bytes = [0; CANARY];
        for &(at, size) in &self.canaries {
            self.mapping.get_slice(at, size).unwrap().copy_to(&mut bytes);
            assert!(bytes.iter().all(|byte| *byte == FILL), "memory outside of the guest's was written");
        }
        assert!(self.bytes(ROM) == rom(), "read-only memory was written");
    }

    /// Every page of RAM that differs from `before` is in the log.
    pub fn check_dirty(&self, before: &[u8], now: &[u8], logged: &PageBitmap) {
        for (page, (before, now)) in before.chunks(4096).zip(now.chunks(4096)).enumerate() {
            assert!(
                before == now || logged.contains(page as u64),
                "page {page:#x} changed and is not logged"
            );
        }
    }
}

fn rom() -> Vec<u8> {
    // Something to execute and to follow, other in each page.
    (0..ROM.size).map(|at| (at / 4096 * 7 + at % 251) as u8).collect()
}

/// How many bytes a region holds.
pub fn size_of_region(region: &GuestRegion) -> u64 {
    region.len()
}
