//! A tree that grows.

use super::tiles::{TILE_HEIGHT, TILE_WIDTH, TileError, TileId, TileSource};
use super::{empty_root, node_hash};
use crate::digest::Digest;

/// A tile that has got its last hash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FullTile {
    /// Which.
    pub id: TileId,
    /// Its hashes, one after the other.
    pub bytes: Vec<u8>,
}

/// The right edge of a tree: all that it takes to add leaves. It holds less than 256 hashes a level.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    size: u64,
    /// Roots of the complete subtrees that the tree consists of, from the left, and their heights.
    peaks: Vec<(u32, Digest)>,
    /// The hashes of the tile that is being filled, a level each.
    levels: Vec<Vec<u8>>,
    full: Vec<FullTile>,
}

impl Tree {
    /// One without leaves.
    pub fn new() -> Self {
        Self::default()
    }

    /// The tree of the first `size` leaves, from tiles. That they are right is seen by its root.
    ///
    /// # Errors
    /// If a tile is absent or too short.
    pub fn load(size: u64, tiles: &dyn TileSource) -> Result<Self, TileError> {
        let mut tree = Self { size, ..Self::default() };
        let mut level = 0;
        let mut peaks = Vec::new();
        while size >> (TILE_HEIGHT * level) > 0 {
            let width = (size >> (TILE_HEIGHT * level)) % TILE_WIDTH;
            let mut bytes = Vec::new();
            if width > 0 {
                bytes = tiles.hashes(level, (size >> (TILE_HEIGHT * level)) - width, width)?;
            }
            // The subtrees of the level from the right, smallest first.
            let mut end = width;
            for height in 0..TILE_HEIGHT {
                if width >> height & 1 == 1 {
                    let start = end - (1 << height);
                    peaks.push((level * TILE_HEIGHT + height, fold(&bytes, start, end)));
                    end = start;
                }
            }
            tree.levels.push(bytes);
            level += 1;
            if level * TILE_HEIGHT >= 64 {
                break;
            }
        }
        peaks.reverse();
        tree.peaks = peaks;
        Ok(tree)
    }

    /// How many leaves it has.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Adds a leaf.
    pub fn push(&mut self, leaf: Digest) {
        let index = self.size;
        self.size += 1;
        let (mut height, mut hash) = (0, leaf);
        self.store(index, height, &hash);
        while self.peaks.last().is_some_and(|(h, _)| *h == height)
            && let Some((_, left)) = self.peaks.pop()
        {
            hash = node_hash(&left, &hash);
            height += 1;
            self.store(index, height, &hash);
        }
        self.peaks.push((height, hash));
    }

    /// Keeps the hash of the subtree of `height` that `index` is the last leaf of, if tiles hold that height.
    fn store(&mut self, index: u64, height: u32, hash: &Digest) {
        if !height.is_multiple_of(TILE_HEIGHT) {
            return;
        }
        let level = height / TILE_HEIGHT;
        let place = level as usize;
        if self.levels.len() <= place {
            self.levels.resize_with(place + 1, Vec::new);
        }
        let Some(bytes) = self.levels.get_mut(place) else { return };
        bytes.extend_from_slice(hash.as_bytes());
        if bytes.len() as u64 == TILE_WIDTH * 32 {
            let id = TileId { level, index: index >> (height + TILE_HEIGHT), width: TILE_WIDTH };
            self.full.push(FullTile { id, bytes: std::mem::take(bytes) });
        }
    }

    /// The root hash.
    pub fn root(&self) -> Digest {
        let mut peaks = self.peaks.iter().rev().map(|(_, hash)| *hash);
        let Some(first) = peaks.next() else { return empty_root() };
        peaks.fold(first, |right, left| node_hash(&left, &right))
    }

    /// Takes the tiles that have become full since the last call.
    pub fn take_full(&mut self) -> Vec<FullTile> {
        std::mem::take(&mut self.full)
    }

    /// The tiles at the right edge that are not full, with their hashes.
    pub fn partial(&self) -> impl Iterator<Item = (TileId, &[u8])> {
        self.levels.iter().zip(0u32..).filter(|(bytes, _)| !bytes.is_empty()).map(|(bytes, level)| {
            let width = bytes.len() as u64 / 32;
            let id = TileId { level, index: self.size >> (TILE_HEIGHT * (level + 1)), width };
            (id, bytes.as_slice())
        })
    }
}

/// The root of the complete subtree over hashes `start` to `end` of `bytes`, whose number is a power of two.
pub(super) fn fold(bytes: &[u8], start: u64, end: u64) -> Digest {
    let hash = |chunk: &[u8]| Digest::from_slice(chunk).unwrap_or_default();
    let (start, end) = (usize::try_from(start).unwrap_or(0) * 32, usize::try_from(end).unwrap_or(0) * 32);
    let mut row: Vec<Digest> = bytes.get(start..end).unwrap_or_default().chunks_exact(32).map(hash).collect();
    while row.len() > 1 {
        row = row
            .chunks(2)
            .map(|pair| match pair {
                [left, right] => node_hash(left, right),
                [one, ..] => *one,
                [] => Digest::default(),
            })
            .collect();
    }
    row.first().copied().unwrap_or_default()
}
