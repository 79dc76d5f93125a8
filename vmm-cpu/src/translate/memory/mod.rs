//! Guest memory as a vCPU sees it: the map of guest-physical addresses, the page-table walk, the software TLB.
//!
//! Threat model: every address is the guest's choice, and page tables are guest memory that other vCPUs and devices
//! write at the same time. An entry is read once and judged by what was read.

mod budget;
mod code_pages;
pub(crate) mod frame;
mod host;
mod map;
mod reserve;
mod space;
mod tlb;
mod walk;
mod window;

pub(crate) use budget::WINDOW_PAGES;
pub(crate) use code_pages::{Added, VcpuSet};
pub(crate) use host::{HostWord, Order};
pub(crate) use map::{MemoryMap, Slot};
#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
pub(crate) use tlb::Invalidated;
pub(crate) use tlb::{Fetched, Forgotten, Reach, Tlb};
pub(crate) use walk::{Access, GPA_BITS, Paging, Translation, walk};
pub(crate) use window::{Figures as WindowFigures, NEAR};

pub(crate) const PAGE: u64 = 4096;
pub(crate) const PAGE_MASK: u64 = !(PAGE - 1);
