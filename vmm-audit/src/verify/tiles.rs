//! The tiles beside the tree that the entries make.

use super::pass::Pass;
use super::{VerifyError, io};
use crate::digest::Digest;
use crate::merkle::FullTile;
use crate::merkle::tiles::{TILE_HEIGHT, TILE_WIDTH, TileId, TileSource as _, tile_root};

/// Bytes of a full tile.
const FULL: u64 = TILE_WIDTH * 32;

impl Pass<'_> {
    pub(super) fn tile_file(&mut self, path: &str) {
        match TileId::parse(path) {
            Some(id) => {
                self.tiles.entry((id.level, id.index)).or_default().insert(id.width);
            }
            None => self.foreign(path),
        }
    }

    /// Compares the files of tiles that have become full.
    pub(super) fn compare_full(&mut self, full: &[FullTile]) {
        for tile in full {
            let widths = self.tiles.remove(&(tile.id.level, tile.id.index)).unwrap_or_default();
            for width in &widths {
                self.compare(TileId { width: *width, ..tile.id }, &tile.bytes);
            }
            let end = (tile.id.index + 1) << (TILE_HEIGHT * (tile.id.level + 1));
            let needed = self.published.as_ref().is_some_and(|published| published.size >= end);
            if needed && !widths.contains(&TILE_WIDTH) {
                self.damage(tile.id.path(), None, None, "it is absent".to_owned());
            }
        }
    }

    fn compare(&mut self, id: TileId, expected: &[u8]) {
        let length = usize::try_from(id.width * 32).unwrap_or(usize::MAX);
        match (self.storage.read(&id.path(), FULL), expected.get(..length)) {
            (Ok(Some(there)), Some(expected)) if there == expected => {}
            (Ok(Some(there)), Some(expected)) => {
                let at = there.iter().zip(expected).position(|(a, b)| a != b);
                let at = at.unwrap_or(there.len().min(expected.len())) as u64;
                let leaf = (id.level == 0).then(|| id.index * TILE_WIDTH + at / 32);
                self.damage(id.path(), Some(at), leaf, "it is not what the entries make".to_owned());
            }
            (Ok(_), None) => self.damage(id.path(), None, None, "it is beyond the end of the log".to_owned()),
            (Ok(None), _) => self.damage(id.path(), None, None, "it is absent".to_owned()),
            (Err(e), _) => self.damage(id.path(), None, None, e.to_string()),
        }
    }

    /// What is left: tiles at the right edge, from before the first segment, or from nowhere.
    pub(super) fn finish_tiles(&mut self) -> Result<(), VerifyError> {
        if !self.options.tree {
            self.note("tile", "the tree and the tiles were not looked at".to_owned());
            return Ok(());
        }
        let Some(tree) = self.tree.take() else {
            if !self.tiles.is_empty() {
                self.note("tile", "the tiles were not all compared, since entries are damaged".to_owned());
            }
            return Ok(());
        };
        let size = tree.size();
        let edge: Vec<_> = tree.partial().map(|(id, bytes)| (id, bytes.to_vec())).collect();
        for (id, bytes) in &edge {
            for width in self.tiles.remove(&(id.level, id.index)).unwrap_or_default() {
                self.compare(TileId { width, ..*id }, bytes);
            }
        }
        for ((level, index), widths) in std::mem::take(&mut self.tiles) {
            for width in widths {
                let id = TileId { level, index, width };
                let shift = TILE_HEIGHT * (level + 1);
                let end = if shift < 64 { (index + 1).checked_shl(shift) } else { None };
                let inside = end.is_some_and(|end| end > 0 && end <= size && end >> shift == index + 1);
                if !inside {
                    self.damage(id.path(), None, None, "it is beyond the end of the log".to_owned());
                } else if let Err(what) = self.compare_with_parent(id) {
                    self.damage(id.path(), None, None, what);
                }
            }
        }
        self.published_tiles().map_err(io("tile"))
    }

    /// A tile whose entries are gone: its root stands in the tile above it, or in the tree's right edge.
    fn compare_with_parent(&self, id: TileId) -> Result<(), String> {
        let wrong = |e: &dyn std::fmt::Display| format!("it cannot be compared: {e}");
        let full = TileId { width: TILE_WIDTH, ..id };
        let there = self.storage.read(&full.path(), FULL).map_err(|e| wrong(&e))?;
        let there = there.ok_or_else(|| format!("{full} is absent"))?;
        if id.width < TILE_WIDTH {
            let narrow = self.storage.read(&id.path(), FULL).map_err(|e| wrong(&e))?.unwrap_or_default();
            let same = narrow.len() as u64 == id.width * 32 && there.starts_with(&narrow);
            return if same { Ok(()) } else { Err("it is not the beginning of the full tile".to_owned()) };
        }
        let parent = self.storage.hashes(id.level + 1, id.index, 1).map_err(|e| wrong(&e))?;
        let same = there.len() as u64 == FULL && Digest::from_slice(&parent) == Some(tile_root(&there));
        if same { Ok(()) } else { Err("its root is not the one in the tile above".to_owned()) }
    }

    /// The tiles must make the root of the checkpoint that is published with them.
    fn published_tiles(&mut self) -> std::io::Result<()> {
        let Some(published) = self.published.clone() else { return Ok(()) };
        match crate::merkle::tiles::root_at(&self.storage, published.size) {
            Ok(root) if root == published.root => {}
            Ok(_) => {
                let what = "the tiles make another root than the published checkpoint".to_owned();
                self.damage("tile".to_owned(), None, None, what);
            }
            Err(crate::merkle::tiles::TileError::Io { source, .. }) => return Err(source),
            Err(e) => self.damage("tile".to_owned(), None, None, e.to_string()),
        }
        Ok(())
    }
}
