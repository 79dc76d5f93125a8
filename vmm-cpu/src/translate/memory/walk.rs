//! The page-table walk (Intel SDM 3A chapter 5): 32-bit, PAE and 4-level paging, with accessed and dirty bits.

use super::map::MemoryMap;
use super::{PAGE, PAGE_MASK};
use crate::translate::cpu::{cr0, cr4, efer};

/// Width of guest-physical addresses in bits.
pub(crate) const GPA_BITS: u32 = 46;

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const GLOBAL: u64 = 1 << 8;
const NO_EXECUTE: u64 = 1 << 63;
/// Lowest bit of the protection key.
const KEY: u32 = 59;
/// The address in an entry.
const FRAME: u64 = (1 << 52) - PAGE;
/// Address bits beyond the width of guest-physical addresses.
const BEYOND: u64 = FRAME & !((1 << GPA_BITS) - 1);

/// Error code bits of #PF (Intel SDM 3A 5.7).
mod code {
    pub(super) const PROTECTION: u32 = 1 << 0;
    pub(super) const WRITE: u32 = 1 << 1;
    pub(super) const USER: u32 = 1 << 2;
    pub(super) const RESERVED: u32 = 1 << 3;
    pub(super) const FETCH: u32 = 1 << 4;
    pub(super) const KEY: u32 = 1 << 5;
}

/// Attempts to set an accessed or dirty bit that another processor's change may spoil.
const ATTEMPTS: u32 = 64;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    Execute,
}

/// The registers that paging depends on, and who accesses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Paging {
    pub(crate) cr0: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    pub(crate) efer: u64,
    /// By code at privilege level 3.
    pub(crate) user: bool,
    /// RFLAGS.AC, which lifts SMAP from explicit accesses.
    pub(crate) smap_lifted: bool,
    /// PKRU, which counts where CR4.PKE is set.
    pub(crate) pkru: u32,
}

/// Error code of a page fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PageFault {
    pub(crate) error: u32,
}

/// A guest-physical page and what the page tables allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Translation {
    /// Base of the 4-KiB page.
    pub(crate) gpa: u64,
    /// Reads are allowed.
    pub(crate) readable: bool,
    /// Writes are allowed and the dirty bit is set.
    pub(crate) writable: bool,
    pub(crate) executable: bool,
    pub(crate) global: bool,
    /// Size of the page that it is part of, in bytes.
    pub(crate) size: u64,
}

/// One level of a walk.
struct Level {
    /// Lowest address bit that selects an entry.
    shift: u32,
    /// Bits that select an entry.
    bits: u32,
    entry_bytes: u64,
    /// An entry with the PS bit maps a page.
    may_map: bool,
    /// Entries that map nothing themselves have W, U and A bits.
    has_permissions: bool,
    /// Bits that must be clear in entries that point to a table.
    reserved: u64,
}

const fn long(shift: u32, may_map: bool, reserved: u64) -> Level {
    Level { shift, bits: 9, entry_bytes: 8, may_map, has_permissions: true, reserved }
}

const LEVELS_4: [Level; 4] = [
    long(39, false, LARGE | BEYOND),
    long(30, true, BEYOND),
    long(21, true, BEYOND),
    long(12, false, BEYOND),
];
/// PAE: bits 62 to 52 are reserved, and most low bits of page-directory-pointer entries.
const PAE_BEYOND: u64 = BEYOND | 0x7ff << 52;
const LEVELS_PAE: [Level; 3] = [
    Level {
        shift: 30,
        bits: 2,
        entry_bytes: 8,
        may_map: false,
        has_permissions: false,
        reserved: PAE_BEYOND | NO_EXECUTE | 0x1e6,
    },
    long(21, true, PAE_BEYOND),
    long(12, false, PAE_BEYOND),
];
const LEVELS_32: [Level; 2] = [
    Level { shift: 22, bits: 10, entry_bytes: 4, may_map: true, has_permissions: true, reserved: 0 },
    Level { shift: 12, bits: 10, entry_bytes: 4, may_map: false, has_permissions: true, reserved: 0 },
];

/// What the entries on the way allow together.
#[derive(Clone, Copy)]
struct Rights {
    writable: bool,
    user: bool,
    executable: bool,
}

impl Paging {
    /// Whether `rights` allow `access`.
    fn allows(&self, rights: Rights, access: Access) -> bool {
        if self.user {
            return rights.user
                && match access {
                    Access::Read => true,
                    Access::Write => rights.writable,
                    Access::Execute => rights.executable,
                };
        }
        let smap = rights.user && self.cr4 & cr4::SMAP != 0 && !self.smap_lifted;
        match access {
            Access::Read => !smap,
            Access::Write => !smap && (rights.writable || self.cr0 & cr0::WP == 0),
            Access::Execute => rights.executable && !(rights.user && self.cr4 & cr4::SMEP != 0),
        }
    }

    /// Whether the protection key of a page lets its data be accessed (Intel SDM 3A 5.6.2).
    fn key_allows(&self, entry: u64, rights: Rights, access: Access) -> bool {
        let counts = self.cr4 & cr4::PKE != 0 && self.efer & efer::LMA != 0 && rights.user;
        let key = entry >> KEY & 0xf;
        let bit = |n: u64| counts && u64::from(self.pkru) >> (2 * key + n) & 1 != 0;
        match access {
            Access::Execute => true,
            Access::Read => !bit(0),
            Access::Write => !bit(0) && (!bit(1) || !self.user && self.cr0 & cr0::WP == 0),
        }
    }

    fn fault(&self, access: Access, cause: u32) -> PageFault {
        let mut error = cause;
        if self.user {
            error |= code::USER;
        }
        // Fetches are told apart where page tables or SMEP can forbid them alone (Intel SDM 3A 5.7).
        let tells_fetches =
            self.cr4 & cr4::SMEP != 0 || self.cr4 & cr4::PAE != 0 && self.efer & efer::NXE != 0;
        match access {
            Access::Write => error |= code::WRITE,
            Access::Execute if tells_fetches => error |= code::FETCH,
            _ => {}
        }
        PageFault { error }
    }
}

/// Translates `va` for `access`, sets accessed bits and, for a write, the dirty bit.
///
/// # Errors
/// The error code of the page fault.
pub(crate) fn walk(
    map: &MemoryMap,
    paging: &Paging,
    va: u64,
    access: Access,
) -> Result<Translation, PageFault> {
    if paging.cr0 & cr0::PG == 0 {
        let gpa = va & 0xffff_f000;
        return Ok(Translation {
            gpa,
            readable: true,
            writable: true,
            executable: true,
            global: false,
            size: PAGE,
        });
    }
    for _ in 0..ATTEMPTS {
        if let Some(translation) = attempt(map, paging, va, access, true)? {
            return Ok(translation);
        }
    }
    // Another processor changes the entry all the time. To fault is to let the guest try again.
    Err(paging.fault(access, 0))
}

/// What [`walk`] would find without having to set any bit; `None` if paging is off or the walk would do more.
pub(crate) fn peek(map: &MemoryMap, paging: &Paging, va: u64, access: Access) -> Option<Translation> {
    if paging.cr0 & cr0::PG == 0 {
        return None;
    }
    attempt(map, paging, va, access, false).ok().flatten()
}

/// `None` if an entry changed on the way, or would have to and `updates` does not let it.
fn attempt(
    map: &MemoryMap,
    paging: &Paging,
    va: u64,
    access: Access,
    updates: bool,
) -> Result<Option<Translation>, PageFault> {
    let (levels, root): (&[Level], u64) = if paging.efer & efer::LMA != 0 {
        (&LEVELS_4, paging.cr3 & FRAME)
    } else if paging.cr4 & cr4::PAE != 0 {
        (&LEVELS_PAE, paging.cr3 & 0xffff_ffe0)
    } else {
        (&LEVELS_32, paging.cr3 & 0xffff_f000)
    };
    let no_execute_exists = paging.efer & efer::NXE != 0;
    let mut rights = Rights { writable: true, user: true, executable: true };
    let mut table = root;
    for (depth, level) in levels.iter().enumerate() {
        let index = va >> level.shift & ((1 << level.bits) - 1);
        let gpa = table + index * level.entry_bytes;
        let narrow = level.entry_bytes == 4;
        // What is no RAM reads as all ones.
        let entry = if narrow {
            map.load::<u32>(gpa).map_or(u64::from(u32::MAX), u64::from)
        } else {
            map.load::<u64>(gpa).unwrap_or(u64::MAX)
        };
        if entry & PRESENT == 0 {
            return Err(paging.fault(access, 0));
        }
        let large_pages = !narrow || paging.cr4 & cr4::PSE != 0;
        let is_last = depth + 1 == levels.len();
        let maps = is_last || level.may_map && large_pages && entry & LARGE != 0;
        let mut reserved = level.reserved;
        if !narrow && !no_execute_exists {
            reserved |= NO_EXECUTE;
        }
        if maps && !is_last {
            // Address bits below the page's size; bit 12 is PAT. In 32-bit paging bits 20 to 13 extend the address.
            reserved |= if narrow { 1 << 21 } else { (1 << level.shift) - (1 << 13) };
        }
        if entry & reserved != 0 {
            return Err(paging.fault(access, code::PROTECTION | code::RESERVED));
        }
        if level.has_permissions {
            rights.writable &= entry & WRITABLE != 0;
            rights.user &= entry & USER != 0;
            rights.executable &= narrow || entry & NO_EXECUTE == 0;
        }
        if maps && !paging.allows(rights, access) {
            return Err(paging.fault(access, code::PROTECTION));
        }
        if maps && !paging.key_allows(entry, rights, access) {
            return Err(paging.fault(access, code::PROTECTION | code::KEY));
        }
        let mut wanted = entry;
        if level.has_permissions {
            wanted |= ACCESSED;
        }
        if maps && access == Access::Write {
            wanted |= DIRTY;
        }
        if wanted != entry && !(updates && update(map, gpa, narrow, entry, wanted)) {
            return Ok(None);
        }
        if maps {
            let size = 1 << level.shift;
            let frame = match (narrow, is_last) {
                (true, false) => entry & 0xffc0_0000 | (entry >> 13 & 0xff) << 32,
                (true, true) => entry & 0xffff_f000,
                (false, _) => entry & FRAME & !(size - 1),
            };
            let may = |access| paging.allows(rights, access) && paging.key_allows(entry, rights, access);
            return Ok(Some(Translation {
                gpa: frame | va & (size - 1) & PAGE_MASK,
                readable: may(Access::Read),
                writable: wanted & DIRTY != 0 && may(Access::Write),
                executable: paging.allows(rights, Access::Execute),
                global: entry & GLOBAL != 0 && paging.cr4 & cr4::PGE != 0,
                size,
            }));
        }
        table = entry & FRAME;
    }
    Err(paging.fault(access, 0))
}

/// Replaces an entry, unless it changed. An entry in memory that cannot be written keeps its bits.
fn update(map: &MemoryMap, gpa: u64, narrow: bool, old: u64, new: u64) -> bool {
    use crate::translate::segment::low32;
    if narrow {
        map.compare_exchange(gpa, low32(old), low32(new)).unwrap_or(true)
    } else {
        map.compare_exchange(gpa, old, new).unwrap_or(true)
    }
}

#[cfg(test)]
#[path = "walk_tests.rs"]
mod tests;
