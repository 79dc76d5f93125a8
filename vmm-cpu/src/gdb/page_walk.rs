//! The way from a guest-virtual to a guest-physical address, level by level, for people to read (Intel SDM 3A chapter 5).

use std::fmt::{self, Write};

use vmm_memory::GuestRam;

use super::memory::read_physical;
use crate::state::SystemRegisters;

/// CR4.LA57.
const LA57: u64 = 1 << 12;
/// CR4.PSE.
const PSE: u64 = 1 << 4;
/// The address in an entry.
const FRAME: u64 = 0x000f_ffff_ffff_f000;
const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;

/// Bits of an entry that have a name.
const BITS: [(u32, &str); 8] = [
    (1, "writable"),
    (2, "user"),
    (3, "write-through"),
    (4, "cache-disabled"),
    (5, "accessed"),
    (6, "dirty"),
    (8, "global"),
    (63, "no-execute"),
];

/// Name of a level's entries and the lowest address bit that selects one.
type Level = (&'static str, u32);

const LEVELS_5: [Level; 5] = [("PML5E", 48), ("PML4E", 39), ("PDPTE", 30), ("PDE", 21), ("PTE", 12)];
const LEVELS_32: [Level; 2] = [("PDE", 22), ("PTE", 12)];

/// Writes the entries that translate `gva`, and where they lead.
pub(super) fn show(ram: &GuestRam, system: &SystemRegisters, gva: u64, out: &mut dyn Write) -> fmt::Result {
    if system.cr0 & SystemRegisters::CR0_PG == 0 {
        return writeln!(out, "paging is off: {gva:#x} is guest-physical {:#x}", gva & 0xffff_ffff);
    }
    let long = system.efer & SystemRegisters::EFER_LMA != 0;
    let wide = long || system.cr4 & SystemRegisters::CR4_PAE != 0;
    let levels: &[Level] = match (long, wide) {
        (true, _) if system.cr4 & LA57 != 0 => &LEVELS_5,
        (true, _) => LEVELS_5.get(1..).unwrap_or_default(),
        (false, true) => LEVELS_5.get(2..).unwrap_or_default(),
        (false, false) => &LEVELS_32,
    };
    let unused = 64 - if levels.len() == 5 { 57 } else { 48 };
    if long && (gva << unused).cast_signed() >> unused != gva.cast_signed() {
        return writeln!(out, "{gva:#x} is not canonical");
    }
    writeln!(out, "CR3 {:#x}, {} levels", system.cr3, levels.len())?;
    let mut table = system.cr3
        & match (long, wide) {
            (true, _) => FRAME,
            (false, true) => 0xffff_ffe0,
            (false, false) => 0xffff_f000,
        };
    let entry_bits = if wide { 9 } else { 10 };
    for (depth, (name, shift)) in levels.iter().enumerate() {
        // PAE has four entries at the first level.
        let bits = if !long && wide && depth == 0 { 2 } else { entry_bits };
        let index = gva >> shift & ((1 << bits) - 1);
        let width = if wide { 8 } else { 4 };
        let place = table + index * width;
        let mut bytes = [0; 8];
        let read = bytes.split_at_mut_checked(if wide { 8 } else { 4 });
        if !read.is_some_and(|(bytes, _)| read_physical(ram, place, bytes)) {
            return writeln!(out, "{name}[{index}] at {place:#x}: no memory");
        }
        let entry = u64::from_le_bytes(bytes);
        write!(out, "{name}[{index}] at {place:#x}: {entry:#018x}")?;
        if entry & PRESENT == 0 {
            return writeln!(out, " not present");
        }
        for (bit, name) in BITS {
            if entry >> bit & 1 != 0 {
                write!(out, " {name}")?;
            }
        }
        let is_last = depth + 1 == levels.len();
        let may_be_large =
            matches!(*shift, 21 | 30) && (long || *shift == 21) || *shift == 22 && system.cr4 & PSE != 0;
        if is_last || may_be_large && entry & LARGE != 0 {
            let size = 1_u64 << shift;
            let frame = if !wide && !is_last {
                entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32
            } else {
                entry & FRAME & !(size - 1)
            };
            let unit = match size >> 20 {
                0 => format!("{} KiB", size >> 10),
                mib => format!("{mib} MiB"),
            };
            writeln!(out)?;
            return writeln!(
                out,
                "{gva:#x} is guest-physical {:#x}, in a page of {unit}",
                frame | gva & (size - 1)
            );
        }
        writeln!(out)?;
        table = entry & if wide { FRAME } else { 0xffff_f000 };
    }
    Ok(())
}
