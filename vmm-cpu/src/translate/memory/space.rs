//! An address space in the address window: its pages, and what they may cost.
//!
//! Faults and mappings cost microseconds, a thousand times what a lookup in the TLB does. So an address space has to earn
//! them by the time that it runs.

use std::time::{Duration, Instant};

use rustc_hash::FxHashMap;

/// What a fault costs that maps a page.
pub(super) const FAULT: Duration = Duration::from_micros(10);
/// What it costs to compare a page with the page tables.
pub(super) const CHECK: Duration = Duration::from_nanos(150);
/// An address space earns one part in so many of the time that it runs.
const SHARE: u32 = 8;
/// The most that it can have earned.
const MOST: Duration = Duration::from_millis(50);

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
    /// What it may spend.
    credit: Duration,
    since: Instant,
}

impl Space {
    pub(super) fn new(root: u64, earned: Duration) -> Self {
        let (slots, pages) = (Vec::new(), FxHashMap::default());
        Self { root, slots, pages, used: 0, credit: earned, since: Instant::now() }
    }

    /// The slot of a region.
    pub(super) fn slot(&self, region: u16) -> Option<u32> {
        self.slots.iter().find(|(of, _)| *of == region).map(|(_, slot)| *slot)
    }

    /// The slot that `va` is in.
    pub(super) fn slot_at(&self, va: u64) -> Option<u32> {
        self.slot(u16::try_from(va >> 32).ok()?)
    }

    /// It runs from now on.
    pub(super) fn start(&mut self) {
        self.since = Instant::now();
    }

    /// It has run until now.
    pub(super) fn earn(&mut self) {
        let now = Instant::now();
        self.credit = (self.credit + now.duration_since(self.since) / SHARE).min(MOST);
        self.since = now;
    }

    /// Takes what something costs, as far as there is so much; whether there is.
    pub(super) fn spend(&mut self, cost: Duration) -> bool {
        let left = self.credit.checked_sub(cost);
        self.credit = left.unwrap_or_default();
        left.is_some()
    }
}
