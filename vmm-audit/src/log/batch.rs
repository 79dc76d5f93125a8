//! A batch on its way to the disk.
//!
//! [`LogWriter::commit`] does it all at once. The pipeline has a thread of its own for the disk, so that the next batch is gathered and hashed
//! meanwhile: [`LogWriter::prepare`] closes the batch with a signed checkpoint, [`Writing::write`] may be called anywhere, and
//! [`LogWriter::settle`] takes the result. There is one batch on its way at a time.

use std::sync::{Arc, Mutex, PoisonError};

use sha2::{Digest as _, Sha256};

use super::append::{Batch, LogWriter};
use super::segment::{FrameKind, path, put_frame};
use super::{LogError, wall_clock};
use crate::checkpoint::Checkpoint;
use crate::digest::Digest;
use crate::merkle::FullTile;
use crate::merkle::tiles::TileId;
use crate::storage::StorageFile;

/// A file that the log and the thread of the disk have.
pub(super) type SharedFile = Arc<Mutex<Box<dyn StorageFile>>>;

/// The right edge of the tree at a checkpoint: what is published with it.
#[derive(Debug, Default)]
pub(super) struct Edge {
    pub(super) size: u64,
    pub(super) tiles: Vec<(TileId, Vec<u8>)>,
}

/// What holds once the batch is on the disk.
struct After {
    chain: Digest,
    frame: Vec<u8>,
    size: u64,
    note: String,
    rings: Vec<u64>,
    tiles: Vec<FullTile>,
    edge: Edge,
}

/// A batch that is to be written, and where.
pub(crate) struct Writing {
    file: SharedFile,
    path: String,
    /// Bytes of the segment before it.
    at: u64,
    bytes: Vec<u8>,
    /// Bytes of it that are entries; behind them is the checkpoint.
    entries: usize,
    after: After,
}

/// A batch, and what became of it.
pub(crate) struct Written {
    writing: Writing,
    result: Result<(), LogError>,
}

impl Writing {
    /// Writes it, and waits until the disk has it.
    pub(crate) fn write(self) -> Written {
        let result = self.try_write();
        Written { writing: self, result }
    }

    fn try_write(&self) -> Result<(), LogError> {
        let path = || self.path.clone();
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(source) = file.append(&self.bytes) {
            // What is there of the batch goes again, so that it is not taken for a batch.
            file.truncate(self.at).map_err(LogError::io(path()))?;
            return Err(LogError::Write { path: path(), source });
        }
        file.sync().map_err(|source| LogError::Sync { path: path(), source })
    }
}

/// The hash chain from the last checkpoint on, as far as it has come.
#[derive(Debug, Default)]
pub(super) struct Running {
    hash: Sha256,
    /// Bytes of what is pending that are in it; `None` before anything is.
    done: Option<usize>,
}

impl Running {
    /// Takes over what is pending and not yet hashed.
    fn update(&mut self, chain: &Digest, carry: &[u8], pending: &[u8]) {
        let done = self.done.unwrap_or_else(|| {
            self.hash = Sha256::new_with_prefix(chain.as_bytes());
            self.hash.update(carry);
            0
        });
        self.hash.update(pending.get(done..).unwrap_or_default());
        self.done = Some(pending.len());
    }
}

impl LogWriter {
    /// Hashes what has been appended so far, so that [`prepare`](Self::prepare) has less to do. Only while the batch before is
    /// settled, or on its way and not failed.
    pub(crate) fn hash_pending(&mut self) {
        let (chain, carry) = match &self.ahead {
            Some((chain, frame)) => (chain, frame),
            None => (&self.chain, &self.carry),
        };
        self.running.update(chain, carry, &self.pending);
    }

    /// Whether there is something to be written.
    pub(crate) fn is_pending(&self) -> bool {
        !self.pending.is_empty() || !self.changed_rings.is_empty()
    }

    /// Closes what is pending with a signed checkpoint.
    pub(crate) fn prepare(&mut self, closed: bool, next: Option<String>) -> Result<Writing, LogError> {
        self.check()?;
        self.running.update(&self.chain, &self.carry, &self.pending);
        let chain = Digest::from_bytes(std::mem::take(&mut self.running).hash.finalize().into());
        let changed = self.changed_rings.iter();
        let rings = changed.filter_map(|id| self.rings.get(id).map(|position| (*id, *position))).collect();
        let checkpoint = Checkpoint {
            origin: self.origin().to_owned(),
            size: self.tree.size(),
            root: self.tree.root(),
            chain,
            time: wall_clock(),
            epoch: self.keys.epoch,
            next,
            rings,
            closed,
        };
        let note = checkpoint.sign(&self.keys.current)?;
        let mut frame = Vec::with_capacity(note.len() + 16);
        put_frame(&mut frame, FrameKind::Checkpoint, checkpoint.size, note.as_bytes());
        let mut bytes = std::mem::replace(&mut self.pending, std::mem::take(&mut self.spare));
        let entries = bytes.len();
        bytes.extend_from_slice(&frame);
        let mut tiles = std::mem::take(&mut self.held);
        tiles.append(&mut self.tree.take_full());
        let edge = self.tree.partial().map(|(id, bytes)| (id, bytes.to_vec())).collect();
        let after = After {
            chain,
            size: checkpoint.size,
            note,
            rings: std::mem::take(&mut self.changed_rings).into_iter().collect(),
            tiles,
            edge: Edge { size: checkpoint.size, tiles: edge },
            frame,
        };
        self.ahead = Some((after.chain, after.frame.clone()));
        let file = Arc::clone(&self.file);
        Ok(Writing { file, path: path(self.number), at: self.length, bytes, entries, after })
    }

    /// Takes over what became of a batch. How many bytes it had.
    ///
    /// # Errors
    /// Those of writing it. After [`LogError::Write`] its entries are pending again, before those that have come since.
    pub(crate) fn settle(&mut self, written: Written) -> Result<Batch, LogError> {
        let Written { writing: Writing { mut bytes, entries, after, .. }, result } = written;
        self.ahead = None;
        match result {
            Ok(()) => {
                let count = bytes.len() as u64;
                bytes.clear();
                self.spare = bytes;
                self.length += count;
                (self.chain, self.carry) = (after.chain, after.frame);
                (self.acknowledged, self.note, self.edge) = (after.size, after.note, after.edge);
                self.tiles.extend(after.tiles);
                Ok(Batch { size: after.size, bytes: count })
            }
            Err(error) if error.is_transient() => {
                bytes.truncate(entries);
                bytes.append(&mut self.pending);
                self.pending = bytes;
                self.running = Running::default();
                self.changed_rings.extend(after.rings);
                self.held = after.tiles;
                Err(error)
            }
            Err(error) => Err(self.poison(error)),
        }
    }

    /// Writes what is pending and a checkpoint.
    pub(super) fn write(&mut self, closed: bool, next: Option<String>) -> Result<u64, LogError> {
        let written = self.prepare(closed, next)?.write();
        self.settle(written).map(|batch| batch.bytes)
    }

    /// Whether the segment has come to its end, or going over to the next was interrupted.
    pub(crate) fn is_rotation_due(&self) -> bool {
        let options = &self.options;
        self.rotation.is_some()
            || self.length >= options.segment_bytes
            || self.begun.elapsed() >= options.segment_age
    }

    /// What is left to do when a batch is settled and the next may be on its way.
    pub(crate) fn tidy(&mut self) -> Result<(), LogError> {
        self.remove_old()?;
        self.publish_if_due()
    }
}
