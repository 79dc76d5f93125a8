//! From RAM to the file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use rustix::fs::SeekFrom;
use vm_memory::{Bytes as _, GuestMemoryRegion, MemoryRegionAddress};
use zerocopy::IntoBytes as _;

use super::chunk::{
    CHUNK, CHUNK_BYTES, PAGE_BYTES, PAGES, RECORD, Record, codec, digest, occupied, pages_of, runs,
};
use super::layout::{Place, RamLayout};
use super::{Count, RamOptions, RamStats};
use crate::crew;
use crate::dirty::DirtyPages;
use crate::region::GuestRegion;
use crate::snapshot::format::HEADER_SIZE;
use crate::{GuestRam, PAGE_SIZE};

/// What was saved.
pub(crate) struct Saved {
    pub(crate) layout: RamLayout,
    /// The records, one behind the other.
    pub(crate) records: Vec<u8>,
    /// Where it ends in the file.
    pub(crate) end: u64,
    pub(crate) stats: RamStats,
}

/// What one thread works with.
struct Buffers {
    chunk: Vec<u8>,
    packed: Vec<u8>,
    compressed: Vec<u8>,
}

/// Writes RAM to a file, from behind the header on.
pub(crate) fn save(ram: &GuestRam, file: &File, options: &RamOptions<'_>) -> io::Result<Saved> {
    let layout = RamLayout::of(ram, options.packed);
    let regions = ram.regions();
    let places: Vec<Place> = layout.places().collect();
    let records = Mutex::new(vec![0; places.len() * RECORD]);
    // Where the next packed bytes go.
    let next = AtomicU64::new(HEADER_SIZE);
    let count = Count::new(layout.size(), options);
    let changed = options.base.map(|(_, changed)| changed);
    if !options.packed {
        file.set_len(HEADER_SIZE + layout.size())?;
    }
    let make = || Buffers { chunk: vec![0; CHUNK_BYTES], packed: Vec::new(), compressed: Vec::new() };
    crew::share("snapshot", options.threads, places.len(), make, |buffers, at| {
        let (Some(place), Some(region)) =
            (places.get(at), places.get(at).and_then(|place| regions.get(place.region)))
        else {
            return Ok(());
        };
        let changed = changed.map_or(u64::MAX, |changed| changed_pages(changed, region, place));
        let record = save_chunk(region, place, changed, file, options.packed.then_some(&next), buffers)?;
        let mut records = records.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = records.get_mut(at * RECORD..(at + 1) * RECORD) {
            own.copy_from_slice(record.as_bytes());
        }
        drop(records);
        count.add(place.size);
        Ok::<_, io::Error>(())
    })?;
    let end = if options.packed { next.into_inner() } else { HEADER_SIZE + layout.size() };
    let records = records.into_inner().unwrap_or_else(PoisonError::into_inner);
    let stats = stats(&layout, &records);
    Ok(Saved { layout, records, end, stats })
}

fn stats(layout: &RamLayout, records: &[u8]) -> RamStats {
    let mut stats = RamStats { pages: layout.size() / PAGE_SIZE, ..RamStats::default() };
    for record in records.chunks(RECORD).filter_map(|bytes| zerocopy::FromBytes::read_from_bytes(bytes).ok())
    {
        let record: Record = record;
        let stored = u64::from(record.stored.get().count_ones());
        stats.stored += stored;
        stats.inherited += u64::from(record.inherited.get().count_ones());
        stats.bytes +=
            if record.codec.get() == codec::IN_PLACE { stored * PAGE_SIZE } else { record.len.get().into() };
    }
    stats
}

/// The pages of a chunk that may have changed.
fn changed_pages(changed: &DirtyPages, region: &GuestRegion, place: &Place) -> u64 {
    let gpa = region.start_addr();
    if changed.untracked_regions().contains(&gpa) {
        return u64::MAX;
    }
    let of_region = changed.regions().find(|(base, _)| *base == gpa);
    // A word for each chunk.
    let word = usize::try_from(place.offset / CHUNK).ok();
    of_region.zip(word).and_then(|((_, bitmap), word)| bitmap.words().get(word).copied()).unwrap_or(0)
}
const _: () = assert!(PAGES == 64, "a word of a bitmap");

fn save_chunk(
    region: &Arc<GuestRegion>,
    place: &Place,
    changed: u64,
    file: &File,
    next: Option<&AtomicU64>,
    buffers: &mut Buffers,
) -> io::Result<Record> {
    let pages = pages_of(place.size);
    let changed = changed & pages;
    let record = Record { inherited: (pages & !changed).into(), ..Record::default() };
    let looked_at = changed & present(region, place);
    let Buffers { chunk, packed, compressed } = buffers;
    let size = usize::try_from(place.size).map_err(io::Error::other)?;
    let chunk = chunk.get_mut(..size).ok_or_else(|| io::Error::other("a chunk that is too large"))?;
    for run in runs(looked_at) {
        let address = MemoryRegionAddress(place.offset + run.start as u64);
        region.read_slice(chunk.get_mut(run).unwrap_or_default(), address).map_err(io::Error::other)?;
    }
    let stored = occupied(chunk, looked_at);
    if stored == 0 {
        return Ok(record);
    }
    let record = Record { stored: stored.into(), ..record };
    let Some(next) = next else {
        let at = HEADER_SIZE + place.at;
        for run in runs(stored) {
            let offset = at + run.start as u64;
            file.write_all_at(chunk.get(run).unwrap_or_default(), offset)?;
        }
        let digest = digest(chunk, stored);
        let len = u32::try_from(size).map_err(io::Error::other)?;
        return Ok(Record {
            at: at.into(),
            len: len.into(),
            digest,
            codec: codec::IN_PLACE.into(),
            ..record
        });
    };
    packed.clear();
    runs(stored).for_each(|run| packed.extend_from_slice(chunk.get(run).unwrap_or_default()));
    compressed.resize(lz4_flex::block::get_maximum_output_size(packed.len()), 0);
    let (codec, bytes) = match lz4_flex::block::compress_into(packed, compressed) {
        Ok(len) if len + PAGE_BYTES <= packed.len() => {
            (codec::LZ4, compressed.get(..len).unwrap_or_default())
        }
        Ok(_) | Err(_) => (codec::PACKED, &**packed),
    };
    let at = next.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    file.write_all_at(bytes, at)?;
    let len = u32::try_from(bytes.len()).map_err(io::Error::other)?;
    Ok(Record {
        at: at.into(),
        len: len.into(),
        codec: codec.into(),
        digest: blake3::hash(bytes).into(),
        ..record
    })
}

/// The pages of a chunk that may have something: of a memfd, those that were ever written. To read others would take memory.
fn present(region: &GuestRegion, place: &Place) -> u64 {
    let pages = pages_of(place.size);
    let Some(file) = region.file_offset().filter(|_| region.flags() & libc::MAP_SHARED != 0) else {
        return pages;
    };
    let (begin, mut at, mut mask) = (file.start() + place.offset, 0, 0);
    while at < place.size {
        let seek = |whence: fn(u64) -> SeekFrom, from| rustix::fs::seek(file.file(), whence(begin + from));
        let data = match seek(SeekFrom::Data, at) {
            Ok(data) => data - begin,
            Err(rustix::io::Errno::NXIO) => break,
            // It does not say.
            Err(_) => return pages,
        };
        if data >= place.size {
            break;
        }
        let Ok(hole) = seek(SeekFrom::Hole, data) else { return pages };
        at = (hole - begin).min(place.size);
        mask |= pages_of(at.next_multiple_of(PAGE_SIZE)) & !pages_of(data / PAGE_SIZE * PAGE_SIZE);
    }
    mask
}
