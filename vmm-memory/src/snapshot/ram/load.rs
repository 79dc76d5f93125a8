//! From the file to RAM.

use std::sync::Arc;

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryRegion, MemoryRegionAddress, MmapRegion};

use super::chunk::{pages_of, runs};
use super::image::{Buffers, Image};
use super::layout::Place;
use super::{Count, RamOptions};
use crate::crew;
use crate::region::{GuestRegion, host_page_size, is_read_only};
use crate::snapshot::error::SnapshotError;
use crate::snapshot::format::HEADER_SIZE;
use crate::snapshot::reader::Snapshot;
use crate::{Backing, GuestRam, MemoryError, PAGE_SIZE, RegionConfig};

impl Image {
    /// Makes all of `ram` what it was.
    pub(crate) fn load(
        &self,
        snapshot: &Snapshot,
        ram: &GuestRam,
        options: &RamOptions<'_>,
    ) -> Result<(), SnapshotError> {
        if let Some(problem) = self.layout.differs(ram) {
            return Err(SnapshotError::Layout { path: snapshot.path().to_owned(), problem });
        }
        let regions = ram.regions();
        let empty = regions.iter().map(|region| empty(ram, region)).collect::<Result<Vec<_>, _>>()?;
        self.write(snapshot, &regions, options, |at| {
            let is_empty = self.places.get(at).and_then(|place| empty.get(place.region)).copied();
            (u64::MAX, is_empty.unwrap_or(false))
        })
    }

    /// RAM that shares the file's pages until they are written.
    pub(crate) fn map(
        &self,
        snapshot: &Snapshot,
        track_dirty: bool,
        options: &RamOptions<'_>,
    ) -> Result<GuestRam, SnapshotError> {
        let (lowest, image) = snapshot.lowest(self);
        if image.layout.packed {
            let problem = "its RAM is packed, which cannot be mapped; load it instead".to_owned();
            return Err(SnapshotError::Layout { path: lowest.path().to_owned(), problem });
        }
        let mut builder = GuestRam::builder().track_dirty(track_dirty);
        let mut offset = HEADER_SIZE;
        for range in &image.layout.regions {
            let backing = Backing::CopyOnWrite { file: Arc::clone(lowest.file()), offset };
            let region = RegionConfig::new(GuestAddress(range.gpa), range.size);
            builder = builder.region(region.backing(backing).read_only(range.read_only));
            offset += range.size;
        }
        let ram = builder.build()?;
        if image.layout != self.layout || !std::ptr::eq(image, self) {
            // What the file below has is there already.
            self.write(snapshot, &ram.regions(), options, |at| (self.above(snapshot, at), false))?;
        }
        Ok(ram)
    }

    /// The pages of a chunk that are not left to the lowest snapshot.
    fn above(&self, snapshot: &Snapshot, at: usize) -> u64 {
        let (mut mask, mut of) = (0, Some((snapshot, self)));
        let mut left = u64::MAX;
        while let Some((snapshot, image)) = of {
            let below = snapshot.base_image();
            if below.is_some() {
                let inherited = image.records.get(at).map_or(0, |record| record.inherited.get());
                mask |= left & !inherited;
                left &= inherited;
            }
            of = below;
        }
        mask
    }

    /// Writes pages of all chunks: those that `which` says, and whether others of RAM are zero.
    fn write(
        &self,
        snapshot: &Snapshot,
        regions: &[Arc<GuestRegion>],
        options: &RamOptions<'_>,
        which: impl Fn(usize) -> (u64, bool) + Sync,
    ) -> Result<(), SnapshotError> {
        let count = Count::new(self.layout.size(), options);
        crew::share("snapshot", options.threads, self.places.len(), Buffers::default, |buffers, at| {
            let Some((place, region)) =
                self.places.get(at).and_then(|place| Some((place, regions.get(place.region)?)))
            else {
                return Ok(());
            };
            let (wanted, is_empty) = which(at);
            if wanted == u64::MAX && self.records.get(at).is_some_and(|record| record.stored == 0) {
                self.check_empty(snapshot, place)?;
            }
            let mut chunk = buffers.take();
            let done =
                self.write_chunk(snapshot, at, (place, region), (wanted, is_empty), &mut chunk, buffers);
            buffers.put(chunk);
            count.add(place.size);
            done
        })?;
        regions.iter().for_each(|region| forget_dirty(region));
        Ok(())
    }

    fn write_chunk(
        &self,
        snapshot: &Snapshot,
        at: usize,
        (place, region): (&Place, &GuestRegion),
        (wanted, is_empty): (u64, bool),
        chunk: &mut [u8],
        buffers: &mut Buffers,
    ) -> Result<(), SnapshotError> {
        let wanted = wanted & pages_of(place.size);
        if wanted == 0 {
            return Ok(());
        }
        let occupied = self.fill(snapshot, at, wanted, chunk, buffers)?;
        let nothing = wanted & !occupied;
        if !is_empty {
            for run in runs(nothing) {
                chunk.get_mut(run).unwrap_or_default().fill(0);
            }
        }
        let written = if is_empty { occupied } else { wanted };
        let other = |error: vm_memory::GuestMemoryError| {
            let problem = format!("{}: {error}", self.layout.name(place));
            SnapshotError::Layout { path: snapshot.path().to_owned(), problem }
        };
        for run in runs(written) {
            let address = MemoryRegionAddress(place.offset + run.start as u64);
            let pages = chunk.get(run).unwrap_or_default();
            if !is_read_only(region) {
                region.write_slice(pages, address).map_err(other)?;
                continue;
            }
            let mut here = vec![0; pages.len()];
            region.read_slice(&mut here, address).map_err(other)?;
            if here != pages {
                let problem = format!(
                    "{}: what is there cannot be written, and is not what was saved",
                    self.layout.name(place)
                );
                return Err(SnapshotError::Layout { path: snapshot.path().to_owned(), problem });
            }
        }
        Ok(())
    }
}

/// What is as it was saved is not dirty.
pub(super) fn forget_dirty(region: &GuestRegion) {
    if let Some(bitmap) = MmapRegion::bitmap(region) {
        drop(bitmap.get_and_reset());
    }
}

/// Makes a region zero if that is to be had for nothing; whether it is zero.
fn empty(ram: &GuestRam, region: &GuestRegion) -> Result<bool, MemoryError> {
    // Huge pages that go back to their pool may not be there any more when they are wanted.
    if is_read_only(region) || host_page_size(region) != PAGE_SIZE {
        return Ok(false);
    }
    match ram.discard(region.start_addr(), region.len()) {
        Ok(()) => Ok(true),
        Err(MemoryError::NotDiscardable { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}
