//! One pass over the segments, with everything else beside it.

use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest as _, Sha256};

use super::{Finding, MAX_FINDINGS, Severity, Verification, VerifyError, VerifyOptions, io};
use crate::checkpoint::Checkpoint;
use crate::digest::Digest;
use crate::event::{Entry, Event, Kind};
use crate::keys::{KeyChain, succession_path};
use crate::log::carried_over;
use crate::log::segment::{Frame, FrameKind, HEADER, Header, Scanned, Scanner, path};
use crate::merkle::tiles::root_at;
use crate::merkle::{Tree, leaf_hash};
use crate::note::MAX_NOTE;
use crate::storage::Storage;

/// A state that the log must have had.
pub(super) struct Remembered {
    pub(super) name: String,
    pub(super) checkpoint: Checkpoint,
    pub(super) seen: bool,
}

/// The last checkpoint of the segments, as far as the pass has come.
pub(super) struct Last {
    pub(super) checkpoint: Checkpoint,
    pub(super) note: Vec<u8>,
    frame: Vec<u8>,
}

pub(super) struct Pass<'a> {
    pub(super) storage: &'a dyn Storage,
    options: &'a VerifyOptions,
    keys: KeyChain,
    pub(super) findings: Vec<Finding>,
    more: u64,
    /// All tile files, by level and index, with their widths.
    pub(super) tiles: BTreeMap<(u32, u64), BTreeSet<u64>>,
    cut: BTreeSet<String>,
    key_files: BTreeSet<String>,
    pub(super) remembered: Vec<Remembered>,
    pub(super) published: Option<Checkpoint>,
    /// The tree so far, unless it was lost to damage.
    pub(super) tree: Option<Tree>,
    hash: Sha256,
    /// The sequence number that is due.
    seq: u64,
    /// Set from damage on until a checkpoint says where the log is: the last good entry's successor.
    lost: Option<u64>,
    pub(super) last: Option<Last>,
    first_entry: u64,
    /// Retention says that entries below are gone.
    retained_from: u64,
    /// Key files that a checkpoint in the segments calls for and that are not there.
    missing_key: Option<u64>,
    recoveries: BTreeMap<String, (Digest, u64)>,
    checkpoints: u64,
    segments: u64,
    bytes: u64,
    times: Option<(u64, u64)>,
    /// Where the first byte behind the last checkpoint is, and how many entries are there.
    tail: Option<(String, u64, u64)>,
}

impl<'a> Pass<'a> {
    pub(super) fn new(storage: &'a dyn Storage, options: &'a VerifyOptions, keys: KeyChain) -> Self {
        Self {
            storage,
            options,
            keys,
            findings: Vec::new(),
            more: 0,
            tiles: BTreeMap::new(),
            cut: BTreeSet::new(),
            key_files: BTreeSet::new(),
            remembered: Vec::new(),
            published: None,
            tree: None,
            hash: Sha256::new(),
            seq: 0,
            lost: None,
            last: None,
            first_entry: 0,
            retained_from: 0,
            missing_key: None,
            recoveries: BTreeMap::new(),
            checkpoints: 0,
            segments: 0,
            bytes: 0,
            times: None,
            tail: None,
        }
    }

    fn find(
        &mut self,
        severity: Severity,
        file: String,
        offset: Option<u64>,
        entry: Option<u64>,
        what: String,
    ) {
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(Finding { severity, file, offset, entry, what });
        } else {
            self.more += 1;
        }
    }

    pub(super) fn damage(&mut self, file: String, offset: Option<u64>, entry: Option<u64>, what: String) {
        self.find(Severity::Damage, file, offset, entry, what);
    }

    pub(super) fn note(&mut self, file: &str, what: String) {
        self.find(Severity::Note, file.to_owned(), None, None, what);
    }

    pub(super) fn foreign(&mut self, path: &str) {
        self.note(path, "not a part of the log".to_owned());
    }

    pub(super) fn cut_file(&mut self, name: &str) {
        if name.ends_with(".tmp") {
            self.foreign(&format!("cut/{name}"));
        } else {
            self.cut.insert(name.to_owned());
        }
    }

    pub(super) fn key_file(&mut self, path: &str) {
        if path.ends_with(".tmp") {
            self.foreign(path);
        } else {
            self.key_files.insert(path.to_owned());
        }
    }

    /// What the log must have been: the published checkpoint, and those that the verifier has kept.
    pub(super) fn open_published(&mut self) -> Result<(), VerifyError> {
        let note = self.storage.read("checkpoint", MAX_NOTE as u64);
        let note = match note {
            Err(e) if e.kind() == std::io::ErrorKind::FileTooLarge => {
                self.damage(
                    "checkpoint".to_owned(),
                    None,
                    None,
                    "longer than a checkpoint can be".to_owned(),
                );
                None
            }
            note => note.map_err(io("checkpoint"))?,
        };
        let kept = self.options.since.iter().enumerate();
        let kept = kept.map(|(n, note)| (format!("kept checkpoint {}", n + 1), note.clone()));
        let published = note.map(|note| ("checkpoint".to_owned(), note));
        for (name, note) in kept.chain(published).collect::<Vec<_>>() {
            match self.keys.open(&note) {
                Ok(checkpoint) => {
                    if name == "checkpoint" {
                        self.published = Some(checkpoint.clone());
                    }
                    self.remembered.push(Remembered { name, checkpoint, seen: false });
                }
                Err(e) => self.damage(name, None, None, e.to_string()),
            }
        }
        Ok(())
    }

    pub(super) fn segments(
        &mut self,
        numbers: &[(u64, u64)],
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(), VerifyError> {
        let total = numbers.iter().map(|(_, length)| length).sum();
        let mut due = None;
        for (number, length) in numbers {
            if let Some(due) = due
                && due != *number
            {
                let what = format!("segments {due} to {} are absent", number - 1);
                self.lose(path(due), 0, what);
            }
            due = number.checked_add(1);
            self.segment(*number, progress, total)?;
            self.bytes += length;
            self.segments += 1;
            progress(self.bytes, total);
        }
        if numbers.is_empty() {
            self.damage("segments".to_owned(), None, None, "there are none".to_owned());
        }
        Ok(())
    }

    /// Damage after which it is not known where in the log this is.
    fn lose(&mut self, file: String, offset: u64, what: String) {
        self.damage(file, Some(offset), Some(self.seq), what);
        self.lost.get_or_insert(self.seq);
        self.tree = None;
    }

    fn segment(
        &mut self,
        number: u64,
        progress: &mut dyn FnMut(u64, u64),
        total: u64,
    ) -> Result<(), VerifyError> {
        let name = path(number);
        if let Some((file, offset, entries)) = self.tail.take() {
            let what = format!("{entries} entries and more are behind the last checkpoint of the segment");
            self.lose(file, offset, what);
        }
        let file = self.storage.open_to_read(&name).map_err(io(&name))?;
        let mut bytes = [0; HEADER];
        let read = file.read_at(0, &mut bytes).map_err(io(&name))?;
        let header = Header::decode(bytes.get(..read).unwrap_or_default());
        match header {
            Ok(header) => self.header(&name, number, &header),
            Err(damage) => self.lose(name.clone(), 0, damage.to_string()),
        }
        let mut scanner = Scanner::new(file, HEADER as u64);
        let mut reported = 0;
        while let Some(scanned) = scanner.next().map_err(io(&name))? {
            match scanned {
                Scanned::Frame(frame) => {
                    if frame.offset - reported > 8 << 20 {
                        reported = frame.offset;
                        progress(self.bytes + reported, total);
                    }
                    match frame.kind {
                        FrameKind::Entry => self.entry(&name, &frame),
                        FrameKind::Checkpoint => self.checkpoint(&name, &frame),
                    }
                }
                Scanned::Damaged { offset, bytes, damage } => {
                    let entries = self.tail.as_ref().map_or(0, |(_, _, entries)| *entries);
                    self.tail.get_or_insert((name.clone(), offset, entries));
                    self.lost_in_tail(&name, offset, bytes, &damage.to_string());
                }
            }
        }
        Ok(())
    }

    /// Damage within a segment. If no checkpoint follows, then nothing acknowledged is damaged; that is said at the end.
    fn lost_in_tail(&mut self, name: &str, offset: u64, bytes: u64, why: &str) {
        self.lose(name.to_owned(), offset, format!("{bytes} bytes are damaged: {why}"));
    }

    fn header(&mut self, name: &str, number: u64, header: &Header) {
        let origin = Digest::of(self.options.key.name().as_bytes());
        if header.origin != origin {
            self.lose(name.to_owned(), 0, "the segment is that of another log".to_owned());
        }
        if header.number != number {
            self.lose(name.to_owned(), 0, format!("this is segment {}", header.number));
        }
        if self.segments == 0 {
            self.begin(name, header);
        } else {
            let expected = self.last.as_ref().map(|last| carried_over(last.checkpoint.chain, &last.frame));
            if header.base != self.seq {
                let what = format!("it begins with entry {}, and entry {} is due", header.base, self.seq);
                self.lose(name.to_owned(), 0, what);
            } else if expected.is_some_and(|expected| expected != header.chain) {
                self.lose(
                    name.to_owned(),
                    0,
                    "it does not continue the hash chain: the end of the segment before is another"
                        .to_owned(),
                );
            }
        }
        self.hash = Sha256::new();
        self.hash.update(header.chain.as_bytes());
        self.hash.update(header.encode());
    }

    /// The first segment that there is.
    fn begin(&mut self, name: &str, header: &Header) {
        (self.seq, self.first_entry) = (header.base, header.base);
        if header.number == 0 {
            if header.base != 0 || header.chain != Digest::default() {
                self.lose(name.to_owned(), 0, "the first segment does not begin at zero".to_owned());
            }
            self.tree = Some(Tree::new());
            return;
        }
        match Tree::load(header.base, &self.storage) {
            Ok(tree) => self.tree = Some(tree),
            Err(e) => {
                let what = format!("the tree before it cannot be had from the tiles: {e}");
                self.damage(name.to_owned(), Some(0), Some(header.base), what);
            }
        }
    }

    fn entry(&mut self, name: &str, frame: &Frame<'_>) {
        #[expect(clippy::cast_possible_truncation, reason = "the low half")]
        if frame.number != self.seq as u32 && self.lost.is_none() {
            let what = format!("an entry numbered {} where {} is due", frame.number, self.seq);
            self.lose(name.to_owned(), frame.offset, what);
        }
        let tail = self.tail.get_or_insert((name.to_owned(), frame.offset, 0));
        tail.2 += 1;
        self.hash.update(frame.bytes);
        if let Some(tree) = &mut self.tree {
            tree.push(leaf_hash(frame.payload));
            let full = tree.take_full();
            self.compare_full(&full);
        }
        self.own_event(name, frame);
        self.seq += 1;
        self.recall();
    }

    /// The log's own events say what may be absent.
    fn own_event(&mut self, name: &str, frame: &Frame<'_>) {
        let event = match Entry::decode(frame.payload) {
            Ok(Entry { source: 0, event }) => Event::decode(event),
            Ok(_) => return,
            Err(e) => Err(e),
        };
        match event {
            Ok(event) if event.kind == Kind::Retention => {
                let below = event.object.as_ref().and_then(|object| object.number).unwrap_or(0);
                self.retained_from = self.retained_from.max(below);
            }
            Ok(event) if event.kind == Kind::Recovery => {
                let file = event.object.as_ref().and_then(|object| object.name.clone());
                if let (Some(file), Some(digest)) = (file, event.request) {
                    self.recoveries.insert(file.to_string(), (digest, self.seq));
                }
            }
            Ok(_) => {}
            Err(e) => self.damage(name.to_owned(), Some(frame.offset), Some(self.seq), e.to_string()),
        }
    }

    /// Compares the tree with the states that it must have had.
    fn recall(&mut self) {
        let Some(tree) = &self.tree else { return };
        let wrong: Vec<_> = self
            .remembered
            .iter_mut()
            .filter(|remembered| !remembered.seen && remembered.checkpoint.size == tree.size())
            .filter_map(|remembered| {
                remembered.seen = true;
                (remembered.checkpoint.root != tree.root()).then(|| remembered.name.clone())
            })
            .collect();
        let size = tree.size();
        for name in wrong {
            self.damage(
                name,
                None,
                Some(size),
                "the log had another root when it had so many entries".to_owned(),
            );
        }
    }

    fn checkpoint(&mut self, name: &str, frame: &Frame<'_>) {
        let at = Some(frame.offset);
        let checkpoint = match self.keys.open(frame.payload) {
            Ok(checkpoint) => checkpoint,
            Err(e) => return self.lose(name.to_owned(), frame.offset, format!("a checkpoint: {e}")),
        };
        if let Some(epoch) = self.missing_key.take() {
            self.damage(
                succession_path(epoch),
                None,
                None,
                "it is absent, and the log has gone on".to_owned(),
            );
        }
        let chain = Digest::from_bytes(std::mem::replace(&mut self.hash, Sha256::new()).finalize().into());
        if let Some(good) = self.lost.take() {
            if checkpoint.size > good {
                let what = format!(
                    "entries {good} to {}: not all are there as they were signed",
                    checkpoint.size - 1
                );
                self.damage(name.to_owned(), at, Some(good), what);
            }
            self.tree =
                Tree::load(checkpoint.size, &self.storage).ok().filter(|t| t.root() == checkpoint.root);
        } else {
            if checkpoint.size != self.seq {
                let what = format!("a checkpoint of {} entries behind entry {}", checkpoint.size, self.seq);
                self.damage(name.to_owned(), at, Some(self.seq), what);
            }
            if checkpoint.chain != chain {
                let what = "the hash chain is another than was signed".to_owned();
                self.damage(name.to_owned(), at, Some(self.seq), what);
            }
            let root = self.tree.as_ref().map(Tree::root);
            if root.is_some_and(|root| root != checkpoint.root) {
                let what = "the root of the tree is another than was signed".to_owned();
                self.damage(name.to_owned(), at, Some(self.seq), what);
            }
        }
        self.successor(name, frame, &checkpoint);
        self.hash.update(checkpoint.chain.as_bytes());
        self.hash.update(frame.bytes);
        self.seq = checkpoint.size;
        self.checkpoints += 1;
        self.tail = None;
        let begun = self.times.map_or(checkpoint.time, |(begun, _)| begun);
        self.times = Some((begun, checkpoint.time));
        self.last = Some(Last { note: frame.payload.to_vec(), frame: frame.bytes.to_vec(), checkpoint });
    }

    /// A checkpoint that names the next key is in a file of its own too.
    fn successor(&mut self, name: &str, frame: &Frame<'_>, checkpoint: &Checkpoint) {
        if checkpoint.next.is_none() {
            return;
        }
        let file = succession_path(checkpoint.epoch);
        if self.key_files.remove(&file) {
            let kept = self.storage.read(&file, MAX_NOTE as u64).ok().flatten();
            if kept.as_deref() != Some(frame.payload) {
                self.damage(
                    file,
                    None,
                    None,
                    format!("it is not the checkpoint at byte {} of {name}", frame.offset),
                );
            }
        }
        if checkpoint.epoch == self.keys.last_epoch() {
            self.missing_key = Some(checkpoint.epoch);
            if let Err(e) = self.keys.follow(checkpoint) {
                self.damage(name.to_owned(), Some(frame.offset), None, e.to_string());
            }
        }
    }

    pub(super) fn finish(mut self) -> Result<Verification, VerifyError> {
        self.finish_tail();
        self.finish_remembered();
        self.finish_tiles()?;
        self.finish_files()?;
        let last = self.last.as_ref();
        let size = last.map_or(0, |last| last.checkpoint.size);
        let closed = last.is_some_and(|last| last.checkpoint.closed);
        if !closed && !self.options.live {
            self.note(
                "segments",
                "the log was not closed: its writer is at work or was interrupted, or its end is missing"
                    .to_owned(),
            );
        }
        self.findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
        let last = self.last;
        let state = last.as_ref().map(|last| (last.checkpoint.root, last.checkpoint.chain));
        let (root, chain) = state.unwrap_or_default();
        Ok(Verification {
            intact: self.more == 0 && self.findings.iter().all(|finding| finding.severity == Severity::Note),
            findings: self.findings,
            more: self.more,
            origin: self.options.key.name().to_owned(),
            size,
            first_entry: self.first_entry,
            root,
            chain,
            epoch: last.as_ref().map_or(0, |last| last.checkpoint.epoch),
            checkpoints: self.checkpoints,
            segments: self.segments,
            bytes: self.bytes,
            closed,
            times: self.times,
            checkpoint: last.map(|last| String::from_utf8_lossy(&last.note).into_owned()),
        })
    }

    fn finish_tail(&mut self) {
        if let Some((file, offset, entries)) = self.tail.take() {
            let what = format!("{entries} entries behind the last checkpoint, which nobody has signed");
            if self.options.live {
                // Damage there is that of a frame that is being written.
                self.findings.retain(|f| !(f.file == file && f.offset.is_some_and(|at| at >= offset)));
                self.note(&file, what);
            } else {
                self.damage(file, Some(offset), None, what);
            }
        }
        let last = self.last.as_ref().map(|last| (last.checkpoint.closed, last.checkpoint.size));
        if let (Some((true, size)), Some(published)) = (last, &self.published)
            && published.size < size
        {
            let what = format!("it has {} entries, and the log was closed with {size}", published.size);
            self.damage("checkpoint".to_owned(), None, None, what);
        }
        if self.first_entry > self.retained_from {
            let what = format!(
                "entries before {} are absent, and no event says that they were removed",
                self.first_entry
            );
            self.damage("segments".to_owned(), None, Some(0), what);
        }
    }

    fn finish_remembered(&mut self) {
        let size = self.last.as_ref().map_or(0, |last| last.checkpoint.size);
        for remembered in std::mem::take(&mut self.remembered) {
            let Remembered { name, checkpoint, seen } = remembered;
            if seen {
                continue;
            }
            if checkpoint.size > size {
                let what = format!(
                    "it has {} entries, and the log has {size}: the log is an old copy, or its end is missing",
                    checkpoint.size
                );
                self.damage(name, None, Some(size), what);
                continue;
            }
            // Of a time that the segments do not go back to, or that is lost to damage.
            match root_at(&self.storage, checkpoint.size) {
                Ok(root) if root == checkpoint.root => {}
                Ok(_) => {
                    self.damage(name, None, Some(checkpoint.size), "the log does not continue it".to_owned())
                }
                Err(e) => self.damage(name, None, Some(checkpoint.size), format!("cannot be compared: {e}")),
            }
        }
    }

    fn finish_files(&mut self) -> Result<(), VerifyError> {
        let size = self.last.as_ref().map_or(0, |last| last.checkpoint.size);
        if let Some(epoch) = self.missing_key {
            let closed = "it is absent: its writer was interrupted there".to_owned();
            self.note(&succession_path(epoch), closed);
        }
        for file in std::mem::take(&mut self.key_files) {
            let number = file.strip_prefix("keys/").and_then(|n| n.parse::<u64>().ok());
            match number.filter(|n| succession_path(*n) == file && *n < self.keys.last_epoch()) {
                // Of a segment that is no more.
                Some(epoch) if self.keys.range(epoch).1 <= self.first_entry && self.first_entry > 0 => {}
                Some(epoch) => {
                    let at = self.keys.range(epoch).1;
                    let what = format!(
                        "the key changed at entry {at}, and the log, which has {size}, does not say so"
                    );
                    self.damage(file, None, Some(at), what);
                }
                None => self.damage(file, None, None, "it is not one of the log's key files".to_owned()),
            }
        }
        let recoveries = std::mem::take(&mut self.recoveries);
        for (name, (digest, entry)) in &recoveries {
            let path = format!("cut/{name}");
            let bytes = self.storage.read(&path, u64::MAX - 1).map_err(io(&path))?;
            match bytes.map(|bytes| Digest::of(&bytes)) {
                Some(found) if found == *digest => {}
                Some(_) => self.damage(path, None, Some(*entry), "it is not what was cut off".to_owned()),
                None => self.damage(path, None, Some(*entry), "it is absent".to_owned()),
            }
        }
        for name in std::mem::take(&mut self.cut) {
            if !recoveries.contains_key(&name) && self.first_entry == 0 {
                self.note(
                    &format!("cut/{name}"),
                    "no event speaks of it: recovery was interrupted".to_owned(),
                );
            }
        }
        if self.published.is_none() && size > 0 && !self.findings.iter().any(|f| f.file == "checkpoint") {
            let what = "it is absent".to_owned();
            if self.last.as_ref().is_some_and(|last| last.checkpoint.closed) {
                self.damage("checkpoint".to_owned(), None, None, what);
            } else {
                self.note("checkpoint", what);
            }
        }
        Ok(())
    }
}
