//! What can go wrong with guest memory, other than loading a kernel image into it.

use std::fmt;
use std::io;

use vm_memory::GuestRegionCollectionError;
use vm_memory::mmap::MmapRegionError;

use crate::huge::HugePageSize;
use crate::numa::NodeSet;

/// An error of guest RAM, of dirty tracking or of shared memory.
///
/// Every message names the value that was refused and what would have been accepted. Addresses are
/// guest-physical, sizes are in bytes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// A region of no bytes.
    #[error("region at {gpa:#x} has size 0; at least {min} bytes are needed")]
    ZeroSize {
        /// Base address of the region.
        gpa: u64,
        /// Smallest size.
        min: u64,
    },

    /// A base or a size that is not a whole number of pages.
    #[error("region at {gpa:#x} of {size:#x} bytes: base and size must be multiples of {align:#x}")]
    Unaligned {
        /// Base address of the region.
        gpa: u64,
        /// Size of the region.
        size: u64,
        /// What both must be a multiple of.
        align: u64,
    },

    /// A region that ends beyond the physical address space.
    #[error("region at {gpa:#x} of {size:#x} bytes ends beyond the physical address limit {limit:#x}")]
    BeyondAddressSpace {
        /// Base address of the region.
        gpa: u64,
        /// Size of the region.
        size: u64,
        /// First address that is out of reach.
        limit: u64,
    },

    /// More memory than one guest may have.
    #[error("region at {gpa:#x} of {size} bytes, added to {present} bytes present, exceeds {max} bytes")]
    TooLarge {
        /// Base address of the region.
        gpa: u64,
        /// Size of the region.
        size: u64,
        /// Sum of the sizes of the regions that the guest has.
        present: u64,
        /// Largest sum.
        max: u64,
    },

    /// An amount of RAM that cannot be laid out.
    #[error("RAM of {size} bytes; supported are {min} to {max} bytes")]
    RamSize {
        /// The amount asked for.
        size: u64,
        /// Least amount.
        min: u64,
        /// Largest amount.
        max: u64,
    },

    /// Two regions that claim the same guest-physical addresses.
    #[error(
        "region at {gpa:#x} of {size:#x} bytes overlaps the region at {other_gpa:#x} of {other_size:#x} bytes"
    )]
    Overlap {
        /// Base address of the region that was refused.
        gpa: u64,
        /// Size of the region that was refused.
        size: u64,
        /// Base address of the region that is present.
        other_gpa: u64,
        /// Size of the region that is present.
        other_size: u64,
    },

    /// A region whose host mapping the guest already has at another address.
    ///
    /// Two regions over one mapping would share one dirty bitmap, and harvesting one would take the
    /// other's pages. Map the memory twice instead.
    #[error("region at {gpa:#x} shares its host mapping with the region at {other_gpa:#x}")]
    SharedHostMapping {
        /// Base address of the region that was refused.
        gpa: u64,
        /// Base address of the region that is present.
        other_gpa: u64,
    },

    /// A region whose dirty bitmap does not have one bit for each page.
    #[error("region at {gpa:#x} has a dirty bitmap of {bits} bits for {pages} pages of {page_size} bytes")]
    BitmapGranule {
        /// Base address of the region.
        gpa: u64,
        /// Bits of its bitmap.
        bits: u64,
        /// Pages of the region.
        pages: u64,
        /// Bytes of a page.
        page_size: u64,
    },

    /// No region has this base address.
    #[error("no region starts at {gpa:#x}")]
    NoRegion {
        /// The address asked for.
        gpa: u64,
    },

    /// A file that ends before the region that it should back.
    #[error(
        "region at {gpa:#x} needs {size:#x} bytes from file offset {offset:#x}; the file has {file_size:#x}"
    )]
    FileTooShort {
        /// Base address of the region.
        gpa: u64,
        /// Where in the file the region begins.
        offset: u64,
        /// Size of the region.
        size: u64,
        /// Size of the file.
        file_size: u64,
    },

    /// A file offset that is not a whole number of pages.
    #[error("region at {gpa:#x}: file offset {offset:#x} is not a multiple of {align:#x}")]
    UnalignedOffset {
        /// Base address of the region.
        gpa: u64,
        /// Where in the file the region begins.
        offset: u64,
        /// What the offset must be a multiple of.
        align: u64,
    },

    /// The host refused to map the region.
    #[error("cannot map the region at {gpa:#x} of {size:#x} bytes")]
    Map {
        /// Base address of the region.
        gpa: u64,
        /// Size of the region.
        size: u64,
        /// What the host answered.
        source: MmapRegionError,
    },

    /// The host's pool has too few huge pages.
    #[error(
        "region at {gpa:#x} of {size:#x} bytes needs {needed} huge pages of {page_size}, of which the host has {available} to \
         give; to have enough: echo {wanted} > {file}"
    )]
    HugePages {
        /// Base address of the region.
        gpa: u64,
        /// Size of the region.
        size: u64,
        /// Size of the pages.
        page_size: HugePageSize,
        /// Pages that the region takes.
        needed: u64,
        /// Pages that are neither in use nor reserved.
        available: u64,
        /// Size of a pool that is large enough.
        wanted: u64,
        /// The file that holds the size of the pool.
        file: String,
    },

    /// The NUMA nodes that a region is bound to have too few huge pages, though the host has enough.
    #[error(
        "region at {gpa:#x} of {size:#x} bytes needs {needed} huge pages of {page_size} on NUMA nodes {nodes}, which have \
         {free}; to have more: echo N > /sys/devices/system/node/nodeX/hugepages/hugepages-{}kB/nr_hugepages",
        .page_size.bytes() >> 10
    )]
    HugePagesOnNodes {
        /// Base address of the region.
        gpa: u64,
        /// Size of the region.
        size: u64,
        /// Size of the pages.
        page_size: HugePageSize,
        /// Pages that the region takes.
        needed: u64,
        /// The nodes.
        nodes: NodeSet,
        /// Free pages on these nodes.
        free: u64,
    },

    /// Huge pages of a size that the host does not have.
    #[error("huge pages of {page_size}: the host has pools of these sizes: {supported}")]
    HugePageSize {
        /// The size asked for.
        page_size: HugePageSize,
        /// Those there are.
        supported: String,
    },

    /// The pool of huge pages did not grow.
    #[error("cannot add {pages} huge pages of {page_size} to the host's pool")]
    HugePagePool {
        /// Size of the pages.
        page_size: HugePageSize,
        /// How many were to be added.
        pages: u64,
        /// What the host answered.
        source: io::Error,
    },

    /// A NUMA node without memory, or none at all.
    #[error("NUMA node {node} has no memory; the host has nodes {present}")]
    NumaNode {
        /// The node asked for.
        node: u32,
        /// The nodes with memory.
        present: NodeSet,
    },

    /// A NUMA policy that names no node.
    #[error("the NUMA policy names no node; the host has nodes {present}")]
    NoNumaNodes {
        /// The nodes with memory.
        present: NodeSet,
    },

    /// A NUMA policy for memory that follows none.
    #[error(
        "region at {gpa:#x}: {what} follows no NUMA policy of a mapping; use anonymous memory, a memfd or huge pages"
    )]
    NumaBacking {
        /// Base address of the region.
        gpa: u64,
        /// What the region is made of.
        what: &'static str,
    },

    /// The host did not take the NUMA policy.
    #[error("cannot set the NUMA policy of {size:#x} bytes at {gpa:#x} to nodes {nodes}")]
    Numa {
        /// Base address of the region.
        gpa: u64,
        /// Size of the region.
        size: u64,
        /// The nodes of the policy.
        nodes: NodeSet,
        /// What the host answered.
        source: io::Error,
    },

    /// A guest_memfd that the host cannot map, as what a region is made of.
    #[error(
        "region at {gpa:#x}: its guest_memfd is private to the guest; make a mappable one, or give the region a shared half"
    )]
    NotMappable {
        /// Base address of the region.
        gpa: u64,
    },

    /// A system call on the file behind a region failed.
    #[error("{operation} failed on the memory file of {size} bytes")]
    File {
        /// What was attempted.
        operation: &'static str,
        /// Size of the memory concerned; 0 where it is not known yet.
        size: u64,
        /// What the host answered.
        source: io::Error,
    },

    /// Memory could not be made resident.
    #[error("cannot prefault {size:#x} bytes at {gpa:#x}")]
    Prefault {
        /// First address of the part that failed.
        gpa: u64,
        /// Size of that part.
        size: u64,
        /// What the host answered.
        source: io::Error,
    },

    /// A range of which a part lies in no region.
    #[error("{size:#x} bytes at {gpa:#x}: there is no RAM at {hole:#x}")]
    NoRam {
        /// First address of the range.
        gpa: u64,
        /// Size of the range.
        size: u64,
        /// First address where there is none.
        hole: u64,
    },

    /// Memory that is not this guest's to give back.
    #[error("cannot discard {size:#x} bytes at {gpa:#x}: the region at {region:#x} {kept}")]
    NotDiscardable {
        /// First address of the range.
        gpa: u64,
        /// Size of the range.
        size: u64,
        /// Base address of the region that keeps its contents.
        region: u64,
        /// Why it does.
        kept: Kept,
    },

    /// The host did not take memory back. Some of it may be discarded.
    #[error("cannot discard {size:#x} bytes at {gpa:#x}")]
    Discard {
        /// First address of the part that failed.
        gpa: u64,
        /// Size of that part.
        size: u64,
        /// What the host answered.
        source: io::Error,
    },

    /// A backend could not report its dirty pages. Nothing is lost: what had been collected comes
    /// with the next harvest that succeeds.
    #[error("dirty log failed for the region at {gpa:#x}")]
    DirtyLog {
        /// Base address of the region.
        gpa: u64,
        /// What the backend answered.
        source: Box<dyn std::error::Error + Send + Sync>,
    },

    /// A descriptor that is not a memfd which can be sealed.
    #[error("the descriptor is not a memfd: it has no file seals")]
    NotMemfd {
        /// What the host answered.
        source: io::Error,
    },

    /// A memfd without the seals that make it safe to map.
    #[error("the memfd lacks {}", Names(.missing))]
    MissingSeals {
        /// The seals that are needed and not there.
        missing: Vec<Seal>,
    },

    /// A memfd that was to be mapped for writing and is sealed against that.
    #[error("the memfd carries {seal}, so it can be mapped read-only only")]
    SealedAgainstWriting {
        /// The seal found.
        seal: Seal,
    },

    /// A descriptor that was opened read-only where writing is needed.
    #[error("the memfd descriptor is not open for reading and writing")]
    DescriptorAccess,

    /// A memfd to which no seal can be added any more.
    #[error("{wanted} cannot be added: the memfd carries F_SEAL_SEAL")]
    SealsLocked {
        /// The seal that was to be added.
        wanted: Seal,
    },

    /// The regions do not form an address space. [`GuestRam`](crate::GuestRam) checks everything that
    /// `vm-memory` does, so this reports a disagreement between the two.
    #[error("vm-memory refused the regions")]
    Collection(#[from] GuestRegionCollectionError),
}

/// Why memory of a region cannot be discarded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
#[non_exhaustive]
pub enum Kept {
    /// The region is read-only: its contents are what it is there for.
    #[error("is read-only")]
    ReadOnly,
    /// Behind it is a file, or memory that others share: discarding would take it from them.
    #[error("is backed by a file that others may use")]
    File,
}

/// A seal of a memfd (fcntl(2), File Sealing).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Seal {
    /// `F_SEAL_SEAL`: no seal can be added.
    Seal,
    /// `F_SEAL_SHRINK`: the file cannot become shorter, so a mapping of it cannot raise SIGBUS.
    Shrink,
    /// `F_SEAL_GROW`: the file cannot become longer.
    Grow,
    /// `F_SEAL_WRITE`: nobody can write.
    Write,
    /// `F_SEAL_FUTURE_WRITE`: nobody can write, but for writable mappings made earlier.
    FutureWrite,
}

impl fmt::Display for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Seal => "F_SEAL_SEAL",
            Self::Shrink => "F_SEAL_SHRINK",
            Self::Grow => "F_SEAL_GROW",
            Self::Write => "F_SEAL_WRITE",
            Self::FutureWrite => "F_SEAL_FUTURE_WRITE",
        })
    }
}

struct Names<'a>(&'a [Seal]);

impl fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, seal) in self.0.iter().enumerate() {
            let separator = if index == 0 { "" } else { ", " };
            write!(f, "{separator}{seal}")?;
        }
        Ok(())
    }
}
