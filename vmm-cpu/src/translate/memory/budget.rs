//! How many pages the address windows of the process may have mapped, all together.
//!
//! Linux lets a process have 65530 mappings unless its administrator says otherwise, and a page can be two of them: itself,
//! and what is free beside it. A process that has them all cannot allocate memory, nor unmap a part of anything. No guest
//! shall bring it there, and no two.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Pages in the address windows of a process.
pub(crate) const WINDOW_PAGES: usize = 16384;

/// What one window has of them.
#[derive(Debug)]
pub(super) struct Share {
    pages: usize,
    /// What all have.
    taken: &'static AtomicUsize,
}

impl Share {
    pub(super) fn of_process() -> Self {
        static TAKEN: AtomicUsize = AtomicUsize::new(0);
        Self::of(&TAKEN)
    }

    fn of(taken: &'static AtomicUsize) -> Self {
        Self { pages: 0, taken }
    }

    /// Makes the share `pages`, unless there are no more; whether it is that. It can always be less than before.
    pub(super) fn set(&mut self, pages: usize) -> bool {
        let allowed = |taken: usize| {
            let others = taken.saturating_sub(self.pages);
            let all = others.checked_add(pages)?;
            (pages <= self.pages || all <= WINDOW_PAGES).then_some(all)
        };
        let is_done = self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, allowed).is_ok();
        if is_done {
            self.pages = pages;
        }
        is_done
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.set(0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_together_never_have_more() {
        static TAKEN: AtomicUsize = AtomicUsize::new(0);
        let (mut one, mut other) = (Share::of(&TAKEN), Share::of(&TAKEN));
        assert!(one.set(WINDOW_PAGES - 5) && other.set(5));
        assert!(!other.set(6) && !one.set(usize::MAX));
        assert!(one.set(WINDOW_PAGES - 6) && other.set(6) && !one.set(WINDOW_PAGES - 5));
        drop(one);
        assert!(other.set(WINDOW_PAGES) && !other.set(WINDOW_PAGES + 1));
        drop(other);
        assert_eq!(TAKEN.load(Ordering::Relaxed), 0);
    }
}
