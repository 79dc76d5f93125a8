//! Code that changes: how it is noticed, and what follows.
//!
//! A page that blocks were made from is watched: the TLB lets no store to it through, and each store drops the blocks that
//! it overlaps. Where programs store to a page of code all the time, mostly to what is no code, that costs them a hundred times
//! what stores cost otherwise. Such a page comes to be checked instead: stores to it are not looked at any more, and each
//! block that is made from it is compared with memory whenever it is entered, by translated code too. Its blocks end after each
//! instruction that may store something, so that the next one is compared before it runs: a processor executes what it
//! has itself stored (Intel SDM 3A 13.6, AMD APM 2 7.6.1).
//!
//! A page is watched again when translations of it are to be entered once more after addresses were translated anew, and it is
//! what it was the time before.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use super::block::BlockCache;
use super::core::{CodeStore, Core, Machine};
use super::memory::{Added, PAGE, PAGE_MASK, VcpuSet};

/// Stores to a watched page that are noticed before it is checked instead. They take less time than it does to make the
/// blocks of a page anew, and a kernel that patches itself makes fewer to one page.
const PATIENCE: u32 = 1024;

/// Pages whose stores are counted.
const COUNTED: usize = 256;

/// How changes of a page's code are found. Where a block has two pages, what is found later goes for both.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Watch {
    /// All stores to it are seen.
    Settled,
    /// Those of some vCPUs may still go unseen.
    Unsettled,
    /// Stores are not looked at.
    Checked,
}

/// Drops the blocks that stores of this vCPU have changed, and tells the others.
#[cold]
pub(super) fn drop_changed_code(m: &mut Machine<'_>, cache: &mut BlockCache) {
    for mut store in std::mem::take(&mut m.code_stores) {
        let mut others = m.holders_of_code(store.gpa);
        if m.is_out_of_patience(store.gpa) {
            others = m.check_code(store.gpa);
            store = CodeStore { gpa: store.gpa & PAGE_MASK, bytes: PAGE };
        }
        drop_code(m, cache, store);
        m.shared.post_code_store(m.index, others, store);
    }
}

/// Drops the blocks that a store has changed, and the interest in its page if no others need it to be watched.
pub(super) fn drop_code(m: &mut Machine<'_>, cache: &mut BlockCache, store: CodeStore) {
    cache.invalidate(store);
    if !cache.needs_watching(store.gpa) {
        m.forget_code(store.gpa);
    }
}

/// Has a page watched again that was checked. Its blocks go.
pub(super) fn stop_checking(m: &mut Machine<'_>, cache: &mut BlockCache, gpa: u64) {
    if let Some(slot) = m.map().slot(gpa) {
        slot.code.uncheck(slot.page(gpa));
    }
    cache.invalidate(CodeStore { gpa: gpa & PAGE_MASK, bytes: PAGE });
}

impl Core {
    /// Makes stores to a page of code seen, also those of other vCPUs, unless it is checked. Until all vCPUs see theirs,
    /// what is decoded has to be compared with memory each time that it runs, too.
    pub(super) fn watch_code(&mut self, gpa: u64) -> Watch {
        let (map, page_gpa) = (Arc::clone(self.tlb.map()), gpa & PAGE_MASK);
        let Some(slot) = map.slot(gpa) else { return Watch::Unsettled };
        let page = slot.page(gpa);
        match slot.code.add(page, self.index) {
            Added::Settled => return Watch::Settled,
            Added::Checked => return Watch::Checked,
            Added::Unsettled => {}
        }
        let epoch = match self.unsettled.get(&page_gpa) {
            Some(epoch) => *epoch,
            None => {
                self.tlb.watch_stores(gpa);
                if self.shared.max_vcpus == 1 {
                    slot.code.settle(page, self.index);
                    return Watch::Settled;
                }
                let epoch = self.shared.ask_others(self.index);
                self.unsettled.insert(page_gpa, epoch);
                epoch
            }
        };
        if !self.shared.others_have_seen(self.index, epoch) {
            return Watch::Unsettled;
        }
        slot.code.settle(page, self.index);
        self.unsettled.remove(&page_gpa);
        Watch::Settled
    }

    /// The vCPUs that have decoded code of the page of `gpa`, to which this one has stored something.
    fn holders_of_code(&self, gpa: u64) -> VcpuSet {
        // One that becomes a holder from here on reads what was stored.
        fence(Ordering::SeqCst);
        self.tlb.map().slot(gpa).map_or(VcpuSet::default(), |slot| slot.code.holders(slot.page(gpa)))
    }

    /// No block of this vCPU that is not checked is left in the page: as far as it is concerned, stores need not be seen any
    /// more.
    pub(super) fn forget_code(&mut self, gpa: u64) {
        self.unsettled.remove(&(gpa & PAGE_MASK));
        if let Some(slot) = self.tlb.map().slot(gpa) {
            slot.code.remove(slot.page(gpa), self.index);
        }
    }

    /// Counts a store to a page of code; whether it was one too many. Checks are worth something where code is translated.
    fn is_out_of_patience(&mut self, gpa: u64) -> bool {
        if !self.checks_code || self.mode.code_bits != 64 {
            return false;
        }
        if self.noticed.len() >= COUNTED {
            self.noticed.clear();
        }
        let count = self.noticed.entry(gpa & PAGE_MASK).or_default();
        *count += 1;
        *count >= PATIENCE
    }

    /// From now on, blocks that are made from the page of `gpa` are checked; the vCPUs that have others.
    fn check_code(&mut self, gpa: u64) -> VcpuSet {
        self.counts.pages_checked += 1;
        self.noticed.remove(&(gpa & PAGE_MASK));
        self.tlb.map().slot(gpa).map_or(VcpuSet::default(), |slot| slot.code.check(slot.page(gpa)))
    }
}
