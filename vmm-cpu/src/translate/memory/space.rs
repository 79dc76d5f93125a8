//! An address space in the address window: its pages, and what they cost.

use std::time::Duration;

use rustc_hash::FxHashMap;

/// What an access costs that faults.
pub(super) const FAULT: Duration = Duration::from_micros(3);
/// What it costs to map a page, and to unmap it some time.
pub(super) const MAPPING: Duration = Duration::from_micros(8);
/// What it costs to change the address space, and for each page of it to be compared with the page tables.
pub(super) const CHANGE: Duration = Duration::from_micros(4);
pub(super) const CHECK: Duration = Duration::from_nanos(150);

/// A mapped page.
#[derive(Clone, Copy, Debug)]
pub(super) struct Mapped {
    pub(super) gpa: u64,
    pub(super) writable: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Space {
    /// Its CR3.
    pub(super) root: u64,
    /// Region and slot.
    pub(super) slots: Vec<(u16, u32)>,
    pub(super) pages: FxHashMap<u64, Mapped>,
    /// When it was last used, as the window counts.
    pub(super) used: u64,
}

impl Space {
    pub(super) fn new(root: u64) -> Self {
        Self { root, slots: Vec::new(), pages: FxHashMap::default(), used: 0 }
    }

    /// The slot of a region.
    pub(super) fn slot(&self, region: u16) -> Option<u32> {
        self.slots.iter().find(|(of, _)| *of == region).map(|(_, slot)| *slot)
    }

    /// The slot that `va` is in.
    pub(super) fn slot_at(&self, va: u64) -> Option<u32> {
        self.slot(u16::try_from(va >> 32).ok()?)
    }
}
