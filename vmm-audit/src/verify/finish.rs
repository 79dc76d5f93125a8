//! What is to be said once all segments have been read: of their end, and of the files beside them.

use super::pass::{Pass, Remembered};
use super::{Severity, Verification, VerifyError, io};
use crate::digest::Digest;
use crate::keys::succession_path;
use crate::merkle::tiles::root_at;

impl Pass<'_> {
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
