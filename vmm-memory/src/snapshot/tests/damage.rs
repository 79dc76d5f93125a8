//! Files that are not what was written.

use std::os::unix::fs::FileExt as _;

use super::*;

/// A small one, with some of everything.
fn small(packed: bool) -> (Place, PathBuf) {
    let place = Place::new();
    let ram =
        GuestRam::builder().region(RegionConfig::new(GuestAddress(0x4000), 3 * PAGE_SIZE)).build().unwrap();
    ram.memory().write_slice(b"page", GuestAddress(0x5ffe)).unwrap();
    let path = place.path("vm");
    save(&ram, path.clone(), &RamOptions::new().packed(packed));
    (place, path)
}

/// All that can be asked of a file.
fn read_all(path: &std::path::Path) -> Result<(), SnapshotError> {
    let snapshot = Snapshot::open(path)?;
    let options = RamOptions::new().threads(NonZeroUsize::MIN);
    snapshot.get::<Toy>("toy")?;
    snapshot.get::<Toy>("other-toy")?;
    snapshot.finish()?;
    snapshot.verify_ram(&options)?;
    let ram = GuestRam::builder().region(RegionConfig::new(GuestAddress(0x4000), 3 * PAGE_SIZE)).build()?;
    snapshot.load_ram(&ram, &options)
}

/// Whether it is an error that tells a place in the file.
fn is_located(error: &SnapshotError) -> bool {
    matches!(
        error,
        SnapshotError::Damaged { .. } | SnapshotError::NotASnapshot { .. } | SnapshotError::Version { .. }
    )
}

#[test]
fn each_byte_that_is_another_is_found() {
    for packed in [false, true] {
        let (_place, path) = small(packed);
        read_all(&path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        for (at, byte) in (0..).zip(&bytes) {
            file.write_all_at(&[byte ^ 1 << (at % 8)], at).unwrap();
            let error = read_all(&path).unwrap_err();
            assert!(is_located(&error), "byte {at}: {error}");
            if let SnapshotError::Damaged { offset, end, part, .. } = error {
                // The length of the file is said by the header.
                let is_in = (offset..end).contains(&at) || part == "its length" && at < 4096;
                assert!(is_in, "byte {at} is said to be in {offset} to {end}, {part}");
            }
            file.write_all_at(&[*byte], at).unwrap();
        }
    }
}

#[test]
fn each_end_that_is_missing_is_found() {
    for packed in [false, true] {
        let (_place, path) = small(packed);
        let bytes = std::fs::read(&path).unwrap();
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        for len in (0..bytes.len()).rev() {
            file.set_len(len as u64).unwrap();
            let error = read_all(&path).unwrap_err();
            assert!(is_located(&error), "{len} bytes: {error}");
        }
        std::fs::write(&path, [&*bytes, &[0]].concat()).unwrap();
        assert!(is_located(&read_all(&path).unwrap_err()));
    }
}

/// Damage of RAM is said where it is, by whoever looks at it.
#[test]
fn damage_of_ram_is_said_by_its_address() {
    let place = Place::new();
    let ram = ram(&Backing::Anonymous);
    fill(&ram);
    for (packed, at, expected) in [
        (false, 4096 + 0x81234, "in RAM at 0x80000 to 0xc0000"),
        // Where nothing was, in a chunk that has something, and in one that has nothing.
        (false, 4096 + 0x12345, "in RAM at 0x0 to 0x40000"),
        (false, 4096 + 0x40000, "in RAM at 0x40000 to 0x80000"),
        (true, 4096 + 1000, "in RAM at "),
    ] {
        let path = place.path("vm");
        save(&ram, path.clone(), &RamOptions::new().packed(packed));
        let file = std::fs::File::options().write(true).read(true).open(&path).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).unwrap();
        file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
        let snapshot = Snapshot::open(&path).unwrap();
        let loaded = super::ram(&Backing::Anonymous);
        for problem in [
            error(snapshot.verify_ram(&RamOptions::new())),
            error(snapshot.load_ram(&loaded, &RamOptions::new())),
        ] {
            assert!(problem.contains(expected), "{problem}");
        }
    }
}

/// Whoever writes digests that are right, can write records that are not.
#[test]
fn records_that_no_writer_writes_are_refused() {
    use super::super::ram::chunk::{Record, codec};
    use super::super::ram::image::Image;
    use zerocopy::IntoBytes as _;
    let chunk: u64 = 64 * PAGE_SIZE;
    let layout = |packed| {
        let mut layout = RamLayout { packed, ..RamLayout::default() };
        layout.regions.push(RamRange { gpa: 0, size: chunk + PAGE_SIZE, read_only: false });
        layout
    };
    let record = |stored: u64, at: u64, len: u64, codec: u32| Record {
        stored: stored.into(),
        at: at.into(),
        len: u32::try_from(len).unwrap().into(),
        codec: codec.into(),
        ..Record::default()
    };
    let read = |packed, records: &[Record], end, has_base| {
        Image::new(layout(packed), records.as_bytes(), end, has_base)
            .map(drop)
            .unwrap_or_else(|problem| panic!("{problem}"))
    };
    let refused = |packed, records: &[Record], end, has_base| {
        Image::new(layout(packed), records.as_bytes(), end, has_base).unwrap_err()
    };
    let nothing = Record::default();
    let in_place =
        [record(1, 4096, chunk, codec::IN_PLACE), record(1, 4096 + chunk, PAGE_SIZE, codec::IN_PLACE)];
    let end = 4096 + chunk + PAGE_SIZE;
    let packed = [record(3, 4096 + 100, 2 * PAGE_SIZE, codec::PACKED), record(1, 4096, 100, codec::LZ4)];
    let packed_end = 4096 + 100 + 2 * PAGE_SIZE;
    let inherits = Record { inherited: 1.into(), ..nothing };
    read(false, &in_place, end, false);
    read(false, &[nothing, nothing], end, false);
    read(false, &[inherits, nothing], end, true);
    read(true, &packed, packed_end, false);
    for (problem, expected) in [
        (refused(false, &in_place[..1], end, false), "it has 64 bytes; 2 chunks take 128"),
        (refused(false, &in_place, end + 1, false), "its chunks end at 0x42000"),
        (
            refused(false, &[in_place[0], record(2, 4096 + chunk, PAGE_SIZE, 0)], end, false),
            "beyond the region's end",
        ),
        (refused(false, &[in_place[0], record(1, 4096, PAGE_SIZE, 0)], end, false), "its record is none"),
        (refused(false, &[record(1, 4096, 4096, 0), nothing], end, false), "its record is none"),
        (refused(false, &[Record { digest: [1; 32], ..nothing }, nothing], end, false), "its record is none"),
        (refused(false, &packed, end, false), "its record is none"),
        (refused(true, &in_place, end, false), "its record is none"),
        (refused(true, &[record(1, 4096, 4097, codec::LZ4), nothing], 8193, false), "its record is none"),
        (refused(true, &[record(1, 4096, 10, 3), nothing], 4106, false), "its record is none"),
        (refused(false, &[inherits, nothing], end, false), "leaves pages to a base, and there is none"),
        (
            refused(false, &[Record { inherited: 1.into(), ..in_place[0] }, nothing], end, true),
            "the base's, too",
        ),
        (refused(true, &packed, packed_end + 1, false), "its chunks end at"),
        (refused(true, &[packed[0], nothing], packed_end, false), "leave a gap or overlap at 0x1000"),
        (
            refused(true, &[record(1, 4096, 4096, 1), record(1, 4097, 4096, 1)], 8193, false),
            "leave a gap or overlap at 0x2000",
        ),
    ] {
        assert!(problem.contains(expected), "{problem} is not \"{expected}\"");
    }
}

#[test]
fn layouts_that_are_none_are_refused() {
    let range = |gpa, size| RamRange { gpa, size, read_only: false };
    let decode = |regions: &[RamRange]| {
        let bytes = RamLayout { regions: regions.to_vec(), packed: false }.encode(1).unwrap();
        RamLayout::decode(&bytes, 1).map_err(|error| error.to_string())
    };
    let layout = decode(&[range(0, 0x1000), range(0x2000, 0x1000)]).unwrap();
    assert_eq!(layout.size(), 0x2000);
    for (regions, expected) in [
        (vec![range(0, 0x1001)], "multiples of 0x1000"),
        (vec![range(0x1000, 0)], "size 0"),
        (vec![range(u64::MAX - 0xfff, 0x1000)], "beyond the physical address limit"),
        (vec![range(0x2000, 0x1000), range(0, 0x1000)], "begins before 0x3000, where another ends"),
        (vec![range(0, 0x2000), range(0x1000, 0x1000)], "begins before 0x2000, where another ends"),
        ((0..1025).map(|at| range(at * 0x1000, 0x1000)).collect(), "at most 1024 are allowed"),
        (vec![range(0, 16 << 40), range(16 << 40, 0x1000)], "at most 17592186044416 are allowed"),
    ] {
        let problem = decode(&regions).unwrap_err();
        assert!(problem.contains(expected), "{problem}");
    }
    let mut bytes = layout.encode(1).unwrap();
    for len in 0..bytes.len() {
        assert!(RamLayout::decode(&bytes[..len], 1).is_err(), "{len}");
    }
    bytes.push(0);
    assert_eq!(RamLayout::decode(&bytes, 1).unwrap_err().to_string(), "1 bytes follow its end");
}
