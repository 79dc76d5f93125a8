//! The guest's page tables as KVM may have seen them, and what it has to see again.
//!
//! KVM keeps shadows of the tables that programs run on, and notices the stores to them that are made in the guest. Those of
//! software go past it. So before a program runs, its tables are compared with what they were when a program last ran: each entry
//! that was present and is another now is stored to once more, in the guest and without a change, which drops its shadow.
//! Entries that were not present have none.
//!
//! With one vCPU that is all, since tables change only between two stays. With several, another may have shown an entry to the
//! program and taken it away again in between. It has then told this vCPU to forget it, by an interrupt, as it has to tell
//! every processor: so what the guest has invalidated here is shown again too, and what came to be present during a stay is
//! noted at its end.

use std::collections::HashMap;
use std::hash::BuildHasherDefault;

use rustc_hash::FxHasher;

use super::pages::{ACCESSED, DIRTY, LARGE, LIST, MOST_COPIES, PAGE_BYTES, PRESENT, Pages, WRITABLE};
use crate::error::Result;
use crate::translate::native::{Invalidated, MemoryMap};

/// Tables that are kept track of: 16 MiB of them. Where there are more, KVM drops all shadows each time.
const MAX_TABLES: usize = 4096;

/// The address in an entry.
const FRAME: u64 = 0x000f_ffff_ffff_f000;

/// Entries of a top-level table that programs have.
const HALF: usize = 256;

type Page = [u8; PAGE_BYTES];
type Map<V> = HashMap<u64, V, BuildHasherDefault<FxHasher>>;

/// One table as KVM may have seen it.
#[derive(Debug)]
struct Table {
    bytes: Box<Page>,
    level: u8,
    /// Tables that it leads to.
    below: Vec<u64>,
    /// It has entries that are looked at although nothing has changed.
    is_restless: bool,
    /// When it was last looked at.
    looked: u64,
}

/// A copy of a top-level table.
#[derive(Clone, Debug)]
struct Copy {
    /// Of which.
    of: Option<u64>,
    entries: [u64; HALF],
    /// vCPUs that run on it.
    users: u32,
    used: u64,
}

/// What KVM has to be shown before a program runs.
#[derive(Debug, Default)]
pub(super) struct News {
    /// Entries, at their addresses for the stubs.
    pub(super) entries: Vec<u64>,
    /// Everything.
    pub(super) all: bool,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Tables {
    known: Map<Table>,
    copies: Vec<Copy>,
    looks: u64,
    /// KVM may have shadows of tables that nothing is known of any more.
    is_lost: bool,
}

/// How tables are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    /// Before a stay.
    Before,
    /// Behind one: what came to be present.
    Behind,
}

impl Tables {
    pub(super) fn new() -> Self {
        let copy = Copy { of: None, entries: [0; HALF], users: 0, used: 0 };
        Self { known: Map::default(), copies: vec![copy; MOST_COPIES], looks: 0, is_lost: false }
    }

    /// Prepares a stay on the tables at `root`; the number of the copy to run on. `held` is what this vCPU ran on last.
    pub(super) fn before(
        &mut self,
        pages: &Pages,
        map: &MemoryMap,
        root: u64,
        held: Option<u64>,
        news: &mut News,
    ) -> Result<u64> {
        self.looks += 1;
        let number = self.copy(root, held);
        self.refresh_copy(pages, map, root, number, news)?;
        self.look(map, number, Look::Before, news);
        news.all |= std::mem::take(&mut self.is_lost);
        Ok(number)
    }

    /// Notes what came to be present during a stay on copy `number`.
    pub(super) fn behind(&mut self, map: &MemoryMap, number: u64) {
        self.looks += 1;
        self.look(map, number, Look::Behind, &mut News::default());
    }

    /// Shows what the guest has invalidated, where that is not only what has changed.
    pub(super) fn invalidate(
        map: &MemoryMap,
        root: u64,
        invalidated: &Invalidated,
        is_same: bool,
        news: &mut News,
    ) {
        news.all |= invalidated.all && is_same;
        for va in invalidated.pages.iter().filter(|va| **va >> 47 == 0) {
            let mut table = root;
            for level in (1..=4_u32).rev() {
                let place = table + (va >> (12 + 9 * (level - 1)) & 0x1ff) * 8;
                let Some(entry) = map.load::<u64>(place) else { break };
                let is_last = level == 1 || entry & PRESENT == 0 || level < 4 && entry & LARGE != 0;
                if is_last && level < 4 {
                    news.entries.push(place);
                }
                if is_last {
                    break;
                }
                table = entry & FRAME;
            }
        }
    }

    /// The copy of a root: the one that there is, or the one that has not been used for longest.
    fn copy(&mut self, root: u64, held: Option<u64>) -> u64 {
        if let Some(held) = held.and_then(|held| self.copies.get_mut(usize::try_from(held).ok()?)) {
            held.users = held.users.saturating_sub(1);
        }
        let looks = self.looks;
        let known = self.copies.iter().position(|copy| copy.of == Some(root));
        let oldest = || {
            let free = self.copies.iter().enumerate().filter(|(_, copy)| copy.users == 0);
            free.min_by_key(|(_, copy)| copy.used).map_or(0, |(number, _)| number)
        };
        let number = known.unwrap_or_else(oldest);
        if let Some(copy) = self.copies.get_mut(number) {
            copy.of = Some(root);
            copy.users += 1;
            copy.used = looks;
        }
        number as u64
    }

    fn refresh_copy(
        &mut self,
        pages: &Pages,
        map: &MemoryMap,
        root: u64,
        number: u64,
        news: &mut News,
    ) -> Result<()> {
        let mut bytes = [0; HALF * 8];
        // A root where there is no memory is one without entries.
        map.read(root, &mut bytes);
        let Some(copy) = usize::try_from(number).ok().and_then(|number| self.copies.get_mut(number)) else {
            return Ok(());
        };
        for ((index, held), entry) in (0..).zip(&mut copy.entries).zip(bytes.as_chunks::<8>().0) {
            let entry = u64::from_le_bytes(*entry);
            let wanted = if entry & PRESENT == 0 { 0 } else { entry | ACCESSED };
            if *held == wanted {
                continue;
            }
            pages.set_copy_entry(number, index, wanted)?;
            if *held & PRESENT != 0 {
                news.entries.push(Pages::copy_entry_va(number, index));
            }
            *held = wanted;
        }
        Ok(())
    }

    /// Looks at all tables below copy `number`, each once.
    fn look(&mut self, map: &MemoryMap, number: u64, look: Look, news: &mut News) {
        let copy = usize::try_from(number).ok().and_then(|number| self.copies.get(number));
        let entries = copy.map(|copy| copy.entries).unwrap_or([0; HALF]);
        let mut left: Vec<(u64, u8)> = entries
            .into_iter()
            .filter(|entry| entry & PRESENT != 0)
            .map(|entry| (entry & FRAME, 3))
            .collect();
        let mut page: Page = [0; PAGE_BYTES];
        while let Some((gpa, level)) = left.pop() {
            let is_new = !self.known.contains_key(&gpa);
            if is_new && self.known.len() >= MAX_TABLES {
                // All that is known of them goes with the shadows.
                self.known.clear();
                self.is_lost = true;
                break;
            }
            if !map.read(gpa, &mut page) {
                continue;
            }
            let looked = self.looks;
            let table = self.known.entry(gpa).or_insert_with(|| Table {
                bytes: Box::new([0; PAGE_BYTES]),
                level,
                below: Vec::new(),
                is_restless: false,
                looked: 0,
            });
            if table.looked == looked {
                continue;
            }
            table.looked = looked;
            if *table.bytes != page || table.level != level || table.is_restless {
                table.level = level;
                table.take_over(gpa, &page, look, news);
            }
            left.extend(table.below.iter().map(|gpa| (*gpa, level - 1)));
        }
        if news.entries.len() > LIST / 2 {
            news.all = true;
        }
    }
}

impl Table {
    fn take_over(&mut self, gpa: u64, page: &Page, look: Look, news: &mut News) {
        self.below.clear();
        self.is_restless = false;
        let entries = self.bytes.as_chunks_mut::<8>().0.iter_mut().zip(page.as_chunks::<8>().0);
        for (place, (old, new)) in (gpa..).step_by(8).zip(entries) {
            let (was, is) = (u64::from_le_bytes(*old), u64::from_le_bytes(*new));
            let is_leaf = self.level == 1 || is & LARGE != 0;
            self.is_restless |= finds_out(is, is_leaf);
            match look {
                Look::Before => {
                    if replaces(was, is, is_leaf) {
                        news.entries.push(place);
                    }
                    *old = *new;
                }
                Look::Behind if was & PRESENT == 0 && is & PRESENT != 0 => *old = *new,
                Look::Behind => {}
            }
            if is & PRESENT != 0 && !is_leaf {
                self.below.push(is & FRAME);
            }
        }
    }
}

/// Whether a shadow of `was` would be wrong now. Bits that processors set are not looked at as long as they are set; where a
/// writable page is not dirty, the processor has to find out anew.
fn replaces(was: u64, is: u64, is_leaf: bool) -> bool {
    let set_by_processors = ACCESSED | DIRTY;
    let is_other = (was ^ is) & !set_by_processors != 0;
    let is_cleared = was & !is & set_by_processors != 0;
    was & PRESENT != 0 && (is_other || is_cleared || finds_out(is, is_leaf))
}

/// Whether the processor has to find out whether the page becomes dirty.
fn finds_out(entry: u64, is_leaf: bool) -> bool {
    is_leaf && entry & (PRESENT | WRITABLE | DIRTY) == PRESENT | WRITABLE
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_present_and_changed_is_shown() {
        for (was, is, is_leaf, shown) in [
            (0, 0x1067, true, false),
            (0x1067, 0, true, true),
            (0x1067, 0x2067, true, true),
            (0x1067, 0x1065, true, true),
            (0x1005, 0x1025, true, false),
            (0x1025, 0x1005, true, true),
            (0x1067, 0x1027, true, true),
            (0x1027, 0x1027, true, true),
            (0x1027, 0x1027, false, false),
            (0x1007, 0x1067, true, false),
        ] {
            assert_eq!(replaces(was, is, is_leaf), shown, "{was:#x} to {is:#x}");
        }
    }
}
