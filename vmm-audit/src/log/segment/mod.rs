//! The form of a segment.
//!
//! A segment is a file `segments/N` with a header and frames. All numbers are little-endian.
//!
//! | header, bytes | what |
//! |---|---|
//! | 0..8 | `VMMAUDIT` |
//! | 8..10 | version, 1 |
//! | 10..12 | length of the header, 108 |
//! | 12..16 | 0 |
//! | 16..24 | number of the segment, from 0 |
//! | 24..32 | entries in the log before it |
//! | 32..40 | epoch of the key that signs in it |
//! | 40..72 | the hash chain at its beginning |
//! | 72..104 | SHA-256 of the log's origin |
//! | 104..108 | CRC32C of bytes 0..104 |
//!
//! | frame, bytes | what |
//! |---|---|
//! | 0 | `0xa5` |
//! | 1 | kind: 1 entry, 2 checkpoint |
//! | 2..4 | length of the payload |
//! | 4..8 | low half of the entry's sequence number; of the log's size in a checkpoint |
//! | 8..12 | CRC32C of bytes 0..8 and the payload |
//! | 12.. | the entry, or the signed note |
//!
//! The hash chain at a checkpoint is SHA-256 over the chain at the checkpoint before and all bytes from that checkpoint's
//! frame on up to this one's; at the first checkpoint of a segment, over the chain in the header and all bytes from the header on. The
//! chain in the header is SHA-256 over the chain at the last checkpoint of the segment before and that checkpoint's frame, and zeros in the
//! first segment. So a segment is checked with nothing but the last checkpoint before it.

mod scanner;

use crate::digest::Digest;
use crate::event::{Entry, MAX_ENTRY};
use crate::merkle::leaf_hash;
use crate::note::MAX_NOTE;

pub use scanner::{Scanned, Scanner};

/// Bytes of a segment's header.
pub const HEADER: usize = HEADER_LENGTH as usize;
const HEADER_LENGTH: u16 = 108;
/// Bytes of a frame before its payload.
pub const FRAME: usize = 12;
const MAGIC: &[u8; 8] = b"VMMAUDIT";
const MARK: u8 = 0xa5;
const VERSION: u16 = 1;

/// The file of a segment.
pub(crate) fn path(number: u64) -> String {
    format!("segments/{number:010}")
}

/// The number of the segment with this name in the folder.
pub(crate) fn parse_name(name: &str) -> Option<u64> {
    name.parse().ok().filter(|number| format!("{number:010}") == name)
}

/// The beginning of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Its number.
    pub number: u64,
    /// Entries in the log before it.
    pub base: u64,
    /// The epoch of the key that signs in it.
    pub epoch: u64,
    /// The hash chain.
    pub chain: Digest,
    /// SHA-256 of the log's origin.
    pub origin: Digest,
}

/// What is wrong with bytes of a segment.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    /// The header is not one.
    #[error("the header is damaged: {0}")]
    Header(&'static str),
    /// A version that this reader does not know.
    #[error("the segment has version {0}, this is a reader of version 1")]
    Version(u16),
    /// The file ends within a frame.
    #[error("the file ends within a frame: {there} of {needed} bytes are there")]
    Cut {
        /// Bytes that are there.
        there: usize,
        /// Bytes that the frame has.
        needed: usize,
    },
    /// No frame begins here.
    #[error("no frame begins here")]
    NoFrame,
    /// Length and contents do not fit.
    #[error("the checksum is {found:#010x} instead of {expected:#010x}")]
    Checksum {
        /// That of what is there.
        found: u32,
        /// The one in the frame.
        expected: u32,
    },
}

impl Header {
    /// Its bytes.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = Vec::with_capacity(HEADER);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&HEADER_LENGTH.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        for number in [self.number, self.base, self.epoch] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(self.chain.as_bytes());
        bytes.extend_from_slice(self.origin.as_bytes());
        bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
        bytes.try_into().unwrap_or([0; HEADER])
    }

    /// From the beginning of a segment.
    ///
    /// # Errors
    /// If it is none.
    pub fn decode(bytes: &[u8]) -> Result<Self, Damage> {
        let there = bytes.len();
        let header: &[u8; HEADER] = bytes.first_chunk().ok_or(Damage::Cut { there, needed: HEADER })?;
        let mut fields = Fields(header);
        if fields.take() != *MAGIC {
            return Err(Damage::Header("it does not begin with VMMAUDIT"));
        }
        let version = u16::from_le_bytes(fields.take());
        let (length, zero) = (u16::from_le_bytes(fields.take()), u32::from_le_bytes(fields.take()));
        let mut number = || u64::from_le_bytes(fields.take());
        let (number, base, epoch) = (number(), number(), number());
        let (chain, origin) = (Digest::from_bytes(fields.take()), Digest::from_bytes(fields.take()));
        let expected = u32::from_le_bytes(fields.take());
        if crc32c::crc32c(header.get(..HEADER - 4).unwrap_or_default()) != expected {
            return Err(Damage::Header("the checksum does not fit"));
        }
        if version != VERSION {
            return Err(Damage::Version(version));
        }
        if length != HEADER_LENGTH || zero != 0 {
            return Err(Damage::Header("a length other than 108, or reserved bytes that are not 0"));
        }
        Ok(Self { number, base, epoch, chain, origin })
    }
}

/// Takes fields of fixed length.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> [u8; N] {
        let (field, rest) =
            self.0.split_first_chunk().map_or(([0; N], &[][..]), |(field, rest)| (*field, rest));
        self.0 = rest;
        field
    }
}

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// An entry.
    Entry,
    /// A signed checkpoint.
    Checkpoint,
}

/// Appends a frame to `to`. The payload has at most 65,535 bytes.
pub(crate) fn put_frame(to: &mut Vec<u8>, kind: FrameKind, number: u64, payload: &[u8]) {
    frame(to, kind, number, |to| to.extend_from_slice(payload));
}

/// Appends the frame of an entry to `to`, and returns the entry's hash.
pub(crate) fn put_entry(to: &mut Vec<u8>, seq: u64, source: u32, event: &[u8]) -> Digest {
    let at = frame(to, FrameKind::Entry, seq, |to| Entry { source, event }.encode(to));
    leaf_hash(to.get(at..).unwrap_or_default())
}

/// Appends a frame with what `fill` appends to `to`, in its place. Where that begins.
fn frame(to: &mut Vec<u8>, kind: FrameKind, number: u64, fill: impl FnOnce(&mut Vec<u8>)) -> usize {
    let start = to.len();
    to.extend_from_slice(&[0; FRAME]);
    fill(to);
    let Some((place, payload)) = to.get_mut(start..).and_then(<[u8]>::split_first_chunk_mut::<FRAME>) else {
        return start;
    };
    let [l0, l1] = u16::try_from(payload.len()).unwrap_or(u16::MAX).to_le_bytes();
    #[expect(clippy::cast_possible_truncation, reason = "the low half")]
    let [n0, n1, n2, n3] = (number as u32).to_le_bytes();
    let kind = if kind == FrameKind::Entry { 1 } else { 2 };
    let head = [MARK, kind, l0, l1, n0, n1, n2, n3];
    let [c0, c1, c2, c3] = crc32c::crc32c_append(crc32c::crc32c(&head), payload).to_le_bytes();
    *place = [MARK, kind, l0, l1, n0, n1, n2, n3, c0, c1, c2, c3];
    start + FRAME
}

/// A frame as it was found.
#[derive(Clone, Copy, Debug)]
pub struct Frame<'a> {
    /// Where in the file it begins.
    pub offset: u64,
    /// What it holds.
    pub kind: FrameKind,
    /// The low half of its number.
    pub number: u32,
    /// The entry or note.
    pub payload: &'a [u8],
    /// All of its bytes.
    pub bytes: &'a [u8],
}

/// The frame at the beginning of `bytes`.
fn parse(bytes: &[u8], offset: u64) -> Result<Frame<'_>, Damage> {
    let there = bytes.len();
    let head: &[u8; FRAME] = match bytes.first_chunk() {
        Some(head) => head,
        None if bytes.first().is_none_or(|mark| *mark == MARK) => {
            return Err(Damage::Cut { there, needed: FRAME });
        }
        None => return Err(Damage::NoFrame),
    };
    let mut fields = Fields(head);
    let [mark, kind] = fields.take();
    let length = usize::from(u16::from_le_bytes(fields.take()));
    let number = u32::from_le_bytes(fields.take());
    let expected = u32::from_le_bytes(fields.take());
    let (kind, limit) = match (mark, kind) {
        (MARK, 1) => (FrameKind::Entry, MAX_ENTRY),
        (MARK, 2) => (FrameKind::Checkpoint, MAX_NOTE),
        _ => return Err(Damage::NoFrame),
    };
    if length > limit {
        return Err(Damage::NoFrame);
    }
    let bytes = bytes.get(..FRAME + length).ok_or(Damage::Cut { there, needed: FRAME + length })?;
    let (head, payload) = bytes.split_at_checked(FRAME).ok_or(Damage::NoFrame)?;
    let found = crc32c::crc32c_append(crc32c::crc32c(head.get(..8).unwrap_or_default()), payload);
    if found != expected {
        return Err(Damage::Checksum { found, expected });
    }
    Ok(Frame { offset, kind, number, payload, bytes })
}

#[cfg(test)]
mod tests {
    use super::scanner::CHUNK;
    use super::*;
    use crate::storage::{MemoryStorage, Storage as _};

    fn scanned(bytes: &[u8]) -> Vec<(u64, Result<Vec<u8>, u64>)> {
        let storage = MemoryStorage::new();
        storage.put("f", bytes.to_vec());
        let file = storage.open("f").unwrap();
        let mut scanner = Scanner::new(file, 0);
        let mut found = Vec::new();
        while let Some(next) = scanner.next().unwrap() {
            found.push(match next {
                Scanned::Frame(frame) => (frame.offset, Ok(frame.payload.to_vec())),
                Scanned::Damaged { offset, bytes, .. } => (offset, Err(bytes)),
            });
        }
        assert_eq!(scanner.position(), bytes.len() as u64);
        found
    }

    #[test]
    fn a_header_comes_back_and_shows_every_flipped_bit() {
        let origin = Digest::of(b"o");
        let header = Header { number: 3, base: 70, epoch: 2, chain: Digest::of(b"c"), origin };
        let bytes = header.encode();
        assert_eq!(Header::decode(&bytes), Ok(header));
        for at in 0..HEADER {
            let mut bytes = bytes;
            bytes[at] ^= 4;
            assert!(Header::decode(&bytes).is_err(), "{at}");
        }
    }

    #[test]
    fn frames_are_found_again_behind_damage() {
        let mut bytes = Vec::new();
        for n in 0..3u8 {
            put_frame(&mut bytes, FrameKind::Entry, n.into(), &[n; 5]);
        }
        assert_eq!(scanned(&bytes), [(0, Ok(vec![0; 5])), (17, Ok(vec![1; 5])), (34, Ok(vec![2; 5]))]);
        for at in 17..34 {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1;
            assert_eq!(scanned(&bytes), [(0, Ok(vec![0; 5])), (17, Err(17)), (34, Ok(vec![2; 5]))], "{at}");
        }
        for end in 35..51 {
            assert_eq!(scanned(&bytes[..end])[2], (34, Err(end as u64 - 34)));
        }
        assert_eq!(scanned(&[0xa5; 100]), [(0, Err(100))]);
    }

    #[test]
    fn frames_across_chunks_are_whole() {
        let mut bytes = vec![0xa5; 3];
        let payload = vec![0xa5; MAX_ENTRY];
        let count = 3 * CHUNK / MAX_ENTRY;
        (0..count).for_each(|n| put_frame(&mut bytes, FrameKind::Entry, n as u64, &payload));
        let found = scanned(&bytes);
        assert_eq!(found[0], (0, Err(3)));
        assert_eq!(found.len(), count + 1);
        assert!(found[1..].iter().all(|(_, payload)| payload.as_ref().is_ok_and(|p| p.len() == MAX_ENTRY)));
    }
}
