//! Whether a log is what its writer wrote.
//!
//! It takes the public key of epoch 0, which the verifier has from elsewhere. Everything in the log's directory is checked against what
//! that key and its successors have signed: each byte of the segments through the hash chain and the tree, the tiles, the key files, the
//! published checkpoint, and what recovery kept.
//!
//! A log whose end was cut off at a checkpoint, and everything else with it, is a valid older log. So a verifier keeps a checkpoint
//! from last time ([`VerifyOptions::since`]): then the log must continue it. Whoever has no such checkpoint sees at least whether the log was
//! closed.

mod entries;
mod finish;
mod pass;
mod tiles;

use serde::Serialize;

use crate::digest::Digest;
use crate::keys::KeyChain;
use crate::log::segment::parse_name;
use crate::note::Verifier;
use crate::storage::{Storage, walk};

/// What to verify by.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct VerifyOptions {
    /// The key of epoch 0.
    pub key: Verifier,
    /// Checkpoints that the log must continue.
    pub since: Vec<Vec<u8>>,
    /// Whether a writer is at work, so that what is behind the last checkpoint is no finding.
    pub live: bool,
    /// Whether the Merkle tree is computed from the entries and compared with the signed roots and the tiles. Without that, the hash
    /// chain and its signatures still cover each byte of the segments, in a third of the time; proofs and tiles are not vouched for.
    pub tree: bool,
}

impl VerifyOptions {
    /// By this key.
    pub fn new(key: Verifier) -> Self {
        Self { key, since: Vec::new(), live: false, tree: true }
    }

    /// With a checkpoint that the log must continue.
    #[must_use]
    pub fn since(mut self, note: Vec<u8>) -> Self {
        self.since.push(note);
        self
    }

    /// With or without the [`tree`](Self::tree).
    #[must_use]
    pub fn tree(mut self, tree: bool) -> Self {
        self.tree = tree;
        self
    }

    /// While a writer is at work.
    #[must_use]
    pub fn live(mut self, live: bool) -> Self {
        self.live = live;
        self
    }
}

/// What a finding means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// To know, and no more.
    Note,
    /// The log is not what its writer wrote.
    Damage,
}

/// Something about a log, and where.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Finding {
    /// What it means.
    pub severity: Severity,
    /// The file, relative to the log.
    pub file: String,
    /// The byte in it, where it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
    /// The first entry that it is about, where it is one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub entry: Option<u64>,
    /// What it is.
    pub what: String,
}

impl std::fmt::Display for Finding {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.file)?;
        if let Some(offset) = self.offset {
            write!(f, ", byte {offset}")?;
        }
        if let Some(entry) = self.entry {
            write!(f, ", entry {entry}")?;
        }
        write!(f, ": {}", self.what)
    }
}

/// The result of a verification.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Verification {
    /// Whether there is no damage.
    pub intact: bool,
    /// What was found, damage first.
    pub findings: Vec<Finding>,
    /// How many findings there are beyond the first [`MAX_FINDINGS`].
    pub more: u64,
    /// The log's name.
    pub origin: String,
    /// Entries in the log, as the last checkpoint has it.
    pub size: u64,
    /// The first entry that is still there.
    pub first_entry: u64,
    /// The root of the tree.
    pub root: Digest,
    /// The hash chain.
    pub chain: Digest,
    /// The last epoch.
    pub epoch: u64,
    /// Checkpoints in the segments.
    pub checkpoints: u64,
    /// Segments.
    pub segments: u64,
    /// Bytes of segments.
    pub bytes: u64,
    /// Whether the log was closed.
    pub closed: bool,
    /// Times of the first and last checkpoint, nanoseconds since 1970.
    pub times: Option<(u64, u64)>,
    /// The last checkpoint: to be kept for the next verification.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<String>,
}

/// Findings that are kept.
pub const MAX_FINDINGS: usize = 1000;

/// The storage cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("{path}: {source}")]
pub struct VerifyError {
    /// The file.
    pub path: String,
    /// Why.
    pub source: std::io::Error,
}

pub(crate) fn io(path: &str) -> impl FnOnce(std::io::Error) -> VerifyError {
    let path = path.to_owned();
    |source| VerifyError { path, source }
}

/// Verifies the log in `storage`. `progress` is told how many bytes of how many are done.
///
/// # Errors
/// If the storage cannot be read. That the log is damaged is no error, but in the result.
pub fn verify(
    storage: &dyn Storage,
    options: &VerifyOptions,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Verification, VerifyError> {
    let files = walk(storage, "").map_err(io(""))?;
    let (keys, broken) = KeyChain::load(options.key.clone(), storage);
    let mut pass = pass::Pass::new(storage, options, keys);
    if let Some(broken) = broken {
        pass.damage(broken.path, None, None, broken.why);
    }
    let mut numbers = Vec::new();
    for (path, length) in &files {
        match path.split_once('/') {
            Some(("segments", name)) => match parse_name(name) {
                Some(number) => numbers.push((number, *length)),
                None => pass.foreign(path),
            },
            Some(("tile", _)) => pass.tile_file(path),
            Some(("cut", name)) => pass.cut_file(name),
            Some(("keys", _)) => pass.key_file(path),
            None if path == "checkpoint" => {}
            None if path == "lock" => {
                if *length > 0 {
                    pass.damage("lock".to_owned(), Some(0), None, "it is not empty".to_owned());
                }
            }
            _ => pass.foreign(path),
        }
    }
    numbers.sort_unstable();
    pass.open_published()?;
    pass.segments(&numbers, progress)?;
    pass.finish()
}
