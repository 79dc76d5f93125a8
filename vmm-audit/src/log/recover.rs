//! Opening: a new log, one that was closed, or one whose writer was interrupted.
//!
//! What is behind the last checkpoint was never acknowledged. It is kept in `cut/`, cut off, and an event says so. If there is damage
//! before a checkpoint, then acknowledged entries are damaged, and the log is left as it is.

use std::collections::{BTreeMap, BTreeSet};
use std::io::ErrorKind;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::batch::{Edge, Running};
use super::load::{Last, State, load};
use super::rotate::{Rotation, create_segment};
use super::segment::{FrameKind, HEADER, Header, Scanned, Scanner, path};
use super::{LogError, LogOptions, LogWriter};
use crate::checkpoint::Checkpoint;
use crate::digest::Digest;
use crate::event::{Event, Kind, Object, ObjectClass, parse_uuid};
use crate::keys::{KeyChain, KeyError, KeyStore, Keys};
use crate::merkle::{Tree, leaf_hash};
use crate::note::MAX_NOTE;
use crate::read::segments;
use crate::storage::{Storage, StorageFile};

/// What was found when a log was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Recovered {
    /// There was none.
    pub created: bool,
    /// Entries that were there, all acknowledged.
    pub entries: u64,
    /// Whether the last writer closed it.
    pub closed: bool,
    /// Bytes behind the last checkpoint that were cut off.
    pub cut_bytes: u64,
    /// Whole entries among them.
    pub cut_entries: u64,
    /// Where those bytes are now.
    pub cut_file: Option<String>,
}

impl LogWriter {
    /// Opens the log in `storage`, or begins it. `origin` names it for good: a host name and path, without spaces or plus, as
    /// `host.example/audit`.
    ///
    /// # Errors
    /// If another writer has it, the keys are not its keys, acknowledged entries are damaged, it is older than its own published
    /// checkpoint, or the system refuses.
    pub fn open(
        storage: Arc<dyn Storage>,
        mut store: Box<dyn KeyStore>,
        origin: &str,
        options: LogOptions,
    ) -> Result<(Self, Recovered), LogError> {
        options.check()?;
        let lock = storage.lock().map_err(LogError::io("lock"))?.ok_or(LogError::Locked)?;
        let numbers = segments(&*storage).map_err(LogError::io("segments"))?;
        let keys = match store.load()? {
            Some(keys) if keys.root.name() != origin => {
                let (found, expected) = (keys.root.name().to_owned(), origin.to_owned());
                return Err(KeyError::Origin { found, expected }.into());
            }
            Some(keys) => keys,
            None if !numbers.is_empty() => {
                return Err(KeyError::Form("the log is there, and its keys are not").into());
            }
            None => {
                let keys = Keys::generate(origin)?;
                store.save(&keys)?;
                keys
            }
        };
        let (mut chain, broken) = KeyChain::load(keys.root.clone(), &*storage);
        if let Some(broken) = broken {
            return Err(LogError::Damaged { path: broken.path, offset: 0, why: broken.why });
        }
        let Some((&first, &last)) = numbers.first().zip(numbers.last()) else {
            return Self::begin(storage, store, keys, options, lock);
        };
        let state = load(&*storage, &numbers, &mut chain)?;
        let mut recovered = Recovered::default();
        let committed = state.scan.last.as_ref().or(state.before.as_ref());
        let size = committed.map_or(0, |last| last.checkpoint.size);
        recovered.entries = size;
        recovered.closed = state.scan.last.as_ref().is_some_and(|last| last.checkpoint.closed);
        check_published(&*storage, &chain, size)?;
        let tree = load_tree(&*storage, &state, committed, first)?;
        // Last of what can refuse it: what is refused is left as it is.
        let rotation =
            interrupted_rotation(&keys, &chain, state.scan.last.as_ref().map(|last| &last.checkpoint))?;

        // The tail, and the file if it has nothing but a tail.
        let name = path(last);
        let mut file = storage.open(&name).map_err(LogError::io(name.clone()))?;
        let end = match (&state.scan.last, state.header) {
            (Some(last), _) => last.end,
            (None, Some(_)) => HEADER as u64,
            (None, None) => 0,
        };
        if state.scan.length > end {
            recovered.cut_bytes = state.scan.length - end;
            recovered.cut_entries = state.scan.entries_behind;
            cut(&*storage, &mut *file, &name, end, size)?;
        }
        let is_empty = state.header.is_none();
        let (chain_value, carry) = match (&state.scan.last, &state.header) {
            (None, Some(header)) => (header.chain, header.encode().to_vec()),
            _ => committed.map_or_else(Default::default, |last| (last.checkpoint.chain, last.frame.clone())),
        };
        let note = committed.map_or_else(String::new, |last| last.note.clone());
        let mut writer = Self {
            begun: Instant::now(),
            first,
            number: state.number,
            length: end,
            chain: chain_value,
            carry,
            pending: Vec::new(),
            spare: Vec::new(),
            running: Running::default(),
            ahead: None,
            held: Vec::new(),
            edge: Edge::default(),
            acknowledged: size,
            note,
            changed_rings: state.scan.rings.keys().copied().collect(),
            rings: state.scan.rings,
            poisoned: None,
            rotation,
            remove_below: first,
            tiles: Vec::new(),
            published: (0, Instant::now()),
            own_seq: 0,
            tree,
            storage,
            store,
            keys,
            options,
            _lock: lock,
            file: Arc::new(Mutex::new(file)),
        };
        writer.tiles = writer.tree.take_full();
        if is_empty {
            // The segment was being made: it is made again.
            writer.storage.remove(&name).map_err(LogError::io(name))?;
            writer.remake_segment(last)?;
        }
        writer.finish_rotation()?;
        writer.record(&mut recovered)?;
        Ok((writer, recovered))
    }

    /// Begins a log.
    fn begin(
        storage: Arc<dyn Storage>,
        store: Box<dyn KeyStore>,
        keys: Keys,
        options: LogOptions,
        lock: Box<dyn Send>,
    ) -> Result<(Self, Recovered), LogError> {
        let published = storage.read("checkpoint", MAX_NOTE as u64).map_err(LogError::io("checkpoint"))?;
        if let Some(published) = published.and_then(|note| Checkpoint::unverified(&note).ok()) {
            return Err(LogError::RolledBack { found: 0, published: published.size });
        }
        if keys.epoch > 0 {
            return Err(LogError::Damaged {
                path: "segments".to_owned(),
                offset: 0,
                why: format!("there are none, and the keys are of epoch {}", keys.epoch),
            });
        }
        let origin = Digest::of(keys.root.name().as_bytes());
        let header = Header { number: 0, base: 0, epoch: 0, chain: Digest::default(), origin };
        let file = create_segment(&*storage, 0, &header)?;
        let mut writer = Self {
            _lock: lock,
            file,
            number: 0,
            length: HEADER as u64,
            begun: Instant::now(),
            first: 0,
            chain: Digest::default(),
            carry: header.encode().to_vec(),
            pending: Vec::new(),
            spare: Vec::new(),
            running: Running::default(),
            ahead: None,
            held: Vec::new(),
            edge: Edge::default(),
            tree: Tree::new(),
            acknowledged: 0,
            note: String::new(),
            rings: BTreeMap::new(),
            changed_rings: BTreeSet::new(),
            poisoned: None,
            rotation: None,
            remove_below: 0,
            tiles: Vec::new(),
            published: (0, Instant::now()),
            own_seq: 0,
            storage,
            store,
            keys,
            options,
        };
        let mut recovered = Recovered { created: true, ..Recovered::default() };
        writer.record(&mut recovered)?;
        Ok((writer, recovered))
    }

    /// Makes a segment whose file was lost while it was made.
    fn remake_segment(&mut self, number: u64) -> Result<(), LogError> {
        if number > 0 {
            return self.begin_segment(number);
        }
        let origin = Digest::of(self.origin().as_bytes());
        let header = Header { number, base: 0, epoch: self.keys.epoch, chain: Digest::default(), origin };
        self.file = create_segment(&*self.storage, number, &header)?;
        (self.chain, self.carry, self.length) = (header.chain, header.encode().to_vec(), HEADER as u64);
        Ok(())
    }

    /// Writes down what was found, and that there is a writer now.
    fn record(&mut self, recovered: &mut Recovered) -> Result<(), LogError> {
        for name in cut_files(&*self.storage, self.acknowledged)? {
            let path = format!("cut/{name}");
            let bytes = self.storage.read(&path, u64::MAX - 1).map_err(LogError::io(path.clone()))?;
            let bytes = bytes.unwrap_or_default();
            let event = Event::new(Kind::Recovery)
                .object(Object::named(ObjectClass::Log, name.as_str()))
                .request(Digest::of(&bytes))
                .amount(recovered.cut_entries, bytes.len() as u64)
                .reason("what was not acknowledged was cut off");
            self.append_own(&event)?;
            recovered.cut_file = Some(path);
        }
        let mended = self.mend_tiles()?;
        let mut event = Event::new(Kind::LogOpened).attribute("version", env!("CARGO_PKG_VERSION"));
        if mended > 0 {
            event = event.attribute("tiles-mended", mended.to_string());
        }
        event.boot = boot_id();
        self.append_own(&event)?;
        self.commit()?;
        self.publish()
    }
}

/// The host's boot identifier, where there is one.
pub(crate) fn boot_id() -> Option<u128> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    parse_uuid(text.trim())
}

/// Where a change of keys was interrupted, if one was.
fn interrupted_rotation(
    keys: &Keys,
    chain: &KeyChain,
    last: Option<&Checkpoint>,
) -> Result<Option<Rotation>, LogError> {
    let damaged = |why: String| LogError::Damaged { path: "keys".to_owned(), offset: 0, why };
    let current = keys.current.verifier();
    if let Some(named) = last.and_then(|last| last.next.as_ref()) {
        // The segment has ended. Either the key file is next, or the new segment.
        if keys.next.as_ref().is_some_and(|next| next.verifier().to_string() == *named) {
            return Ok(Some(Rotation::KeyFile));
        }
        if current.to_string() == *named {
            return Ok(Some(Rotation::Publish));
        }
        return Err(damaged("the log names a next key that the key store does not have".to_owned()));
    }
    match chain.key(keys.epoch) {
        Some(key) if key == current && chain.last_epoch() == keys.epoch => Ok(None),
        _ => Err(damaged(format!(
            "the key store has a key of epoch {}, and the log is at epoch {}, or has another key",
            keys.epoch,
            chain.last_epoch()
        ))),
    }
}

/// The published checkpoint must not be ahead of the log.
fn check_published(storage: &dyn Storage, keys: &KeyChain, size: u64) -> Result<(), LogError> {
    let note = match storage.read("checkpoint", MAX_NOTE as u64) {
        // Damaged as any other that is none.
        Err(error) if error.kind() == ErrorKind::FileTooLarge => Some(Vec::new()),
        note => note.map_err(LogError::io("checkpoint"))?,
    };
    match note.map(|note| keys.open(&note)) {
        Some(Ok(published)) if published.size > size => {
            Err(LogError::RolledBack { found: size, published: published.size })
        }
        Some(Err(e)) => {
            tracing::warn!(error = %e, "the published checkpoint of the audit log is replaced");
            Ok(())
        }
        _ => Ok(()),
    }
}

/// The tree of all acknowledged entries: from the tiles as far as those of the segments before, or from the segments themselves.
fn load_tree(
    storage: &dyn Storage,
    state: &State,
    committed: Option<&Last>,
    first: u64,
) -> Result<Tree, LogError> {
    let root = committed.map_or_else(crate::merkle::empty_root, |last| last.checkpoint.root);
    let base = state.before.as_ref().map_or(0, |last| last.checkpoint.size);
    let grow = |mut tree: Tree| {
        state.scan.leaves.iter().for_each(|leaf| tree.push(*leaf));
        tree
    };
    if let Ok(tree) = Tree::load(base, &storage).map(grow)
        && tree.root() == root
    {
        return Ok(tree);
    }
    let damaged = || LogError::Damaged {
        path: path(state.number),
        offset: 0,
        why: "the signed root is not that of the entries".to_owned(),
    };
    if first > 0 {
        return Err(damaged());
    }
    let mut tree = Tree::new();
    for number in first..=state.number {
        let file = storage.open_to_read(&path(number)).map_err(LogError::io(path(number)))?;
        let mut scanner = Scanner::new(file, HEADER as u64);
        while let Some(scanned) = scanner.next().map_err(LogError::io(path(number)))? {
            if let Scanned::Frame(frame) = scanned
                && frame.kind == FrameKind::Entry
                && committed.is_some_and(|last| tree.size() < last.checkpoint.size)
            {
                tree.push(leaf_hash(frame.payload));
            }
        }
    }
    if tree.root() == root { Ok(tree) } else { Err(damaged()) }
}

/// The files in `cut/` of a log with `size` entries.
fn cut_files(storage: &dyn Storage, size: u64) -> Result<Vec<String>, LogError> {
    let listed = storage.list("cut").map_err(LogError::io("cut"))?;
    let prefix = format!("{size:020}-");
    let is_file = |name: &String| name.starts_with(&prefix) && !name.ends_with(".tmp");
    Ok(listed.into_iter().map(|listed| listed.name).filter(is_file).collect())
}

/// What an interrupted writer can leave at most, by far: 1 GiB.
const MAX_TAIL: u64 = 1 << 30;

/// Keeps what is behind `end`, and cuts it off.
fn cut(
    storage: &dyn Storage,
    file: &mut dyn StorageFile,
    name: &str,
    end: u64,
    size: u64,
) -> Result<(), LogError> {
    let length = file.length().map_err(LogError::io(name))?;
    if length.saturating_sub(end) > MAX_TAIL {
        let why = format!("{} bytes behind the last checkpoint are more than a batch can be", length - end);
        return Err(LogError::Damaged { path: name.to_owned(), offset: end, why });
    }
    let mut tail = vec![0; usize::try_from(length - end).unwrap_or(0)];
    let read = file.read_at(end, &mut tail).map_err(LogError::io(name))?;
    tail.truncate(read);
    let count = cut_files(storage, size)?.len();
    let kept = format!("cut/{size:020}-{count}");
    storage.replace(&kept, &tail, true).map_err(LogError::io(kept))?;
    file.truncate(end).map_err(LogError::io(name))?;
    file.sync().map_err(LogError::io(name))
}
