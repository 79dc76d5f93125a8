//! Giving host memory back: the range is checked as a whole first, then discarded region by region.

use std::io;
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes as _, GuestMemoryRegion, MemoryRegionAddress, MmapRegion};

use crate::advice::{Advice, advise};
use crate::error::Kept;
use crate::guest_memfd::GuestMemfdRange;
use crate::region::{GuestRegion, host_page_size, is_read_only};
use crate::{MemoryError, PAGE_SIZE};

/// A region, and what is known of it.
#[derive(Debug)]
pub(crate) struct Discardable<'a> {
    pub(crate) region: &'a Arc<GuestRegion>,
    /// It has a memfd of its own.
    pub(crate) own_memfd: bool,
    pub(crate) guest_memfd: Option<&'a GuestMemfdRange>,
}

/// Part of a region, to be discarded.
#[derive(Debug)]
pub(crate) struct Part {
    region: Arc<GuestRegion>,
    offset: u64,
    size: u64,
    guest_memfd: Option<GuestMemfdRange>,
}

/// The parts of regions that make up `size` bytes at `gpa`. `regions` ascend.
pub(crate) fn parts<'a>(
    gpa: u64,
    size: u64,
    regions: impl Iterator<Item = Discardable<'a>>,
) -> Result<Vec<Part>, MemoryError> {
    if !gpa.is_multiple_of(PAGE_SIZE) || !size.is_multiple_of(PAGE_SIZE) {
        return Err(MemoryError::Unaligned { gpa, size, align: PAGE_SIZE });
    }
    let (mut at, mut left) = (gpa, size);
    let mut parts = Vec::new();
    for Discardable { region, own_memfd, guest_memfd } in regions {
        let start = region.start_addr().0;
        let Some(offset) = at.checked_sub(start) else { break };
        if left == 0 || offset >= region.len() {
            continue;
        }
        if let Some(kept) = kept(region, own_memfd) {
            return Err(MemoryError::NotDiscardable { gpa, size, region: start, kept });
        }
        let size = left.min(region.len() - offset);
        parts.push(Part { region: Arc::clone(region), offset, size, guest_memfd: guest_memfd.cloned() });
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
        let done = self.give_back().and_then(|()| self.give_private_back());
        // Also after a failure, which may have come when some pages were gone.
        if let (Ok(offset), Ok(size)) = (usize::try_from(self.offset), usize::try_from(self.size)) {
            MmapRegion::bitmap(&self.region).mark_dirty(offset, size);
        }
        done.map_err(|source| MemoryError::Discard {
            gpa: self.region.start_addr().0 + self.offset,
            size: self.size,
            source,
        })
    }

    fn give_back(&self) -> io::Result<()> {
        let (start, end) = (self.offset, self.offset + self.size);
        // Whole pages of the host, of which there may be none; what is in front of them and behind them is made zero.
        let page = host_page_size(&self.region);
        let first = start.next_multiple_of(page).min(end);
        let last = (end - end % page).max(first);
        self.clear(start, first)?;
        if first < last {
            self.discard_pages(first, last - first)?;
        }
        self.clear(last, end)
    }

    fn discard_pages(&self, offset: u64, size: u64) -> io::Result<()> {
        let done = match self.region.file_offset() {
            Some(file) => retry(|| {
                // Within the file: the region was mapped from it.
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(file.file(), flags, file.start() + offset, size)
            }),
            None => retry(|| advise(&self.region, offset, size, Advice::Discard)),
        };
        Ok(done?)
    }

    fn clear(&self, start: u64, end: u64) -> io::Result<()> {
        const ZERO: [u8; 4096] = [0; 4096];
        for at in (start..end).step_by(ZERO.len()) {
            self.region.write_slice(&ZERO, MemoryRegionAddress(at)).map_err(io::Error::other)?;
        }
        Ok(())
    }

    fn give_private_back(&self) -> io::Result<()> {
        match &self.guest_memfd {
            // It is the region itself.
            Some(range)
                if self
                    .region
                    .file_offset()
                    .is_some_and(|file| Arc::ptr_eq(file.arc(), range.memfd.file())) =>
            {
                Ok(())
            }
            Some(range) => Ok(retry(|| range.memfd.punch(range.offset + self.offset, self.size))?),
            None => Ok(()),
        }
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
