use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestMemoryBackend};

use super::*;
use crate::PAGE_SIZE;
use crate::layout::{GPA_LIMIT, HIGH_RAM_START, MIN_RAM};

fn ranges(ram: &GuestRam) -> Vec<(u64, u64)> {
    ram.regions().iter().map(|region| (region.start_addr().0, region.len())).collect()
}

fn snapshot(ram: &GuestRam) -> Vec<(u64, u64)> {
    ram.memory().iter().map(|region| (region.start_addr().0, region.len())).collect()
}

#[test]
fn smallest_ram() {
    let ram = GuestRam::builder().ram(MIN_RAM).build().unwrap();
    assert_eq!(ranges(&ram), [(0, MIN_RAM)]);
    assert_eq!(ram.size(), MIN_RAM);
    let memory = ram.memory();
    memory.write_obj(1u8, GuestAddress(MIN_RAM - 1)).unwrap();
    memory.write_obj(1u8, GuestAddress(MIN_RAM)).unwrap_err();
}

#[test]
fn one_tebibyte_is_built_and_written_at_both_ends() {
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let ram = GuestRam::builder().ram(1 << 40).backing(backing).track_dirty(true).build().unwrap();
        assert_eq!(ram.size(), 1 << 40);
        let last = GuestAddress((1 << 40) + (1 << 30) - 8);
        for gpa in [GuestAddress(0), GuestAddress((3 << 30) - 8), HIGH_RAM_START, last] {
            ram.memory().write_obj(gpa.0 ^ 0x55, gpa).unwrap();
            assert_eq!(ram.memory().read_obj::<u64>(gpa).unwrap(), gpa.0 ^ 0x55);
        }
        ram.memory().write_obj(0u64, GuestAddress(last.0 + 8)).unwrap_err();
        ram.memory().write_obj(0u64, GuestAddress(3 << 30)).unwrap_err();
    }
}

#[test]
fn ram_on_a_file_continues_above_the_hole() {
    let file = Arc::new(tempfile::tempfile().unwrap());
    let size = (3 << 30) + MIN_RAM;
    file.set_len(PAGE_SIZE + size).unwrap();
    let backing = Backing::File { file: Arc::clone(&file), offset: PAGE_SIZE };
    let ram = GuestRam::builder().ram(size).backing(backing.clone()).build().unwrap();
    ram.memory().write_obj(0xABCDu16, HIGH_RAM_START).unwrap();
    let mut bytes = [0; 2];
    file.read_exact_at(&mut bytes, PAGE_SIZE + (3 << 30)).unwrap();
    assert_eq!(u16::from_le_bytes(bytes), 0xABCD);

    let longer = GuestRam::builder().ram(size + PAGE_SIZE).backing(backing).build().unwrap_err();
    assert!(matches!(longer, MemoryError::FileTooShort { .. }), "{longer}");
}

#[test]
fn regions_beside_and_instead_of_ram() {
    let ram = GuestRam::builder()
        .region(RegionConfig::new(GuestAddress(5 << 30), PAGE_SIZE).backing(Backing::Memfd))
        .ram(MIN_RAM)
        .region(RegionConfig::new(GuestAddress(GPA_LIMIT - PAGE_SIZE), PAGE_SIZE))
        .build()
        .unwrap();
    assert_eq!(ranges(&ram), [(0, MIN_RAM), (5 << 30, PAGE_SIZE), (GPA_LIMIT - PAGE_SIZE, PAGE_SIZE)]);
    assert_eq!(snapshot(&ram), ranges(&ram));
    let empty = GuestRam::builder().build().unwrap();
    assert_eq!((empty.size(), empty.memory().num_regions()), (0, 0));
    empty.add_region(RegionConfig::new(GuestAddress(0), PAGE_SIZE)).unwrap();
    empty.remove_region(GuestAddress(0)).unwrap();
    assert_eq!((empty.size(), empty.memory().num_regions()), (0, 0));
}

#[test]
fn refusals_change_nothing_and_name_both() {
    let ram = GuestRam::builder().ram(MIN_RAM).build().unwrap();
    let error = ram.add_region(RegionConfig::new(GuestAddress(MIN_RAM - PAGE_SIZE), 0x3000)).unwrap_err();
    assert!(matches!(
        error,
        MemoryError::Overlap { gpa: 0xFF000, size: 0x3000, other_gpa: 0, other_size: MIN_RAM }
    ));
    for value in ["0xff000", "0x3000", "0x0", "0x100000"] {
        assert!(error.to_string().contains(value), "{error}");
    }
    let error = ram.add_region(RegionConfig::new(HIGH_RAM_START, MAX_RAM)).unwrap_err();
    assert!(matches!(error, MemoryError::TooLarge { size: MAX_RAM, present: MIN_RAM, .. }), "{error}");
    let error = ram.remove_region(GuestAddress(PAGE_SIZE)).unwrap_err();
    assert!(matches!(error, MemoryError::NoRegion { gpa: PAGE_SIZE }), "{error}");
    assert_eq!(ranges(&ram), [(0, MIN_RAM)]);
    assert_eq!(snapshot(&ram), [(0, MIN_RAM)]);

    let overlapping = GuestRam::builder().ram(MIN_RAM).region(RegionConfig::new(GuestAddress(0), PAGE_SIZE));
    assert!(matches!(overlapping.build(), Err(MemoryError::Overlap { .. })));
}

#[test]
fn one_mapping_cannot_be_two_regions_of_a_guest() {
    let ram = GuestRam::builder().ram(MIN_RAM).build().unwrap();
    let first = ram.regions().remove(0);
    let alias = GuestRegion::with_arc(first.get_mmap(), HIGH_RAM_START).unwrap();
    let error = ram.insert(Arc::new(alias)).unwrap_err();
    assert!(matches!(error, MemoryError::SharedHostMapping { other_gpa: 0, .. }), "{error}");
}

#[test]
fn a_removed_region_lives_with_its_holders() {
    let ram = GuestRam::builder().ram(MIN_RAM).build().unwrap();
    let device = ram.address_space();
    let before = device.memory();
    let region = ram.remove_region(GuestAddress(0)).unwrap();
    before.write_obj(9u8, GuestAddress(0)).unwrap();
    device.memory().write_obj(9u8, GuestAddress(0)).unwrap_err();
    drop(before);
    assert_eq!(Arc::strong_count(&region), 1);
    assert_eq!(region.read_obj::<u8>(vm_memory::MemoryRegionAddress(0)).unwrap(), 9);
    ram.insert(region).unwrap();
    assert_eq!(device.memory().read_obj::<u8>(GuestAddress(0)).unwrap(), 9);
}

#[test]
fn a_device_cannot_reach_a_read_only_region() {
    let mut image = tempfile::NamedTempFile::new().unwrap();
    std::io::Write::write_all(&mut image, &[0xCC; 0x1000]).unwrap();
    let file = Arc::new(File::open(image.path()).unwrap());
    let rom = RegionConfig::new(GuestAddress(MIN_RAM), PAGE_SIZE)
        .backing(Backing::File { file, offset: 0 })
        .read_only(true);
    let ram = GuestRam::builder().ram(MIN_RAM).build().unwrap();
    let device = ram.address_space();
    let rom = ram.add_region(rom).unwrap();
    assert_eq!(ranges(&ram), [(0, MIN_RAM), (MIN_RAM, PAGE_SIZE)]);
    assert_eq!(ram.size(), MIN_RAM + PAGE_SIZE);

    // Reaching the mapping here would end the test by SIGSEGV.
    let memory = device.memory();
    memory.write_obj(0u64, GuestAddress(MIN_RAM)).unwrap_err();
    memory.write_slice(&[0; 16], GuestAddress(MIN_RAM - 8)).unwrap_err();
    memory.read_obj::<u64>(GuestAddress(MIN_RAM)).unwrap_err();
    assert!(memory.get_host_address(GuestAddress(MIN_RAM)).is_err());
    assert_eq!(rom.read_obj::<u8>(vm_memory::MemoryRegionAddress(0)).unwrap(), 0xCC);

    ram.remove_region(GuestAddress(MIN_RAM)).unwrap();
    ram.insert(rom).unwrap();
    device.memory().write_obj(0u64, GuestAddress(MIN_RAM)).unwrap_err();
}

#[test]
fn concurrent_changes_are_all_kept() {
    const THREADS: u64 = 4;
    const ROUNDS: u64 = 60;
    let ram = GuestRam::builder().ram(MIN_RAM).build().unwrap();
    let start = Barrier::new(usize::try_from(THREADS).unwrap() + 1);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let writers: Vec<_> = (0..THREADS)
            .map(|thread| {
                let (ram, start) = (ram.clone(), &start);
                scope.spawn(move || {
                    start.wait();
                    for round in 0..ROUNDS {
                        let gpa = GuestAddress(HIGH_RAM_START.0 + (round * THREADS + thread) * PAGE_SIZE);
                        ram.add_region(RegionConfig::new(gpa, PAGE_SIZE)).unwrap();
                        ram.memory().write_obj(gpa.0, gpa).unwrap();
                        if round % 2 == 0 {
                            ram.remove_region(gpa).unwrap();
                        }
                    }
                })
            })
            .collect();
        scope.spawn(|| {
            let device = ram.address_space();
            start.wait();
            while !done.load(Ordering::Acquire) {
                let memory = device.memory();
                assert!(memory.find_region(GuestAddress(0)).is_some());
                assert_eq!(memory.iter().count(), memory.num_regions());
            }
        });
        for writer in writers {
            writer.join().unwrap();
        }
        done.store(true, Ordering::Release);
    });
    let mut expected = vec![(0, MIN_RAM)];
    for round in (1..ROUNDS).step_by(2) {
        expected
            .extend((0..THREADS).map(|t| (HIGH_RAM_START.0 + (round * THREADS + t) * PAGE_SIZE, PAGE_SIZE)));
    }
    assert_eq!(ranges(&ram), expected);
    assert_eq!(snapshot(&ram), expected);
    for &(gpa, _) in expected.get(1..).unwrap() {
        assert_eq!(ram.memory().read_obj::<u64>(GuestAddress(gpa)).unwrap(), gpa);
    }
}

#[derive(Clone, Debug)]
enum Op {
    Add { page: u64, pages: u64, read_only: bool },
    Remove { page: u64 },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (0..24u64, 1..6u64, any::<bool>()).prop_map(|(page, pages, read_only)| Op::Add {
            page,
            pages,
            read_only
        }),
        (0..24u64).prop_map(|page| Op::Remove { page }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn follows_a_model(ops in prop::collection::vec(op(), 1..40)) {
        let ram = GuestRam::builder().build().unwrap();
        let mut model: BTreeMap<u64, (u64, bool)> = BTreeMap::new();
        for op in ops {
            match op {
                Op::Add { page, pages, read_only } => {
                    let free = model.iter().all(|(&other, &(length, _))| {
                        (page..page + pages).all(|p| !(other..other + length).contains(&p))
                    });
                    let config = RegionConfig::new(GuestAddress(page * PAGE_SIZE), pages * PAGE_SIZE);
                    let added = ram.add_region(config.read_only(read_only));
                    prop_assert_eq!(added.is_ok(), free);
                    if free {
                        model.insert(page, (pages, read_only));
                    }
                }
                Op::Remove { page } => {
                    let removed = ram.remove_region(GuestAddress(page * PAGE_SIZE));
                    prop_assert_eq!(removed.is_ok(), model.remove(&page).is_some());
                }
            }
            let expected = |all: bool| -> Vec<_> {
                model
                    .iter()
                    .filter(|(_, (_, read_only))| all || !read_only)
                    .map(|(page, (pages, _))| (page * PAGE_SIZE, pages * PAGE_SIZE))
                    .collect()
            };
            prop_assert_eq!(ranges(&ram), expected(true));
            prop_assert_eq!(snapshot(&ram), expected(false));
        }
    }
}
