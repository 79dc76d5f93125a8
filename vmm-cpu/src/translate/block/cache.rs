//! The cache of blocks.

use rustc_hash::FxHashMap;

use super::Block;
use crate::translate::core::CodeStore;
use crate::translate::memory::{MemoryMap, PAGE_MASK};

/// Entries of the table from RIP to block.
const JUMPS: usize = 4096;

/// Blocks that are kept. Where there is no room for another, the oldest go.
const MAX_BLOCKS: usize = 128 * 1024;

/// Operations that are kept, of all blocks together: 64 MiB. A kernel's blocks have some six each.
const MAX_KEPT_OPS: usize = 2 * 1024 * 1024;

/// Blocks that are listed as gone. If there are more, all count as such.
const MAX_DROPPED: usize = 4096;

/// Blocks that go at a time to make room, at most: fewer than are listed.
const EVICTED: usize = MAX_DROPPED / 2;

/// Whether what is known of a linear address still holds: TLB generation, code width and privilege level.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stamp(pub(crate) u64);

#[derive(Clone, Copy, Debug, Default)]
struct Jump {
    rip: u64,
    stamp: Stamp,
    block: u32,
    /// [`BlockCache::epoch`] when it was remembered.
    epoch: u32,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct BlockCache {
    /// Dropped blocks have no operations until their place is used again.
    blocks: Vec<Block>,
    free: Vec<u32>,
    /// The place that is made free next: blocks come to be in the order of their places, but for those that are made free
    /// one by one.
    oldest: u32,
    /// Operations in them.
    ops: usize,
    by_address: FxHashMap<(u64, u32), u32>,
    /// Blocks with code in each page.
    by_page: FxHashMap<u64, Vec<u32>>,
    jumps: Box<[Jump; JUMPS]>,
    /// Changes whenever a block's place may have become another's.
    epoch: u32,
    /// Blocks that are gone since somebody asked; `None`: all that there were.
    dropped: Option<Vec<u32>>,
    /// Blocks that there ever were.
    decoded: u64,
}

impl BlockCache {
    pub(crate) fn new() -> Self {
        Self {
            blocks: Vec::new(),
            free: Vec::new(),
            oldest: 0,
            ops: 0,
            by_address: FxHashMap::default(),
            by_page: FxHashMap::default(),
            jumps: Box::new([Jump::default(); JUMPS]),
            epoch: 1,
            dropped: Some(Vec::new()),
            decoded: 0,
        }
    }

    /// How many blocks were decoded.
    pub(crate) fn decoded(&self) -> u64 {
        self.decoded
    }

    /// Whether blocks are gone of which nobody heard yet.
    pub(crate) fn has_dropped(&self) -> bool {
        self.dropped.as_ref().is_none_or(|blocks| !blocks.is_empty())
    }

    /// The blocks that are gone since this was last asked, or `Some(None)` if all that there were are.
    pub(crate) fn take_dropped(&mut self) -> Option<Option<Vec<u32>>> {
        self.has_dropped().then(|| self.dropped.replace(Vec::new()))
    }

    /// Counts a run of a block; how many there were before.
    pub(crate) fn count_run(&mut self, block: u32) -> u32 {
        self.blocks.get_mut(block as usize).map_or(0, |block| {
            let before = block.runs;
            block.runs = before.saturating_add(1);
            before
        })
    }

    #[allow(clippy::cast_possible_truncation, reason = "the low bits select")]
    fn slot(rip: u64) -> usize {
        (rip ^ rip >> 12) as usize % JUMPS
    }

    /// The block that runs at `rip`, if that was asked before and nothing has changed.
    #[allow(clippy::indexing_slicing, reason = "the index is reduced to the length")]
    #[inline(always)]
    pub(crate) fn find(&self, rip: u64, stamp: Stamp) -> Option<u32> {
        let jump = &self.jumps[Self::slot(rip)];
        (jump.rip == rip && jump.stamp == stamp && jump.epoch == self.epoch).then_some(jump.block)
    }

    /// Remembers which block runs at `rip`.
    #[allow(clippy::indexing_slicing, reason = "the index is reduced to the length")]
    pub(crate) fn remember(&mut self, rip: u64, stamp: Stamp, block: u32) {
        self.jumps[Self::slot(rip)] = Jump { rip, stamp, block, epoch: self.epoch };
    }

    #[inline(always)]
    pub(crate) fn get(&self, block: u32) -> Option<&Block> {
        self.blocks.get(block as usize)
    }

    /// The block at `gpa`, if its code is still what it was. `second_page` finds where code that crosses into the next
    /// page continues.
    pub(crate) fn lookup(
        &mut self,
        gpa: u64,
        code_bits: u32,
        map: &MemoryMap,
        second_page: impl FnOnce() -> Option<u64>,
    ) -> Option<u32> {
        let id = *self.by_address.get(&(gpa, code_bits))?;
        let block = self.get(id)?;
        let same = block.second_page.is_none_or(|page| second_page() == Some(page))
            && block.parts().all(|(gpa, bytes)| {
                let mut now = [0; 1024];
                now.get_mut(..bytes.len()).is_some_and(|now| map.read(gpa, now) && *now == *bytes)
            });
        if same {
            return Some(id);
        }
        self.remove(id);
        None
    }

    /// Keeps a block.
    pub(crate) fn insert(&mut self, block: Block) -> u32 {
        let (key, pages) = ((block.gpa, block.code_bits), block.pages());
        let id = match self.free.pop() {
            Some(id) => id,
            None => u32::try_from(self.blocks.len()).unwrap_or(u32::MAX),
        };
        self.ops += block.ops.len();
        self.decoded += 1;
        match self.blocks.get_mut(id as usize) {
            Some(place) => *place = block,
            None => self.blocks.push(block),
        }
        if let Some(old) = self.by_address.insert(key, id) {
            self.unlink(old);
        }
        for page in pages {
            self.by_page.entry(page).or_default().push(id);
        }
        id
    }

    /// Whether there is a block with code in the page of `gpa` that is not checked.
    pub(crate) fn needs_watching(&self, gpa: u64) -> bool {
        let ids = self.by_page.get(&(gpa & PAGE_MASK));
        ids.is_some_and(|ids| ids.iter().any(|id| self.get(*id).is_some_and(|block| !block.checked)))
    }

    fn is_full(&self) -> bool {
        self.blocks.len() >= MAX_BLOCKS && self.free.is_empty() || self.ops >= MAX_KEPT_OPS
    }

    /// Drops the oldest blocks as far as another one needs their room.
    pub(crate) fn make_room(&mut self) {
        while self.is_full() {
            for _ in 0..EVICTED {
                let id = self.oldest;
                self.oldest = id + 1;
                match self.get(id) {
                    Some(block) if !block.ops.is_empty() => self.remove(id),
                    Some(_) => {}
                    None => self.oldest = 0,
                }
            }
        }
    }

    /// Drops everything.
    pub(crate) fn clear(&mut self) {
        self.blocks.clear();
        self.free.clear();
        self.oldest = 0;
        self.dropped = None;
        self.ops = 0;
        self.by_address.clear();
        self.by_page.clear();
        self.forget_jumps();
    }

    fn forget_jumps(&mut self) {
        self.epoch = self.epoch.wrapping_add(1);
        if self.epoch == 0 {
            // After 2^32 of them, old entries would look new.
            self.jumps.fill(Jump::default());
            self.epoch = 1;
        }
    }

    /// Drops the blocks whose code a store may have changed; whether there were any.
    pub(crate) fn invalidate(&mut self, store: CodeStore) -> bool {
        let first = store.gpa & PAGE_MASK;
        let end = store.gpa.saturating_add(store.bytes);
        let mut any = false;
        let Some(ids) = self.by_page.get(&first) else { return false };
        let overlapping: Vec<u32> = ids
            .iter()
            .copied()
            .filter(|id| {
                self.get(*id).is_some_and(|block| {
                    block
                        .parts()
                        .any(|(gpa, bytes)| gpa < end && store.gpa < gpa.saturating_add(bytes.len() as u64))
                })
            })
            .collect();
        for id in overlapping {
            self.remove(id);
            any = true;
        }
        any
    }

    /// Drops a block.
    pub(crate) fn remove(&mut self, id: u32) {
        if let Some(block) = self.get(id) {
            self.by_address.remove(&(block.gpa, block.code_bits));
        }
        self.unlink(id);
    }

    /// Takes a block, which no address leads to any more, out of the pages and makes its place free.
    fn unlink(&mut self, id: u32) {
        let Some(block) = self.blocks.get_mut(id as usize) else { return };
        let pages = block.pages();
        self.ops = self.ops.saturating_sub(block.ops.len());
        // What remembers it finds nothing to run.
        (block.ops, block.bytes) = (Box::default(), Box::default());
        for page in pages {
            if let Some(ids) = self.by_page.get_mut(&page) {
                ids.retain(|other| *other != id);
                if ids.is_empty() {
                    self.by_page.remove(&page);
                }
            }
        }
        self.forget_jumps();
        self.free.push(id);
        if let Some(dropped) = &mut self.dropped {
            if dropped.len() < MAX_DROPPED {
                dropped.push(id);
            } else {
                self.dropped = None;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::translate::ops::Op;

    fn block(gpa: u64, ops: usize) -> Block {
        let op = Op::new(|_, _| Ok(()), 0);
        let ops = std::iter::repeat_n(op, ops).collect();
        Block { ops, bytes: [0x90].into(), gpa, second_page: None, code_bits: 64, checked: false, runs: 0 }
    }

    /// Adds `count` blocks of so many operations, one after another; their addresses.
    fn fill(cache: &mut BlockCache, count: u64, ops: usize) -> Vec<(u64, u32)> {
        (0..count)
            .map(|n| {
                cache.make_room();
                (n * 8, cache.insert(block(n * 8, ops)))
            })
            .collect()
    }

    fn is_kept(cache: &BlockCache, (gpa, id): (u64, u32)) -> bool {
        cache.get(id).is_some_and(|block| block.gpa == gpa && !block.ops.is_empty())
    }

    #[test]
    fn the_oldest_blocks_make_room_and_are_told() {
        let mut cache = BlockCache::new();
        let most = MAX_BLOCKS as u64;
        let blocks = fill(&mut cache, most, 1);
        assert!(!cache.has_dropped());
        assert!(blocks.iter().all(|block| is_kept(&cache, *block)));
        cache.make_room();
        let dropped = cache.take_dropped().unwrap().unwrap();
        let (gone, kept) = blocks.split_at(EVICTED);
        assert_eq!(dropped, gone.iter().map(|(_, id)| *id).collect::<Vec<_>>());
        assert!(kept.iter().all(|block| is_kept(&cache, *block)));
        assert!(!gone.iter().any(|block| is_kept(&cache, *block)));
        // All around, where some are gone for other reasons.
        cache.invalidate(CodeStore { gpa: 3 * most * 8 / 4, bytes: 8 });
        let late: Vec<(u64, u32)> = (0..most)
            .map(|n| {
                cache.make_room();
                let gpa = (most + n) * 8;
                (gpa, cache.insert(block(gpa, 1)))
            })
            .collect();
        assert!(
            late[EVICTED..].iter().filter(|block| is_kept(&cache, **block)).count()
                > MAX_BLOCKS - 2 * EVICTED
        );
        assert!(!kept[..MAX_BLOCKS / 2].iter().any(|block| is_kept(&cache, *block)));
    }

    #[test]
    fn operations_are_bounded() {
        let mut cache = BlockCache::new();
        let blocks = fill(&mut cache, 2 * (MAX_KEPT_OPS / 64) as u64, 64);
        assert!(cache.ops <= MAX_KEPT_OPS);
        assert!(cache.ops > MAX_KEPT_OPS - 64 * (EVICTED + 1));
        assert!(is_kept(&cache, *blocks.last().unwrap()));
    }
}
