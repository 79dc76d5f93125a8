//! What translated code reaches at fixed distances: the tables of the TLB, and its own part of the vCPU's state.
//!
//! It is one piece of memory, so that one base register serves for all of it. The interpreter uses the same tables.

use std::mem::offset_of;

use super::{PAGE, Reach};

/// Entries of each table.
pub(crate) const ENTRIES: usize = 2048;

/// Tables: one for each [`Reach`].
const TABLES: usize = 4;

/// A translation. An entry whose tag is [`nothing_at`] its index allows nothing of that kind.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Entry {
    /// Linear page, if reads are allowed.
    pub(crate) read: u64,
    /// Linear page, if writes are allowed and nothing has to be noted about them.
    pub(crate) write: u64,
    /// Host address of the page.
    pub(crate) host: u64,
    /// Guest-physical page, and flags in the bits below.
    pub(crate) kind: u64,
}

impl Entry {
    /// The entry at `index` that allows nothing.
    pub(crate) const fn nothing(index: usize) -> Self {
        Self { read: nothing_at(index), write: nothing_at(index), host: 0, kind: 0 }
    }
}

/// The tag of no access that uses the entry at `index`: a page that belongs to another entry, and not to the next one
/// either, where accesses end that cross into another page.
pub(crate) const fn nothing_at(index: usize) -> u64 {
    (index ^ (ENTRIES / 2)) as u64 * PAGE
}

/// Tables of branch targets: one for each [`Reach`] that code is translated for, the last for code that accesses memory
/// through the address window.
pub(crate) const BRANCH_TABLES: usize = 4;

/// Entries of a table of branch targets.
pub(crate) const BRANCHES: usize = 4096;

/// Parts of 4 GiB that 48 bits of address have.
pub(crate) const REGIONS: usize = 1 << 16;

/// Translations at one time, at most.
pub(crate) const TRANSLATIONS: usize = 1 << 17;

/// The part of a vCPU's state that translated code works on, where it is not in the host's registers.
#[repr(C)]
pub(crate) struct State {
    /// Host address of the registers that translated code was entered with.
    pub(crate) cpu: u64,
    /// Where an indirect branch goes that the table of targets does not know.
    pub(crate) rip: u64,
    /// The status flags as LAHF and SETO leave them in AX.
    pub(crate) flags: u64,
    /// Host address of a quadword that is zero when translated code is to be left at its next branch backwards.
    pub(crate) go: u64,
    /// Where translated code is entered.
    pub(crate) target: u64,
    /// What translated code jumps to when it is left.
    pub(crate) leave: u64,
    pub(crate) mxcsr: u32,
    pub(crate) host_mxcsr: u32,
    pub(crate) fs_base: u64,
    pub(crate) gs_base: u64,
    pub(crate) kernel_gs_base: u64,
    /// RFLAGS but for the status flags.
    pub(crate) control: u64,
    /// Not zero: something is to be looked at as soon as interrupts are let in.
    pub(crate) held: u64,
    /// Where each instruction is a tick of the time-stamp counter: what that will be when no budget is left.
    pub(crate) tsc: u64,
    pub(crate) tsc_aux: u64,
    /// Instructions that may still start.
    pub(crate) budget: i64,
    /// Host address of the instruction of translated code that the host could not execute.
    pub(crate) fault: u64,
    /// The status flags that the processor had then, as `flags`.
    pub(crate) fault_flags: u64,
    /// Those of the segment registers, by number.
    pub(crate) selectors: [u64; 6],
}

/// Where an indirect branch has gone.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Branch {
    pub(crate) rip: u64,
    /// Host address of the translation, for status flags that are in [`State::flags`].
    pub(crate) code: u64,
}

impl Branch {
    /// The entry at `index` that no branch finds, since its RIP belongs to another one.
    pub(crate) const fn nothing(index: usize) -> Self {
        Self { rip: index as u64 ^ 1, code: 0 }
    }
}

/// The host addresses at which a translation is entered from other pages, zero where there is none.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct Gate {
    /// With the status flags in the processor.
    pub(crate) live: u64,
    /// With the status flags in [`State::flags`].
    pub(crate) saved: u64,
}

impl Gate {
    /// That of no translation.
    pub(crate) const NOWHERE: Self = Self { live: 0, saved: 0 };
}

/// See the module.
#[repr(C, align(4096))]
pub(crate) struct Frame {
    pub(crate) state: State,
    _rest: [u8; 4096 - size_of::<State>()],
    pub(super) tables: [[Entry; ENTRIES]; TABLES],
    pub(crate) branches: [[Branch; BRANCHES]; BRANCH_TABLES],
    pub(crate) gates: [Gate; TRANSLATIONS],
    /// What is added to a linear address in each region to have that of the address window. Nothing reads it before the
    /// window has set it.
    pub(crate) regions: [u64; REGIONS],
}

/// Distance of a table of branch targets from the frame's start.
pub(crate) const fn branch_table_offset(table: usize) -> usize {
    offset_of!(Frame, branches) + table % BRANCH_TABLES * size_of::<[Branch; BRANCHES]>()
}

/// Distance of the table for `reach` from the frame's start.
pub(crate) const fn table_offset(reach: Reach) -> usize {
    offset_of!(Frame, tables) + reach as usize * size_of::<[Entry; ENTRIES]>()
}

impl Frame {
    pub(crate) fn new() -> Box<Self> {
        let mut frame = zeroed();
        frame.clear();
        frame.forget_branches();
        frame
    }

    /// Empties the tables of branch targets.
    pub(crate) fn forget_branches(&mut self) {
        for table in &mut self.branches {
            table.iter_mut().enumerate().for_each(|(index, branch)| *branch = Branch::nothing(index));
        }
    }

    /// Makes all entries allow nothing.
    pub(crate) fn clear(&mut self) {
        for table in &mut self.tables {
            table.iter_mut().enumerate().for_each(|(index, entry)| *entry = Entry::nothing(index));
        }
    }

    #[allow(clippy::cast_possible_truncation, reason = "the low bits select")]
    #[inline(always)]
    pub(crate) fn index(va: u64) -> usize {
        (va / PAGE) as usize % ENTRIES
    }

    /// The entry that `va` uses with these rights.
    #[allow(clippy::indexing_slicing, reason = "both indices are reduced to the lengths")]
    #[inline(always)]
    pub(crate) fn entry(&self, reach: Reach, va: u64) -> &Entry {
        &self.tables[reach as usize % TABLES][Self::index(va)]
    }

    #[allow(clippy::indexing_slicing, reason = "both indices are reduced to the lengths")]
    pub(crate) fn entry_mut(&mut self, reach: Reach, va: u64) -> &mut Entry {
        &mut self.tables[reach as usize % TABLES][Self::index(va)]
    }

    /// All entries of table `table`.
    #[allow(clippy::indexing_slicing, reason = "the index is reduced to the length")]
    pub(crate) fn table_mut(&mut self, table: u8) -> &mut [Entry; ENTRIES] {
        &mut self.tables[usize::from(table) % TABLES]
    }

    /// All entries of all tables, with the index of each.
    pub(crate) fn entries_mut(&mut self) -> impl Iterator<Item = (usize, &mut Entry)> {
        self.tables.iter_mut().flat_map(|table| table.iter_mut().enumerate())
    }
}

/// A frame of zeros, which is no value to work with. It is too large for the stack.
#[allow(unsafe_code, reason = "an array too large for the stack")]
fn zeroed() -> Box<Frame> {
    let frame = Box::<Frame>::new_zeroed();
    // SAFETY: all fields are integers.
    unsafe { frame.assume_init() }
}
