//! The log on its storage: one writer, any number of readers.
//!
//! | path | what |
//! |---|---|
//! | `segments/N` | the entries and the checkpoints that acknowledge them ([`segment`]) |
//! | `keys/E` | the checkpoint with which the key of epoch E names its successor |
//! | `tile/L/N` | the hashes of the Merkle tree (C2SP tlog-tiles), made from the segments |
//! | `checkpoint` | the latest checkpoint that the tiles are there for |
//! | `cut/S` | what recovery cut off when the log had S entries |
//! | `lock` | held by the writer |

mod append;
mod batch;
mod load;
mod options;
mod publish;
mod recover;
mod retire;
mod rotate;
pub mod segment;

use std::io;

pub use append::{Batch, LogWriter};
pub(crate) use batch::{Writing, Written};
pub(crate) use load::read_header;
pub use options::LogOptions;
pub use recover::Recovered;
pub(crate) use recover::boot_id;
pub(crate) use rotate::carried_over;

use crate::event::EventError;
use crate::keys::KeyError;
use crate::merkle::tiles::TileError;
use crate::note::NoteError;

/// What goes wrong with a log that is written to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// Another process writes to it.
    #[error("another writer has the log")]
    Locked,
    /// A file cannot be read, or written for another reason than those below.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The batch could not be written; all that was acknowledged is safe, and it may be tried again, which
    /// [`LogWriter::commit`] does with what is pending.
    #[error("{path} takes no more: {source}")]
    Write {
        /// The segment.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// The disk did not say that it has the batch. Nobody knows which part it has, so nothing is written to this log any more by this
    /// writer; what was acknowledged is safe.
    #[error("{path} failed to reach the disk, the log is closed: {source}")]
    Sync {
        /// The segment.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// An earlier failure closed the log.
    #[error("the log was closed by an earlier failure: {0}")]
    Poisoned(String),
    /// What has been acknowledged is damaged. Nothing is cut off or written then; `vmm-audit verify` says what else.
    #[error("{path} at byte {offset}: acknowledged entries are damaged: {why}")]
    Damaged {
        /// The file.
        path: String,
        /// Where in it.
        offset: u64,
        /// What is wrong.
        why: String,
    },
    /// The log is older than what it has published.
    #[error(
        "the log has {found} entries, and a checkpoint says that it had {published}: it is an old copy, or its end is missing"
    )]
    RolledBack {
        /// Entries that it has.
        found: u64,
        /// Entries that it had.
        published: u64,
    },
    /// An event that cannot be an entry.
    #[error(transparent)]
    Event(#[from] EventError),
    /// The keys.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A note.
    #[error(transparent)]
    Note(#[from] NoteError),
    /// The tiles.
    #[error(transparent)]
    Tile(#[from] TileError),
    /// An option that cannot be.
    #[error("{option} is {value}: allowed are {allowed}")]
    Option {
        /// Its name.
        option: &'static str,
        /// Its value.
        value: String,
        /// What is allowed.
        allowed: &'static str,
    },
}

impl LogError {
    pub(crate) fn io(path: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        |source| Self::Io { path, source }
    }

    /// Whether trying again later may help.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Write { .. })
    }
}

/// Nanoseconds since 1970.
pub(crate) fn wall_clock() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    nanoseconds(now)
}

/// Nanoseconds of `CLOCK_MONOTONIC`.
pub(crate) fn monotonic_clock() -> u64 {
    nanoseconds(rustix::time::clock_gettime(rustix::time::ClockId::Monotonic))
}

fn nanoseconds(time: rustix::time::Timespec) -> u64 {
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    seconds.saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}
