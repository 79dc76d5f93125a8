//! The log as C2SP tlog-tiles with entry bundles: what a web server needs to publish it, and what tools for transparency logs read.

use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::checkpoint::Checkpoint;
use crate::merkle::tiles::{TILE_HEIGHT, TILE_WIDTH, TileId, TileSource as _, index_path};
use crate::note::MAX_NOTE;
use crate::read::{Entries, Item};
use crate::storage::Storage;

/// Writes `checkpoint`, `tile/L/N` and `tile/entries/N` to the directory `to`, for the log's published checkpoint. How many entries that are.
///
/// # Errors
/// If the log cannot be read, has no published checkpoint, or is damaged or pruned before it, or the directory cannot be written to.
pub fn export_tiles(storage: &Arc<dyn Storage>, to: &Path) -> io::Result<u64> {
    let other = |why: String| io::Error::other(why);
    let note = storage.read("checkpoint", MAX_NOTE as u64)?;
    let note = note.ok_or_else(|| other("the log has no published checkpoint".to_owned()))?;
    let size = Checkpoint::unverified(&note).map_err(|e| other(e.to_string()))?.size;
    let mut entries = Entries::new(Arc::clone(storage)).live();
    let (mut next, mut bundle) = (0u64, Vec::new());
    while next < size {
        let found = match entries.next()? {
            Some(Item::Entry(found)) => found,
            Some(Item::Checkpoint { .. }) => continue,
            Some(Item::Damage { place, why, .. }) => return Err(other(format!("{place}: {why}"))),
            None => return Err(other(format!("the log ends at entry {next}, before its checkpoint"))),
        };
        if found.seq != next {
            return Err(other(format!("entry {next} is absent: only a whole log can be exported as tiles")));
        }
        let length =
            u16::try_from(found.bytes.len()).map_err(|_| other(format!("entry {next} is too long")))?;
        bundle.extend_from_slice(&length.to_be_bytes());
        bundle.extend_from_slice(&found.bytes);
        next += 1;
        if next.is_multiple_of(TILE_WIDTH) || next == size {
            let width = (next - 1) % TILE_WIDTH + 1;
            let suffix = if width < TILE_WIDTH { format!(".p/{width}") } else { String::new() };
            let path = format!("tile/entries/{}{suffix}", index_path((next - 1) / TILE_WIDTH));
            write(to, &path, &std::mem::take(&mut bundle))?;
        }
    }
    let tiles: &dyn Storage = &**storage;
    for level in 0..(64 / TILE_HEIGHT) {
        let count = size >> (TILE_HEIGHT * level);
        for index in 0..count.div_ceil(TILE_WIDTH) {
            let width = (count - index * TILE_WIDTH).min(TILE_WIDTH);
            let bytes = tiles.hashes(level, index * TILE_WIDTH, width).map_err(|e| other(e.to_string()))?;
            write(to, &TileId { level, index, width }.path(), &bytes)?;
        }
    }
    write(to, "checkpoint", &note)?;
    Ok(size)
}

fn write(to: &Path, path: &str, bytes: &[u8]) -> io::Result<()> {
    let path = to.join(path);
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, bytes)
}
