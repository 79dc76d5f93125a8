//! The file's side: what its records say, and pages from it.

use std::fs::File;

use zerocopy::FromBytes as _;

use super::chunk::{CHUNK_BYTES, PAGE_BYTES, RECORD, Record, codec, digest, is_zero, pages_of, runs};
use super::layout::{Place, RamLayout};
use super::{Count, RamOptions};
use crate::PAGE_SIZE;
use crate::crew;
use crate::snapshot::error::SnapshotError;
use crate::snapshot::format::HEADER_SIZE;
use crate::snapshot::reader::{Part, Snapshot};

/// RAM in a snapshot.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) layout: RamLayout,
    pub(crate) places: Vec<Place>,
    pub(crate) records: Vec<Record>,
}

/// What one thread works with.
#[derive(Default)]
pub(crate) struct Buffers {
    bytes: Vec<u8>,
    pages: Vec<u8>,
    /// Chunks.
    spare: Vec<Vec<u8>>,
}

impl Buffers {
    /// A chunk to be filled, which [`put`](Self::put) takes back.
    pub(crate) fn take(&mut self) -> Vec<u8> {
        self.spare.pop().unwrap_or_else(|| vec![0; CHUNK_BYTES])
    }

    pub(crate) fn put(&mut self, chunk: Vec<u8>) {
        self.spare.push(chunk);
    }
}

impl Image {
    /// What records say of RAM that ends in the file at `end`; why they cannot be right.
    pub(crate) fn new(layout: RamLayout, records: &[u8], end: u64, has_base: bool) -> Result<Self, String> {
        let places: Vec<Place> = layout.places().collect();
        let (records, rest) = records.as_chunks::<RECORD>();
        if records.len() != places.len() || !rest.is_empty() {
            let bytes = records.len() * RECORD + rest.len();
            return Err(format!(
                "it has {bytes} bytes; {} chunks take {}",
                places.len(),
                places.len() * RECORD
            ));
        }
        let records: Vec<Record> =
            records.iter().filter_map(|bytes| Record::read_from_bytes(bytes).ok()).collect();
        let mut packed = Vec::new();
        for (record, place) in records.iter().zip(&places) {
            check(record, place, layout.packed, has_base)
                .map_err(|problem| format!("{}: {problem}", layout.name(place)))?;
            if record.stored != 0 && layout.packed {
                packed.push((record.at.get(), u64::from(record.len.get())));
            }
        }
        let mut at = HEADER_SIZE;
        if layout.packed {
            packed.sort_unstable();
            for (begin, len) in packed {
                if begin != at {
                    return Err(format!(
                        "its chunks leave a gap or overlap at {at:#x}: the next one begins at {begin:#x}"
                    ));
                }
                at = begin.saturating_add(len);
            }
        } else {
            at = at.saturating_add(layout.size());
        }
        if at != end {
            return Err(format!("its chunks end at {at:#x}, and what follows them begins at {end:#x}"));
        }
        Ok(Self { layout, places, records })
    }

    /// Puts those pages of a chunk which are in `wanted` and not zero into `chunk`, and says which they are. What else is in `chunk` then
    /// means nothing.
    pub(crate) fn fill(
        &self,
        snapshot: &Snapshot,
        at: usize,
        wanted: u64,
        chunk: &mut [u8],
        buffers: &mut Buffers,
    ) -> Result<u64, SnapshotError> {
        let (Some(record), Some(place)) = (self.records.get(at), self.places.get(at)) else { return Ok(0) };
        let (stored, inherited) = (record.stored.get(), record.inherited.get() & wanted);
        let own = stored & wanted;
        let mut below = 0;
        if inherited != 0
            && let Some((base, image)) = snapshot.base_image()
        {
            below = image.fill(base, at, inherited, chunk, buffers)?;
        }
        // Pages in place come with all that is between them.
        if own != 0 && own == stored && below == 0 {
            self.read(snapshot, record, place, chunk, buffers)?;
        } else if own != 0 {
            let mut all = buffers.take();
            let done = self.read(snapshot, record, place, &mut all, buffers);
            for run in runs(own) {
                if let (Some(target), Some(source)) = (chunk.get_mut(run.clone()), all.get(run)) {
                    target.copy_from_slice(source);
                }
            }
            buffers.put(all);
            done?;
        }
        Ok(own | below)
    }

    /// Reads the pages that the file has of a chunk, each to its place, and checks them.
    fn read(
        &self,
        snapshot: &Snapshot,
        record: &Record,
        place: &Place,
        chunk: &mut [u8],
        Buffers { bytes, pages, .. }: &mut Buffers,
    ) -> Result<(), SnapshotError> {
        let part =
            Part { name: self.layout.name(place), begin: record.at.get(), len: record.len.get().into() };
        let (len, stored) = (record.len.get() as usize, record.stored.get());
        let other = || snapshot.damaged(&part, "its digest is another".to_owned());
        if record.codec.get() == codec::IN_PLACE {
            let chunk = chunk.get_mut(..len).ok_or_else(other)?;
            snapshot.read_at(chunk, part.begin, &part)?;
            if digest(chunk, stored) != record.digest {
                return Err(other());
            }
            let elsewhere = pages_of(place.size) & !stored;
            if !runs(elsewhere).all(|run| chunk.get(run).is_some_and(is_zero)) {
                return Err(snapshot.damaged(&part, "there is something between its pages".to_owned()));
            }
            return Ok(());
        }
        bytes.resize(len, 0);
        snapshot.read_at(bytes, part.begin, &part)?;
        if blake3::hash(bytes) != record.digest {
            return Err(other());
        }
        let expected = stored.count_ones() as usize * PAGE_BYTES;
        let pages = if record.codec.get() == codec::LZ4 {
            pages.resize(expected, 0);
            let len = lz4_flex::block::decompress_into(bytes, pages)
                .map_err(|error| snapshot.damaged(&part, format!("it is no block of LZ4: {error}")))?;
            pages.get(..len).unwrap_or_default()
        } else {
            bytes
        };
        if pages.len() != expected {
            let problem = format!("it has {} bytes of pages; {expected} are expected", pages.len());
            return Err(snapshot.damaged(&part, problem));
        }
        let mut left = pages;
        for run in runs(stored) {
            if let (Some(target), Some((source, rest))) =
                (chunk.get_mut(run.clone()), left.split_at_checked(run.len()))
            {
                target.copy_from_slice(source);
                left = rest;
            }
        }
        Ok(())
    }

    /// Checks all that the file has, and that it has nothing else.
    pub(crate) fn verify(&self, snapshot: &Snapshot, options: &RamOptions<'_>) -> Result<(), SnapshotError> {
        let count = Count::new(self.layout.size(), options);
        crew::share("snapshot", options.threads, self.places.len(), Buffers::default, |buffers, at| {
            let (Some(record), Some(place)) = (self.records.get(at), self.places.get(at)) else {
                return Ok(());
            };
            if record.stored != 0 {
                let mut chunk = buffers.take();
                let done = self.read(snapshot, record, place, &mut chunk, buffers);
                buffers.put(chunk);
                done?;
            } else {
                self.check_empty(snapshot, place)?;
            }
            count.add(place.size);
            Ok(())
        })
    }

    /// Checks that there is nothing where the file has nothing of a chunk.
    pub(crate) fn check_empty(&self, snapshot: &Snapshot, place: &Place) -> Result<(), SnapshotError> {
        if self.layout.packed {
            return Ok(());
        }
        let begin = HEADER_SIZE + place.at;
        let part = Part { name: self.layout.name(place), begin, len: place.size };
        let mut at = begin;
        let mut page = [0; PAGE_BYTES];
        while let Some(data) = next_data(snapshot.file(), at).filter(|data| *data < begin + place.size) {
            // The file system's blocks may be larger, or smaller, than pages.
            let from = data.max(at) / PAGE_SIZE * PAGE_SIZE;
            snapshot.read_at(&mut page, from, &part)?;
            if !is_zero(&page) {
                return Err(snapshot.damaged(&part, "there is something where nothing was".to_owned()));
            }
            at = from + PAGE_SIZE;
        }
        Ok(())
    }
}

/// Where the next byte is, from `at` on, that the file system keeps; `at` itself where it does not say.
fn next_data(file: &File, at: u64) -> Option<u64> {
    match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
        Ok(data) => Some(data),
        Err(rustix::io::Errno::NXIO) => None,
        Err(_) => Some(at),
    }
}

fn check(record: &Record, place: &Place, packed: bool, has_base: bool) -> Result<(), String> {
    let (stored, inherited) = (record.stored.get(), record.inherited.get());
    if (stored | inherited) & !pages_of(place.size) != 0 {
        return Err("it has pages beyond the region's end".to_owned());
    }
    if stored & inherited != 0 {
        return Err("it has pages that are the base's, too".to_owned());
    }
    if inherited != 0 && !has_base {
        return Err("it leaves pages to a base, and there is none".to_owned());
    }
    let (at, len, codec) = (record.at.get(), u64::from(record.len.get()), record.codec.get());
    let pages = u64::from(stored.count_ones()) * PAGE_SIZE;
    let is_right = match (stored, packed, codec) {
        (0, ..) => (at, len, codec, record.digest) == (0, 0, 0, [0; 32]),
        (_, false, codec::IN_PLACE) => at == HEADER_SIZE + place.at && len == place.size,
        (_, true, codec::PACKED) => len == pages,
        (_, true, codec::LZ4) => 0 < len && len < pages,
        _ => false,
    };
    if is_right {
        return Ok(());
    }
    Err(format!("its record is none: {stored:#x} pages, {len} bytes at {at:#x}, codec {codec}"))
}
