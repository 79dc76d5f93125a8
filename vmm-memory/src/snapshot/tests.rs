//! Whole snapshots. Their damage is in `damage`.

mod chain;
mod damage;
mod lazy;

use std::num::NonZeroUsize;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tempfile::TempDir;
use vm_memory::{Bytes as _, GuestAddress};

use super::*;
use crate::{Backing, DirtyTracker, GuestRam, PAGE_SIZE, RegionConfig};

/// A number, and a text since version 2.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Toy {
    number: u32,
    text: String,
}

impl Toy {
    fn new(number: u32) -> Self {
        Self { number, text: String::new() }
    }
}

impl SnapshotState for Toy {
    const FORMAT: StateFormat = StateFormat { name: "toys", newest: 2, oldest: 1 };

    fn encode(&self, version: u16) -> Result<Vec<u8>, StateError> {
        let mut bytes = self.number.to_le_bytes().to_vec();
        match version {
            1 if self.text.is_empty() => {}
            1 => return Err(format!("version 1 has no text, and there is \"{}\"", self.text).into()),
            _ => bytes.extend_from_slice(self.text.as_bytes()),
        }
        Ok(bytes)
    }

    fn decode(bytes: &[u8], version: u16) -> Result<Self, StateError> {
        let (number, text) = bytes.split_first_chunk().ok_or("too short")?;
        if version == 1 && !text.is_empty() {
            return Err("too long".into());
        }
        Ok(Self { number: u32::from_le_bytes(*number), text: String::from_utf8(text.to_vec())? })
    }
}

/// The same, of a release that knows version 1.
#[derive(Debug)]
struct OldToy(Toy);

impl SnapshotState for OldToy {
    const FORMAT: StateFormat = StateFormat { name: "toys", newest: 1, oldest: 1 };

    fn encode(&self, version: u16) -> Result<Vec<u8>, StateError> {
        self.0.encode(version)
    }

    fn decode(bytes: &[u8], version: u16) -> Result<Self, StateError> {
        Toy::decode(bytes, version).map(Self)
    }
}

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }
}

/// Two regions, the second one with a chunk that is not whole.
fn ram(backing: &Backing) -> GuestRam {
    let region = |gpa, size| RegionConfig::new(GuestAddress(gpa), size).backing(backing.clone());
    let ram =
        GuestRam::builder().region(region(0, 1 << 20)).region(region(1 << 32, (1 << 20) + 5 * PAGE_SIZE));
    ram.track_dirty(true).build().unwrap()
}

/// Pages of all kinds: one byte in one, whole ones, runs, the last of a region, random ones.
fn fill(ram: &GuestRam) {
    let memory = ram.memory();
    memory.write_obj(1_u8, GuestAddress(0x5fff)).unwrap();
    memory.write_slice(&[0xa5; 3 * 4096], GuestAddress(0x3e000)).unwrap();
    let mut random = vec![0; 0x10000];
    blake3::Hasher::new().finalize_xof().fill(&mut random);
    memory.write_slice(&random, GuestAddress(0x80000)).unwrap();
    memory.write_slice(&random[..0x5000], GuestAddress((1 << 32) + (1 << 20))).unwrap();
}

fn contents(ram: &GuestRam) -> Vec<Vec<u8>> {
    let memory = ram.memory();
    let region = |region: &Arc<crate::GuestRegion>| {
        use vm_memory::GuestMemoryRegion as _;
        let mut bytes = vec![0; usize::try_from(region.len()).unwrap()];
        memory.read_slice(&mut bytes, region.start_addr()).unwrap();
        bytes
    };
    ram.regions().iter().map(region).collect()
}

fn save(ram: &GuestRam, path: PathBuf, options: &RamOptions<'_>) -> (RamStats, SnapshotDigest) {
    let mut writer = SnapshotWriter::create(path).unwrap();
    writer.put("toy", &Toy { number: 7, text: "seven".to_owned() }).unwrap();
    let stats = writer.put_ram(ram, options).unwrap();
    writer.put("other-toy", &Toy::new(8)).unwrap();
    (stats, writer.finish().unwrap())
}

fn error(result: Result<impl Sized, SnapshotError>) -> String {
    let Err(error) = result else { panic!("no error") };
    std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source())
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(": ")
}

#[test]
fn what_was_saved_comes_back() {
    let place = Place::new();
    for backing in [Backing::Anonymous, Backing::Memfd] {
        let ram = ram(&backing);
        fill(&ram);
        let expected = contents(&ram);
        for packed in [false, true] {
            let path = place.path("vm");
            let (done, total) = (AtomicU64::new(0), 2 * (1 << 20) + 5 * PAGE_SIZE);
            let progress = |progress: Progress| {
                assert_eq!(progress.total, total);
                done.fetch_max(progress.done, Ordering::Relaxed);
            };
            let options = RamOptions::new().packed(packed).progress(&progress);
            let (stats, digest) = save(&ram, path.clone(), &options);
            assert_eq!((stats.pages, stats.stored, stats.inherited), (517, 1 + 3 + 16 + 5, 0));
            assert_eq!(stats.bytes < stats.stored * PAGE_SIZE, packed, "{stats:?}");
            assert_eq!(done.swap(0, Ordering::Relaxed), total);

            let snapshot = Snapshot::open(&path).unwrap();
            assert_eq!((snapshot.digest(), snapshot.base_digest()), (digest, None));
            assert_eq!(snapshot.names().collect::<Vec<_>>(), ["toy", "ram", "other-toy"]);
            assert_eq!(snapshot.versions().collect::<Vec<_>>(), [("toys", 2), ("vmm-memory", 1)]);
            assert_eq!(snapshot.get::<Toy>("toy").unwrap(), Toy { number: 7, text: "seven".to_owned() });
            assert!(
                error(snapshot.finish()).ends_with("holds states that nothing here takes: [\"other-toy\"]")
            );
            assert_eq!(snapshot.get::<Toy>("other-toy").unwrap().number, 8);
            snapshot.finish().unwrap();
            snapshot.verify_ram(&options).unwrap();
            assert_eq!(done.swap(0, Ordering::Relaxed), total);

            // Whatever was in it.
            for other in [Backing::Anonymous, Backing::Memfd] {
                let loaded = super::tests::ram(&other);
                loaded.memory().write_slice(&[1; 0x9000], GuestAddress(0x20000)).unwrap();
                loaded.memory().write_slice(&[1; 0x9000], GuestAddress(1 << 32)).unwrap();
                let tracker = DirtyTracker::new(&loaded);
                snapshot.load_ram(&loaded, &options.threads(NonZeroUsize::new(3).unwrap())).unwrap();
                assert!(contents(&loaded) == expected, "{backing:?}, packed: {packed}, to {other:?}");
                assert_eq!(tracker.harvest().unwrap().page_count(), 0);
            }
            if packed {
                let problem = error(snapshot.map_ram(false, &options));
                assert!(
                    problem.ends_with("its RAM is packed, which cannot be mapped; load it instead"),
                    "{problem}"
                );
            } else {
                let (one, other) =
                    (snapshot.map_ram(true, &options).unwrap(), snapshot.map_ram(false, &options).unwrap());
                assert!(contents(&one) == expected && contents(&other) == expected);
                one.memory().write_obj(9_u8, GuestAddress(0x80000)).unwrap();
                assert!(contents(&one) != expected && contents(&other) == expected);
                let dirty = DirtyTracker::new(&one).harvest().unwrap();
                assert_eq!(dirty.ranges().collect::<Vec<_>>(), [(GuestAddress(0x80000), PAGE_SIZE)]);
                snapshot.verify_ram(&options).unwrap();
            }
        }
    }
}

#[test]
fn zero_pages_take_no_room() {
    let place = Place::new();
    let ram = GuestRam::builder().ram(256 << 20).backing(Backing::Memfd).build().unwrap();
    ram.memory().write_obj(1_u8, GuestAddress(100 << 20)).unwrap();
    let path = place.path("vm");
    let (stats, _) = save(&ram, path.clone(), &RamOptions::new());
    assert_eq!((stats.stored, stats.bytes), (1, PAGE_SIZE));
    let blocks = std::fs::metadata(&path).unwrap().blocks() * 512;
    assert!(blocks < 1 << 20, "{blocks} bytes on the disk");
    // Nor in the guest's memfd, for having been read.
    let regions = ram.regions();
    let memfd = regions[0].file_offset().unwrap().file().metadata().unwrap().blocks() * 512;
    assert_eq!(memfd, PAGE_SIZE);
    use vm_memory::GuestMemoryRegion as _;
    let loaded = GuestRam::builder().ram(256 << 20).backing(Backing::Memfd).build().unwrap();
    Snapshot::open(&path).unwrap().load_ram(&loaded, &RamOptions::new()).unwrap();
    assert_eq!(loaded.memory().read_obj::<u8>(GuestAddress(100 << 20)).unwrap(), 1);
    let regions = loaded.regions();
    assert_eq!(regions[0].file_offset().unwrap().file().metadata().unwrap().blocks() * 512, PAGE_SIZE);
}

#[test]
fn an_increment_has_what_has_changed() {
    let place = Place::new();
    let ram = ram(&Backing::Anonymous);
    fill(&ram);
    let tracker = DirtyTracker::new(&ram);
    tracker.harvest().unwrap();
    for packed in [false, true] {
        let mut paths = vec![place.path("0")];
        let mut states = Vec::new();
        save(&ram, paths[0].clone(), &RamOptions::new());
        states.push(contents(&ram));
        let open = |paths: &[PathBuf]| {
            let (first, more) = paths.split_first().unwrap();
            let mut top = Arc::new(Snapshot::open(first).unwrap());
            for path in more {
                top = Arc::new(Snapshot::open_on(&top, path).unwrap());
            }
            top
        };
        for round in 1..4_u8 {
            let memory = ram.memory();
            memory.write_obj(round, GuestAddress(0x80000 + u64::from(round) * 0x1000)).unwrap();
            memory.write_slice(&[round; 0x2000], GuestAddress(0x3f000)).unwrap();
            // Made zero by the guest, or given back.
            memory.write_slice(&[0; 0x1000], GuestAddress(0x88000 + u64::from(round) * 0x1000)).unwrap();
            ram.discard(GuestAddress((1 << 32) + (1 << 20) + u64::from(round) * 0x1000), 0x1000).unwrap();
            let changed = tracker.harvest().unwrap();
            let base = open(&paths);
            paths.push(place.path(&round.to_string()));
            let options = RamOptions::new().since(&base, &changed).packed(packed);
            let (stats, _) = save(&ram, paths[usize::from(round)].clone(), &options);
            assert_eq!((stats.stored, stats.inherited), (3, 517 - 5), "{stats:?}");
            states.push(contents(&ram));
        }
        for (count, expected) in (1..).zip(&states) {
            let snapshot = open(&paths[..count]);
            snapshot.verify_ram(&RamOptions::new()).unwrap();
            let loaded = super::tests::ram(&Backing::Memfd);
            snapshot.load_ram(&loaded, &RamOptions::new()).unwrap();
            assert!(contents(&loaded) == *expected, "{count} loaded, packed: {packed}");
            let mapped = snapshot.map_ram(true, &RamOptions::new()).unwrap();
            assert!(contents(&mapped) == *expected, "{count} mapped, packed: {packed}");
            assert!(DirtyTracker::new(&mapped).harvest().unwrap().is_empty());
        }
        // Not without its base, nor with another.
        let problem = error(Snapshot::open(&paths[1]));
        assert!(
            problem.contains("it is based on") && problem.ends_with("has to be opened with that"),
            "{problem}"
        );
        let problem = error(Snapshot::open_on(&open(&paths[..1]), &paths[2]));
        assert!(
            problem.contains("it is based on") && problem.contains(&paths[0].display().to_string()),
            "{problem}"
        );
        let problem = error(Snapshot::open_on(&open(&paths[..1]), &paths[0]));
        assert!(problem.contains("it is based on no other"), "{problem}");
    }
}

#[test]
fn pages_that_nobody_keeps_track_of_are_saved() {
    let place = Place::new();
    let untracked = GuestRam::builder().ram(1 << 20).build().unwrap();
    untracked.memory().write_obj(1_u8, GuestAddress(0)).unwrap();
    save(&untracked, place.path("0"), &RamOptions::new());
    let base = Arc::new(Snapshot::open(place.path("0")).unwrap());
    untracked.memory().write_obj(1_u8, GuestAddress(0x7000)).unwrap();
    let changed = DirtyTracker::new(&untracked).harvest().unwrap();
    let (stats, _) = save(&untracked, place.path("1"), &RamOptions::new().since(&base, &changed));
    assert_eq!((stats.stored, stats.inherited), (2, 0));
    // RAM that is laid out otherwise has another base.
    let other = GuestRam::builder().ram(2 << 20).build().unwrap();
    let mut writer = SnapshotWriter::create(place.path("2")).unwrap();
    let problem = error(writer.put_ram(&other, &RamOptions::new().since(&base, &changed)));
    assert!(
        problem.ends_with("saved were 0x100000 bytes at 0x0, here are 0x200000 bytes at 0x0"),
        "{problem}"
    );
}

#[test]
fn ram_that_lies_elsewhere_is_refused() {
    let place = Place::new();
    save(&ram(&Backing::Anonymous), place.path("vm"), &RamOptions::new());
    let snapshot = Snapshot::open(place.path("vm")).unwrap();
    for (other, expected) in [
        (
            GuestRam::builder().ram(1 << 20),
            "saved were 0x105000 bytes at 0x100000000, here are no more region",
        ),
        (
            GuestRam::builder().ram(2 << 20),
            "saved were 0x100000 bytes at 0x0, here are 0x200000 bytes at 0x0",
        ),
    ] {
        let problem = error(snapshot.load_ram(&other.build().unwrap(), &RamOptions::new()));
        assert!(problem.ends_with(expected), "{problem}");
    }
}

#[test]
fn read_only_memory_is_compared_and_mapped() {
    let place = Place::new();
    let rom = |byte: u8| {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[byte; 0x2000], 0).unwrap();
        let backing = Backing::File { file: Arc::new(file), offset: 0 };
        let rom = RegionConfig::new(GuestAddress(0xf_0000), 0x2000).backing(backing).read_only(true);
        GuestRam::builder().region(RegionConfig::new(GuestAddress(0), 0x4000)).region(rom).build().unwrap()
    };
    save(&rom(5), place.path("vm"), &RamOptions::new());
    let snapshot = Snapshot::open(place.path("vm")).unwrap();
    snapshot.load_ram(&rom(5), &RamOptions::new()).unwrap();
    let problem = error(snapshot.load_ram(&rom(6), &RamOptions::new()));
    assert!(
        problem.ends_with(
            "RAM at 0xf0000 to 0xf2000: what is there cannot be written, and is not what was saved"
        ),
        "{problem}"
    );
    let mapped = snapshot.map_ram(false, &RamOptions::new()).unwrap();
    let mut byte = [0];
    mapped.regions()[1].read_slice(&mut byte, vm_memory::MemoryRegionAddress(0x1fff)).unwrap();
    assert_eq!(byte, [5]);
}

#[test]
fn states_of_older_and_newer_releases() {
    let place = Place::new();
    let write = |name: &str, version: Option<u16>, toy: &Toy| {
        let mut writer = SnapshotWriter::create(place.path(name))?;
        if let Some(version) = version {
            writer.version(Toy::FORMAT, version)?;
        }
        writer.put("toy", toy)?;
        writer.finish()?;
        Snapshot::open(place.path(name))
    };
    // From 1 to 2, and back.
    let one = write("1", Some(1), &Toy::new(5)).unwrap();
    let toy: Toy = one.get("toy").unwrap();
    assert_eq!(toy, Toy::new(5));
    let two = write("2", None, &toy).unwrap();
    assert_eq!(two.get::<Toy>("toy").unwrap(), toy);
    assert_eq!(write("1", Some(1), &toy).unwrap().get::<OldToy>("toy").unwrap().0, toy);
    // What is of the future, or would be lost.
    let problem = error(two.get::<OldToy>("toy"));
    assert!(
        problem.ends_with("the state \"toy\" of toys is of version 2; this release knows 1 to 1"),
        "{problem}"
    );
    let texts = Toy { number: 5, text: "five".to_owned() };
    assert_eq!(
        error(write("1", Some(1), &texts)),
        "the state \"toy\" cannot be written in version 1 of toys: version 1 has no text, and there is \"five\""
    );
    assert_eq!(
        error(write("3", Some(3), &toy)),
        "a snapshot cannot hold version 3 of toys: known are 1 to 2"
    );
    let mut writer = SnapshotWriter::create(place.path("4")).unwrap();
    writer.put("toy", &toy).unwrap();
    assert!(error(writer.version(Toy::FORMAT, 1)).ends_with("a state was written in another one already"));
}

#[test]
fn states_that_are_not_there_or_of_another_kind() {
    let place = Place::new();
    let mut writer = SnapshotWriter::create(place.path("vm")).unwrap();
    writer.put("toy", &Toy::new(5)).unwrap();
    assert!(error(writer.put("toy", &Toy::new(6))).ends_with("it holds one of that name already"));
    assert!(error(writer.put("two toys", &Toy::new(6))).contains("names are made of ASCII letters"));
    writer.finish().unwrap();
    let snapshot = Snapshot::open(place.path("vm")).unwrap();
    assert!(error(snapshot.get::<Toy>("tow")).ends_with("holds no state \"tow\"; it holds [\"toy\"]"));
    let problem = error(snapshot.get::<RamLayout>("toy"));
    assert!(
        problem.ends_with("the state \"toy\" is of toys, where one of vmm-memory is expected"),
        "{problem}"
    );
    assert!(snapshot.ram_layout().is_none());
    assert!(error(snapshot.map_ram(false, &RamOptions::new())).contains("holds no state \"ram\""));
    assert!(error(Snapshot::open(place.path("nothing"))).contains("opening it: No such file"));
}

#[test]
fn nothing_is_there_until_it_is_finished() {
    let place = Place::new();
    let ram = ram(&Backing::Anonymous);
    let (_, digest) = save(&ram, place.path("vm"), &RamOptions::new());
    let mut writer = SnapshotWriter::create(place.path("vm")).unwrap();
    writer.put_ram(&ram, &RamOptions::new()).unwrap();
    assert!(error(writer.put_ram(&ram, &RamOptions::new())).ends_with("it holds some already"));
    drop(writer);
    assert_eq!(Snapshot::open(place.path("vm")).unwrap().digest(), digest);
    assert_eq!(std::fs::read_dir(place.0.path()).unwrap().count(), 1);
    assert!(
        error(SnapshotWriter::create(place.path("no/vm"))).contains("opening its directory: No such file")
    );
}

/// Files of this version are kept, and stay readable. `VMM_WRITE_SNAPSHOTS=1` writes them anew.
#[test]
fn snapshots_of_releases_before_are_read() {
    for (name, packed) in [("in-place.v1", false), ("packed.v1", true)] {
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots").join(name);
        let build = || {
            let region = RegionConfig::new(GuestAddress(0x4000), 3 * PAGE_SIZE);
            GuestRam::builder().region(region).build().unwrap()
        };
        let ram = build();
        ram.memory().write_slice(b"page", GuestAddress(0x5ffe)).unwrap();
        if std::env::var_os("VMM_WRITE_SNAPSHOTS").is_some() {
            save(&ram, path.clone(), &RamOptions::new().packed(packed));
        }
        let snapshot = Snapshot::open(&path).unwrap();
        assert_eq!(snapshot.get::<Toy>("toy").unwrap(), Toy { number: 7, text: "seven".to_owned() });
        assert_eq!(snapshot.get::<Toy>("other-toy").unwrap(), Toy::new(8));
        snapshot.finish().unwrap();
        let loaded = build();
        snapshot.load_ram(&loaded, &RamOptions::new()).unwrap();
        assert!(contents(&loaded) == contents(&ram), "{name}");
    }
}
