//! Guest memory for tests.

use vmm_memory::vm_memory::{GuestAddress, GuestMemoryAtomic};
use vmm_memory::{GuestMemoryMap, GuestRam, MemoryError, RegionConfig};

/// Guest memory as the kit makes it.
pub type Memory = GuestMemoryAtomic<GuestMemoryMap>;

/// `size` bytes of guest memory from address 0 on; a multiple of 4096.
///
/// # Errors
/// If there cannot be so much.
pub fn guest_memory(size: u64) -> Result<Memory, MemoryError> {
    guest_memory_of(&[(0, size)])
}

/// Guest memory of several regions: address and size of each, multiples of 4096. Regions that touch are still two, so a
/// buffer can lie across their border.
///
/// # Errors
/// If regions overlap, or cannot be.
pub fn guest_memory_of(regions: &[(u64, u64)]) -> Result<Memory, MemoryError> {
    let builder = regions.iter().fold(GuestRam::builder(), |builder, (gpa, size)| {
        builder.region(RegionConfig::new(GuestAddress(*gpa), *size).huge_pages(false))
    });
    Ok(builder.build()?.address_space())
}
