//! Writing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use super::batch::{Edge, Running, SharedFile};
use super::rotate::Rotation;
use super::segment::put_entry;
use super::{LogError, LogOptions, monotonic_clock, wall_clock};
use crate::digest::Digest;
use crate::event::{Event, EventBytes, EventError, Kind, MAX_EVENT};
use crate::keys::{KeyStore, Keys};
use crate::merkle::{FullTile, Tree};
use crate::note::Verifier;
use crate::storage::Storage;

/// Writes a log: events are appended, and acknowledged by a checkpoint for all of them at once, when the disk has them.
///
/// ```
/// use std::sync::Arc;
/// use vmm_audit::event::{Event, Kind};
/// use vmm_audit::keys::MemoryKeys;
/// use vmm_audit::log::{LogOptions, LogWriter};
/// use vmm_audit::storage::MemoryStorage;
///
/// let storage = Arc::new(MemoryStorage::new());
/// let (mut log, _) = LogWriter::open(storage, Box::new(MemoryKeys::new()), "host.example/audit", LogOptions::new())?;
/// let seq = log.append(1, &Event::new(Kind::Launch).encode()?)?;
/// log.commit()?; // from here on it is there for good
/// assert!(log.acknowledged() > seq);
/// log.close()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct LogWriter {
    pub(super) storage: Arc<dyn Storage>,
    pub(super) store: Box<dyn KeyStore>,
    pub(super) keys: Keys,
    pub(super) options: LogOptions,
    pub(super) _lock: Box<dyn Send>,
    pub(super) file: SharedFile,
    /// The segment, and its bytes that are acknowledged.
    pub(super) number: u64,
    pub(super) length: u64,
    pub(super) begun: Instant,
    /// Segments that there are.
    pub(super) first: u64,
    /// The chain at the last checkpoint, and the bytes after it that are on the disk.
    pub(super) chain: Digest,
    pub(super) carry: Vec<u8>,
    pub(super) pending: Vec<u8>,
    /// A buffer to be used again.
    pub(super) spare: Vec<u8>,
    /// The chain over what is pending, and where it will begin if a batch is on its way.
    pub(super) running: Running,
    pub(super) ahead: Option<(Digest, Vec<u8>)>,
    pub(super) tree: Tree,
    pub(super) acknowledged: u64,
    pub(super) note: String,
    pub(super) rings: BTreeMap<u64, u64>,
    pub(super) changed_rings: BTreeSet<u64>,
    pub(super) poisoned: Option<String>,
    pub(super) rotation: Option<Rotation>,
    /// Segments below this go once the event that says so is acknowledged.
    pub(super) remove_below: u64,
    /// Full tiles to be written: of what is acknowledged, and of what has to be written again.
    pub(super) tiles: Vec<FullTile>,
    pub(super) held: Vec<FullTile>,
    pub(super) edge: Edge,
    pub(super) published: (u64, Instant),
    pub(super) own_seq: u64,
}

/// What a commit acknowledged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Batch {
    /// Entries in the log now; all with smaller sequence numbers are on the disk.
    pub size: u64,
    /// Bytes that were written for it.
    pub bytes: u64,
}

impl LogWriter {
    /// The log's name.
    pub fn origin(&self) -> &str {
        self.keys.root.name()
    }

    /// The public key that verifiers are given: that of epoch 0.
    pub fn verifier(&self) -> &Verifier {
        &self.keys.root
    }

    /// Entries that are on the disk.
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged
    }

    /// Entries, those among them that are not yet acknowledged.
    pub fn size(&self) -> u64 {
        self.tree.size()
    }

    /// The latest checkpoint, a signed note: what an auditor keeps, to see later that the log still continues it.
    pub fn checkpoint(&self) -> &str {
        &self.note
    }

    /// The number of the segment that is being written.
    pub fn segment(&self) -> u64 {
        self.number
    }

    /// How far a shared ring has been taken over, as of the last commit.
    pub fn ring(&self, id: u64) -> Option<u64> {
        self.rings.get(&id).copied()
    }

    /// Says that a shared ring has been taken over up to `position`, which the next checkpoint records.
    pub fn set_ring(&mut self, id: u64, position: u64) {
        self.rings.insert(id, position);
        self.changed_rings.insert(id);
    }

    /// Forgets a shared ring whose emitter is gone.
    pub fn forget_ring(&mut self, id: u64) {
        self.rings.remove(&id);
        self.changed_rings.remove(&id);
    }

    /// Adds an event of `source` (0 is the log itself) and returns its sequence number. It is in memory until
    /// [`commit`](Self::commit).
    ///
    /// # Errors
    /// If it is longer than an event may be, or the log is closed by a failure. That it is an event is not checked.
    pub fn append(&mut self, source: u32, event: &[u8]) -> Result<u64, LogError> {
        self.check()?;
        if event.len() > MAX_EVENT {
            return Err(EventError::TooLong { length: event.len(), max: MAX_EVENT }.into());
        }
        let seq = self.tree.size();
        self.tree.push(put_entry(&mut self.pending, seq, source, event));
        Ok(seq)
    }

    /// Adds an event of the log's own.
    ///
    /// # Errors
    /// Like [`append`](Self::append).
    pub fn append_own(&mut self, event: &Event) -> Result<u64, LogError> {
        let mut bytes = EventBytes::new();
        self.own_seq += 1;
        event.encode_into(&mut bytes, self.own_seq, 0, (monotonic_clock(), wall_clock()))?;
        self.append(0, &bytes)
    }

    /// Bytes that wait for a commit.
    pub fn pending_bytes(&self) -> usize {
        self.pending.len()
    }

    pub(super) fn check(&self) -> Result<(), LogError> {
        self.poisoned.as_ref().map_or(Ok(()), |why| Err(LogError::Poisoned(why.clone())))
    }

    /// Writes all that was appended, waits until the disk has it, and signs that.
    ///
    /// # Errors
    /// [`LogError::Write`] if there is no room: nothing is lost, and the next commit tries again with what is pending. Anything
    /// else closes the log.
    pub fn commit(&mut self) -> Result<Batch, LogError> {
        self.check()?;
        if self.is_rotation_due() {
            self.begin_rotation();
        }
        self.finish_rotation()?;
        let bytes = if self.is_pending() { self.write(false, None)? } else { 0 };
        self.tidy()?;
        Ok(Batch { size: self.acknowledged, bytes })
    }

    pub(super) fn poison(&mut self, error: LogError) -> LogError {
        tracing::error!(error = %error, "the audit log is closed");
        self.poisoned = Some(error.to_string());
        error
    }

    /// Closes the log in the ordinary way: everything is on the disk, and the last checkpoint says that it is the last.
    ///
    /// # Errors
    /// Like [`commit`](Self::commit).
    pub fn close(mut self) -> Result<(), LogError> {
        self.check()?;
        self.finish_rotation()?;
        self.append_own(&Event::new(Kind::LogClosed))?;
        self.write(true, None)?;
        self.remove_old()?;
        self.publish()?;
        self.storage.sync().map_err(LogError::io("the file system"))
    }
}
