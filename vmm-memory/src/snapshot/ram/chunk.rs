//! The record of a chunk: 64 pages of RAM, one bit each in a word.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::PAGE_SIZE;
use crate::snapshot::format::Digest;

/// Pages of a chunk.
pub(crate) const PAGES: u64 = 64;
/// Bytes of a chunk; the last one of a region may have fewer.
pub(crate) const CHUNK: u64 = PAGES * PAGE_SIZE;
pub(crate) const CHUNK_BYTES: usize = 64 * PAGE_BYTES;
pub(crate) const PAGE_BYTES: usize = 4096;
const _: () = assert!(PAGE_BYTES as u64 == PAGE_SIZE && CHUNK_BYTES as u64 == CHUNK, "the same");

/// How the bytes of a chunk are kept.
pub(crate) mod codec {
    /// Pages where they are in RAM, counted from where RAM begins. In between, where there is nothing, the file is zero.
    pub(crate) const IN_PLACE: u32 = 0;
    /// Those pages that are there, one behind the other.
    pub(crate) const PACKED: u32 = 1;
    /// The same, as a block of LZ4.
    pub(crate) const LZ4: u32 = 2;
}

/// What the file says of a chunk. What it has none of is zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Record {
    /// Pages that the file has: bit n is page n of the chunk.
    pub(crate) stored: U64,
    /// Pages that are those of the base. All others are zero.
    pub(crate) inherited: U64,
    /// Where the bytes are in the file.
    pub(crate) at: U64,
    /// How many there are.
    pub(crate) len: U32,
    pub(crate) codec: U32,
    /// Of the pages that the file has, as it has them.
    pub(crate) digest: Digest,
}

/// Bytes of a record.
pub(crate) const RECORD: usize = size_of::<Record>();
const _: () = assert!(RECORD == 64, "records have no padding");

/// The bits of a chunk's first pages, as many as `bytes` are.
pub(crate) fn pages_of(bytes: u64) -> u64 {
    let pages = bytes / PAGE_SIZE;
    if pages >= PAGES { u64::MAX } else { (1 << pages) - 1 }
}

/// Ranges of bytes of the pages in `mask`, ascending, each as long as it can be.
pub(crate) fn runs(mask: u64) -> impl Iterator<Item = std::ops::Range<usize>> {
    let mut left = mask;
    std::iter::from_fn(move || {
        if left == 0 {
            return None;
        }
        let first = left.trailing_zeros();
        let count = (left >> first).trailing_ones();
        // Shifts by 64 are none.
        let run = u64::MAX >> (64 - count) << first;
        left &= !run;
        let first = first as usize * PAGE_BYTES;
        Some(first..first + count as usize * PAGE_BYTES)
    })
}

/// The digest of the pages in `mask`, in a chunk.
pub(crate) fn digest(chunk: &[u8], mask: u64) -> Digest {
    let mut hasher = blake3::Hasher::new();
    for run in runs(mask) {
        hasher.update(chunk.get(run).unwrap_or_default());
    }
    hasher.finalize().into()
}

/// The pages of a chunk, of those in `of`, that are not zero.
pub(crate) fn occupied(chunk: &[u8], of: u64) -> u64 {
    let mut mask = 0;
    for (page, bytes) in chunk.chunks(PAGE_BYTES).enumerate() {
        if of >> page & 1 != 0 && !is_zero(bytes) {
            mask |= 1 << page;
        }
    }
    mask
}

/// Whether all bytes are zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // Most pages that are not zero begin so; the rest in steps that a vector unit takes at once.
    let (steps, rest) = bytes.as_chunks::<256>();
    steps.iter().all(|step| step.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_those_of_the_bits() {
        let of =
            |mask| runs(mask).map(|run| (run.start / PAGE_BYTES, run.end / PAGE_BYTES)).collect::<Vec<_>>();
        assert_eq!(of(0), []);
        assert_eq!(of(u64::MAX), [(0, 64)]);
        assert_eq!(of(1 << 63), [(63, 64)]);
        assert_eq!(of(0b1011_0110), [(1, 3), (4, 6), (7, 8)]);
        assert_eq!((pages_of(0), pages_of(3 * PAGE_SIZE), pages_of(CHUNK)), (0, 7, u64::MAX));
    }

    #[test]
    fn a_byte_anywhere_makes_a_page_occupied() {
        let mut chunk = vec![0; CHUNK_BYTES];
        assert_eq!(occupied(&chunk, u64::MAX), 0);
        for at in [0, 255, 256, 4095, 4096, 70_000, CHUNK_BYTES - 1] {
            chunk[at] = 1;
            assert_eq!(occupied(&chunk, u64::MAX), 1 << (at / PAGE_BYTES), "{at}");
            assert_eq!(occupied(&chunk, !(1 << (at / PAGE_BYTES))), 0, "{at}");
            chunk[at] = 0;
        }
    }

    #[test]
    fn the_digest_is_that_of_the_pages() {
        let chunk: Vec<u8> = (0..CHUNK_BYTES).map(|at| (at / 1000).to_le_bytes()[0]).collect();
        let (first, third) = (&chunk[..PAGE_BYTES], &chunk[2 * PAGE_BYTES..3 * PAGE_BYTES]);
        assert_eq!(digest(&chunk, 0b101), *blake3::hash(&[first, third].concat()).as_bytes());
    }
}
