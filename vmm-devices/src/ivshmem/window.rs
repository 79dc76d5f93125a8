//! BAR 2: shared memory in the guest's address space, where the guest has put it.
//!
//! There is one host mapping for as long as the device has the memory. A move of the BAR makes a region of it at the new address, which
//! needs no system call of this crate: a confined monitor can do that.

use std::error::Error;
use std::fmt;
use std::sync::Arc;

use vmm_memory::vm_memory::{Bytes as _, GuestAddress, GuestMemoryRegion as _, MemoryRegionAddress};
use vmm_memory::{Access, GuestRegion, SharedMapping};

use super::metrics::IvshmemMetrics;

/// Shows memory to a guest: `map_memory` and `unmap_memory` of `vmm-cpu`'s `Vm`. Where a monitor gives none, the guest's accesses come
/// by the bus, one by one.
///
/// Called when the guest moves the BAR or switches it on or off, on the thread of its vCPU and with the device locked, and when the
/// right is revoked, on the thread that does that. It must not call the device.
///
/// ```
/// # use std::error::Error;
/// # use std::sync::Arc;
/// # use vmm_devices::ivshmem::RegionMapper;
/// # use vmm_devices::vmm_memory::{Access, GuestRegion, vm_memory::GuestAddress};
/// # trait Vm: Send + Sync {
/// #     fn map_memory(&self, region: Arc<GuestRegion>, writable: bool) -> std::io::Result<()>;
/// #     fn unmap_memory(&self, gpa: GuestAddress) -> std::io::Result<Arc<GuestRegion>>;
/// # }
/// struct Mapper(Arc<dyn Vm>);
///
/// impl RegionMapper for Mapper {
///     fn map(&mut self, region: Arc<GuestRegion>, access: Access) -> Result<(), Box<dyn Error + Send + Sync>> {
///         Ok(self.0.map_memory(region, access == Access::ReadWrite)?)
///     }
///
///     fn unmap(&mut self, gpa: GuestAddress) -> Result<(), Box<dyn Error + Send + Sync>> {
///         self.0.unmap_memory(gpa)?;
///         Ok(())
///     }
/// }
/// ```
pub trait RegionMapper: Send {
    /// From now on the guest sees `region` at its base, for `access`: a store to one that is read-only comes by the bus.
    ///
    /// # Errors
    /// If it cannot be there; then the guest's accesses come by the bus.
    fn map(&mut self, region: Arc<GuestRegion>, access: Access) -> Result<(), Box<dyn Error + Send + Sync>>;

    /// The guest sees the region at `gpa` no more: when this returns, no vCPU can reach it.
    ///
    /// # Errors
    /// If that is not certain. The device then keeps the memory.
    fn unmap(&mut self, gpa: GuestAddress) -> Result<(), Box<dyn Error + Send + Sync>>;
}

/// Hears of what a mapper could not do.
pub(super) type Failed = Box<dyn Fn(&dyn Error) + Send>;

/// The memory as the device and its guest have it.
pub(super) struct Window {
    /// `None` when it is out of reach.
    mapping: Option<SharedMapping>,
    access: Access,
    mapper: Option<Box<dyn RegionMapper>>,
    failed: Option<Failed>,
    /// Where the guest sees it.
    mapped: Option<GuestAddress>,
    /// The channel is closed: it is not mapped again.
    closed: bool,
}

impl fmt::Debug for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Window")
            .field("access", &self.access)
            .field("mapped", &self.mapped)
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}

impl Window {
    pub(super) fn new(mapping: SharedMapping) -> Self {
        let access = mapping.access();
        Self { mapping: Some(mapping), access, mapper: None, failed: None, mapped: None, closed: false }
    }

    pub(super) fn connect(&mut self, mapper: Option<Box<dyn RegionMapper>>, failed: Option<Failed>) {
        (self.mapper, self.failed) = (mapper, failed);
    }

    pub(super) fn access(&self) -> Access {
        self.access
    }

    /// Where the guest sees it without the bus.
    pub(super) fn mapped(&self) -> Option<GuestAddress> {
        self.mapped
    }

    /// The BAR answers at `at`, or nowhere.
    pub(super) fn moved(&mut self, at: Option<u64>, metrics: &IvshmemMetrics) {
        if !self.unmap(metrics) {
            // The guest still sees it where it was, and is not shown it a second time.
            return;
        }
        let (Some(base), Some(mapping), Some(mapper)) =
            (at, self.mapping.as_ref().filter(|_| !self.closed), self.mapper.as_mut())
        else {
            return;
        };
        let gpa = GuestAddress(base);
        // Its last address is one that the BAR's registers can hold.
        let Some(region) = GuestRegion::with_arc(mapping.region().get_mmap(), gpa) else { return };
        match mapper.map(Arc::new(region), self.access) {
            Ok(()) => {
                metrics.mapped.one();
                self.mapped = Some(gpa);
            }
            Err(error) => {
                metrics.map_failures.one();
                self.report(&*error);
            }
        }
    }

    /// Whether the guest does not see it any more.
    fn unmap(&mut self, metrics: &IvshmemMetrics) -> bool {
        let Some(gpa) = self.mapped else { return true };
        let Some(mapper) = &mut self.mapper else { return true };
        match mapper.unmap(gpa) {
            Ok(()) => {
                self.mapped = None;
                true
            }
            Err(error) => {
                metrics.map_failures.one();
                self.report(&*error);
                false
            }
        }
    }

    fn report(&self, error: &dyn Error) {
        if let Some(failed) = &self.failed {
            failed(error);
        }
    }

    /// Takes it out of the guest's reach for good. Whether that is certain.
    pub(super) fn close(&mut self, metrics: &IvshmemMetrics) -> bool {
        self.closed = true;
        let unmapped = self.unmap(metrics);
        if unmapped {
            self.mapping = None;
        }
        unmapped
    }

    /// A load by the bus. `data` comes filled with ones, which is what is where there is no memory.
    pub(super) fn load(&self, offset: u64, data: &mut [u8], metrics: &IvshmemMetrics) {
        metrics.loads_by_bus.one();
        if let Some(mapping) = self.mapping.as_ref().filter(|_| !self.closed) {
            // What goes beyond the end stays as it is.
            let room = usize::try_from(mapping.region().len().saturating_sub(offset)).unwrap_or(usize::MAX);
            let within = data.len().min(room);
            if let Some(piece) = data.get_mut(..within).filter(|piece| !piece.is_empty())
                && mapping.region().read_slice(piece, MemoryRegionAddress(offset)).is_err()
            {
                piece.fill(0xff);
            }
        }
    }

    /// A store by the bus.
    pub(super) fn store(&self, offset: u64, data: &[u8], metrics: &IvshmemMetrics) {
        metrics.stores_by_bus.one();
        // A mapping that is read-only must not be written: the process would end by SIGSEGV.
        let writable = self.mapping.as_ref().filter(|_| self.access == Access::ReadWrite && !self.closed);
        let stored = writable.is_some_and(|mapping| {
            let room = usize::try_from(mapping.region().len().saturating_sub(offset)).unwrap_or(usize::MAX);
            let piece = data.get(..data.len().min(room)).unwrap_or_default();
            mapping.region().write_slice(piece, MemoryRegionAddress(offset)).is_ok()
        });
        if !stored {
            metrics.stores_dropped.one();
        }
    }
}
