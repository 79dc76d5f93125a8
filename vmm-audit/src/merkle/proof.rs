//! Proofs that an entry is in the log, and that one state of the log continues another (RFC 6962, 2.1.1 and 2.1.2).

use super::node_hash;
use super::tiles::{TileError, TileSource, range_hash};
use crate::digest::Digest;

/// A proof does not show what it should.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProofError {
    /// The numbers that it is about make no sense.
    #[error("{first} of {size}: not within the tree")]
    Range {
        /// Index or size of the older tree.
        first: u64,
        /// The size of the tree.
        size: u64,
    },
    /// It has too many or too few hashes.
    #[error("the proof has {0} hashes, which is the wrong number")]
    Length(usize),
    /// It leads to another root.
    #[error("the proof leads to the root {found}, not {expected}")]
    Root {
        /// The root that it leads to.
        found: Digest,
        /// The root that there is.
        expected: Digest,
    },
}

/// The greatest power of two below `n`, for `n` of at least 2.
fn split(n: u64) -> u64 {
    1 << (63 - (n - 1).leading_zeros())
}

/// The hashes that lead from entry `index` to the root of the first `size` entries.
///
/// # Errors
/// If there is no such entry, or a tile cannot be had.
pub fn prove_inclusion(tiles: &dyn TileSource, index: u64, size: u64) -> Result<Vec<Digest>, TileError> {
    if index >= size {
        return Err(TileError::Outside { what: format!("entry {index}"), size });
    }
    let (mut start, mut end) = (0, size);
    let mut path = Vec::new();
    while end - start > 1 {
        let middle = start + split(end - start);
        if index < middle {
            path.push(range_hash(tiles, middle, end)?);
            end = middle;
        } else {
            path.push(range_hash(tiles, start, middle)?);
            start = middle;
        }
    }
    path.reverse();
    Ok(path)
}

/// Checks that `leaf` is entry `index` of the tree of `size` entries that has `root`.
///
/// # Errors
/// If it does not show that.
pub fn verify_inclusion(
    leaf: Digest,
    index: u64,
    size: u64,
    proof: &[Digest],
    root: Digest,
) -> Result<(), ProofError> {
    if index >= size {
        return Err(ProofError::Range { first: index, size });
    }
    let (mut number, mut last, mut hash) = (index, size - 1, leaf);
    let mut rest = proof.iter();
    while last > 0 {
        if number & 1 == 1 {
            hash = node_hash(rest.next().ok_or(ProofError::Length(proof.len()))?, &hash);
        } else if number < last {
            hash = node_hash(&hash, rest.next().ok_or(ProofError::Length(proof.len()))?);
        }
        number >>= 1;
        last >>= 1;
    }
    finish(rest.next().is_none(), proof, hash, root)
}

fn finish(used_up: bool, proof: &[Digest], found: Digest, expected: Digest) -> Result<(), ProofError> {
    if !used_up {
        return Err(ProofError::Length(proof.len()));
    }
    if found == expected { Ok(()) } else { Err(ProofError::Root { found, expected }) }
}

/// The hashes that show that the tree of `size` entries continues that of the first `old`.
///
/// # Errors
/// If `old` is greater than `size`, or a tile cannot be had.
pub fn prove_consistency(tiles: &dyn TileSource, old: u64, size: u64) -> Result<Vec<Digest>, TileError> {
    if old > size {
        return Err(TileError::Outside { what: format!("first {old}"), size });
    }
    let mut path = Vec::new();
    if old == 0 || old == size {
        return Ok(path);
    }
    let (mut start, mut end) = (0, size);
    while end > old {
        let middle = start + split(end - start);
        if old <= middle {
            path.push(range_hash(tiles, middle, end)?);
            end = middle;
        } else {
            path.push(range_hash(tiles, start, middle)?);
            start = middle;
        }
    }
    if start > 0 {
        path.push(range_hash(tiles, start, end)?);
    }
    path.reverse();
    Ok(path)
}

/// Checks that the tree of `size` entries with `root` continues that of `old` entries with `old_root`.
///
/// # Errors
/// If it does not show that.
pub fn verify_consistency(
    old: u64,
    old_root: Digest,
    size: u64,
    root: Digest,
    proof: &[Digest],
) -> Result<(), ProofError> {
    if old > size {
        return Err(ProofError::Range { first: old, size });
    }
    if old == size {
        return finish(proof.is_empty(), proof, old_root, root);
    }
    if old == 0 {
        return finish(proof.is_empty(), proof, old_root, super::empty_root());
    }
    let short = || ProofError::Length(proof.len());
    let mut rest = proof.iter();
    let (mut number, mut last) = (old - 1, size - 1);
    while number & 1 == 1 {
        number >>= 1;
        last >>= 1;
    }
    let seed = if number == 0 { old_root } else { *rest.next().ok_or_else(short)? };
    let (mut old_hash, mut hash) = (seed, seed);
    while last > 0 {
        if number & 1 == 1 {
            let next = rest.next().ok_or_else(short)?;
            old_hash = node_hash(next, &old_hash);
            hash = node_hash(next, &hash);
        } else if number < last {
            hash = node_hash(&hash, rest.next().ok_or_else(short)?);
        }
        number >>= 1;
        last >>= 1;
    }
    finish(true, proof, old_hash, old_root)?;
    finish(rest.next().is_none(), proof, hash, root)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::cast_possible_truncation)] // sizes of small trees
    use std::collections::HashMap;

    use super::super::tiles::{TileId, root_at};
    use super::super::{Tree, empty_root, leaf_hash};
    use super::*;

    #[derive(Default)]
    struct Tiles(HashMap<TileId, Vec<u8>>);

    impl TileSource for Tiles {
        fn tile(&self, id: TileId) -> std::io::Result<Option<Vec<u8>>> {
            Ok(self.0.get(&id).cloned())
        }
    }

    fn leaf(n: u64) -> Digest {
        leaf_hash(&n.to_be_bytes())
    }

    /// The tree head of RFC 6962, 2.1, as it is written there.
    fn mth(leaves: &[Digest]) -> Digest {
        match leaves {
            [] => empty_root(),
            [one] => *one,
            _ => {
                let (left, right) = leaves.split_at(split(leaves.len() as u64) as usize);
                node_hash(&mth(left), &mth(right))
            }
        }
    }

    fn grown(size: u64) -> (Tree, Tiles) {
        let (mut tree, mut tiles) = (Tree::new(), Tiles::default());
        for n in 0..size {
            tree.push(leaf(n));
            tiles.0.extend(tree.take_full().into_iter().map(|tile| (tile.id, tile.bytes)));
        }
        tiles.0.extend(tree.partial().map(|(id, bytes)| (id, bytes.to_vec())));
        (tree, tiles)
    }

    #[test]
    fn roots_and_proofs_at_every_small_size() {
        let leaves: Vec<_> = (0..70).map(leaf).collect();
        for size in 0..70u64 {
            let (tree, tiles) = grown(size);
            let root = mth(&leaves[..size as usize]);
            assert_eq!(tree.root(), root);
            assert_eq!(root_at(&tiles, size).unwrap(), root);
            assert_eq!(Tree::load(size, &tiles).unwrap().root(), root);
            for index in 0..size {
                let proof = prove_inclusion(&tiles, index, size).unwrap();
                assert_eq!(verify_inclusion(leaf(index), index, size, &proof, root), Ok(()));
                assert!(verify_inclusion(leaf(index + 1), index, size, &proof, root).is_err());
            }
            for old in 0..=size {
                let old_root = mth(&leaves[..old as usize]);
                let proof = prove_consistency(&tiles, old, size).unwrap();
                assert_eq!(verify_consistency(old, old_root, size, root, &proof), Ok(()), "{old} {size}");
                assert!(verify_consistency(old, leaf(99), size, root, &proof).is_err());
                if old < size && old > 0 {
                    assert!(verify_consistency(old, old_root, size, leaf(99), &proof).is_err());
                }
            }
        }
    }

    #[test]
    fn trees_that_span_tiles_load_and_go_on() {
        let (whole, tiles) = grown(70_000);
        for size in [255, 256, 257, 65_535, 65_536, 65_537, 70_000] {
            let (tree, own) = grown(size);
            assert_eq!(root_at(&tiles, size).unwrap(), tree.root());
            let mut loaded = Tree::load(size, &own).unwrap();
            assert_eq!(loaded.root(), tree.root());
            for n in size..70_000 {
                loaded.push(leaf(n));
            }
            assert_eq!(loaded.root(), whole.root());
        }
        // The example of the specification: 273 full tiles and one of 112 at level 0, one full and 17 at level 1, 1 at level 2.
        let mut widths: Vec<_> = whole.partial().map(|(id, _)| (id.level, id.index, id.width)).collect();
        widths.sort_unstable();
        assert_eq!(widths, [(0, 273, 112), (1, 1, 17), (2, 0, 1)]);
        assert_eq!(tiles.0.keys().filter(|id| id.width == 256).count(), 274);
    }

    #[test]
    fn paths_are_those_of_the_specification() {
        for (id, path) in [
            (TileId { level: 0, index: 1_234_067, width: 256 }, "tile/0/x001/x234/067"),
            (TileId { level: 2, index: 0, width: 7 }, "tile/2/000.p/7"),
        ] {
            assert_eq!(id.path(), path);
            assert_eq!(TileId::parse(path), Some(id));
        }
        for wrong in [
            "tile/0/0",
            "tile/00/000",
            "tile/0/x000/001",
            "tile/0/000.p/256",
            "tile/0/000.p/0",
            "tile/64/000",
        ] {
            assert_eq!(TileId::parse(wrong), None, "{wrong}");
        }
    }
}
