//! Guest memory in a guest_memfd, and memory that is private to the guest: optional capabilities of a virtual machine.
//!
//! Threat model: with private memory the guest does not trust its monitor. The monitor cannot read or write a page while it is
//! private; what a guest accesses in the other way than the page has comes back as a [`MemoryFault`], as often as the guest
//! likes. That the host's kernel keeps its promise is not shown to the guest by anything here: for that there is hardware.

use std::fmt;
use std::sync::Arc;

use vmm_memory::vm_memory::GuestAddress;
use vmm_memory::{GuestMemfd, GuestMemfdRange, GuestRegion};

use crate::error::Result;
use crate::vm::GuestAccess;

/// What a guest_memfd is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GuestMemfdKind {
    /// Private halves of regions: no process can map it.
    Private,
    /// Whole regions: the host maps it as it does a memfd ([`Backing::GuestMemfd`](vmm_memory::Backing::GuestMemfd)).
    Mappable,
}

/// Makes guest_memfds and maps them.
pub trait GuestMemfds: fmt::Debug + Send + Sync {
    /// Makes one of `size` bytes, a multiple of [`PAGE_SIZE`](vmm_memory::PAGE_SIZE), all zero, for this virtual machine
    /// alone.
    ///
    /// # Errors
    /// [`Error::Unsupported`](crate::Error::Unsupported) for a kind that the host does not have,
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a size that cannot be.
    fn create(&self, size: u64, kind: GuestMemfdKind) -> Result<Arc<GuestMemfd>>;

    /// As [`Vm::map_memory`](crate::Vm::map_memory), for a region of which a half, or all, is `range`.
    /// [`map_ram`](trait.Vm.html#method.map_ram) does it for the regions of a [`GuestRam`](vmm_memory::GuestRam).
    ///
    /// # Errors
    /// As [`Vm::map_memory`](crate::Vm::map_memory), and [`Error::InvalidArgument`](crate::Error::InvalidArgument) if the
    /// region is read-only or longer than the file.
    fn map(&self, region: Arc<GuestRegion>, access: GuestAccess, range: &GuestMemfdRange) -> Result<()>;
}

/// Decides page by page which half of a region the guest has.
pub trait PrivateMemory: fmt::Debug + Send + Sync {
    /// Gives the guest the private half of `len` bytes at `gpa`, multiples of [`PAGE_SIZE`](vmm_memory::PAGE_SIZE), whatever
    /// it has now. Contents stay behind in the half that they are in; the monitor gives the memory of the other half back if
    /// it is to cost nothing.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for a range that is not all in regions with a private half.
    fn set_private(&self, gpa: GuestAddress, len: u64) -> Result<()>;

    /// Gives the guest the shared half.
    ///
    /// # Errors
    /// As [`set_private`](Self::set_private).
    fn set_shared(&self, gpa: GuestAddress, len: u64) -> Result<()>;
}

/// The guest accessed memory in the way that it does not have there ([`Halt::MemoryFault`](crate::Halt::MemoryFault)).
/// Nothing has happened yet: after [`PrivateMemory::set_private`] or [`PrivateMemory::set_shared`] the guest goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryFault {
    /// First address, a multiple of [`PAGE_SIZE`](vmm_memory::PAGE_SIZE).
    pub gpa: GuestAddress,
    /// Length in bytes.
    pub len: u64,
    /// Whether the guest wants private memory there.
    pub private: bool,
}

impl MemoryFault {
    /// An access to `len` bytes at `gpa`, as to private memory if `private`.
    pub fn new(gpa: GuestAddress, len: u64, private: bool) -> Self {
        Self { gpa, len, private }
    }
}
