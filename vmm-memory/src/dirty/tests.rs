use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::thread;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestMemoryRegion, MemoryRegionAddress, VolatileMemory};

use super::*;
use crate::RegionConfig;
use crate::layout::HIGH_RAM_START;
use crate::region::DirtyBitmap;

const LOW: GuestAddress = GuestAddress(0);
const HIGH: GuestAddress = HIGH_RAM_START;

/// Stands for a backend: it records writes that `vm-memory` does not see.
#[derive(Debug, Default)]
struct Backend {
    words: Mutex<BTreeMap<u64, Arc<[AtomicU64]>>>,
    /// Every so many harvests, one fails halfway; never if 0.
    fail_every: AtomicU32,
    calls: AtomicU32,
}

impl Backend {
    fn map(&self, region: &GuestRegion) {
        let words = (0..region.len().div_ceil(64 * PAGE_SIZE)).map(|_| AtomicU64::new(0)).collect();
        self.words.lock().unwrap().insert(region.start_addr().0, words);
    }

    fn log_of(&self, region: &GuestRegion) -> Option<Arc<[AtomicU64]>> {
        self.words.lock().unwrap().get(&region.start_addr().0).cloned()
    }

    fn mark(&self, region: &GuestRegion, page: u64) {
        let log = self.log_of(region).unwrap();
        log[usize::try_from(page / 64).unwrap()].fetch_or(1 << (page % 64), Ordering::SeqCst);
    }

    fn guest_write(&self, region: &GuestRegion, offset: u64, value: u64) {
        let mapping: &MmapRegion<DirtyBitmap> = region;
        // A store by reference is not recorded in the bitmap of the mapping.
        let word: &AtomicU64 = mapping.get_atomic_ref(usize::try_from(offset).unwrap()).unwrap();
        word.store(value, Ordering::Relaxed);
        self.mark(region, offset / PAGE_SIZE);
    }

    fn fail_every(&self, harvests: u32) {
        self.fail_every.store(harvests, Ordering::Relaxed);
    }
}

impl DirtyLog for Backend {
    fn harvest(
        &self,
        region: &GuestRegion,
        into: &mut PageBitmap,
    ) -> Result<(), Box<dyn Error + Send + Sync>> {
        let Some(log) = self.log_of(region) else { return Ok(()) };
        let call = self.calls.fetch_add(1, Ordering::Relaxed) + 1;
        let every = self.fail_every.load(Ordering::Relaxed);
        let fails = every != 0 && call.is_multiple_of(every);
        let taken = if fails { log.len() / 2 } else { log.len() };
        let bits: Vec<u64> = log.iter().take(taken).map(|word| word.swap(0, Ordering::SeqCst)).collect();
        into.or_words(&bits);
        if fails { Err("log unreadable".into()) } else { Ok(()) }
    }
}

fn two_regions() -> GuestRam {
    GuestRam::builder()
        .region(RegionConfig::new(LOW, 256 * PAGE_SIZE))
        .region(RegionConfig::new(HIGH, 130 * PAGE_SIZE))
        .track_dirty(true)
        .build()
        .unwrap()
}

fn with_backend(ram: &GuestRam) -> (DirtyTracker, Arc<Backend>) {
    let backend = Arc::new(Backend::default());
    ram.regions().iter().for_each(|region| backend.map(region));
    let tracker = DirtyTracker::new(ram);
    tracker.add_log(backend.clone());
    (tracker, backend)
}

fn ranges(pages: &DirtyPages) -> Vec<(u64, u64)> {
    pages.ranges().map(|(start, length)| (start.0, length)).collect()
}

#[test]
fn device_and_guest_writes_are_merged() {
    let ram = two_regions();
    let (tracker, backend) = with_backend(&ram);
    let [low, high] = ram.regions().try_into().unwrap();
    ram.memory().write_slice(&[1; 0x1001], GuestAddress(0x3FFF)).unwrap();
    backend.guest_write(&low, 5 * PAGE_SIZE, 1);
    backend.guest_write(&low, 255 * PAGE_SIZE, 1);
    backend.guest_write(&high, 129 * PAGE_SIZE, 1);
    ram.memory().write_obj(1u8, HIGH).unwrap();

    let pages = tracker.harvest().unwrap();
    let last = (HIGH.0 + 129 * PAGE_SIZE, PAGE_SIZE);
    assert_eq!(ranges(&pages), [(0x3000, 0x3000), (0xFF000, PAGE_SIZE), (HIGH.0, PAGE_SIZE), last]);
    assert_eq!(pages.page_count(), 6);
    assert_eq!(pages.regions().map(|(base, _)| base).collect::<Vec<_>>(), [LOW, HIGH]);
    for (gpa, dirty) in [
        (0x2FFF, false),
        (0x3000, true),
        (0x5FFF, true),
        (0x6000, false),
        (0x10_0000, false),
        (HIGH.0 - 1, false),
        (HIGH.0, true),
        (HIGH.0 + PAGE_SIZE, false),
        (HIGH.0 + 130 * PAGE_SIZE - 1, true),
        (HIGH.0 + 130 * PAGE_SIZE, false),
        (u64::MAX, false),
    ] {
        assert_eq!(pages.contains(GuestAddress(gpa)), dirty, "{gpa:#x}");
    }
    let nothing = tracker.harvest().unwrap();
    assert!(nothing.is_empty() && nothing.page_count() == 0 && ranges(&nothing).is_empty());
}

#[test]
fn adjacent_regions_stay_apart() {
    let ram = GuestRam::builder()
        .region(RegionConfig::new(LOW, PAGE_SIZE))
        .region(RegionConfig::new(GuestAddress(PAGE_SIZE), PAGE_SIZE))
        .track_dirty(true)
        .build()
        .unwrap();
    let tracker = DirtyTracker::new(&ram);
    ram.memory().write_slice(&[1; 0x2000], LOW).unwrap();
    assert_eq!(ranges(&tracker.harvest().unwrap()), [(0, PAGE_SIZE), (PAGE_SIZE, PAGE_SIZE)]);
}

#[test]
fn failing_log_loses_nothing() {
    let ram = two_regions();
    let (tracker, backend) = with_backend(&ram);
    let other = Arc::new(Backend::default());
    let [low, high] = ram.regions().try_into().unwrap();
    other.map(&high);
    tracker.add_log(other.clone());

    // Taken from the bitmap, taken by the first log, in the half that the failing log takes, in the
    // half it does not.
    ram.memory().write_obj(1u8, GuestAddress(0x1000)).unwrap();
    backend.mark(&low, 2);
    other.mark(&high, 0);
    other.mark(&high, 128);
    other.fail_every(1);
    for _ in 0..3 {
        let error = tracker.harvest().unwrap_err();
        assert!(matches!(error, MemoryError::DirtyLog { gpa, .. } if gpa == HIGH.0), "{error}");
        assert_eq!(error.source().unwrap().to_string(), "log unreadable");
    }
    backend.mark(&low, 9);
    other.fail_every(0);
    let pages = tracker.harvest().unwrap();
    assert_eq!(
        ranges(&pages),
        [(0x1000, 0x2000), (0x9000, PAGE_SIZE), (HIGH.0, PAGE_SIZE), (HIGH.0 + 128 * PAGE_SIZE, PAGE_SIZE)]
    );
    assert!(tracker.harvest().unwrap().is_empty());
}

#[derive(Debug)]
struct Panics;

impl DirtyLog for Panics {
    fn harvest(&self, _: &GuestRegion, into: &mut PageBitmap) -> Result<(), Box<dyn Error + Send + Sync>> {
        into.set(7);
        panic!("a log gone wrong")
    }
}

#[test]
fn panicking_log_loses_nothing() {
    let ram = two_regions();
    let tracker = DirtyTracker::new(&ram);
    ram.memory().write_obj(1u8, GuestAddress(0x1000)).unwrap();
    tracker.add_log(Arc::new(Panics));
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| tracker.harvest())).unwrap_err();
    tracker.state().logs.clear();
    assert_eq!(ranges(&tracker.harvest().unwrap()), [(0x1000, PAGE_SIZE), (0x7000, PAGE_SIZE)]);
}

#[test]
fn inserted_region_is_reported_whole_and_removed_one_not_at_all() {
    let ram = two_regions();
    let (tracker, backend) = with_backend(&ram);
    let [low, high] = ram.regions().try_into().unwrap();
    backend.mark(&low, 1);
    backend.mark(&high, 1);
    backend.fail_every(2);
    tracker.harvest().unwrap_err();
    backend.fail_every(0);

    ram.remove_region(LOW).unwrap();
    let middle = GuestAddress(0x8000_0000);
    ram.add_region(RegionConfig::new(middle, 3 * PAGE_SIZE)).unwrap();
    let pages = tracker.harvest().unwrap();
    assert_eq!(ranges(&pages), [(middle.0, 3 * PAGE_SIZE), (HIGH.0 + PAGE_SIZE, PAGE_SIZE)]);

    // Away and back between two harvests: what the backend knew of it may be gone.
    ram.remove_region(HIGH).unwrap();
    ram.insert(high).unwrap();
    ram.insert(low).unwrap();
    ram.remove_region(middle).unwrap();
    let pages = tracker.harvest().unwrap();
    assert_eq!(ranges(&pages), [(0, 256 * PAGE_SIZE), (HIGH.0, 130 * PAGE_SIZE)]);
    assert!(tracker.harvest().unwrap().is_empty());
}

#[test]
fn untracked_regions_are_named() {
    let ram = two_regions();
    let (tracker, backend) = with_backend(&ram);
    let blind =
        ram.add_region(RegionConfig::new(GuestAddress(1 << 40), PAGE_SIZE).track_dirty(false)).unwrap();
    ram.add_region(RegionConfig::new(GuestAddress(2 << 40), PAGE_SIZE).read_only(true)).unwrap();
    backend.map(&blind);
    tracker.harvest().unwrap();
    ram.memory().write_obj(1u8, GuestAddress(1 << 40)).unwrap();
    let pages = tracker.harvest().unwrap();
    assert!(pages.is_empty());
    assert_eq!(pages.untracked_regions(), [GuestAddress(1 << 40)]);
    backend.mark(&blind, 0);
    assert_eq!(ranges(&tracker.harvest().unwrap()), [(1 << 40, PAGE_SIZE)]);
}

#[test]
fn one_tebibyte_is_harvested() {
    let ram = GuestRam::builder().ram(1 << 40).track_dirty(true).build().unwrap();
    let tracker = DirtyTracker::new(&ram);
    let last = (1 << 40) + (1 << 30) - PAGE_SIZE;
    ram.memory().write_obj(1u8, LOW).unwrap();
    ram.memory().write_obj(1u8, GuestAddress(last)).unwrap();
    assert_eq!(ranges(&tracker.harvest().unwrap()), [(0, PAGE_SIZE), (last, PAGE_SIZE)]);
}

/// Cheap and reproducible; each thread has its own.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// What a migration target holds: it gets just the pages that harvests report.
struct Target(BTreeMap<u64, Vec<u8>>);

impl Target {
    fn full_copy(ram: &GuestRam) -> Self {
        let copy = |region: &Arc<GuestRegion>| {
            let mut bytes = vec![0; region.size()];
            region.read_slice(&mut bytes, MemoryRegionAddress(0)).unwrap();
            (region.start_addr().0, bytes)
        };
        Self(ram.regions().iter().map(copy).collect())
    }

    fn receive(&mut self, ram: &GuestRam, pages: &DirtyPages) {
        for (start, length) in pages.ranges() {
            let (base, bytes) = self.0.range_mut(..=start.0).next_back().unwrap();
            let at = usize::try_from(start.0 - base).unwrap();
            let part = &mut bytes[at..at + usize::try_from(length).unwrap()];
            ram.memory().read_slice(part, start).unwrap();
        }
    }
}

#[test]
fn no_page_is_lost_under_load() {
    const ROUNDS: u64 = 120;
    const WRITERS: u64 = 4;
    let ram = two_regions();
    let (tracker, backend) = with_backend(&ram);
    backend.fail_every(3);
    let regions = ram.regions();
    let mut target = Target::full_copy(&ram);
    let mut harvests_while_writing = 0;
    for round in 1..=ROUNDS {
        let running = AtomicUsize::new(usize::try_from(WRITERS).unwrap());
        thread::scope(|scope| {
            for writer in 0..WRITERS {
                let (ram, backend, regions, running) = (&ram, &backend, &regions, &running);
                scope.spawn(move || {
                    let mut random = Random(round * WRITERS + writer + 1);
                    for count in 0..400 {
                        let region = &regions[usize::try_from(random.below(2)).unwrap()];
                        let offset = random.below(region.len() / PAGE_SIZE) * PAGE_SIZE + writer * 8;
                        let value = round << 32 | count;
                        if writer % 2 == 0 {
                            let gpa = GuestAddress(region.start_addr().0 + offset);
                            ram.memory().write_obj(value, gpa).unwrap();
                        } else {
                            backend.guest_write(region, offset, value);
                        }
                    }
                    running.fetch_sub(1, Ordering::Release);
                });
            }
            while running.load(Ordering::Acquire) > 0 {
                if let Ok(pages) = tracker.harvest() {
                    target.receive(&ram, &pages);
                    harvests_while_writing += 1;
                }
            }
        });
        let pages = loop {
            if let Ok(pages) = tracker.harvest() {
                break pages;
            }
        };
        target.receive(&ram, &pages);
        assert!(target.0 == Target::full_copy(&ram).0, "the target differs after round {round}");
    }
    assert!(harvests_while_writing > ROUNDS, "{harvests_while_writing} harvests tell little");
}

#[derive(Clone, Debug)]
enum Step {
    Device { page: u64, pages: u64 },
    Guest { page: u64 },
    Harvest { fails: bool },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..120u64, 1..10u64).prop_map(|(page, pages)| Step::Device { page, pages }),
        (0..130u64).prop_map(|page| Step::Guest { page }),
        any::<bool>().prop_map(|fails| Step::Harvest { fails }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Without concurrency a harvest is exact: every page written and no other.
    #[test]
    fn harvest_is_exact(steps in prop::collection::vec(step(), 1..60)) {
        let ram = GuestRam::builder()
            .region(RegionConfig::new(HIGH, 130 * PAGE_SIZE))
            .track_dirty(true)
            .build()
            .unwrap();
        let (tracker, backend) = with_backend(&ram);
        let region = &ram.regions()[0];
        let mut model = PageBitmap::with_pages(130);
        for step in steps.into_iter().chain([Step::Harvest { fails: false }]) {
            match step {
                Step::Device { page, pages } => {
                    let length = usize::try_from(pages * PAGE_SIZE).unwrap();
                    let gpa = GuestAddress(HIGH.0 + page * PAGE_SIZE);
                    ram.memory().write_slice(&vec![1; length], gpa).unwrap();
                    model.set_range(page..page + pages);
                }
                Step::Guest { page } => {
                    backend.guest_write(region, page * PAGE_SIZE, 1);
                    model.set(page);
                }
                Step::Harvest { fails } => {
                    backend.fail_every(fails.into());
                    let harvest = tracker.harvest();
                    prop_assert_eq!(harvest.is_err(), fails);
                    if let Ok(pages) = harvest {
                        let found = pages.regions().next().map(|(_, found)| found.clone());
                        let expected = std::mem::replace(&mut model, PageBitmap::with_pages(130));
                        prop_assert_eq!(found.unwrap_or_else(|| PageBitmap::with_pages(130)), expected);
                    }
                }
            }
        }
    }
}
