//! Guest memory as the debugger sees it: by guest-virtual address, through the page tables of one vCPU.

use std::sync::Arc;

use vmm_memory::vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, MemoryRegionAddress};
use vmm_memory::{GuestRam, GuestRegion, PAGE_SIZE, is_read_only};

use crate::error::Result;
use crate::vcpu::Vcpu;

/// One part of a range of guest-virtual addresses that lies in one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where it lies in guest-physical memory.
    pub(super) gpa: u64,
    /// Which bytes of the range these are: the first, and how many.
    pub(super) start: usize,
    pub(super) length: usize,
}

/// The pieces of `length` bytes at `gva`, as far as the vCPU's page tables lead.
///
/// # Errors
/// Whatever the backend's host says.
pub(super) fn pieces(vcpu: &mut dyn Vcpu, gva: u64, length: usize) -> Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    let mut start = 0;
    while start < length {
        let Some(address) = gva.checked_add(start as u64) else { break };
        let Some(GuestAddress(gpa)) = vcpu.translate(address)? else { break };
        let room = usize::try_from(PAGE_SIZE - address % PAGE_SIZE).unwrap_or(1);
        let length = room.min(length - start);
        pieces.push(Piece { gpa, start, length });
        start += length;
    }
    Ok(pieces)
}

/// Reads RAM or ROM at a guest-physical address; whether all of it is there.
pub(super) fn read_physical(ram: &GuestRam, gpa: u64, bytes: &mut [u8]) -> bool {
    place(ram, gpa, bytes.len()).is_some_and(|(region, offset)| region.read_slice(bytes, offset).is_ok())
}

/// Writes RAM at a guest-physical address; whether all of it is there.
pub(super) fn write_physical(ram: &GuestRam, gpa: u64, bytes: &[u8]) -> bool {
    place(ram, gpa, bytes.len())
        .is_some_and(|(region, offset)| !is_read_only(&region) && region.write_slice(bytes, offset).is_ok())
}

/// Whether RAM that can be written is at a guest-physical address.
pub(super) fn is_writable(ram: &GuestRam, gpa: u64, length: usize) -> bool {
    place(ram, gpa, length).is_some_and(|(region, _)| !is_read_only(&region))
}

fn place(ram: &GuestRam, gpa: u64, length: usize) -> Option<(Arc<GuestRegion>, MemoryRegionAddress)> {
    ram.regions().into_iter().find_map(|region| {
        let offset = gpa.checked_sub(region.start_addr().0)?;
        let room = region.len().checked_sub(offset)?;
        (room >= length as u64).then_some((region, MemoryRegionAddress(offset)))
    })
}
