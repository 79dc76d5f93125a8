//! A set of pages of one region.

use std::fmt;
use std::ops::Range;

use vm_memory::GuestMemoryRegion;

use crate::PAGE_SIZE;
use crate::region::GuestRegion;

/// A set of pages of one region: one bit for each [`PAGE_SIZE`] bytes.
///
/// Page 0 is the region's first. Bit `n` of word `w` stands for page `64 * w + n`, as in KVM's dirty log.
/// There is no page beyond the region's end: such a bit is ignored wherever it comes from, and never
/// reported.
#[derive(Clone, PartialEq, Eq)]
pub struct PageBitmap {
    words: Vec<u64>,
    pages: u64,
}

impl PageBitmap {
    /// The empty set of pages of `region`. Takes one bit of memory a page, which the host supplies as
    /// it is written.
    pub fn for_region(region: &GuestRegion) -> Self {
        Self::with_pages(region.len() / PAGE_SIZE)
    }

    pub(crate) fn with_pages(pages: u64) -> Self {
        // A region is mapped, so its count of pages fits; were it not so, the set would hold no page.
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(0);
        Self { words: vec![0; words], pages }
    }

    /// Number of pages of the region.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The bits, 64 pages a word.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Adds a page.
    pub fn set(&mut self, page: u64) {
        self.set_range(page..page.saturating_add(1));
    }

    /// Adds a range of pages.
    pub fn set_range(&mut self, range: Range<u64>) {
        let end = range.end.min(self.pages);
        let mut page = range.start;
        while page < end {
            let bit = page % 64;
            let here = (64 - bit).min(end - page);
            if let Some(word) = self.word_mut(page) {
                *word |= (u64::MAX >> (64 - here)) << bit;
            }
            page += here;
        }
    }

    /// Adds every page whose bit is set in `words`, which may have any length.
    pub fn or_words(&mut self, words: &[u64]) {
        for (own, other) in self.words.iter_mut().zip(words) {
            *own |= other;
        }
        let used = self.pages % 64;
        if used != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << used) - 1;
        }
    }

    /// Whether the page is in the set.
    pub fn contains(&self, page: u64) -> bool {
        usize::try_from(page / 64)
            .ok()
            .and_then(|index| self.words.get(index))
            .is_some_and(|word| word >> (page % 64) & 1 != 0)
    }

    /// Number of pages in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// The pages as ranges, ascending, none touching the next.
    pub fn ranges(&self) -> PageRanges<'_> {
        PageRanges { bitmap: self, next: 0 }
    }

    fn word_mut(&mut self, page: u64) -> Option<&mut u64> {
        self.words.get_mut(usize::try_from(page / 64).ok()?)
    }

    /// First page from `from` on that is in the set, or that is not.
    fn find(&self, from: u64, in_set: bool) -> Option<u64> {
        let first = usize::try_from(from / 64).ok()?;
        let mut mask = u64::MAX << (from % 64);
        for (index, &word) in self.words.iter().enumerate().skip(first) {
            let found = if in_set { word } else { !word } & mask;
            if found != 0 {
                let page = index as u64 * 64 + u64::from(found.trailing_zeros());
                return (page < self.pages).then_some(page);
            }
            mask = u64::MAX;
        }
        None
    }
}

impl fmt::Debug for PageBitmap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PageBitmap").field("pages", &self.pages).field("set", &self.count()).finish()
    }
}

/// The ranges of pages of a [`PageBitmap`].
#[derive(Clone, Debug)]
pub struct PageRanges<'a> {
    bitmap: &'a PageBitmap,
    next: u64,
}

impl Iterator for PageRanges<'_> {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        let start = self.bitmap.find(self.next, true)?;
        let end = self.bitmap.find(start, false).unwrap_or(self.bitmap.pages);
        self.next = end;
        Some(start..end)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn bitmap(pages: u64, set: &[u64]) -> PageBitmap {
        let mut bitmap = PageBitmap::with_pages(pages);
        set.iter().for_each(|page| bitmap.set(*page));
        bitmap
    }

    #[test]
    fn ranges_join_across_words_and_stop_at_the_end() {
        let all = |bitmap: &PageBitmap| bitmap.ranges().collect::<Vec<_>>();
        assert_eq!(all(&bitmap(200, &[])), []);
        assert_eq!(all(&bitmap(200, &[62, 63, 64, 65, 199])), [62..66, 199..200]);
        let mut full = bitmap(128, &[]);
        full.or_words(&[u64::MAX; 5]);
        assert_eq!((full.ranges().next(), full.ranges().count()), (Some(0..128), 1));
        assert_eq!(full.count(), 128);
    }

    #[test]
    fn pages_beyond_the_end_do_not_exist() {
        let mut bitmap = bitmap(65, &[65, 127, 128, u64::MAX]);
        bitmap.or_words(&[0, !1, u64::MAX]);
        bitmap.set_range(65..u64::MAX);
        assert!(bitmap.is_empty());
        bitmap.or_words(&[0, 3]);
        assert_eq!((bitmap.ranges().next(), bitmap.count()), (Some(64..65), 1));
        assert!(bitmap.contains(64) && !bitmap.contains(65) && !bitmap.contains(u64::MAX));
    }

    proptest! {
        #[test]
        fn agrees_with_a_set(
            pages in 0u64..400,
            single in prop::collection::vec(0u64..450, 0..40),
            spans in prop::collection::vec((0u64..450, 0u64..200), 0..4),
            words in prop::collection::vec(any::<u64>().prop_map(|w| w & w >> 7 & w << 3), 0..9),
        ) {
            let mut bitmap = PageBitmap::with_pages(pages);
            let mut model = BTreeSet::new();
            for page in single {
                bitmap.set(page);
                model.insert(page);
            }
            for (start, length) in spans {
                bitmap.set_range(start..start + length);
                model.extend(start..start + length);
            }
            bitmap.or_words(&words);
            for (index, word) in (0u64..).zip(&words) {
                model.extend((0..64).filter(|bit| word >> bit & 1 != 0).map(|bit| index * 64 + bit));
            }
            model.retain(|page| *page < pages);

            prop_assert_eq!(bitmap.count(), model.len() as u64);
            prop_assert_eq!(bitmap.is_empty(), model.is_empty());
            for page in 0..500 {
                prop_assert_eq!(bitmap.contains(page), model.contains(&page));
            }
            let ranges: Vec<_> = bitmap.ranges().collect();
            for pair in ranges.windows(2) {
                prop_assert!(pair[0].end < pair[1].start);
            }
            prop_assert_eq!(ranges.into_iter().flatten().collect::<BTreeSet<_>>(), model);
        }
    }
}
