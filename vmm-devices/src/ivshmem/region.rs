//! Memory that devices have in common, and a device's seat at it.

use std::fmt;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;

use vmm_memory::vm_memory::GuestAddress;
use vmm_memory::{
    Access, MemoryError, PAGE_SIZE, PeerMemory, ReadOnlySharedMemory, SharedMapping, SharedMemory,
};

use super::error::IvshmemError;
use super::metrics::{IvshmemFigures, IvshmemMetrics};
use super::port::{Port, check_region};
use super::window::Window;
use crate::channel::{DoorbellRing, Grant, RegionMap};

/// What a region is made of.
#[derive(Debug)]
enum Memory {
    Writable(SharedMemory),
    ReadOnly(ReadOnlySharedMemory),
    Peer(PeerMemory),
}

/// Memory with a name, of a size that a BAR can have. Clones are the same region.
#[derive(Clone, Debug)]
pub struct Region {
    name: Arc<str>,
    memory: Arc<Memory>,
}

impl Region {
    /// Memory that those with the right to do so write.
    ///
    /// # Errors
    /// [`IvshmemError::Size`] unless its size is a power of two.
    pub fn new(name: impl Into<Arc<str>>, memory: SharedMemory) -> Result<Self, IvshmemError> {
        Self::of(name.into(), memory.size(), Memory::Writable(memory))
    }

    /// Memory that nobody writes but who had it before it was sealed.
    ///
    /// # Errors
    /// [`IvshmemError::Size`] unless its size is a power of two.
    pub fn read_only(name: impl Into<Arc<str>>, memory: ReadOnlySharedMemory) -> Result<Self, IvshmemError> {
        Self::of(name.into(), memory.size(), Memory::ReadOnly(memory))
    }

    /// Memory that another process made.
    ///
    /// # Errors
    /// [`IvshmemError::Size`] unless its size is a power of two.
    pub fn of_peer(name: impl Into<Arc<str>>, memory: PeerMemory) -> Result<Self, IvshmemError> {
        Self::of(name.into(), memory.size(), Memory::Peer(memory))
    }

    fn of(region: Arc<str>, size: u64, memory: Memory) -> Result<Self, IvshmemError> {
        if !size.is_power_of_two() || size < PAGE_SIZE {
            return Err(IvshmemError::Size { region, size });
        }
        Ok(Self { name: region, memory: Arc::new(memory) })
    }

    /// Its name, by which grants mean it.
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// In bytes.
    pub fn size(&self) -> u64 {
        match &*self.memory {
            Memory::Writable(memory) => memory.size(),
            Memory::ReadOnly(memory) => memory.size(),
            Memory::Peer(memory) => memory.size(),
        }
    }

    /// The most that it can be mapped for.
    pub fn access(&self) -> Access {
        match &*self.memory {
            Memory::Writable(_) => Access::ReadWrite,
            Memory::ReadOnly(_) => Access::ReadOnly,
            Memory::Peer(memory) => memory.access(),
        }
    }

    /// A seat without doorbells, as QEMU's `ivshmem-plain` has: the guest sees the memory and nothing else.
    ///
    /// # Errors
    /// [`IvshmemError::WrongRegion`], [`IvshmemError::Revoked`], [`IvshmemError::Access`] for a grant to write what is read-only, and
    /// [`IvshmemError::Memory`] if it cannot be mapped.
    pub fn attach(&self, grant: Grant<RegionMap>) -> Result<Member, IvshmemError> {
        self.seat((0, 0), grant, None)
    }

    /// A seat at `position` with so many vectors, for which `map` and `ring` are the rights.
    pub(super) fn seat(
        &self,
        seat: (u16, u16),
        map: Grant<RegionMap>,
        ring: Option<Grant<DoorbellRing>>,
    ) -> Result<Member, IvshmemError> {
        check_region(&self.name, &map.channel().region, &map)?;
        if let Some(ring) = &ring {
            check_region(&self.name, &ring.channel().region, ring)?;
        }
        let window = Window::new(self.map(map.channel().access)?);
        let port = Port::open(seat, window, map, ring)?;
        Ok(Member { region: Arc::clone(&self.name), size: self.size(), port })
    }

    fn map(&self, access: Access) -> Result<SharedMapping, IvshmemError> {
        if access == Access::ReadWrite && self.access() == Access::ReadOnly {
            return Err(IvshmemError::Access { region: Arc::clone(&self.name), granted: access });
        }
        // Where it is mapped here; the guest's addresses come later.
        let nowhere = GuestAddress(0);
        Ok(match &*self.memory {
            Memory::Writable(memory) => memory.map(nowhere, access)?,
            Memory::ReadOnly(memory) => memory.map(nowhere)?,
            Memory::Peer(memory) => memory.map(nowhere, access)?,
        })
    }

    /// A descriptor for a process that is to have it for `access`. One for reading cannot be mapped for writing: see
    /// [`SharedMemory::try_clone_read_only_fd`] on who can get around that.
    ///
    /// # Errors
    /// [`IvshmemError::Access`] for more than there is, and [`IvshmemError::Memory`].
    pub fn descriptor(&self, access: Access) -> Result<OwnedFd, IvshmemError> {
        let refused = || IvshmemError::Access { region: Arc::clone(&self.name), granted: access };
        Ok(match (&*self.memory, access) {
            (Memory::Writable(memory), Access::ReadWrite) => memory.try_clone_fd()?,
            (Memory::Writable(memory), Access::ReadOnly) => memory.try_clone_read_only_fd()?,
            (Memory::ReadOnly(memory), Access::ReadOnly) => memory.try_clone_fd()?,
            // It gives what this process has itself.
            (Memory::Peer(memory), access) if access == memory.access() => {
                let failed = |source| MemoryError::File {
                    operation: "fcntl(F_DUPFD_CLOEXEC)",
                    size: memory.size(),
                    source,
                };
                memory.as_fd().try_clone_to_owned().map_err(failed)?
            }
            _ => return Err(refused()),
        })
    }
}

/// A seat at shared memory, which a device takes ([`Ivshmem::builder`](super::Ivshmem::builder)). Dropping it, or the device, leaves.
pub struct Member {
    region: Arc<str>,
    size: u64,
    pub(super) port: Arc<Port>,
}

impl Member {
    /// The region's name.
    pub fn region(&self) -> &Arc<str> {
        &self.region
    }

    /// The region's size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// What peers call it; 0 without doorbells.
    pub fn position(&self) -> u16 {
        self.port.position()
    }

    /// For how many vectors peers ring; 0 without doorbells.
    pub fn vectors(&self) -> u16 {
        self.port.vectors()
    }

    /// What the memory is mapped for.
    pub fn access(&self) -> Access {
        crate::interrupt::lock(&self.port.window).access()
    }

    /// Positions of the peers that the guest can ring, its own among them, ascending.
    pub fn peers(&self) -> Vec<u16> {
        crate::interrupt::lock(&self.port.bells).peers()
    }

    /// Whether it has not been closed.
    pub fn is_open(&self) -> bool {
        self.port.is_open()
    }

    /// Closes it, as the revocation of its right does: the guest sees the memory no more, and rings for nobody. When this returns
    /// it is done.
    pub fn close(&self) {
        self.port.close();
    }

    /// What the device has done.
    pub fn figures(&self) -> IvshmemFigures {
        self.port.metrics.snapshot()
    }

    /// The counters themselves, which outlive the device.
    pub fn metrics(&self) -> Arc<IvshmemMetrics> {
        Arc::clone(&self.port.metrics)
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.port.close();
    }
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").field("region", &self.region).field("port", &self.port).finish()
    }
}
