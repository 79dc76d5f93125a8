//! What is there of a log when it is opened: its last segments, up to the last checkpoint.

use std::collections::BTreeMap;
use std::io;

use sha2::{Digest as _, Sha256};

use super::LogError;
use super::rotate::carried_over;
use super::segment::{Damage, FrameKind, HEADER, Header, Scanned, Scanner, path};
use crate::checkpoint::Checkpoint;
use crate::digest::Digest;
use crate::keys::KeyChain;
use crate::merkle::leaf_hash;
use crate::storage::{Storage, StorageFile};

/// What is in a segment up to its last checkpoint.
pub(super) struct Scan {
    pub(super) leaves: Vec<Digest>,
    pub(super) last: Option<Last>,
    pub(super) rings: BTreeMap<u64, u64>,
    pub(super) length: u64,
    /// Whole entries behind the last checkpoint.
    pub(super) entries_behind: u64,
}

pub(super) struct Last {
    pub(super) checkpoint: Checkpoint,
    pub(super) note: String,
    pub(super) frame: Vec<u8>,
    pub(super) end: u64,
}

/// The header of a segment, or what is wrong with it.
pub(crate) fn read_header(file: &dyn StorageFile) -> io::Result<Result<Header, Damage>> {
    let mut bytes = [0; HEADER];
    let read = file.read_at(0, &mut bytes)?;
    Ok(Header::decode(bytes.get(..read).unwrap_or_default()))
}

/// The time of a segment's first checkpoint, its signature unchecked.
pub(super) fn first_time(file: Box<dyn StorageFile>) -> io::Result<Option<u64>> {
    let mut scanner = Scanner::new(file, HEADER as u64);
    while let Some(scanned) = scanner.next()? {
        if let Scanned::Frame(frame) = scanned
            && frame.kind == FrameKind::Checkpoint
        {
            return Ok(Checkpoint::unverified(frame.payload).ok().map(|checkpoint| checkpoint.time));
        }
    }
    Ok(None)
}

/// Reads a segment behind its header. `keys` grow if a checkpoint names the next.
fn scan(
    file: Box<dyn StorageFile>,
    name: &str,
    header: &Header,
    keys: &mut KeyChain,
) -> Result<Scan, LogError> {
    let failed = || LogError::io(name);
    let damaged = |offset, why: String| LogError::Damaged { path: name.to_owned(), offset, why };
    let mut scan = Scan {
        leaves: Vec::new(),
        last: None,
        rings: BTreeMap::new(),
        length: file.length().map_err(failed())?,
        entries_behind: 0,
    };
    let mut pending = Vec::new();
    let mut hash = Sha256::new();
    hash.update(header.chain.as_bytes());
    hash.update(header.encode());
    // What is wrong, if something is, until a checkpoint shows that it matters.
    let mut wrong: Option<(u64, String)> = None;
    let mut scanner = Scanner::new(file, HEADER as u64);
    while let Some(scanned) = scanner.next().map_err(failed())? {
        let frame = match scanned {
            Scanned::Frame(frame) => frame,
            Scanned::Damaged { offset, damage, .. } => {
                wrong.get_or_insert((offset, damage.to_string()));
                continue;
            }
        };
        let seq = header.base + (scan.leaves.len() + pending.len()) as u64;
        #[expect(clippy::cast_possible_truncation, reason = "the low half")]
        if frame.number != seq as u32 {
            wrong.get_or_insert((
                frame.offset,
                format!("a frame numbered {} where {seq} is due", frame.number),
            ));
        }
        match frame.kind {
            FrameKind::Entry => {
                pending.push(leaf_hash(frame.payload));
                hash.update(frame.bytes);
            }
            FrameKind::Checkpoint => match keys.open(frame.payload) {
                Ok(checkpoint) => {
                    if let Some((offset, why)) = wrong {
                        return Err(damaged(offset, why));
                    }
                    let chain = Digest::from_bytes(hash.finalize().into());
                    if checkpoint.size != seq || checkpoint.chain != chain {
                        return Err(damaged(
                            frame.offset,
                            "the checkpoint is not one of what is before it".to_owned(),
                        ));
                    }
                    if checkpoint.next.is_some() && checkpoint.epoch == keys.last_epoch() {
                        keys.follow(&checkpoint)?;
                    }
                    hash = Sha256::new();
                    hash.update(checkpoint.chain.as_bytes());
                    hash.update(frame.bytes);
                    scan.leaves.append(&mut pending);
                    scan.rings.extend(checkpoint.rings.iter().copied());
                    let note = String::from_utf8_lossy(frame.payload).into_owned();
                    let end = frame.offset + frame.bytes.len() as u64;
                    scan.last = Some(Last { checkpoint, note, frame: frame.bytes.to_vec(), end });
                }
                Err(e) => {
                    wrong.get_or_insert((frame.offset, e.to_string()));
                }
            },
        }
    }
    scan.entries_behind = pending.len() as u64;
    Ok(scan)
}

/// The state in which writing goes on.
pub(super) struct State {
    pub(super) number: u64,
    pub(super) header: Option<Header>,
    pub(super) scan: Scan,
    /// The end of the segment before.
    pub(super) before: Option<Last>,
}

/// Reads the last two segments.
pub(super) fn load(storage: &dyn Storage, numbers: &[u64], keys: &mut KeyChain) -> Result<State, LogError> {
    let missing =
        |number: u64| LogError::Damaged { path: path(number), offset: 0, why: "it is absent".to_owned() };
    let (first, last) = numbers.first().zip(numbers.last()).map_or((0, 0), |(first, last)| (*first, *last));
    for (number, there) in (first..=last).zip(numbers) {
        if number != *there {
            return Err(missing(number));
        }
    }
    let mut before = None;
    let mut rings = BTreeMap::new();
    if last > first {
        let found = scan_whole(storage, last - 1, keys)?;
        let end = found.length;
        rings = found.rings;
        before = found.last.filter(|last| last.end == end);
        if before.is_none() {
            let why = "there is more behind its last checkpoint".to_owned();
            return Err(LogError::Damaged { path: path(last - 1), offset: end, why });
        }
    } else if last > 0 {
        return Err(missing(last - 1));
    }
    let name = path(last);
    let file = storage.open_to_read(&name).map_err(LogError::io(name.clone()))?;
    let header = match read_header(&*file).map_err(LogError::io(name.clone()))? {
        Ok(header) => header,
        Err(damage) => {
            // Nothing acknowledged may be behind it.
            let length = file.length().map_err(LogError::io(name.clone()))?;
            let mut scanner = Scanner::new(file, 0);
            while let Some(scanned) = scanner.next().map_err(LogError::io(name.clone()))? {
                if let Scanned::Frame(frame) = scanned
                    && frame.kind == FrameKind::Checkpoint
                    && keys.open(frame.payload).is_ok()
                {
                    return Err(LogError::Damaged { path: name, offset: 0, why: damage.to_string() });
                }
            }
            let scan = Scan { leaves: Vec::new(), last: None, rings, length, entries_behind: 0 };
            return Ok(State { number: last, header: None, scan, before });
        }
    };
    let (base, chain) = before.as_ref().map_or((0, Digest::default()), |last| {
        (last.checkpoint.size, carried_over(last.checkpoint.chain, &last.frame))
    });
    if header.number != last || header.base != base || header.chain != chain {
        let why = "its header does not continue the segment before".to_owned();
        return Err(LogError::Damaged { path: name, offset: 0, why });
    }
    let mut scan = scan(file, &name, &header, keys)?;
    rings.extend(std::mem::take(&mut scan.rings));
    scan.rings = rings;
    Ok(State { number: last, header: Some(header), scan, before })
}

/// Reads a segment that is not the last.
fn scan_whole(storage: &dyn Storage, number: u64, keys: &mut KeyChain) -> Result<Scan, LogError> {
    let name = path(number);
    let file = storage.open_to_read(&name).map_err(LogError::io(name.clone()))?;
    let header = read_header(&*file).map_err(LogError::io(name.clone()))?;
    let header =
        header.map_err(|e| LogError::Damaged { path: name.clone(), offset: 0, why: e.to_string() })?;
    scan(file, &name, &header, keys)
}
