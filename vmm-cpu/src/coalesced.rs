//! Writes that are gathered instead of being handed over one by one: an optional capability of a virtual machine.
//!
//! Threat model: the guest chooses addresses, data and number of writes. What is gathered is bounded by the backend; a write
//! that finds no room is handed over at once, behind those that were gathered before it.

use std::fmt;

use vmm_memory::vm_memory::GuestAddress;

use crate::error::Result;
use crate::vcpu::VcpuIo;

/// Addresses where a write may wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CoalescedZone {
    /// Stores to guest-physical addresses without memory.
    Mmio {
        /// First address.
        gpa: GuestAddress,
        /// Length in bytes, at least 1.
        len: u32,
    },
    /// OUT to ports.
    Pio {
        /// First port.
        port: u16,
        /// Number of ports, at least 1.
        len: u16,
    },
}

/// Gathers guest writes to devices that do not need to hear of each at once, such as frame buffers, and spares the exits.
///
/// What a vCPU has written to a zone arrives through [`VcpuIo`], split as always, in the order in which it was written and
/// before anything that the same vCPU asks of its VMM afterwards: before the next callback of
/// [`Vcpu::run`](crate::Vcpu::run), and before `run` returns. Meanwhile it waits, for ever if the guest does nothing else;
/// [`deliver`](Self::deliver) fetches it.
///
/// Writes of several vCPUs wait in one line. Whoever comes first hands all of them over, also those of other vCPUs, to the
/// [`VcpuIo`] that it runs with, and holds a lock meanwhile: what two vCPUs wrote arrives in the order of the writes, and a
/// callback must not wait for another vCPU.
///
/// Reads are never gathered, nor are writes that are partly outside of a zone. Of a store across the border of two pages, the
/// part in front of the border and the part behind it are two writes, and where only the second is in a zone, `kvm` hands it
/// over first: begin no zone right behind a border that such stores cross.
pub trait CoalescedWrites: fmt::Debug + Send + Sync {
    /// Lets writes to `zone` wait from now on.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) for an empty zone, one that ends beyond the addresses that
    /// there are, or one that overlaps another.
    fn add_zone(&self, zone: CoalescedZone) -> Result<()>;

    /// Undoes [`add_zone`](Self::add_zone). What waits still arrives.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if there is no such zone.
    fn remove_zone(&self, zone: CoalescedZone) -> Result<()>;

    /// Hands what waits over to `io` now, from any thread but that of a callback; how many writes there were.
    ///
    /// # Errors
    /// Whatever the backend's host says.
    fn deliver(&self, io: &mut dyn VcpuIo) -> Result<usize>;
}
