//! The segments: each frame against the hash chain, the tree and the signatures.

use sha2::{Digest as _, Sha256};

use super::pass::{Last, Pass, Remembered};
use super::{VerifyError, io};
use crate::checkpoint::Checkpoint;
use crate::digest::Digest;
use crate::event::{Entry, Event, Kind};
use crate::keys::succession_path;
use crate::log::segment::{Frame, FrameKind, HEADER, Header, Scanned, Scanner, path};
use crate::log::{carried_over, read_header};
use crate::merkle::{Tree, leaf_hash};
use crate::note::MAX_NOTE;

impl Pass<'_> {
    pub(super) fn segment(
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
        match read_header(&*file).map_err(io(&name))? {
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
            self.tree = self.options.tree.then(Tree::new);
            return;
        }
        if !self.options.tree {
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
        let tail = self.tail.get_or_insert_with(|| (name.to_owned(), frame.offset, 0));
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

    /// Without the tree, what is signed here stands for the state that the log must have had when it was so long.
    fn recall_signed(&mut self, checkpoint: &Checkpoint) {
        let same = |remembered: &&mut Remembered| remembered.checkpoint.size == checkpoint.size;
        let mut wrong = Vec::new();
        for remembered in self.remembered.iter_mut().filter(same) {
            remembered.seen = true;
            if remembered.checkpoint.root != checkpoint.root {
                wrong.push(remembered.name.clone());
            }
        }
        for name in wrong {
            let what = "the log signed another root when it had so many entries".to_owned();
            self.damage(name, None, Some(checkpoint.size), what);
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
            if self.options.tree {
                let tree = Tree::load(checkpoint.size, &self.storage);
                self.tree = tree.ok().filter(|tree| tree.root() == checkpoint.root);
            }
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
        if !self.options.tree {
            self.recall_signed(&checkpoint);
        }
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
}
