//! Regions of huge pages, which behave as all others do: contents, dirty pages, discarding, sharing, copying.
//!
//! Each test adds the pages that it needs to the host's pool and gives them back. That takes root; without it they say so.

#![allow(clippy::unwrap_used, reason = "the lint spares test functions only, not what they call")]

use std::fs;
use std::num::NonZeroUsize;

use vmm_memory::vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, MemoryRegionAddress};
use vmm_memory::{
    Access, Backing, DirtyTracker, GuestRam, GuestRegion, HugePageSize, MemoryError, NodeSet, NumaPolicy,
    PAGE_SIZE, ReadOnlySharedMemory, RegionConfig, ReservedHugePages, SharedMemory, host_page_size,
};

const BASE: u64 = 1 << 32;
const HUGE: u64 = 2 << 20;
const SIZE: HugePageSize = HugePageSize::TwoMib;

/// Pages for a test; without them it says why it is skipped.
fn reserve(page_size: HugePageSize, pages: u64) -> Option<ReservedHugePages> {
    match ReservedHugePages::reserve(page_size, pages) {
        Ok(reserved) => Some(reserved),
        Err(error) => {
            let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
            println!("skipped: {error}: {source}");
            None
        }
    }
}

fn backings() -> [Backing; 2] {
    [Backing::HugeTlb { page_size: SIZE }, Backing::HugeTlbMemfd { page_size: SIZE }]
}

fn config(backing: Backing, pages: u64) -> RegionConfig {
    RegionConfig::new(GuestAddress(BASE), pages * HUGE).backing(backing)
}

/// KiB that the kernel counts under `names` for the mapping of `region`.
fn kib(region: &GuestRegion, names: &[&str]) -> u64 {
    let maps = fs::read_to_string("/proc/self/smaps").unwrap();
    let start = format!("{:x}-", region.as_ptr().addr());
    let number = |line: &str| {
        let (name, value) = line.split_once(':')?;
        names.contains(&name).then(|| value.trim().trim_end_matches(" kB").parse::<u64>().unwrap())
    };
    let lines = maps.lines().skip_while(|line| !line.starts_with(&start)).skip(1);
    lines.take_while(|line| !line.starts_with("VmFlags")).filter_map(number).sum()
}

/// Huge pages that the region has.
fn resident(region: &GuestRegion) -> u64 {
    kib(region, &["Private_Hugetlb", "Shared_Hugetlb"]) << 10 >> HUGE.trailing_zeros()
}

#[test]
fn pages_are_huge_zero_and_writable() {
    let Some(_pages) = reserve(SIZE, 4) else { return };
    for backing in backings() {
        let ram = GuestRam::builder().region(config(backing.clone(), 4)).build().unwrap();
        let region = ram.regions().remove(0);
        assert_eq!(host_page_size(&region), HUGE, "{backing:?}");
        assert_eq!((kib(&region, &["KernelPageSize"]), resident(&region)), (2048, 0), "{backing:?}");
        let last = GuestAddress(BASE + 4 * HUGE - 8);
        assert_eq!(ram.memory().read_obj::<u64>(last).unwrap(), 0);
        ram.memory().write_obj(7_u64, last).unwrap();
        assert_eq!(ram.memory().read_obj::<u64>(last).unwrap(), 7);
        assert_eq!(resident(&region), 1, "{backing:?}");
        let shared = matches!(backing, Backing::HugeTlbMemfd { .. });
        assert_eq!(region.file_offset().is_some(), shared);
        if let Some(file) = region.file_offset() {
            file.file().set_len(0).unwrap_err();
        }
    }
}

#[test]
fn a_pool_that_is_too_small_is_an_error_and_no_signal() {
    let Some(pool) = SIZE.pool() else {
        println!("skipped: the host has no huge pages of 2 MiB");
        return;
    };
    for backing in backings() {
        let error = GuestRam::builder().region(config(backing, 1 << 20)).build().unwrap_err();
        let MemoryError::HugePages { needed, wanted, .. } = error else { panic!("{error}") };
        assert_eq!(needed, 1 << 20);
        assert!(wanted >= pool.total, "{wanted}");
        assert!(error.to_string().contains("echo "), "{error}");
    }
    let memory = SharedMemory::create_huge("too-large", 1 << 40, SIZE).unwrap();
    let error = memory.map(GuestAddress(0), Access::ReadWrite).unwrap_err();
    assert!(matches!(error, MemoryError::HugePages { .. }), "{error}");
}

#[test]
fn base_and_size_are_whole_pages() {
    for (gpa, size) in [(BASE + PAGE_SIZE, HUGE), (BASE, HUGE + PAGE_SIZE), (BASE, PAGE_SIZE)] {
        for backing in backings() {
            let config = RegionConfig::new(GuestAddress(gpa), size).backing(backing);
            let error = GuestRam::builder().region(config).build().unwrap_err();
            assert!(matches!(error, MemoryError::Unaligned { align: HUGE, .. }), "{error}");
        }
    }
    let error = SharedMemory::create_huge("odd", HUGE + PAGE_SIZE, SIZE).unwrap_err();
    assert!(matches!(error, MemoryError::Unaligned { align: HUGE, .. }), "{error}");
}

#[test]
fn dirty_pages_stay_small() {
    let Some(_pages) = reserve(SIZE, 2) else { return };
    for backing in backings() {
        let ram = GuestRam::builder().region(config(backing, 2)).track_dirty(true).build().unwrap();
        let tracker = DirtyTracker::new(&ram);
        ram.memory().write_slice(&[1; 8], GuestAddress(BASE + HUGE - 4)).unwrap();
        let dirty: Vec<_> = tracker.harvest().unwrap().ranges().collect();
        assert_eq!(dirty, [(GuestAddress(BASE + HUGE - PAGE_SIZE), 2 * PAGE_SIZE)]);
    }
}

#[test]
fn discarding_gives_whole_pages_back_and_clears_the_rest() {
    let Some(_pages) = reserve(SIZE, 4) else { return };
    for backing in backings() {
        let ram = GuestRam::builder()
            .region(config(backing.clone(), 4))
            .prefault(NonZeroUsize::new(3).unwrap())
            .track_dirty(true)
            .build()
            .unwrap();
        let region = ram.regions().remove(0);
        assert_eq!(resident(&region), 4, "{backing:?}");
        ram.memory().write_slice(&vec![7; region.size()], GuestAddress(BASE)).unwrap();
        let tracker = DirtyTracker::new(&ram);
        tracker.harvest().unwrap();
        // The end of the first page, two whole ones, and the start of the last; then a part of one.
        let (start, end) = (HUGE - 2 * PAGE_SIZE, 3 * HUGE + 3 * PAGE_SIZE);
        ram.discard(GuestAddress(BASE + start), end - start).unwrap();
        ram.discard(GuestAddress(BASE + PAGE_SIZE), PAGE_SIZE).unwrap();
        assert_eq!(resident(&region), 2, "{backing:?}");
        let dirty: Vec<_> = tracker.harvest().unwrap().ranges().collect();
        let expected = [(BASE + PAGE_SIZE, PAGE_SIZE), (BASE + start, end - start)];
        assert_eq!(dirty, expected.map(|(gpa, len)| (GuestAddress(gpa), len)));
        let mut bytes = vec![0; region.size()];
        ram.memory().read_slice(&mut bytes, GuestAddress(BASE)).unwrap();
        for (page, bytes) in (0..).zip(bytes.chunks(4096)) {
            let at = page * PAGE_SIZE;
            let gone = page == 1 || (start..end).contains(&at);
            assert!(bytes.iter().all(|byte| *byte == if gone { 0 } else { 7 }), "page {page} of {backing:?}");
        }
        // They come back from the pool.
        ram.memory().write_obj(1_u8, GuestAddress(BASE + 2 * HUGE)).unwrap();
    }
}

#[test]
fn shared_memory_can_be_huge() {
    let Some(_pages) = reserve(SIZE, 2) else { return };
    let memory = SharedMemory::create_huge("frames", 2 * HUGE, SIZE).unwrap();
    let writer = memory.map(GuestAddress(BASE), Access::ReadWrite).unwrap();
    let memory = memory.into_read_only().unwrap();
    let received = ReadOnlySharedMemory::from_fd(memory.try_clone_fd().unwrap()).unwrap();
    let reader = received.map(GuestAddress(2 * BASE)).unwrap();
    writer.region().write_obj(0x1234_u64, MemoryRegionAddress(HUGE)).unwrap();
    assert_eq!(reader.region().read_obj::<u64>(MemoryRegionAddress(HUGE)).unwrap(), 0x1234);
    assert_eq!((host_page_size(reader.region()), host_page_size(writer.region())), (HUGE, HUGE));
    SharedMemory::from_fd(memory.try_clone_fd().unwrap()).unwrap_err();
}

#[test]
fn pages_bound_to_a_node_are_there_at_once() {
    let Some(_pages) = reserve(SIZE, 2) else { return };
    for backing in backings() {
        let policy = NumaPolicy::Bind(NodeSet::of_host());
        let ram = match GuestRam::builder().region(config(backing.clone(), 2).numa(policy)).build() {
            Err(MemoryError::Numa { source, .. }) if source.kind() == std::io::ErrorKind::Unsupported => {
                println!("skipped: the host's kernel knows no NUMA policies");
                return;
            }
            other => other.unwrap(),
        };
        assert_eq!(resident(&ram.regions().remove(0)), 2, "{backing:?}");
    }
}

#[test]
fn contents_are_copied_to_memory_of_another_kind_and_back() {
    let Some(_pages) = reserve(SIZE, 2) else { return };
    let [huge, small] = [Backing::HugeTlbMemfd { page_size: SIZE }, Backing::Anonymous]
        .map(|backing| GuestRam::builder().region(config(backing, 2)).build().unwrap());
    let pattern: Vec<u8> = (0..2 * HUGE).map(|at| (at / 4093).to_le_bytes()[0]).collect();
    huge.memory().write_slice(&pattern, GuestAddress(BASE)).unwrap();
    let mut image = Vec::new();
    huge.memory().write_all_volatile_to(GuestAddress(BASE), &mut image, pattern.len()).unwrap();
    small.memory().read_exact_volatile_from(GuestAddress(BASE), &mut image.as_slice(), image.len()).unwrap();
    let mut copy = vec![0; pattern.len()];
    small.memory().read_slice(&mut copy, GuestAddress(BASE)).unwrap();
    assert!(copy == pattern);
}

#[test]
fn ram_of_one_gibibyte_pages() {
    let Some(_page) = reserve(HugePageSize::OneGib, 1) else { return };
    let backing = Backing::HugeTlbMemfd { page_size: HugePageSize::OneGib };
    let ram = GuestRam::builder().ram(1 << 30).backing(backing).build().unwrap();
    assert_eq!(host_page_size(&ram.regions().remove(0)), 1 << 30);
    ram.prefault(NonZeroUsize::new(2).unwrap()).unwrap();
    ram.memory().write_obj(7_u64, GuestAddress((1 << 30) - 8)).unwrap();
    assert_eq!(ram.memory().read_obj::<u64>(GuestAddress((1 << 30) - 8)).unwrap(), 7);
}

#[test]
fn a_pool_shrinks_back() {
    let Some(pages) = reserve(SIZE, 3) else { return };
    let during = SIZE.pool().unwrap().total;
    assert!(during >= 3);
    drop(pages);
    // Other programs may add some of theirs meanwhile.
    println!("{during} pages, {} after", SIZE.pool().unwrap().total);
}
