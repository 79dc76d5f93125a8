#![doc = include_str!("../README.md")]

#[cfg(not(target_os = "linux"))]
compile_error!("vmm-memory needs Linux: it is built on memfd seals and MADV_POPULATE_WRITE");

mod advice;
mod backing;
#[cfg(feature = "boot")]
pub mod boot;
mod crew;
pub mod dirty;
mod discard;
mod error;
mod guest_memfd;
mod huge;
pub mod layout;
mod mempolicy;
mod numa;
mod page_bitmap;
mod prefault;
mod ram;
mod region;
pub mod shared;
#[cfg(feature = "snapshot")]
pub mod snapshot;

pub use backing::Backing;
pub use dirty::{DirtyLog, DirtyPages, DirtyTracker};
pub use error::{Kept, MemoryError, Seal};
pub use guest_memfd::{GuestMemfd, GuestMemfdRange};
pub use huge::{HugePagePool, HugePageSize, ReservedHugePages};
pub use numa::{NodeSet, NumaPolicy};
pub use page_bitmap::{PageBitmap, PageRanges};
pub use ram::{GuestRam, GuestRamBuilder};
pub use region::{
    DirtyBitmap, GuestMemoryMap, GuestRegion, PAGE_SIZE, RegionConfig, host_page_size, is_read_only,
};
pub use shared::{Access, PeerMemory, ReadOnlySharedMemory, SharedMapping, SharedMemory};
pub use vm_memory;
