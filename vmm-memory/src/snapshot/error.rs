//! What can go wrong with a snapshot.

use std::error::Error as StdError;
use std::io;
use std::path::PathBuf;

use crate::MemoryError;

/// Why a state cannot be written in a version, or read from one.
pub type StateError = Box<dyn StdError + Send + Sync>;

/// An error of writing or reading a snapshot. Each names the file, and the place in it where that is to blame.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The host's file system.
    #[error("{path}: {operation}")]
    File {
        /// The file.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// What the host says.
        source: io::Error,
    },

    /// It is something else.
    #[error("{path} is not a snapshot: it does not begin with \"{expected}\"")]
    NotASnapshot {
        /// The file.
        path: PathBuf,
        /// What snapshots begin with.
        expected: &'static str,
    },

    /// It was changed, or cut off, since it was written.
    #[error("{path} is damaged, in {part} (bytes {offset:#x} to {end:#x}): {problem}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// The part in which it is: the header, a state's name, addresses of RAM.
        part: String,
        /// Where the part begins, in bytes.
        offset: u64,
        /// Where it ends.
        end: u64,
        /// What is wrong with it.
        problem: String,
    },

    /// It was written by a newer release.
    #[error("{path}: {what} is of version {found}; this release knows {oldest} to {newest}")]
    Version {
        /// The file.
        path: PathBuf,
        /// Of what.
        what: String,
        /// The version found.
        found: u32,
        /// The oldest version known.
        oldest: u32,
        /// The newest version known.
        newest: u32,
    },

    /// It is of a virtual machine of another architecture.
    #[error("{path} is of a machine of ELF architecture {found}; here is {expected}")]
    Architecture {
        /// The file.
        path: PathBuf,
        /// Its architecture, by its number in ELF files.
        found: u32,
        /// That of this build.
        expected: u32,
    },

    /// A state that was expected is not there.
    #[error("{path} holds no state \"{name}\"; it holds {present:?}")]
    NoState {
        /// The file.
        path: PathBuf,
        /// What was asked for.
        name: String,
        /// What is there.
        present: Vec<String>,
    },

    /// A state that nobody has asked for: the machine that was saved has something that this one has not.
    #[error("{path} holds states that nothing here takes: {names:?}")]
    Unread {
        /// The file.
        path: PathBuf,
        /// Their names.
        names: Vec<String>,
    },

    /// A state of another kind than the one asked for.
    #[error("{path}: the state \"{name}\" is of {found}, where one of {expected} is expected")]
    OtherFormat {
        /// The file.
        path: PathBuf,
        /// The state.
        name: String,
        /// Whose format it has.
        found: String,
        /// Whose was asked for.
        expected: &'static str,
    },

    /// A state that the version asked for cannot express.
    #[error("the state \"{name}\" cannot be written in version {version} of {format}")]
    Encode {
        /// The state.
        name: String,
        /// Whose format.
        format: &'static str,
        /// Which version of it.
        version: u16,
        /// Why.
        source: StateError,
    },

    /// A state that is whole, and means nothing.
    #[error("{path}: the state \"{name}\" (version {version} of {format}) cannot be read")]
    Decode {
        /// The file.
        path: PathBuf,
        /// The state.
        name: String,
        /// Whose format.
        format: &'static str,
        /// Which version of it.
        version: u16,
        /// Why.
        source: StateError,
    },

    /// What was to be written is against the rules of the format.
    #[error("a snapshot cannot hold {what}: {problem}")]
    Unwritable {
        /// What was to be written.
        what: String,
        /// Why it cannot be.
        problem: String,
    },

    /// RAM that lies elsewhere than in the snapshot.
    #[error("{path}: {problem}")]
    Layout {
        /// The file.
        path: PathBuf,
        /// Where the two differ.
        problem: String,
    },

    /// An incremental snapshot without what it is based on, or with another.
    #[error("{path}: {problem}")]
    Base {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },

    /// The host.
    #[error("{operation}")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// What the host says.
        source: io::Error,
    },

    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}
