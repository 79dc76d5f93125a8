use std::fs::File;
use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::advice::resident;
use crate::{Access, Backing, DirtyTracker, GuestRam, RegionConfig, SharedMemory};

const BASE: u64 = 1 << 32;
const SIZE: u64 = 4 << 20;
const PAGE: usize = 4096;

/// RAM of one region, all of it resident and full of 7.
fn full(config: RegionConfig) -> (GuestRam, Arc<GuestRegion>) {
    let ram =
        GuestRam::builder().region(config).prefault(NonZeroUsize::MIN).track_dirty(true).build().unwrap();
    let region = ram.regions().remove(0);
    ram.memory().write_slice(&vec![7; region.size()], region.start_addr()).unwrap();
    MmapRegion::bitmap(&region).as_ref().unwrap().reset();
    assert_eq!(resident(&region), region.len() / PAGE_SIZE);
    (ram, region)
}

fn config(gpa: u64, size: u64, backing: Backing) -> RegionConfig {
    RegionConfig::new(GuestAddress(gpa), size).backing(backing)
}

/// Number of pages of a file that the host has memory for.
fn blocks(file: &File) -> u64 {
    file.metadata().unwrap().blocks() * 512 / PAGE_SIZE
}

#[test]
fn pages_go_back_and_read_as_zero() {
    let small = |backing| config(BASE, SIZE, backing).huge_pages(false);
    for config in [small(Backing::Anonymous), config(BASE, SIZE, Backing::Anonymous), small(Backing::Memfd)] {
        let (ram, region) = full(config.clone());
        // One page, a run across the border of huge pages, and the last one.
        for (page, pages) in [(1, 1), (500, 20), (1023, 1)] {
            let before = resident(&region);
            ram.discard(GuestAddress(BASE + page * PAGE_SIZE), pages * PAGE_SIZE).unwrap();
            assert_eq!(resident(&region), before - pages, "{config:?}");
        }
        if let Some(file) = region.file_offset() {
            assert_eq!(blocks(file.file()), 1024 - 22);
        }
        let mut bytes = vec![0; region.size()];
        ram.memory().read_slice(&mut bytes, GuestAddress(BASE)).unwrap();
        for (page, bytes) in bytes.chunks(PAGE).enumerate() {
            let kept = !matches!(page, 1 | 500..520 | 1023);
            assert_eq!(bytes, [if kept { 7 } else { 0 }; PAGE], "page {page} of {config:?}");
        }
        ram.memory().write_obj(9_u8, GuestAddress(BASE + PAGE_SIZE)).unwrap();
        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(BASE + PAGE_SIZE)).unwrap(), 9);
    }
}

#[test]
fn discarded_pages_are_dirty() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let (ram, _) = full(config(BASE, SIZE, backing));
        let tracker = DirtyTracker::new(&ram);
        assert!(tracker.harvest().unwrap().is_empty());
        ram.discard(GuestAddress(BASE + 0x3000), 0x2000).unwrap();
        let dirty: Vec<_> = tracker.harvest().unwrap().ranges().collect();
        assert_eq!(dirty, [(GuestAddress(BASE + 0x3000), 0x2000)]);
    }
}

#[test]
fn a_range_may_span_regions_that_touch() {
    let ram = GuestRam::builder()
        .region(config(BASE, 0x4000, Backing::Memfd))
        .region(config(BASE + 0x4000, 0x4000, Backing::Anonymous))
        .region(config(BASE + 0x9000, 0x1000, Backing::Anonymous))
        .prefault(NonZeroUsize::MIN)
        .build()
        .unwrap();
    ram.discard(GuestAddress(BASE + 0x3000), 0x3000).unwrap();
    let left = |ram: &GuestRam| ram.regions().iter().map(|region| resident(region)).collect::<Vec<_>>();
    assert_eq!(left(&ram), [3, 2, 1]);
    ram.discard(GuestAddress(BASE), 0).unwrap();
    ram.discard(GuestAddress(0), 0).unwrap();
    for (gpa, len, missing) in [
        (BASE + 0x7000, 0x2000, BASE + 0x8000),
        (BASE + 0x8000, 0x2000, BASE + 0x8000),
        (BASE + 0x9000, 0x2000, BASE + 0xa000),
        (BASE - 0x1000, 0x2000, BASE - 0x1000),
        (0x1000, 0x1000, 0x1000),
        (!0xfff, 0x1000, !0xfff),
        (BASE, !0xfff, BASE + 0x8000),
    ] {
        let error = ram.discard(GuestAddress(gpa), len).unwrap_err();
        assert!(
            matches!(error, MemoryError::NoRam { hole, .. } if hole == missing),
            "{gpa:#x} {len:#x}: {error}"
        );
    }
    for (gpa, len) in [(BASE + 1, 0x1000), (BASE, 0x800), (BASE + 0x800, 0x800)] {
        let error = ram.discard(GuestAddress(gpa), len).unwrap_err();
        assert!(matches!(error, MemoryError::Unaligned { .. }), "{error}");
    }
    assert_eq!(left(&ram), [3, 2, 1], "what was refused has discarded nothing");
}

#[test]
fn what_is_not_the_guests_own_is_refused() {
    let file = Arc::new(tempfile::tempfile().unwrap());
    file.set_len(0x4000).unwrap();
    let of_file = Backing::File { file: Arc::clone(&file), offset: 0 };
    let shared = SharedMemory::create("shared", 0x1000).unwrap();
    let shared = shared.map(GuestAddress(BASE + 0x3000), Access::ReadWrite).unwrap();
    let ram = GuestRam::builder()
        .region(config(BASE, 0x1000, Backing::Anonymous))
        .region(config(BASE + 0x1000, 0x1000, of_file.clone()))
        .region(config(BASE + 0x2000, 0x1000, of_file).read_only(true))
        .region(config(BASE + 0x4000, 0x1000, Backing::Memfd).read_only(true))
        .region(config(BASE + 0x5000, 0x1000, Backing::Memfd))
        .build()
        .unwrap();
    ram.insert(Arc::clone(shared.region())).unwrap();
    for gpa in [0, 0x1000, 0x3000, 0x5000] {
        ram.memory().write_obj(7_u8, GuestAddress(BASE + gpa)).unwrap();
    }
    for (gpa, len, region, why) in [
        (0x1000, 0x1000, 0x1000, Kept::File),
        (0, 0x2000, 0x1000, Kept::File),
        (0x2000, 0x1000, 0x2000, Kept::ReadOnly),
        (0x3000, 0x1000, 0x3000, Kept::File),
        (0x4000, 0x1000, 0x4000, Kept::ReadOnly),
    ] {
        let error = ram.discard(GuestAddress(BASE + gpa), len).unwrap_err();
        let MemoryError::NotDiscardable { region: found, kept, .. } = error else { panic!("{error}") };
        assert_eq!((found, kept), (BASE + region, why));
    }
    // Taken out and put back, a memfd is one like any other: nobody knows who has it meanwhile.
    let own = ram.remove_region(GuestAddress(BASE + 0x5000)).unwrap();
    ram.insert(own).unwrap();
    let error = ram.discard(GuestAddress(BASE + 0x5000), 0x1000).unwrap_err();
    assert!(error.to_string().contains("a file that others may use"), "{error}");
    for gpa in [0, 0x1000, 0x3000, 0x5000] {
        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(BASE + gpa)).unwrap(), 7, "{gpa:#x} was kept");
    }
}

#[test]
fn what_the_host_refuses_names_the_part_and_is_dirty() {
    let (_ram, region) = full(config(BASE, SIZE, Backing::Memfd));
    // Beyond what files can be: `parts` makes no such part, and the host has no other reason to refuse this one.
    let part = Part { region: Arc::clone(&region), offset: 0x1000, size: u64::MAX >> 1, guest_memfd: None };
    let error = part.discard().unwrap_err();
    assert!(matches!(error, MemoryError::Discard { gpa, .. } if gpa == BASE + 0x1000), "{error}");
    assert!(MmapRegion::bitmap(&region).dirty_at(0x1000));
}

proptest! {
    /// Whatever the range: an error that changes nothing, or zeros in it and no change elsewhere.
    #[test]
    fn agrees_with_a_model(ranges in prop::collection::vec((0usize..20, 0usize..10), 1..12)) {
        let backings = [(0, Backing::Anonymous), (4, Backing::Memfd), (12, Backing::Anonymous)];
        let ram = backings.iter().fold(GuestRam::builder(), |ram, (page, backing)| {
            ram.region(config(page * PAGE_SIZE, 4 * PAGE_SIZE, backing.clone()).huge_pages(false))
        });
        let ram = ram.build().unwrap();
        let address = |page: usize| GuestAddress(page as u64 * PAGE_SIZE);
        let is_ram = |page: usize| page < 8 || (12..16).contains(&page);
        let mut model = [1_u8; 32];
        for page in (0..32).filter(|page| is_ram(*page)) {
            ram.memory().write_obj(1_u8, address(page)).unwrap();
        }
        for (page, pages) in ranges {
            let done = ram.discard(address(page), pages as u64 * PAGE_SIZE);
            let expected = (page..page + pages).all(is_ram);
            prop_assert_eq!(done.is_ok(), expected);
            if expected {
                model[page..page + pages].fill(0);
            }
            for page in (0..32).filter(|page| is_ram(*page)) {
                let found: u8 = ram.memory().read_obj(address(page)).unwrap();
                prop_assert_eq!(found, model[page]);
            }
        }
    }
}
