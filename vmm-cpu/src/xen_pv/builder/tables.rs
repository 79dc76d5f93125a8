//! The page tables that a domain starts with: small pages, one run of frames at one run of addresses.

use std::ops::Range;

use vmm_memory::PAGE_SIZE;

use super::error::BuildError;

/// Present, user, accessed: every entry has these, for a guest in ring 3.
const READ_ONLY: u64 = 1 | 1 << 2 | 1 << 5;
/// And writable, dirty.
const WRITABLE: u64 = READ_ONLY | 1 << 1 | 1 << 6;

const ENTRIES: u64 = 512;
const L2_SHIFT: u32 = 21;
const L3_SHIFT: u32 = 30;
const L4_SHIFT: u32 = 39;

/// Slot of an address in the root.
pub(super) fn slot(va: u64) -> usize {
    usize::try_from(va >> L4_SHIFT & (ENTRIES - 1)).unwrap_or(0)
}

/// Frames that are mapped at an address, in one slot of the root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mapping {
    pub(super) va: u64,
    pub(super) frames: Range<u64>,
    /// Frame of the level 3 table; those of level 2 follow, then those of level 1.
    pub(super) first_table: u64,
}

impl Mapping {
    fn last(&self) -> u64 {
        self.va + ((self.frames.end - self.frames.start) * PAGE_SIZE).saturating_sub(1)
    }

    pub(super) fn is_in_one_slot(&self) -> bool {
        let length = (self.frames.end - self.frames.start) * PAGE_SIZE;
        let last = self.va.checked_add(length.saturating_sub(1));
        last.is_some_and(|last| last >> L4_SHIFT == self.va >> L4_SHIFT)
    }

    /// Entries that the run touches in all tables of one level together.
    fn span(&self, shift: u32) -> u64 {
        (self.last() >> shift) - (self.va >> shift) + 1
    }

    /// Tables of the levels 3 to 1.
    pub(super) fn table_count(&self) -> u64 {
        1 + self.span(L3_SHIFT) + self.span(L2_SHIFT)
    }

    /// What the root holds for it.
    pub(super) fn root_entry(&self) -> u64 {
        (self.first_table * PAGE_SIZE) | WRITABLE
    }

    /// Writes the tables. Frames in `read_only`, page tables themselves, are mapped without write permission.
    pub(super) fn write(
        &self,
        read_only: &Range<u64>,
        put: &impl Fn(u64, &[u64; 512]) -> Result<(), BuildError>,
    ) -> Result<(), BuildError> {
        let second = self.first_table + 1;
        let leaves = second + self.span(L3_SHIFT);
        let table = |frame: u64| (frame * PAGE_SIZE) | WRITABLE;
        let page =
            |frame: u64| (frame * PAGE_SIZE) | if read_only.contains(&frame) { READ_ONLY } else { WRITABLE };
        let upper = self.va >> L3_SHIFT;
        fill(self.first_table, upper, second..leaves, &table, put)?;
        let middle = self.va >> L2_SHIFT;
        fill(second, middle, leaves..leaves + self.span(L2_SHIFT), &table, put)?;
        fill(leaves, self.va / PAGE_SIZE, self.frames.clone(), &page, put)
    }
}

/// Writes as many tables from frame `table` on as it takes to enter `targets`, the first of which belongs to entry
/// `first % 512` of the first table.
fn fill(
    table: u64,
    first: u64,
    targets: Range<u64>,
    entry: &impl Fn(u64) -> u64,
    put: &impl Fn(u64, &[u64; 512]) -> Result<(), BuildError>,
) -> Result<(), BuildError> {
    let mut targets = targets.map(entry);
    let mut skip = first % ENTRIES;
    let mut frame = table;
    loop {
        let mut entries = [0; 512];
        let mut used = false;
        for (entry, value) in entries.iter_mut().skip(usize::try_from(skip).unwrap_or(0)).zip(&mut targets) {
            *entry = value;
            used = true;
        }
        if !used {
            return Ok(());
        }
        put(frame, &entries)?;
        frame += 1;
        skip = 0;
    }
}
