//! A proof that an entry is in the log, in a file of its own: whoever has the log's public key can check it without the log.

use serde::{Deserialize, Serialize};

use crate::checkpoint::Checkpoint;
use crate::digest::Digest;
use crate::event::{Entry, Event, EventError};
use crate::keys::{KeyChain, succession_path};
use crate::merkle::leaf_hash;
use crate::merkle::proof::{ProofError, prove_inclusion, verify_inclusion};
use crate::merkle::tiles::TileError;
use crate::note::{MAX_NOTE, NoteError, Verifier};
use crate::storage::Storage;

/// An entry and what shows that it is in the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct EntryProof {
    /// The sequence number of the entry.
    pub index: u64,
    /// The entry, base64.
    pub entry: String,
    /// The hashes from the entry to the root.
    pub path: Vec<Digest>,
    /// The checkpoint whose root it is, a signed note.
    pub checkpoint: String,
    /// The checkpoints with which each key names its successor, from epoch 0 to that of the checkpoint.
    pub keys: Vec<String>,
}

/// What is wrong with a proof, or why there is none.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EntryProofError {
    /// The storage cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// There is no published checkpoint.
    #[error("the log has no published checkpoint")]
    NoCheckpoint,
    /// The tiles do not have what it takes.
    #[error(transparent)]
    Tile(#[from] TileError),
    /// A checkpoint is not signed by the log.
    #[error(transparent)]
    Note(#[from] NoteError),
    /// The hashes do not lead to the root.
    #[error(transparent)]
    Proof(#[from] ProofError),
    /// The entry is none.
    #[error(transparent)]
    Event(#[from] EventError),
    /// The entry is not base64.
    #[error("the entry is not base64")]
    Base64,
}

impl EntryProof {
    /// Proves that entry `index`, whose bytes are `entry`, is in the log that is published in `storage`.
    ///
    /// # Errors
    /// If the published checkpoint does not have that entry, or the files are not there.
    pub fn make(storage: &dyn Storage, index: u64, entry: &[u8]) -> Result<Self, EntryProofError> {
        let read = |path: &str| {
            let text = storage.read(path, MAX_NOTE as u64);
            let text = text.map_err(|source| EntryProofError::Io { path: path.to_owned(), source })?;
            Ok::<_, EntryProofError>(text.map(|text| String::from_utf8_lossy(&text).into_owned()))
        };
        let note = read("checkpoint")?.ok_or(EntryProofError::NoCheckpoint)?;
        let checkpoint = Checkpoint::unverified(note.as_bytes())?;
        let path = prove_inclusion(&storage, index, checkpoint.size)?;
        verify_inclusion(leaf_hash(entry), index, checkpoint.size, &path, checkpoint.root)?;
        let mut keys = Vec::new();
        for epoch in 0..checkpoint.epoch {
            let key = read(&succession_path(epoch))?;
            keys.push(key.ok_or(NoteError::Form("a key file is absent"))?);
        }
        Ok(Self { index, entry: data_encoding::BASE64.encode(entry), path, checkpoint: note, keys })
    }

    /// Checks the proof, with nothing but the log's public key, and returns the source of the event and the event.
    ///
    /// # Errors
    /// If it proves nothing.
    pub fn check(&self, key: &Verifier) -> Result<(u32, Event), EntryProofError> {
        let mut chain = KeyChain::new(key.clone());
        for note in &self.keys {
            let checkpoint = chain.open(note.as_bytes())?;
            chain.follow(&checkpoint)?;
        }
        let checkpoint = chain.open(self.checkpoint.as_bytes())?;
        let bytes =
            data_encoding::BASE64.decode(self.entry.as_bytes()).map_err(|_| EntryProofError::Base64)?;
        verify_inclusion(leaf_hash(&bytes), self.index, checkpoint.size, &self.path, checkpoint.root)?;
        let entry = Entry::decode(&bytes)?;
        Ok((entry.source, Event::decode(entry.event)?))
    }
}
