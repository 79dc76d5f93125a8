//! Snapshots of which each is based on the one before.

use super::*;

#[test]
fn no_snapshot_is_written_that_has_too_many_below_it_to_be_read() {
    let place = Place::new();
    let ram = GuestRam::builder().ram(1 << 20).track_dirty(true).build().unwrap();
    let tracker = DirtyTracker::new(&ram);
    save(&ram, place.path("0"), &RamOptions::new());
    let mut top = Arc::new(Snapshot::open(place.path("0")).unwrap());
    for number in 1..64_u8 {
        ram.memory().write_obj(number, GuestAddress(u64::from(number) * PAGE_SIZE)).unwrap();
        let (changed, path) = (tracker.harvest().unwrap(), place.path(&number.to_string()));
        let (stats, _) = save(&ram, path.clone(), &RamOptions::new().since(&top, &changed));
        assert_eq!(stats.stored, 1);
        top = Arc::new(Snapshot::open_on(&top, path).unwrap());
    }
    let loaded = GuestRam::builder().ram(1 << 20).build().unwrap();
    top.load_ram(&loaded, &RamOptions::new()).unwrap();
    assert!(contents(&loaded) == contents(&ram));
    let mut writer = SnapshotWriter::create(place.path("64")).unwrap();
    let changed = tracker.harvest().unwrap();
    let problem = error(writer.put_ram(&ram, &RamOptions::new().since(&top, &changed)));
    assert!(problem.ends_with("64 snapshots would be below the next; at most 63 are allowed"), "{problem}");
}
