//! Which vCPUs have decoded code of which page, so that stores to such pages are seen, and those to others are not
//! looked at.
//!
//! A page that gets its first code may have entries for writing in other vCPUs' TLBs. Whoever decodes adds itself to the
//! page's holders, asks the others to drop such entries, and once they have, settles the page: from then on all stores to
//! it are seen, for as long as it has any holder. A page without holders is not settled, in the same atomic step.
//!
//! A page that is checked gets no holders any more, and when the last has gone, stores to it are not looked at.

use std::sync::atomic::{AtomicU16, Ordering};

/// All vCPUs notice stores to the page.
const SETTLED: u16 = 1 << 15;
/// Code of the page is compared with memory instead.
const CHECKED: u16 = 1 << 14;
/// One for each vCPU that holds code of it.
const HOLDERS: u16 = CHECKED - 1;

/// What became of a vCPU that decodes code of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Added {
    /// It is a holder, and all vCPUs notice stores.
    Settled,
    /// It is a holder.
    Unsettled,
    /// It is none, since the page is checked.
    Checked,
}

/// A set of vCPUs, by index below 14.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct VcpuSet(u16);

impl VcpuSet {
    fn one(vcpu: u32) -> u16 {
        1_u16.checked_shl(vcpu).unwrap_or(0) & HOLDERS
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
        self.state(page).is_some_and(|state| state.load(Ordering::SeqCst) & !CHECKED != 0)
    }

    /// The vCPUs that hold code of a page.
    pub(crate) fn holders(&self, page: u64) -> VcpuSet {
        self.state(page).map_or(VcpuSet(0), |state| VcpuSet(state.load(Ordering::SeqCst) & HOLDERS))
    }

    /// Makes a vCPU a holder, unless the page is checked.
    pub(crate) fn add(&self, page: u64, vcpu: u32) -> Added {
        let own = VcpuSet::one(vcpu);
        let Some(state) = self.state(page) else { return Added::Unsettled };
        let is_holder = SETTLED | own;
        if state.load(Ordering::SeqCst) & (is_holder | CHECKED) == is_holder {
            return Added::Settled;
        }
        let with = |old: u16| (old & CHECKED == 0).then_some(old | own);
        match state.fetch_update(Ordering::SeqCst, Ordering::SeqCst, with) {
            Err(_) => Added::Checked,
            Ok(old) if old & SETTLED != 0 => Added::Settled,
            Ok(_) => Added::Unsettled,
        }
    }

    /// Lets the page be checked; who holds code of it.
    pub(crate) fn check(&self, page: u64) -> VcpuSet {
        let old = self.state(page).map_or(0, |state| state.fetch_or(CHECKED, Ordering::SeqCst));
        VcpuSet(old & HOLDERS)
    }

    /// Lets the page be watched again.
    pub(crate) fn uncheck(&self, page: u64) {
        if let Some(state) = self.state(page) {
            state.fetch_and(!CHECKED, Ordering::SeqCst);
        }
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
            Some(if left & HOLDERS == 0 { left & CHECKED } else { left })
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
        use Added::{Settled, Unsettled};
        let pages = CodePages::new(2);
        assert!(!pages.is_watched(1) && pages.add(1, 0) == Unsettled && pages.is_watched(1));
        // Another vCPU adds itself meanwhile: not settled for it either.
        assert_eq!(pages.add(1, 7), Unsettled);
        pages.settle(1, 0);
        assert_eq!([pages.add(1, 7), pages.add(1, 0), pages.add(1, 3)], [Settled; 3]);
        pages.remove(1, 0);
        pages.remove(1, 3);
        assert!(pages.holders(1).contains(7) && !pages.holders(1).contains(0));
        assert_eq!(pages.add(1, 0), Settled);
        pages.remove(1, 0);
        pages.remove(1, 7);
        assert!(!pages.is_watched(1));
        assert_eq!(pages.add(1, 0), Unsettled, "entries for writing may be anywhere again");
    }

    #[test]
    fn page_that_is_checked_is_watched_for_its_old_holders_alone() {
        let pages = CodePages::new(2);
        for vcpu in [2, 5] {
            pages.add(1, vcpu);
        }
        pages.settle(1, 2);
        let holders = pages.check(1);
        assert!(holders.contains(2) && holders.contains(5) && !holders.contains(14));
        assert_eq!([pages.add(1, 2), pages.add(1, 3)], [Added::Checked; 2]);
        pages.remove(1, 2);
        assert!(pages.is_watched(1) && !pages.holders(1).contains(3));
        pages.remove(1, 5);
        assert!(!pages.is_watched(1));
        assert_eq!(pages.add(1, 2), Added::Checked);
        pages.uncheck(1);
        assert_eq!(pages.add(1, 2), Added::Unsettled);
        // Neither does it begin where there is no code.
        assert_eq!(pages.check(0), VcpuSet(0));
        assert!(!pages.is_watched(0) && pages.add(0, 0) == Added::Checked);
    }

    #[test]
    fn page_outside_of_the_region_is_never_settled() {
        let pages = CodePages::new(2);
        assert!(pages.add(2, 0) == Added::Unsettled && !pages.is_watched(2));
        assert_eq!((pages.holders(u64::MAX), pages.check(2)), (VcpuSet(0), VcpuSet(0)));
    }
}
