//! Checkpoints: what the log's key signs (C2SP tlog-checkpoint).
//!
//! A checkpoint is a signed note with the log's origin, its size and the root of its Merkle tree. The extension lines say what else holds at
//! that point:
//!
//! | line | what |
//! |---|---|
//! | `chain BASE64` | the hash chain over the segments, up to this checkpoint |
//! | `time N` | nanoseconds since 1970 by the writer's clock |
//! | `epoch N` | which of the log's keys signs, from 0 |
//! | `next VKEY` | the key of the next epoch; the one that signs this signs nothing after it |
//! | `ring ID N` | how far a shared ring has been taken over |
//! | `closed` | the log was closed in the ordinary way |

use data_encoding::BASE64;
use serde::Serialize;

use crate::digest::Digest;
use crate::note::{NoteError, Signer, Verifier, unverified_text};

/// The state of a log at a point.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct Checkpoint {
    /// The log's name.
    pub origin: String,
    /// Entries in the log.
    pub size: u64,
    /// The root of the Merkle tree over them.
    pub root: Digest,
    /// The hash chain.
    pub chain: Digest,
    /// Nanoseconds since 1970.
    pub time: u64,
    /// Which of the log's keys signs.
    pub epoch: u64,
    /// The key of the next epoch, as text.
    pub next: Option<String>,
    /// How far shared rings have been taken over.
    pub rings: Vec<(u64, u64)>,
    /// Whether the log was closed.
    pub closed: bool,
}

impl Checkpoint {
    pub(crate) fn text(&self) -> String {
        let mut text = format!(
            "{}\n{}\n{}\nchain {}\ntime {}\nepoch {}\n",
            self.origin,
            self.size,
            BASE64.encode(self.root.as_bytes()),
            BASE64.encode(self.chain.as_bytes()),
            self.time,
            self.epoch,
        );
        if let Some(next) = &self.next {
            text += &format!("next {next}\n");
        }
        for (id, position) in &self.rings {
            text += &format!("ring {id:016x} {position}\n");
        }
        if self.closed {
            text += "closed\n";
        }
        text
    }

    fn parse(text: &str) -> Result<Self, NoteError> {
        let bad = NoteError::Form;
        let mut lines = text.strip_suffix('\n').ok_or(bad("no newline at the end"))?.split('\n');
        let mut next =
            || lines.next().ok_or(bad("a checkpoint has origin, size, root, chain, time and epoch"));
        let (origin, size, root) = (next()?, next()?, next()?);
        if origin.is_empty() {
            return Err(bad("no origin"));
        }
        let chain = line_after(next()?, "chain ").ok_or(bad("no chain"))?;
        let time = line_after(next()?, "time ").ok_or(bad("no time"))?;
        let epoch = line_after(next()?, "epoch ").ok_or(bad("no epoch"))?;
        let mut checkpoint = Self {
            origin: origin.to_owned(),
            size: number(size).ok_or(bad("the size is not a number"))?,
            root: digest(root).ok_or(bad("the root is not the base64 of 32 bytes"))?,
            chain: digest(chain).ok_or(bad("the chain is not the base64 of 32 bytes"))?,
            time: number(time).ok_or(bad("the time is not a number"))?,
            epoch: number(epoch).ok_or(bad("the epoch is not a number"))?,
            next: None,
            rings: Vec::new(),
            closed: false,
        };
        for line in lines {
            if let Some(key) = line_after(line, "next ") {
                checkpoint.next = Some(key.to_owned());
            } else if let Some((id, position)) =
                line_after(line, "ring ").and_then(|ring| ring.split_once(' '))
            {
                let id = u64::from_str_radix(id, 16).ok().zip(number(position));
                checkpoint.rings.push(id.ok_or(bad("a ring has an identifier and a position"))?);
            } else if line == "closed" {
                checkpoint.closed = true;
            } else if line.is_empty() {
                return Err(bad("an extension line is empty"));
            }
        }
        Ok(checkpoint)
    }

    /// The signed note.
    ///
    /// # Errors
    /// If the origin cannot stand in a note.
    pub fn sign(&self, signer: &Signer) -> Result<String, NoteError> {
        signer.sign(&self.text())
    }

    /// Checks that `note` is a checkpoint of the log that `verifier` names, signed by it.
    ///
    /// # Errors
    /// If it is not.
    pub fn open(note: &[u8], verifier: &Verifier) -> Result<Self, NoteError> {
        let checkpoint = Self::parse(verifier.open(note)?)?;
        if checkpoint.origin == verifier.name() {
            Ok(checkpoint)
        } else {
            Err(NoteError::Form("the origin is that of another log"))
        }
    }

    /// What `note` says, its signature unchecked: for finding out which key should have signed it.
    ///
    /// # Errors
    /// If it does not have the form of a checkpoint.
    pub fn unverified(note: &[u8]) -> Result<Self, NoteError> {
        Self::parse(unverified_text(note)?)
    }
}

fn line_after<'a>(line: &'a str, prefix: &str) -> Option<&'a str> {
    line.strip_prefix(prefix)
}

/// A decimal number without leading zeros.
fn number(text: &str) -> Option<u64> {
    text.parse().ok().filter(|n: &u64| n.to_string() == text)
}

fn digest(text: &str) -> Option<Digest> {
    BASE64.decode(text.as_bytes()).ok().and_then(|bytes| Digest::from_slice(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_lines_survive() {
        let signer = Signer::from_seed("log.example", &[3; 32]).unwrap();
        let checkpoint = Checkpoint {
            origin: "log.example".to_owned(),
            size: 10,
            root: Digest::of(b"r"),
            chain: Digest::of(b"c"),
            time: 7,
            epoch: 2,
            next: Some(signer.verifier().to_string()),
            rings: vec![(0xab, 5), (1, 0)],
            closed: true,
        };
        let note = checkpoint.sign(&signer).unwrap();
        assert_eq!(Checkpoint::open(note.as_bytes(), signer.verifier()), Ok(checkpoint.clone()));
        assert_eq!(Checkpoint::unverified(note.as_bytes()), Ok(checkpoint.clone()));
        let foreign = Checkpoint { origin: "other".to_owned(), ..checkpoint }.sign(&signer).unwrap();
        assert!(Checkpoint::open(foreign.as_bytes(), signer.verifier()).is_err());
    }

    #[test]
    fn numbers_have_one_form() {
        assert_eq!((number("0"), number("00"), number("+1"), number("7")), (Some(0), None, None, Some(7)));
    }
}
