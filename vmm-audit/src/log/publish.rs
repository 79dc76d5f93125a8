//! What the outside sees of a log without reading its segments: the tiles and the checkpoint that they are there for.

use std::time::Instant;

use super::{LogError, LogWriter};
use crate::merkle::tiles::TileId;

/// Tiles that may wait to be written: 32 MiB of them. More than that means that the disk takes segments and no tiles.
const WAITING: usize = 4096;

impl LogWriter {
    pub(super) fn publish_if_due(&mut self) -> Result<(), LogError> {
        let due =
            self.published.0 < self.acknowledged && self.published.1.elapsed() >= self.options.publish_every;
        let written = if due { self.publish() } else { self.write_full_tiles() };
        match written {
            // What was acknowledged is in the segments, and tiles are made of them: this can wait.
            Err(error) if self.tiles.len() < WAITING => {
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

    /// Writes all tiles of what is acknowledged, and its checkpoint.
    ///
    /// # Errors
    /// If that does not work. The log itself is as it was.
    pub(super) fn publish(&mut self) -> Result<(), LogError> {
        self.write_full_tiles()?;
        // What waits for a commit is in the tree too; then the tiles are those of a later checkpoint.
        if self.tree.size() != self.acknowledged {
            return Ok(());
        }
        for (id, bytes) in self.tree.partial() {
            let failed = |source| LogError::Write { path: id.path(), source };
            self.storage.replace(&id.path(), bytes, false).map_err(failed)?;
        }
        let failed = |source| LogError::Write { path: "checkpoint".to_owned(), source };
        self.storage.replace("checkpoint", self.note.as_bytes(), true).map_err(failed)?;
        self.published = (self.acknowledged, Instant::now());
        Ok(())
    }
}
