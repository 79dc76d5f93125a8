//! RAM in a snapshot: zero pages are left out, and pages that a base has.
//!
//! | module | holds |
//! |---|---|
//! | `layout` | where RAM was |
//! | `chunk` | the record of 64 pages, which says what the file has of them |
//! | `save` | from RAM to the file |
//! | `image` | the file's side: what its records say, and pages from it |
//! | `load` | from the file to RAM |
//! | `lazy`, `userfault` | the same, as it is touched |

pub(super) mod chunk;
pub(super) mod image;
mod layout;
mod lazy;
mod load;
mod save;
pub(super) mod userfault;

use std::fmt;
use std::num::NonZeroUsize;

pub use self::layout::{RamLayout, RamRange};
pub use self::lazy::LazyRam;
pub(super) use self::save::save;
use super::reader::Snapshot;
use crate::dirty::DirtyPages;

/// How far it has come, in bytes of RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Those that are done.
    pub done: u64,
    /// All of them.
    pub total: u64,
}

/// What was written of RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RamStats {
    /// Pages of RAM.
    pub pages: u64,
    /// Pages that the file has.
    pub stored: u64,
    /// Pages that are left to the base.
    pub inherited: u64,
    /// Bytes of the file that they take.
    pub bytes: u64,
}

/// How RAM is saved, loaded or verified. Unless said otherwise: on all processors, without telling of progress; saved as it is, whole.
#[derive(Clone, Copy)]
pub struct RamOptions<'a> {
    pub(super) packed: bool,
    pub(super) base: Option<(&'a Snapshot, &'a DirtyPages)>,
    pub(super) threads: NonZeroUsize,
    pub(super) progress: Option<&'a (dyn Fn(Progress) + Sync)>,
}

impl Default for RamOptions<'_> {
    fn default() -> Self {
        let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        Self { packed: false, base: None, threads, progress: None }
    }
}

impl<'a> RamOptions<'a> {
    /// The usual.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether pages are packed and compressed (LZ4) when RAM is saved. What is packed cannot be mapped, just loaded.
    pub fn packed(self, packed: bool) -> Self {
        Self { packed, ..self }
    }

    /// Saves what has changed since `base` alone. `changed` is the harvest of the tracker that was made, or last harvested, when RAM was as in
    /// `base`. Pages that nobody keeps track of are saved whole.
    pub fn since(self, base: &'a Snapshot, changed: &'a DirtyPages) -> Self {
        Self { base: Some((base, changed)), ..self }
    }

    /// On at most so many threads, and never on more than 64, the calling one included.
    pub fn threads(self, threads: NonZeroUsize) -> Self {
        Self { threads, ..self }
    }

    /// Tells of progress, from any of the threads.
    pub fn progress(self, progress: &'a (dyn Fn(Progress) + Sync)) -> Self {
        Self { progress: Some(progress), ..self }
    }
}

impl fmt::Debug for RamOptions<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RamOptions")
            .field("packed", &self.packed)
            .field("incremental", &self.base.is_some())
            .field("threads", &self.threads)
            .finish_non_exhaustive()
    }
}

/// Counts what is done, and tells of it.
struct Count<'a> {
    done: std::sync::atomic::AtomicU64,
    total: u64,
    tell: Option<&'a (dyn Fn(Progress) + Sync)>,
}

impl<'a> Count<'a> {
    fn new(total: u64, options: &RamOptions<'a>) -> Self {
        Self { done: 0.into(), total, tell: options.progress }
    }

    fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, std::sync::atomic::Ordering::Relaxed) + bytes;
        if let Some(tell) = self.tell {
            tell(Progress { done, total: self.total });
        }
    }
}
