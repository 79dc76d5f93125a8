//! Which vCPUs have decoded code of which page, so that stores to such pages are seen, and those to others are not
//! looked at.
//!
//! A page that gets its first code may have entries for writing in other vCPUs' TLBs. Whoever decodes adds itself to the
//! page's holders, asks the others to drop such entries, and once they have, settles the page: from then on all stores to
//! it are seen, for as long as it has any holder. A page without holders is not settled, in the same atomic step.

use std::sync::atomic::{AtomicU16, Ordering};

/// All vCPUs notice stores to the page. The bits below are one for each vCPU that holds code of it.
const SETTLED: u16 = 1 << 15;

/// A set of vCPUs, by index below 15.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct VcpuSet(u16);

impl VcpuSet {
    fn one(vcpu: u32) -> u16 {
        1_u16.checked_shl(vcpu).unwrap_or(0) & !SETTLED
    }

    pub(crate) fn contains(self, vcpu: u32) -> bool {
        self.0 & Self::one(vcpu) != 0
    }
}

/// The pages of a region.
#[derive(Debug)]
pub(crate) struct CodePages(Box<[AtomicU16]>);

impl CodePages {
    pub(crate) fn new(pages: u64) -> Self {
        let pages = usize::try_from(pages).unwrap_or(0);
        Self(std::iter::repeat_with(|| AtomicU16::new(0)).take(pages).collect())
    }

    fn state(&self, page: u64) -> Option<&AtomicU16> {
        self.0.get(usize::try_from(page).ok()?)
    }

    /// Whether stores have to be looked at.
    pub(crate) fn is_watched(&self, page: u64) -> bool {
        self.state(page).is_some_and(|state| state.load(Ordering::SeqCst) != 0)
    }

    /// The vCPUs that hold code of a page.
    pub(crate) fn holders(&self, page: u64) -> VcpuSet {
        self.state(page).map_or(VcpuSet(0), |state| VcpuSet(state.load(Ordering::SeqCst) & !SETTLED))
    }

    /// Makes a vCPU a holder; whether the page is settled.
    pub(crate) fn add(&self, page: u64, vcpu: u32) -> bool {
        let own = VcpuSet::one(vcpu);
        self.state(page).is_some_and(|state| {
            let is_holder = SETTLED | own;
            state.load(Ordering::SeqCst) & is_holder == is_holder
                || state.fetch_or(own, Ordering::SeqCst) & SETTLED != 0
        })
    }

    /// Settles a page: since that vCPU became a holder and stayed one, all others have come to notice stores.
    pub(crate) fn settle(&self, page: u64, vcpu: u32) {
        if let Some(state) = self.state(page)
            && VcpuSet(state.load(Ordering::SeqCst)).contains(vcpu)
        {
            state.fetch_or(SETTLED, Ordering::SeqCst);
        }
    }

    /// A vCPU holds no code of the page any more.
    pub(crate) fn remove(&self, page: u64, vcpu: u32) {
        let own = VcpuSet::one(vcpu);
        let Some(state) = self.state(page) else { return };
        let without = |old: u16| {
            let left = old & !own;
            Some(if left == SETTLED { 0 } else { left })
        };
        // It always finds something to write.
        let _old = state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, without);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_is_settled_while_it_has_holders() {
        let pages = CodePages::new(2);
        assert!(!pages.is_watched(1) && !pages.add(1, 0) && pages.is_watched(1));
        // Another vCPU adds itself meanwhile: not settled for it either.
        assert!(!pages.add(1, 7));
        pages.settle(1, 0);
        assert!(pages.add(1, 7) && pages.add(1, 0) && pages.add(1, 3));
        pages.remove(1, 0);
        pages.remove(1, 3);
        assert!(pages.holders(1).contains(7) && !pages.holders(1).contains(0));
        assert!(pages.add(1, 0));
        pages.remove(1, 0);
        pages.remove(1, 7);
        assert!(!pages.is_watched(1));
        assert!(!pages.add(1, 0), "entries for writing may be anywhere again");
    }

    #[test]
    fn page_outside_of_the_region_is_never_settled() {
        let pages = CodePages::new(2);
        assert!(!pages.add(2, 0) && !pages.is_watched(2));
        assert_eq!(pages.holders(u64::MAX), VcpuSet(0));
    }
}
