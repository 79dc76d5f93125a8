//! What the outside sees of a log without reading its segments: the tiles and the checkpoint that they are there for.

use std::io::ErrorKind;
use std::time::Instant;

use super::{LogError, LogWriter};
use crate::merkle::tiles::{TILE_WIDTH, TileId};

/// Tiles that may wait to be written: 32 MiB of them. More than that means that the disk takes segments and no tiles.
const WAITING: usize = 4096;

impl LogWriter {
    /// Whether so many tiles wait that the next batch has to.
    pub(crate) fn is_behind(&self) -> bool {
        self.tiles.len() >= WAITING
    }

    pub(super) fn publish_if_due(&mut self) -> Result<(), LogError> {
        let due =
            self.published.0 < self.acknowledged && self.published.1.elapsed() >= self.options.publish_every;
        let written = if due { self.publish() } else { self.write_full_tiles() };
        match written {
            // What was acknowledged is in the segments, and tiles are made of them: this can wait.
            Err(error) if !self.is_behind() => {
                tracing::warn!(error = %error, "the tiles of the audit log cannot be written yet");
                Ok(())
            }
            written => written,
        }
    }

    fn write_full_tiles(&mut self) -> Result<(), LogError> {
        let mut done = 0;
        let mut result = Ok(());
        for tile in &self.tiles {
            if let Err(source) = self.write_full_tile(tile.id, &tile.bytes) {
                result = Err(LogError::Write { path: tile.id.path(), source });
                break;
            }
            done += 1;
        }
        self.tiles.drain(..done);
        result
    }

    fn write_full_tile(&self, id: TileId, bytes: &[u8]) -> std::io::Result<()> {
        self.storage.replace(&id.path(), bytes, false)?;
        // The narrower ones are in it.
        let folder = format!("{id}.p");
        for narrower in self.storage.list(&folder)? {
            self.storage.remove(&format!("{folder}/{}", narrower.name))?;
        }
        Ok(())
    }

    /// Makes the narrower tiles at the right edge what they should be: a writer that was interrupted, or a machine that lost its power, may
    /// have left half of one, which nobody would write again. How many that were.
    pub(super) fn mend_tiles(&self) -> Result<u64, LogError> {
        let mut mended = 0;
        for (id, bytes) in self.tree.partial() {
            let folder = format!("{}.p", TileId { width: TILE_WIDTH, ..id });
            for listed in self.storage.list(&folder).map_err(LogError::io(folder.clone()))? {
                let path = format!("{folder}/{}", listed.name);
                let narrower = TileId::parse(&path).and_then(|id| usize::try_from(id.width * 32).ok());
                let Some(expected) = narrower.and_then(|length| bytes.get(..length)) else { continue };
                let there = match self.storage.read(&path, TILE_WIDTH * 32) {
                    // Whatever it is, it is no tile.
                    Err(error) if error.kind() == ErrorKind::FileTooLarge => None,
                    there => there.map_err(LogError::io(path.clone()))?,
                };
                if there.as_deref() != Some(expected) {
                    tracing::warn!(path, "a tile of the audit log is written again");
                    self.storage.replace(&path, expected, false).map_err(LogError::io(path))?;
                    mended += 1;
                }
            }
        }
        Ok(mended)
    }

    /// Writes all tiles of what is acknowledged, and its checkpoint.
    ///
    /// # Errors
    /// If that does not work. The log itself is as it was.
    pub(super) fn publish(&mut self) -> Result<(), LogError> {
        self.write_full_tiles()?;
        for (id, bytes) in &self.edge.tiles {
            let failed = |source| LogError::Write { path: id.path(), source };
            self.storage.replace(&id.path(), bytes, false).map_err(failed)?;
        }
        let failed = |source| LogError::Write { path: "checkpoint".to_owned(), source };
        self.storage.replace("checkpoint", self.note.as_bytes(), true).map_err(failed)?;
        self.published = (self.edge.size, Instant::now());
        Ok(())
    }
}
