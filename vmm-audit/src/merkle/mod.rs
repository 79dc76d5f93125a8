//! The Merkle tree over the entries (RFC 6962, 2.1), stored as C2SP tlog-tiles.
//!
//! [`Tree`] grows by leaves and knows its root; full tiles come out of it. [`tiles`] names and reads them, and [`proof`] makes and checks proofs from
//! them.

pub mod proof;
pub mod tiles;
mod tree;

use sha2::{Digest as _, Sha256};

use crate::digest::Digest;

pub use tree::{FullTile, Tree};

/// The hash of a leaf (RFC 6962, 2.1).
pub fn leaf_hash(entry: &[u8]) -> Digest {
    Digest::of_parts(&[&[0], entry])
}

/// The hash of an inner node (RFC 6962, 2.1).
pub fn node_hash(left: &Digest, right: &Digest) -> Digest {
    let mut bytes = [1u8; 65];
    if let Some((_, hashes)) = bytes.split_first_mut()
        && let Some((l, r)) = hashes.split_at_mut_checked(32)
    {
        l.copy_from_slice(left.as_bytes());
        r.copy_from_slice(right.as_bytes());
    }
    Digest::from_bytes(Sha256::digest(bytes).into())
}

/// The root of a tree without leaves (RFC 6962, 2.1).
pub fn empty_root() -> Digest {
    Digest::of(&[])
}
