//! Giving host memory back: the range is checked as a whole first, then discarded region by region.

use std::io;
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestMemoryRegion, MmapRegion};

use crate::advice::{Advice, advise};
use crate::error::Kept;
use crate::region::{GuestRegion, is_read_only};
use crate::{MemoryError, PAGE_SIZE};

/// Part of a region, to be discarded.
#[derive(Debug)]
pub(crate) struct Part {
    region: Arc<GuestRegion>,
    offset: u64,
    size: u64,
}

/// The parts of regions that make up `size` bytes at `gpa`. `regions` ascend; each comes with whether it has a memfd of its own.
pub(crate) fn parts<'a>(
    gpa: u64,
    size: u64,
    regions: impl Iterator<Item = (&'a Arc<GuestRegion>, bool)>,
) -> Result<Vec<Part>, MemoryError> {
    if !gpa.is_multiple_of(PAGE_SIZE) || !size.is_multiple_of(PAGE_SIZE) {
        return Err(MemoryError::Unaligned { gpa, size, align: PAGE_SIZE });
    }
    let (mut at, mut left) = (gpa, size);
    let mut parts = Vec::new();
    for (region, own_memfd) in regions {
        let start = region.start_addr().0;
        let Some(offset) = at.checked_sub(start) else { break };
        if left == 0 || offset >= region.len() {
            continue;
        }
        if let Some(kept) = kept(region, own_memfd) {
            return Err(MemoryError::NotDiscardable { gpa, size, region: start, kept });
        }
        let size = left.min(region.len() - offset);
        parts.push(Part { region: Arc::clone(region), offset, size });
        // Regions end within the physical address space.
        (at, left) = (at + size, left - size);
    }
    if left > 0 {
        return Err(MemoryError::NoRam { gpa, size, hole: at });
    }
    Ok(parts)
}

/// Whether, and why, a region keeps its contents.
fn kept(region: &GuestRegion, own_memfd: bool) -> Option<Kept> {
    const OWN: i32 = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    if is_read_only(region) {
        Some(Kept::ReadOnly)
    } else if own_memfd || region.file_offset().is_none() && region.flags() & OWN == OWN {
        None
    } else {
        Some(Kept::File)
    }
}

impl Part {
    pub(crate) fn discard(&self) -> Result<(), MemoryError> {
        let done = match self.region.file_offset() {
            Some(file) => retry(|| {
                // Within the file: the region was mapped from it.
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(file.file(), flags, file.start() + self.offset, self.size)
            }),
            None => retry(|| advise(&self.region, self.offset, self.size, Advice::Discard)),
        };
        // Also after a failure, which may have come when some pages were gone.
        if let (Ok(offset), Ok(size)) = (usize::try_from(self.offset), usize::try_from(self.size)) {
            MmapRegion::bitmap(&self.region).mark_dirty(offset, size);
        }
        done.map_err(|error| MemoryError::Discard {
            gpa: self.region.start_addr().0 + self.offset,
            size: self.size,
            source: io::Error::from(error),
        })
    }
}

fn retry(mut call: impl FnMut() -> Result<(), Errno>) -> Result<(), Errno> {
    loop {
        match call() {
            Err(Errno::INTR) => {}
            other => return other,
        }
    }
}

#[cfg(test)]
mod tests;
