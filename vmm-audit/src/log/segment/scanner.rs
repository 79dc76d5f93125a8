//! Reading the frames of a segment, one after the other, over damage too.

use std::io;

use super::{Damage, FRAME, Frame, MARK, parse};
use crate::event::MAX_ENTRY;
use crate::note::MAX_NOTE;
use crate::storage::StorageFile;

/// What is read at a time.
pub(super) const CHUNK: usize = 1 << 20;

/// A whole frame, whichever it is.
const WHOLE: usize = FRAME + if MAX_NOTE > MAX_ENTRY { MAX_NOTE } else { MAX_ENTRY };

/// What [`Scanner::next`] found.
#[derive(Debug)]
pub enum Scanned<'a> {
    /// A frame that is whole.
    Frame(Frame<'a>),
    /// Bytes that are none.
    Damaged {
        /// Where they begin.
        offset: u64,
        /// How many, until the next whole frame or the end.
        bytes: u64,
        /// What is wrong with the first.
        damage: Damage,
    },
}

/// Goes through the frames of a segment, over damage too.
pub struct Scanner {
    file: Box<dyn StorageFile>,
    /// Made when it is first read into, and never cleared: for a small log that would be most of the work.
    buffer: Vec<u8>,
    /// Bytes of it that are the file's.
    filled: usize,
    /// Where in the buffer the next frame begins.
    at: usize,
    /// Where in the file the buffer begins.
    offset: u64,
    end: bool,
}

impl Scanner {
    /// From `offset` of the file on.
    pub fn new(file: Box<dyn StorageFile>, offset: u64) -> Self {
        Self { file, buffer: Vec::new(), filled: 0, at: 0, offset, end: false }
    }

    /// Where the next frame begins, or where the file ends.
    pub fn position(&self) -> u64 {
        self.offset + self.at as u64
    }

    /// Goes to `offset`, to read what has been written there since.
    pub fn seek(&mut self, offset: u64) {
        (self.filled, self.at, self.offset, self.end) = (0, 0, offset, false);
    }

    /// What is there from the next frame on.
    fn rest(&self) -> &[u8] {
        self.buffer.get(self.at..self.filled).unwrap_or_default()
    }

    /// Has the buffer hold a whole frame from `at` on, if the file does.
    fn fill(&mut self) -> io::Result<()> {
        let kept = self.filled - self.at;
        if self.end || kept >= WHOLE {
            return Ok(());
        }
        if self.buffer.is_empty() {
            self.buffer = vec![0; WHOLE + CHUNK];
        }
        self.buffer.copy_within(self.at..self.filled, 0);
        self.offset += self.at as u64;
        (self.at, self.filled) = (0, kept);
        let room = self.buffer.get_mut(kept..kept + CHUNK).unwrap_or_default();
        let read = self.file.read_at(self.offset + kept as u64, room)?;
        self.filled += read;
        self.end = read < CHUNK;
        Ok(())
    }

    /// The next frame or damage; `None` at the end.
    ///
    /// # Errors
    /// If the file cannot be read.
    #[allow(clippy::should_implement_trait, reason = "what it returns borrows from it")]
    pub fn next(&mut self) -> io::Result<Option<Scanned<'_>>> {
        self.fill()?;
        let start = self.position();
        let damage = match parse(self.rest(), start) {
            _ if self.at == self.filled => return Ok(None),
            Ok(Frame { kind, number, bytes, .. }) => {
                // Taken again, since the borrow checker takes what the match is about to be borrowed on all ways out.
                let length = bytes.len();
                let bytes = self.buffer.get(self.at..self.at + length).unwrap_or_default();
                let payload = bytes.get(FRAME..).unwrap_or_default();
                self.at += length;
                return Ok(Some(Scanned::Frame(Frame { offset: start, kind, number, payload, bytes })));
            }
            Err(damage) => damage,
        };
        // On to the next byte at which a whole frame begins.
        loop {
            self.at += 1;
            self.fill()?;
            match self.rest().iter().position(|byte| *byte == MARK) {
                None => self.at = self.filled,
                Some(skipped) => self.at += skipped,
            }
            self.fill()?;
            let rest = self.rest();
            if (rest.is_empty() && self.end) || parse(rest, 0).is_ok() {
                break;
            }
        }
        Ok(Some(Scanned::Damaged { offset: start, bytes: self.position() - start, damage }))
    }
}
