//! Going over to the next segment, and to the next key.

use std::sync::{Arc, Mutex};
use std::time::Instant;

use super::batch::{Running, SharedFile};
use super::segment::{HEADER, Header, path};
use super::{LogError, LogWriter};
use crate::digest::Digest;
use crate::keys::succession_path;
use crate::note::Signer;
use crate::storage::Storage;

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

impl LogWriter {
    /// Ends the segment now and begins the next, with a new key if keys evolve.
    ///
    /// # Errors
    /// Like [`commit`](Self::commit).
    pub fn rotate(&mut self) -> Result<(), LogError> {
        self.check()?;
        self.begin_rotation();
        self.finish_rotation()?;
        self.commit().map(drop)
    }

    /// Has the segment end, unless it is being ended already.
    pub(super) fn begin_rotation(&mut self) {
        let first = if self.options.evolve_keys { Rotation::NextKey } else { Rotation::Succession };
        self.rotation.get_or_insert(first);
    }

    /// Does what is left of a rotation, if there is one.
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
        (self.chain, self.running) = (header.chain, Running::default());
        self.carry = header.encode().to_vec();
        self.number = number;
        self.length = HEADER as u64;
        self.begun = Instant::now();
        // The first checkpoint of a segment has all rings, so that recovery need not look further back.
        self.changed_rings = self.rings.keys().copied().collect();
        Ok(())
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
) -> Result<SharedFile, LogError> {
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
    Ok(Arc::new(Mutex::new(file)))
}
