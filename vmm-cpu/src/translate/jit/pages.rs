//! The pages of code that there are translations of, and which of them hold.
//!
//! A page is a linear page at a guest-physical page, for a [`Mode`]. One that no translation is in any more is forgotten.
//! Each has a copy of its bytes, so that mostly one comparison tells that nothing has changed. They are bounded by what code
//! memory is.

use rustc_hash::FxHashMap;

use super::builder::Mode;
use crate::translate::block::Block;
use crate::translate::memory::{Fetched, Forgotten, PAGE, PAGE_MASK, Reach};

/// Bytes of a page.
pub(super) const PAGE_BYTES: usize = 4096;
const _: () = assert!(PAGE_BYTES as u64 == PAGE);

/// What a page holds, and its host address.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) bytes: Box<[u8; PAGE_BYTES]>,
    pub(super) host: u64,
}

/// Binary logarithm of the size of a small page.
const SMALL: u32 = PAGE.trailing_zeros();

/// Whom code runs for, and whether through the address window.
const USES: [(Reach, bool); 4] =
    [(Reach::User, false), (Reach::User, true), (Reach::Supervisor, false), (Reach::SupervisorAll, false)];

/// Pages that there may be where code memory is small.
const FEW: usize = 512;

/// Linear page with the mode, guest-physical page.
pub(super) type PageKey = (u64, Mode, u64);

/// See the module.
#[derive(Debug)]
pub(super) struct Page {
    key: PageKey,
    /// Its translations may be entered.
    holds: bool,
    /// Of what the page tables have there: whether it is global, and the binary logarithm of its size.
    global: bool,
    size: u32,
    /// Translations that begin here.
    first: Vec<u32>,
    /// Those that begin in the page before and end here.
    second: Vec<u32>,
    /// What it held when that was last compared.
    content: Content,
    /// Each of its translations was made from that.
    exact: bool,
    /// Some were made from blocks that are checked.
    checked: bool,
}

impl Page {
    /// The translations with code in it.
    pub(super) fn translations(&self) -> impl Iterator<Item = u32> {
        self.first.iter().chain(&self.second).copied()
    }

    fn is_empty(&self) -> bool {
        self.first.is_empty() && self.second.is_empty()
    }
}

#[derive(Debug)]
pub(super) struct Pages {
    /// Those that are forgotten have no translations until their places are used again.
    pages: Vec<Page>,
    free: Vec<u32>,
    /// How many there may be.
    most: usize,
    by_key: FxHashMap<PageKey, u32>,
    /// Those that hold, by linear page and mode.
    current: FxHashMap<(u64, Mode), u32>,
    /// Those of them that are not global, and maybe others.
    local: Vec<u32>,
    /// Some that hold may be parts of large pages.
    large: bool,
}

impl Pages {
    /// For so much code memory: a kernel's pages have twice the bytes of a page each, on average.
    pub(super) fn new(code_bytes: usize) -> Self {
        Self::with_most((code_bytes / PAGE_BYTES).max(FEW))
    }

    fn with_most(most: usize) -> Self {
        Self {
            pages: Vec::new(),
            free: Vec::new(),
            most,
            by_key: FxHashMap::default(),
            current: FxHashMap::default(),
            local: Vec::new(),
            large: false,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.pages.len() - self.free.len()
    }

    /// Whether there is no room for another translation's.
    pub(super) fn is_full(&self) -> bool {
        self.len() + 2 > self.most
    }

    pub(super) fn get(&self, page: u32) -> Option<&Page> {
        self.pages.get(page as usize)
    }

    pub(super) fn find(&self, key: &PageKey) -> Option<u32> {
        self.by_key.get(key).copied()
    }

    pub(super) fn holds(&self, page: u32) -> bool {
        self.get(page).is_some_and(|page| page.holds)
    }

    /// Host address of a page, as far as its translations know.
    pub(super) fn host(&self, page: u32) -> Option<u64> {
        self.get(page).map(|page| page.content.host)
    }

    /// Whether some of its translations were made from blocks that are checked.
    pub(super) fn is_checked(&self, page: u32) -> bool {
        self.get(page).is_some_and(|page| page.checked)
    }

    /// The page that holds at a linear page.
    pub(super) fn current(&self, va: u64, mode: Mode) -> Option<u32> {
        self.current.get(&(va, mode)).copied()
    }

    /// Suspends the pages whose translation of addresses is forgotten; which.
    pub(super) fn forget(&mut self, forgotten: &Forgotten, flavour: Mode) -> Vec<u32> {
        let mut suspended = Vec::new();
        if forgotten.all {
            self.local.clear();
            self.large = false;
            suspended.extend(std::mem::take(&mut self.current).into_values());
            for page in &suspended {
                if let Some(page) = self.pages.get_mut(*page as usize) {
                    page.holds = false;
                }
            }
            return suspended;
        }
        if forgotten.local {
            for page in std::mem::take(&mut self.local) {
                if self.get(page).is_some_and(|page| !page.global) {
                    suspended.extend(self.suspend(page));
                }
            }
        }
        for va in &forgotten.pages {
            for (reach, window) in USES {
                for sse in [false, true] {
                    let mode = Mode { reach, sse, window, ..flavour };
                    if let Some(page) = self.current(va & PAGE_MASK, mode) {
                        suspended.extend(self.suspend(page));
                    }
                }
            }
            if self.large {
                let is_part = |page: &Page| page.size > SMALL && page.key.0 >> page.size == va >> page.size;
                let is_part = |page: &u32| self.get(*page).is_some_and(is_part);
                let parts: Vec<u32> = self.current.values().copied().filter(is_part).collect();
                for page in parts {
                    suspended.extend(self.suspend(page));
                }
            }
        }
        suspended
    }

    /// Lets a page not be entered; the page, if it could be.
    pub(super) fn suspend(&mut self, page: u32) -> Option<u32> {
        let found = self.pages.get_mut(page as usize).filter(|found| found.holds)?;
        found.holds = false;
        let (va, mode, _) = found.key;
        self.current.remove(&(va, mode));
        Some(page)
    }

    /// Lets a page be entered, which nothing else at that linear page may be.
    pub(super) fn hold(&mut self, page: u32, fetched: Fetched) {
        let Some(found) = self.pages.get_mut(page as usize) else { return };
        found.holds = true;
        (found.global, found.size) = (fetched.global, fetched.size);
        self.large |= found.size > SMALL;
        let (va, mode, _) = found.key;
        let is_local = !found.global;
        self.current.insert((va, mode), page);
        if is_local {
            if self.local.len() >= 64 + 2 * self.current.len() {
                self.collect_local();
            }
            self.local.push(page);
        }
    }

    /// Rebuilds the list of pages that are not global, which grew by those that were suspended one by one.
    fn collect_local(&mut self) {
        let is_local = |page: &u32| self.get(*page).is_some_and(|page| !page.global);
        self.local = self.current.values().copied().filter(is_local).collect();
    }

    /// A new page with that content.
    pub(super) fn add(&mut self, key: PageKey, content: Content) -> Option<u32> {
        let (first, second) = (Vec::new(), Vec::new());
        let (holds, global, exact, checked) = (false, false, true, false);
        let size = SMALL;
        let new = Page { key, holds, global, size, first, second, content, exact, checked };
        let page = match self.free.pop() {
            Some(page) => {
                *self.pages.get_mut(page as usize)? = new;
                page
            }
            None => {
                self.pages.push(new);
                u32::try_from(self.pages.len() - 1).ok()?
            }
        };
        self.by_key.insert(key, page);
        Some(page)
    }

    /// Adds a translation of `block` to one of its pages: that which it begins in, or the other one.
    pub(super) fn add_translation(&mut self, page: u32, translation: u32, block: &Block, begins: bool) {
        let Some(page) = self.pages.get_mut(page as usize) else { return };
        // Memory may have changed since they were read, and may change back.
        page.exact &= is_in(block, page.key.2, &page.content.bytes);
        page.checked |= block.checked;
        if begins { page.first.push(translation) } else { page.second.push(translation) }
    }

    /// Takes a translation out of a page, which is forgotten if it was the last.
    pub(super) fn remove_translation(&mut self, number: u32, translation: u32) {
        let Some(page) = self.pages.get_mut(number as usize) else { return };
        let before = page.first.len() + page.second.len();
        page.first.retain(|other| *other != translation);
        page.second.retain(|other| *other != translation);
        if before > 0 && page.is_empty() {
            let key = page.key;
            self.suspend(number);
            self.by_key.remove(&key);
            self.free.push(number);
        }
    }

    /// Takes note of what a page holds now; whether its translations may have been made from something else.
    pub(super) fn has_changed(&mut self, page: u32, now: &[u8; PAGE_BYTES]) -> bool {
        let Some(page) = self.pages.get_mut(page as usize) else { return false };
        if page.exact && *now == *page.content.bytes {
            return false;
        }
        // Those that differ are about to go.
        *page.content.bytes = *now;
        page.exact = true;
        true
    }

    /// Panics if something is kept that nothing refers to.
    #[cfg(test)]
    pub(super) fn verify(&self) {
        let kept = self.pages.iter().filter(|page| !page.is_empty());
        assert_eq!((kept.count(), self.len()), (self.len(), self.by_key.len()));
        assert!(self.len() <= self.most && self.local.len() <= 64 + 2 * self.most);
        for ((va, mode), page) in &self.current {
            let page = self.get(*page).unwrap();
            assert!(page.holds && (page.key.0, page.key.1) == (*va, *mode));
        }
        assert_eq!(self.pages.iter().filter(|page| page.holds).count(), self.current.len());
    }

    pub(super) fn clear(&mut self) {
        *self = Self::with_most(self.most);
    }
}

/// Whether the bytes of the page at `gpa` are those that `block` has there.
pub(super) fn is_in(block: &Block, gpa: u64, bytes: &[u8; PAGE_BYTES]) -> bool {
    let mut parts = block.parts().filter(|(start, _)| start & PAGE_MASK == gpa);
    parts.all(|(start, part)| {
        let start = usize::from(offset(start));
        bytes.get(start..start + part.len()) == Some(part)
    })
}

/// Where an address lies in its page.
pub(super) fn offset(address: u64) -> u16 {
    u16::try_from(address & !PAGE_MASK).unwrap_or(0)
}
