//! The GDT and the page tables that a guest starts with.

use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::error::{BootError, BootItem};
use super::room::{ANYWHERE_32, Request};
use super::target::Target;
use crate::PAGE_SIZE;

/// Where the GDT goes if nothing else is there: the free memory behind the BIOS data area.
const GDT_ADDRESS: u64 = 0x500;
/// Where the page tables go if nothing else is there.
const PAGE_TABLES_ADDRESS: u64 = 0x9000;

/// Present, accessed code segment descriptors and friends: base 0, limit 4 GiB, DPL 0
/// (Intel SDM 3A 3.4.5). "Accessed" is set so that no CPU has to write it.
const CODE_64: u64 = 0x00af_9b00_0000_ffff;
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
/// A busy TSS of the minimal size at address 0: the task register must hold one, nothing reads it.
const TSS: u64 = 0x0000_8b00_0000_0067;

/// The GDT that a guest starts with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct GdtLocation {
    /// Guest-physical address of the null descriptor.
    pub base: GuestAddress,
    /// Size in bytes minus 1, as LGDT takes it.
    pub limit: u16,
    /// Selector of the code segment: flat, DPL 0, 64-bit where the protocol starts in long mode.
    pub code: u16,
    /// Selector of the data segment: flat, DPL 0, writable.
    pub data: u16,
    /// Selector of the busy TSS: base 0, limit 0x67.
    pub tss: u16,
}

/// Writes the GDT of the long-mode protocols: `__BOOT_CS` is 0x10 and `__BOOT_DS` 0x18
/// (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol").
pub(super) fn write_gdt_64<M: GuestMemoryBackend>(
    target: &mut Target<'_, M>,
) -> Result<GdtLocation, BootError> {
    // A TSS descriptor takes two entries in long mode.
    let base = write_gdt(target, &[0, 0, CODE_64, DATA, TSS, 0])?;
    Ok(GdtLocation { base, limit: 6 * 8 - 1, code: 0x10, data: 0x18, tss: 0x20 })
}

/// Writes the GDT of the 32-bit protocols. Both leave the guest to load its own first; the selectors are
/// those that QEMU uses, for guests that rely on it.
pub(super) fn write_gdt_32<M: GuestMemoryBackend>(
    target: &mut Target<'_, M>,
) -> Result<GdtLocation, BootError> {
    let base = write_gdt(target, &[0, CODE_32, DATA, TSS])?;
    Ok(GdtLocation { base, limit: 4 * 8 - 1, code: 0x08, data: 0x10, tss: 0x18 })
}

fn write_gdt<M: GuestMemoryBackend>(
    target: &mut Target<'_, M>,
    descriptors: &[u64],
) -> Result<GuestAddress, BootError> {
    let item = BootItem::Gdt;
    let bytes: Vec<u8> = descriptors.iter().flat_map(|descriptor| descriptor.to_le_bytes()).collect();
    let request = Request { item, size: bytes.len() as u64, align: 8 };
    let base = target.room.place(request, GDT_ADDRESS, &ANYWHERE_32)?;
    target.write(item, base, &bytes)?;
    Ok(GuestAddress(base))
}

/// Writes page tables that map the first 4 GiB one to one, writable and executable, and returns the address
/// of the top level for CR3 (Intel SDM 3A 4.5). Pages are 2 MiB: not every CPU has larger ones.
pub(super) fn write_identity_map<M: GuestMemoryBackend>(
    target: &mut Target<'_, M>,
) -> Result<GuestAddress, BootError> {
    const DIRECTORIES: u64 = 4;
    const TABLE: u64 = 0b11;
    const LARGE_PAGE: u64 = 0b1000_0011;

    let item = BootItem::PageTables;
    let request = Request { item, size: (2 + DIRECTORIES) * PAGE_SIZE, align: PAGE_SIZE };
    let top = target.room.place(request, PAGE_TABLES_ADDRESS, &ANYWHERE_32)?;
    let table = |index: u64| top.saturating_add(index * PAGE_SIZE);

    let mut entries = vec![table(1) | TABLE];
    entries.resize(512, 0);
    entries.extend((0..DIRECTORIES).map(|index| table(2 + index) | TABLE));
    entries.resize(2 * 512, 0);
    entries.extend((0..DIRECTORIES * 512).map(|page| page << 21 | LARGE_PAGE));
    let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    target.write(item, top, &bytes)?;
    Ok(GuestAddress(top))
}
