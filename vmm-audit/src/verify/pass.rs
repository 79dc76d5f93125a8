//! One pass over a log: what it knows, and what it finds.

use std::collections::{BTreeMap, BTreeSet};

use sha2::{Digest as _, Sha256};

use super::{Finding, MAX_FINDINGS, Severity, VerifyError, VerifyOptions, io};
use crate::checkpoint::Checkpoint;
use crate::digest::Digest;
use crate::keys::KeyChain;
use crate::log::segment::path;
use crate::merkle::Tree;
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
    pub(super) frame: Vec<u8>,
}

pub(super) struct Pass<'a> {
    pub(super) storage: &'a dyn Storage,
    pub(super) options: &'a VerifyOptions,
    pub(super) keys: KeyChain,
    pub(super) findings: Vec<Finding>,
    pub(super) more: u64,
    /// All tile files, by level and index, with their widths.
    pub(super) tiles: BTreeMap<(u32, u64), BTreeSet<u64>>,
    pub(super) cut: BTreeSet<String>,
    pub(super) key_files: BTreeSet<String>,
    pub(super) remembered: Vec<Remembered>,
    pub(super) published: Option<Checkpoint>,
    /// The tree so far, unless it was lost to damage.
    pub(super) tree: Option<Tree>,
    pub(super) hash: Sha256,
    /// The sequence number that is due.
    pub(super) seq: u64,
    /// Set from damage on until a checkpoint says where the log is: the last good entry's successor.
    pub(super) lost: Option<u64>,
    pub(super) last: Option<Last>,
    pub(super) first_entry: u64,
    /// Retention says that entries below are gone.
    pub(super) retained_from: u64,
    /// Key files that a checkpoint in the segments calls for and that are not there.
    pub(super) missing_key: Option<u64>,
    pub(super) recoveries: BTreeMap<String, (Digest, u64)>,
    pub(super) checkpoints: u64,
    pub(super) segments: u64,
    pub(super) bytes: u64,
    pub(super) times: Option<(u64, u64)>,
    /// Where the first byte behind the last checkpoint is, and how many entries are there.
    pub(super) tail: Option<(String, u64, u64)>,
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
    pub(super) fn lose(&mut self, file: String, offset: u64, what: String) {
        self.damage(file, Some(offset), Some(self.seq), what);
        self.lost.get_or_insert(self.seq);
        self.tree = None;
    }
}
