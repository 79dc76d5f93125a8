//! Tiles: consecutive hashes of the tree at a height of a multiple of 8 (C2SP tlog-tiles).

use std::fmt;

use super::tree::fold;
use super::{empty_root, node_hash};
use crate::digest::Digest;

/// Levels of the tree that a tile stands for.
pub const TILE_HEIGHT: u32 = 8;
/// Hashes in a full tile.
pub const TILE_WIDTH: u64 = 256;

/// Which tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TileId {
    /// Its level; level 0 has the hashes of leaves.
    pub level: u32,
    /// Its number in the level.
    pub index: u64,
    /// How many hashes it has, 1 to 256.
    pub width: u64,
}

/// A tile's number as path elements of three digits, with an `x` before all but the last.
pub fn index_path(index: u64) -> String {
    let mut path = format!("{:03}", index % 1000);
    let mut rest = index / 1000;
    while rest > 0 {
        path = format!("x{:03}/{path}", rest % 1000);
        rest /= 1000;
    }
    path
}

/// The number that path elements stand for, if they are as [`index_path`] writes them.
pub fn parse_index_path(path: &str) -> Option<u64> {
    let mut index = 0u64;
    for digits in path.split('/') {
        let digits = digits.strip_prefix('x').unwrap_or(digits);
        index = index.checked_mul(1000)?.checked_add(digits.parse().ok()?)?;
    }
    (index_path(index) == path).then_some(index)
}

impl TileId {
    /// Its path: `tile/L/N` or `tile/L/N.p/W`.
    pub fn path(&self) -> String {
        self.to_string()
    }

    /// The tile with this path.
    pub fn parse(path: &str) -> Option<Self> {
        let (level, rest) = path.strip_prefix("tile/")?.split_once('/')?;
        let (index, width) = match rest.split_once(".p/") {
            Some((index, width)) => (index, width.parse().ok().filter(|w| (1..TILE_WIDTH).contains(w))?),
            None => (rest, TILE_WIDTH),
        };
        let id =
            Self { level: level.parse().ok().filter(|l| *l < 64)?, index: parse_index_path(index)?, width };
        (id.path() == path).then_some(id)
    }
}

impl fmt::Display for TileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tile/{}/{}", self.level, index_path(self.index))?;
        if self.width < TILE_WIDTH { write!(f, ".p/{}", self.width) } else { Ok(()) }
    }
}

/// Why hashes cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TileError {
    /// No tile has them.
    #[error("{id} is absent, and so is every wider one")]
    Absent {
        /// The narrowest tile that would do.
        id: TileId,
    },
    /// A tile has another length than its name says.
    #[error("{id} has {length} bytes instead of {}", id.width * 32)]
    Length {
        /// The tile.
        id: TileId,
        /// Its length in bytes.
        length: usize,
    },
    /// It cannot be read.
    #[error("{id}: {source}")]
    Io {
        /// The tile.
        id: TileId,
        /// Why.
        source: std::io::Error,
    },
    /// A subtree or tree that is not in the tiles.
    #[error("the tree of {size} leaves has no {what}")]
    Outside {
        /// What was asked for.
        what: String,
        /// The size of the tree.
        size: u64,
    },
}

/// Where tiles are.
pub trait TileSource {
    /// The bytes of a tile, or `None` if there is no such.
    ///
    /// # Errors
    /// If it cannot be read.
    fn tile(&self, id: TileId) -> std::io::Result<Option<Vec<u8>>>;

    /// `count` hashes of a level from number `first` on, all of one tile: of the tile that ends there, or a wider one.
    ///
    /// # Errors
    /// If no tile has them, or cannot be read, or has a wrong length.
    fn hashes(&self, level: u32, first: u64, count: u64) -> Result<Vec<u8>, TileError> {
        let index = first / TILE_WIDTH;
        let (start, least) = (first % TILE_WIDTH, first % TILE_WIDTH + count);
        let narrowest = TileId { level, index, width: least.clamp(1, TILE_WIDTH) };
        for width in std::iter::once(TILE_WIDTH).chain(least..TILE_WIDTH) {
            let id = TileId { level, index, width };
            let Some(bytes) = self.tile(id).map_err(|source| TileError::Io { id, source })? else { continue };
            if bytes.len() as u64 != width * 32 {
                return Err(TileError::Length { id, length: bytes.len() });
            }
            let range = usize::try_from(start * 32).ok().zip(usize::try_from(least * 32).ok());
            let wanted = range.and_then(|(start, end)| bytes.get(start..end));
            return wanted.map(<[u8]>::to_vec).ok_or(TileError::Absent { id: narrowest });
        }
        Err(TileError::Absent { id: narrowest })
    }
}

/// The root of the subtree that a full tile stands for.
pub(crate) fn tile_root(bytes: &[u8]) -> Digest {
    fold(bytes, 0, TILE_WIDTH)
}

/// The hash of the complete subtree of 2^`height` leaves from leaf `start` on.
fn subtree(tiles: &dyn TileSource, height: u32, start: u64) -> Result<Digest, TileError> {
    let level = height / TILE_HEIGHT;
    let count = 1u64 << (height % TILE_HEIGHT);
    let bytes = tiles.hashes(level, start >> (level * TILE_HEIGHT), count)?;
    Ok(fold(&bytes, 0, count))
}

/// The hash over the leaves `start` to `end` (RFC 6962, 2.1), where `start` is a multiple of the power of two that holds them.
pub(super) fn range_hash(tiles: &dyn TileSource, start: u64, end: u64) -> Result<Digest, TileError> {
    let count = end.saturating_sub(start);
    if count == 0 {
        return Ok(empty_root());
    }
    if count.is_power_of_two() {
        return subtree(tiles, count.trailing_zeros(), start);
    }
    // The greatest power of two below: at most 64 times.
    let left = 1u64 << (63 - (count - 1).leading_zeros());
    Ok(node_hash(&subtree(tiles, left.trailing_zeros(), start)?, &range_hash(tiles, start + left, end)?))
}

/// The root of the first `size` leaves, from tiles.
///
/// # Errors
/// If a tile that it takes cannot be had.
pub fn root_at(tiles: &dyn TileSource, size: u64) -> Result<Digest, TileError> {
    range_hash(tiles, 0, size)
}
