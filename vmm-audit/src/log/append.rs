//! Writing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::segment::{FrameKind, Header, path, put_frame};
use super::{LogError, LogOptions, monotonic_clock, wall_clock};
use crate::checkpoint::Checkpoint;
use crate::digest::Digest;
use crate::event::{Entry, Event, EventBytes, EventError, Kind, MAX_EVENT, Object, ObjectClass};
use crate::keys::{KeyStore, Keys, succession_path};
use crate::merkle::{FullTile, Tree, leaf_hash};
use crate::note::{Signer, Verifier};
use crate::storage::{Storage, StorageFile};

/// What is left to do of going over to the next segment. Each step can fail and be tried again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rotation {
    /// Make the next key.
    NextKey,
    /// Sign the last checkpoint of the segment, which names the next key if there is one.
    Succession,
    /// Keep that checkpoint by itself.
    KeyFile,
    /// Destroy the old key.
    Advance,
    /// Have everything on the disk.
    Publish,
    /// Make the file.
    File,
}

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
    pub(super) file: Box<dyn StorageFile>,
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
    pub(super) tree: Tree,
    pub(super) acknowledged: u64,
    pub(super) note: String,
    pub(super) rings: BTreeMap<u64, u64>,
    pub(super) changed_rings: BTreeSet<u64>,
    pub(super) poisoned: Option<String>,
    pub(super) rotation: Option<Rotation>,
    /// Segments below this go once the event that says so is acknowledged.
    pub(super) remove_below: u64,
    pub(super) tiles: Vec<FullTile>,
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
        let mut entry = Vec::with_capacity(event.len() + 8);
        Entry { source, event }.encode(&mut entry);
        let seq = self.tree.size();
        self.tree.push(leaf_hash(&entry));
        put_frame(&mut self.pending, FrameKind::Entry, seq, &entry);
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

    fn check(&self) -> Result<(), LogError> {
        self.poisoned.as_ref().map_or(Ok(()), |why| Err(LogError::Poisoned(why.clone())))
    }

    /// Writes all that was appended, waits until the disk has it, and signs that.
    ///
    /// # Errors
    /// [`LogError::Write`] if there is no room: nothing is lost, and the next commit tries again with what is pending. Anything
    /// else closes the log.
    pub fn commit(&mut self) -> Result<Batch, LogError> {
        self.check()?;
        let due =
            self.length >= self.options.segment_bytes || self.begun.elapsed() >= self.options.segment_age;
        if due && self.rotation.is_none() {
            self.rotation = Some(self.first_step());
        }
        self.finish_rotation()?;
        let mut bytes = 0;
        if !self.pending.is_empty() || !self.changed_rings.is_empty() {
            bytes = self.write(false, None)?;
            self.remove_old()?;
        }
        self.publish_if_due()?;
        Ok(Batch { size: self.acknowledged, bytes })
    }

    /// Ends the segment now and begins the next, with a new key if keys evolve.
    ///
    /// # Errors
    /// Like [`commit`](Self::commit).
    pub fn rotate(&mut self) -> Result<(), LogError> {
        self.check()?;
        if self.rotation.is_none() {
            self.rotation = Some(self.first_step());
        }
        self.finish_rotation()?;
        self.commit().map(drop)
    }

    fn first_step(&self) -> Rotation {
        if self.options.evolve_keys { Rotation::NextKey } else { Rotation::Succession }
    }

    /// Writes what is pending and a checkpoint. Returns how many bytes that were.
    fn write(&mut self, closed: bool, next: Option<String>) -> Result<u64, LogError> {
        let chain = Digest::of_parts(&[self.chain.as_bytes(), &self.carry, &self.pending]);
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
        let entries = self.pending.len();
        self.pending.extend_from_slice(&frame);
        let written = self.file.append(&self.pending);
        let bytes = self.pending.len() as u64;
        if let Err(source) = written {
            self.pending.truncate(entries);
            // What is there of the batch goes again, so that it is not taken for a batch.
            if let Err(e) = self.file.truncate(self.length) {
                return Err(self.poison(LogError::io(path(self.number))(e)));
            }
            return Err(LogError::Write { path: path(self.number), source });
        }
        if let Err(source) = self.file.sync() {
            return Err(self.poison(LogError::Sync { path: path(self.number), source }));
        }
        self.pending.clear();
        self.length += bytes;
        self.chain = chain;
        self.carry = frame;
        self.acknowledged = checkpoint.size;
        self.note = note;
        self.changed_rings.clear();
        self.tiles.append(&mut self.tree.take_full());
        Ok(bytes)
    }

    fn poison(&mut self, error: LogError) -> LogError {
        tracing::error!(error = %error, "the audit log is closed");
        self.poisoned = Some(error.to_string());
        error
    }

    pub(super) fn finish_rotation(&mut self) -> Result<(), LogError> {
        while let Some(step) = self.rotation {
            self.rotation = self.rotation_step(step)?;
        }
        Ok(())
    }

    fn rotation_step(&mut self, step: Rotation) -> Result<Option<Rotation>, LogError> {
        let next = match step {
            Rotation::NextKey => {
                // One from a rotation that was interrupted does as well.
                if self.keys.next.is_none() {
                    self.keys.next = Some(Signer::generate(self.origin())?);
                }
                self.store.save(&self.keys)?;
                Rotation::Succession
            }
            Rotation::Succession => {
                let evolve = self.options.evolve_keys;
                let next = self.keys.next.as_ref().filter(|_| evolve).map(|next| next.verifier().to_string());
                self.write(false, next)?;
                self.remove_old()?;
                if evolve { Rotation::KeyFile } else { Rotation::Publish }
            }
            Rotation::KeyFile => {
                let path = succession_path(self.keys.epoch);
                self.storage.replace(&path, self.note.as_bytes(), true).map_err(LogError::io(path))?;
                Rotation::Advance
            }
            Rotation::Advance => {
                if let Some(next) = self.keys.next.take() {
                    // The old one is zeroed as it is dropped.
                    self.keys.current = next;
                    self.keys.epoch += 1;
                }
                self.store.save(&self.keys)?;
                Rotation::Publish
            }
            Rotation::Publish => {
                self.publish()?;
                self.storage.sync().map_err(LogError::io("the file system"))?;
                Rotation::File
            }
            Rotation::File => {
                self.begin_segment(self.number + 1)?;
                if let Err(error) = self.retire() {
                    tracing::warn!(error = %error, "segments past their time stay until the next one ends");
                }
                return Ok(None);
            }
        };
        Ok(Some(next))
    }

    /// Makes the file of a segment that begins at what is acknowledged.
    pub(super) fn begin_segment(&mut self, number: u64) -> Result<(), LogError> {
        let header = Header {
            number,
            base: self.acknowledged,
            epoch: self.keys.epoch,
            chain: carried_over(self.chain, &self.carry),
            origin: Digest::of(self.origin().as_bytes()),
        };
        self.file = create_segment(&*self.storage, number, &header)?;
        self.chain = header.chain;
        self.carry = header.encode().to_vec();
        self.number = number;
        self.length = header.encode().len() as u64;
        self.begun = Instant::now();
        // The first checkpoint of a segment has all rings, so that recovery need not look further back.
        self.changed_rings = self.rings.keys().copied().collect();
        Ok(())
    }

    /// Finds segments past their time, and writes down that they go.
    fn retire(&mut self) -> Result<(), LogError> {
        let by_count = self.options.keep_segments.map_or(0, |keep| (self.number + 1).saturating_sub(keep));
        let mut below = by_count.max(self.first);
        if let Some(age) = self.options.keep_for {
            while below + 1 < self.number && self.is_older(below, age)? {
                below += 1;
            }
        }
        if below <= self.first {
            return Ok(());
        }
        let base = self.base_of(below)?;
        let event = Event::new(Kind::Retention)
            .object(Object::numbered(ObjectClass::Log, base))
            .amount(below - self.first, 0)
            .attribute("first-segment", below.to_string());
        self.append_own(&event)?;
        self.remove_below = below;
        Ok(())
    }

    /// Whether the segment ended longer ago than `age`: the one after it has the time of its first checkpoint.
    fn is_older(&self, number: u64, age: Duration) -> Result<bool, LogError> {
        let name = path(number + 1);
        let file = self.storage.open_to_read(&name).map_err(LogError::io(name.clone()))?;
        let ended = super::recover::first_time(file).map_err(LogError::io(name))?;
        Ok(ended.is_some_and(|ended| {
            wall_clock().saturating_sub(ended) > u64::try_from(age.as_nanos()).unwrap_or(u64::MAX)
        }))
    }

    fn base_of(&self, number: u64) -> Result<u64, LogError> {
        let name = path(number);
        let file = self.storage.open_to_read(&name).map_err(LogError::io(name.clone()))?;
        let header = super::recover::read_header(&*file).map_err(LogError::io(name.clone()))?;
        let damaged =
            |why: super::segment::Damage| LogError::Damaged { path: name, offset: 0, why: why.to_string() };
        header.map(|header| header.base).map_err(damaged)
    }

    /// Removes the segments whose removal is acknowledged.
    pub(super) fn remove_old(&mut self) -> Result<(), LogError> {
        while self.first < self.remove_below {
            let name = path(self.first);
            match self.storage.remove(&name) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(LogError::io(name)(e)),
                _ => self.first += 1,
            }
        }
        Ok(())
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

/// The chain at the beginning of a segment: of that at the last checkpoint of the one before, and that checkpoint's frame. The first
/// segment begins with zeros.
pub(crate) fn carried_over(chain: Digest, frame: &[u8]) -> Digest {
    Digest::of_parts(&[chain.as_bytes(), frame])
}

/// Makes the file of a segment, with its header on the disk.
pub(super) fn create_segment(
    storage: &dyn Storage,
    number: u64,
    header: &Header,
) -> Result<Box<dyn StorageFile>, LogError> {
    let name = path(number);
    let mut file = match storage.create(&name) {
        // Of an attempt that failed before there was anything in it that counts.
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
            storage.remove(&name).map_err(LogError::io(name.clone()))?;
            storage.create(&name)
        }
        file => file,
    }
    .map_err(LogError::io(name.clone()))?;
    file.append(&header.encode()).map_err(|source| LogError::Write { path: name.clone(), source })?;
    file.sync().map_err(LogError::io(name))?;
    Ok(file)
}
