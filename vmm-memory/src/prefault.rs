//! Making guest memory resident before the guest needs it.
//!
//! The kernel does it best (`MADV_POPULATE_WRITE`, Linux 5.14). Where it cannot, every page is touched with
//! an atomic operation that keeps its value, since guest and devices may be writing meanwhile.

use std::hint::black_box;
use std::io;
use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use vm_memory::{GuestMemoryRegion, MmapRegion, VolatileMemory};

use crate::advice::{Advice, advise};
use crate::region::{GuestRegion, host_page_size, is_read_only};
use crate::{MemoryError, PAGE_SIZE, crew};

/// Bytes that a thread takes at a time, or a huge page where that is larger: many enough to keep all busy to the end, few enough to be cheap
/// to hand out.
const CHUNK: u64 = 32 << 20;

pub(crate) fn prefault(regions: &[Arc<GuestRegion>], threads: NonZeroUsize) -> Result<(), MemoryError> {
    let chunks: Vec<Chunk<'_>> = chunks(regions).collect();
    crew::share(
        "prefault",
        threads,
        chunks.len(),
        || (),
        |(), at| {
            let Some(chunk) = chunks.get(at) else { return Ok(()) };
            make_resident(chunk).map_err(|source| {
                let gpa = chunk.region.start_addr().0 + chunk.offset;
                MemoryError::Prefault { gpa, size: chunk.size, source }
            })
        },
    )
}

struct Chunk<'a> {
    region: &'a GuestRegion,
    offset: u64,
    size: u64,
}

fn chunk_of(region: &GuestRegion) -> u64 {
    CHUNK.max(host_page_size(region))
}

fn chunks(regions: &[Arc<GuestRegion>]) -> impl Iterator<Item = Chunk<'_>> {
    regions.iter().flat_map(|region| {
        let chunk = chunk_of(region);
        (0..region.len().div_ceil(chunk)).map(move |index| {
            let offset = index * chunk;
            Chunk { region, offset, size: chunk.min(region.len() - offset) }
        })
    })
}

fn make_resident(chunk: &Chunk<'_>) -> io::Result<()> {
    match populate(chunk) {
        Err(Errno::INVAL) => touch(chunk),
        other => Ok(other?),
    }
}

/// Lets the kernel populate the page tables.
fn populate(chunk: &Chunk<'_>) -> Result<(), Errno> {
    let advice = if is_read_only(chunk.region) { Advice::PopulateRead } else { Advice::PopulateWrite };
    loop {
        match advise(chunk.region, chunk.offset, chunk.size, advice) {
            Err(Errno::INTR | Errno::AGAIN) => {}
            other => return other,
        }
    }
}

/// Touches every page, in the way its mapping permits.
fn touch(chunk: &Chunk<'_>) -> io::Result<()> {
    let mapping: &MmapRegion<_> = chunk.region;
    for page in 0..chunk.size / PAGE_SIZE {
        let offset = usize::try_from(chunk.offset + page * PAGE_SIZE).map_err(io::Error::other)?;
        let word: &AtomicU64 = mapping.get_atomic_ref(offset).map_err(io::Error::other)?;
        let mut value = black_box(word.load(Ordering::Relaxed));
        if is_read_only(chunk.region) {
            continue;
        }
        // Not `fetch_or(0)`: the compiler may turn that into a load, which maps the shared zero page. Once
        // the exchange fails, another has written, so the page is there; another try costs nothing.
        while let Err(now) = word.compare_exchange_weak(value, value, Ordering::Relaxed, Ordering::Relaxed) {
            value = now;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::thread;

    use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

    use super::*;
    use crate::advice::resident;
    use crate::{Backing, GuestRam, RegionConfig};

    fn mapped(size: u64, backing: Backing) -> Arc<GuestRegion> {
        let region = RegionConfig::new(GuestAddress(1 << 32), size).backing(backing).map(true).unwrap();
        assert_eq!(resident(&region), 0);
        region
    }

    fn whole(region: &GuestRegion) -> Chunk<'_> {
        Chunk { region, offset: 0, size: region.len() }
    }

    #[test]
    fn every_page_becomes_resident() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            // Not a multiple of the chunk: the tail counts too.
            let size = 2 * CHUNK + 5 * PAGE_SIZE;
            let region = mapped(size, backing.clone());
            prefault(&[Arc::clone(&region)], NonZeroUsize::new(3).unwrap()).unwrap();
            assert_eq!(resident(&region), size / PAGE_SIZE, "{backing:?}");
        }
    }

    #[test]
    fn touching_makes_resident_too() {
        for backing in [Backing::Anonymous, Backing::Memfd] {
            let region = mapped(4 << 20, backing.clone());
            touch(&whole(&region)).unwrap();
            assert_eq!(resident(&region), 1024, "{backing:?}");
        }
    }

    #[test]
    fn read_only_memory_is_populated_and_touched() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let backing = Backing::File { file: Arc::new(file), offset: 0 };
        let config = RegionConfig::new(GuestAddress(0), 1 << 20).backing(backing).read_only(true);
        for make in [|chunk: &Chunk<'_>| populate(chunk).map_err(io::Error::from), touch] {
            let region = config.map(false).unwrap();
            make(&whole(&region)).unwrap();
            assert_eq!(resident(&region), 256);
        }
    }

    #[test]
    fn keeps_contents_and_marks_nothing() {
        for make in [make_resident, touch] {
            let region = mapped(1 << 20, Backing::Anonymous);
            region.write_obj(0x1122_3344_5566_7788u64, MemoryRegionAddress(0x3000)).unwrap();
            MmapRegion::bitmap(&region).as_ref().unwrap().reset();
            make(&whole(&region)).unwrap();
            assert_eq!(region.read_obj::<u64>(MemoryRegionAddress(0x3000)).unwrap(), 0x1122_3344_5566_7788);
            let dirty = MmapRegion::bitmap(&region).as_ref().unwrap().get_and_reset();
            assert!(dirty.iter().all(|word| *word == 0));
        }
    }

    #[test]
    fn touching_loses_no_concurrent_write() {
        let region = mapped(PAGE_SIZE, Backing::Anonymous);
        thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let word: &AtomicU64 = MmapRegion::get_atomic_ref(&region, 0).unwrap();
                for expected in 0..2_000_000 {
                    // A lost write shows as a value that is not the one stored last.
                    assert_eq!(word.load(Ordering::Relaxed), expected);
                    word.store(expected + 1, Ordering::Relaxed);
                }
            });
            while !writer.is_finished() {
                touch(&whole(&region)).unwrap();
            }
        });
    }

    #[test]
    fn failure_names_the_part() {
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(CHUNK + PAGE_SIZE).unwrap();
        let config = RegionConfig::new(GuestAddress(1 << 32), CHUNK + PAGE_SIZE)
            .backing(Backing::File { file: Arc::clone(&file), offset: 0 });
        let ram = GuestRam::builder().region(config).build().unwrap();
        file.set_len(CHUNK).unwrap();
        let error = ram.prefault(NonZeroUsize::MIN).unwrap_err();
        let expected = (1 << 32) + CHUNK;
        assert!(
            matches!(error, MemoryError::Prefault { gpa, size: PAGE_SIZE, .. } if gpa == expected),
            "{error:?}"
        );
    }

    #[test]
    fn nothing_to_do_and_many_threads() {
        prefault(&[], NonZeroUsize::MAX).unwrap();
        let region = mapped(PAGE_SIZE, Backing::Anonymous);
        prefault(&[region], NonZeroUsize::MAX).unwrap();
    }
}
