//! What the ABI knows of page tables: the level of each frame that is one.
//!
//! Xen counts references so that a guest can never write to its own page tables. Here the engine confines the guest to its
//! own guest-physical memory, whatever its tables say, so a level is a mark without a count. It serves the guest:
//! entries are checked when they are stored, a link to a new table makes that one known, and faults on stores to tables
//! can be told from others.

use std::sync::atomic::{AtomicU8, Ordering};

use vmm_memory::GuestMemoryMap;
use vmm_memory::vm_memory::Bytes as _;

use super::abi::errno::Errno;
use super::engine::Layout;

const LEVEL: u8 = 7;
const PINNED: u8 = 1 << 7;
/// The engine's entries for mode kernel, or user, are in this top-level table.
const KERNEL_ROOT: u8 = 1 << 6;
const USER_ROOT: u8 = 1 << 5;

/// A mark for each frame of RAM.
#[derive(Debug)]
pub(crate) struct Tables {
    marks: Box<[AtomicU8]>,
    /// Where an engine can read a copy.
    shown: Option<(GuestMemoryMap, Layout)>,
}

impl Tables {
    pub(crate) fn new(frames: u64) -> Self {
        Self { marks: (0..frames).map(|_| AtomicU8::new(0)).collect(), shown: None }
    }

    /// As [`Tables::new`], with a copy at [`Layout::marks`] if that is in the memory. The guest may write there, so the copy
    /// is never read here.
    pub(crate) fn shown(map: &GuestMemoryMap, layout: Layout) -> Self {
        Self { shown: Some((map.clone(), layout)), ..Self::new(layout.frames()) }
    }

    fn show(&self, frame: u64, mark: u8) {
        if let Some((map, layout)) = &self.shown
            && let Some(place) = layout.mark(frame)
            && map.store(mark, place, Ordering::Release).is_err()
        {
            tracing::trace!(frame, "no place for the mark of a frame");
        }
    }

    fn mark(&self, frame: u64) -> Option<&AtomicU8> {
        usize::try_from(frame).ok().and_then(|frame| self.marks.get(frame))
    }

    /// The level of a page table, 1 to 4; 0 for a frame that is none, as far as is known.
    pub(crate) fn level(&self, frame: u64) -> u8 {
        self.mark(frame).map_or(0, |mark| mark.load(Ordering::Acquire) & LEVEL)
    }

    /// Makes a frame known as a table of `level`. Returns whether it was not.
    pub(crate) fn claim(&self, frame: u64, level: u8) -> Result<bool, Errno> {
        let mark = self.mark(frame).ok_or(Errno::EINVAL)?;
        let old = mark.load(Ordering::Acquire);
        match old & LEVEL {
            0 => {
                mark.store(level, Ordering::Release);
                self.show(frame, level);
                Ok(true)
            }
            known if known == level => Ok(false),
            _ => Err(Errno::EINVAL),
        }
    }

    /// As [`Tables::claim`], for a table that the guest names itself: what was known before counts only if the
    /// guest pinned it.
    pub(crate) fn claim_anew(&self, frame: u64, level: u8) -> Result<bool, Errno> {
        let mark = self.mark(frame).ok_or(Errno::EINVAL)?;
        let old = mark.load(Ordering::Acquire);
        if old & LEVEL != level && old & PINNED != 0 {
            return Err(Errno::EINVAL);
        }
        if old & LEVEL != level {
            mark.store(0, Ordering::Release);
        }
        self.claim(frame, level)
    }

    pub(crate) fn pin(&self, frame: u64) -> Result<(), Errno> {
        let mark = self.mark(frame).ok_or(Errno::EINVAL)?;
        let old = mark.fetch_or(PINNED, Ordering::AcqRel);
        self.show(frame, old | PINNED);
        if old & PINNED != 0 { Err(Errno::EINVAL) } else { Ok(()) }
    }

    pub(crate) fn unpin(&self, frame: u64) -> Result<(), Errno> {
        let mark = self.mark(frame).ok_or(Errno::EINVAL)?;
        let old = mark.fetch_and(!PINNED, Ordering::AcqRel);
        self.show(frame, old & !PINNED);
        if old & PINNED == 0 { Err(Errno::EINVAL) } else { Ok(()) }
    }

    /// A frame becomes ordinary memory again: the guest maps it for writing. Refused while it is pinned.
    pub(crate) fn release(&self, frame: u64) -> Result<(), Errno> {
        let Some(mark) = self.mark(frame) else { return Ok(()) };
        let old = mark.load(Ordering::Acquire);
        if old & PINNED != 0 {
            return Err(Errno::EINVAL);
        }
        if old != 0 {
            mark.store(0, Ordering::Release);
            self.show(frame, 0);
        }
        Ok(())
    }

    /// Notes that a table serves as root of that mode. Returns whether the engine has to prepare it for that.
    pub(crate) fn become_root(&self, frame: u64, user: bool) -> bool {
        let Some(mark) = self.mark(frame) else { return false };
        let (this, other) = if user { (USER_ROOT, KERNEL_ROOT) } else { (KERNEL_ROOT, USER_ROOT) };
        let old = mark.load(Ordering::Acquire);
        mark.store(old & !other | this, Ordering::Release);
        self.show(frame, old & !other | this);
        old & this == 0
    }

    /// A table was written anew: the engine has to prepare it when it becomes a root.
    pub(crate) fn forget_root(&self, frame: u64) {
        if let Some(mark) = self.mark(frame) {
            let old = mark.fetch_and(!(KERNEL_ROOT | USER_ROOT), Ordering::AcqRel);
            self.show(frame, old & !(KERNEL_ROOT | USER_ROOT));
        }
    }
}

#[cfg(feature = "snapshot")]
mod saved;
#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_kept_until_released() {
        let tables = Tables::new(4);
        assert_eq!(tables.claim(1, 3), Ok(true));
        assert_eq!(tables.claim(1, 3), Ok(false));
        assert_eq!(tables.claim(1, 2), Err(Errno::EINVAL));
        assert_eq!(tables.claim_anew(1, 2), Ok(true));
        assert_eq!(tables.level(1), 2);
        assert_eq!(tables.release(1), Ok(()));
        assert_eq!(tables.level(1), 0);
        assert_eq!(tables.claim(4, 1), Err(Errno::EINVAL));
        assert_eq!(tables.claim(u64::MAX, 1), Err(Errno::EINVAL));
        assert_eq!(tables.level(u64::MAX), 0);
    }

    #[test]
    fn pinned_tables_stay() {
        let tables = Tables::new(4);
        assert_eq!(tables.unpin(2), Err(Errno::EINVAL));
        assert_eq!(tables.claim_anew(2, 4), Ok(true));
        assert_eq!(tables.pin(2), Ok(()));
        assert_eq!(tables.pin(2), Err(Errno::EINVAL));
        assert_eq!(tables.release(2), Err(Errno::EINVAL));
        assert_eq!(tables.claim_anew(2, 3), Err(Errno::EINVAL));
        assert_eq!(tables.unpin(2), Ok(()));
        assert_eq!(tables.claim_anew(2, 3), Ok(true));
    }

    #[test]
    fn roots_are_prepared_once_a_mode() {
        let tables = Tables::new(4);
        assert!(tables.become_root(1, false));
        assert!(!tables.become_root(1, false));
        assert!(tables.become_root(1, true));
        assert!(tables.become_root(1, false));
        tables.forget_root(1);
        assert!(tables.become_root(1, false));
        assert!(!tables.become_root(99, false));
    }
}
