//! RAM that comes as it is touched.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::*;

/// Whether the host lets this process have user faults; why not, if it does not.
fn has_user_faults(test: &str) -> bool {
    let created = super::super::ram::userfault::UserFaults::new();
    if let Err(error) = &created {
        println!("{test}: skipped: userfaultfd(2) says: {error}");
    }
    created.is_ok()
}

fn holds(what: &str, is_so: impl Fn() -> bool) {
    let started = Instant::now();
    while !is_so() {
        assert!(started.elapsed() < Duration::from_secs(20), "waiting for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn what_is_touched_is_there_and_the_rest_comes() {
    if !has_user_faults("what_is_touched_is_there_and_the_rest_comes") {
        return;
    }
    let place = Place::new();
    let ram = ram(&Backing::Anonymous);
    fill(&ram);
    let expected = contents(&ram);
    for packed in [false, true] {
        save(&ram, place.path("vm"), &RamOptions::new().packed(packed));
        let snapshot = Arc::new(Snapshot::open(place.path("vm")).unwrap());
        let loaded = super::ram(&Backing::Anonymous);
        // What was in it before is gone.
        loaded.memory().write_slice(&[1; 0x9000], GuestAddress(0x20000)).unwrap();
        let lazy = snapshot.load_ram_lazily(&loaded, |error| panic!("{error}")).unwrap();
        assert!(contents(&loaded) == expected, "packed: {packed}");
        holds("all of it", || lazy.is_complete());
        assert_eq!(lazy.done(), 2 * (1 << 20) + 5 * PAGE_SIZE);
        assert!(lazy.failure().is_none());
        drop(lazy);
        assert!(contents(&loaded) == expected, "packed: {packed}, afterwards");
    }
}

#[test]
fn what_is_given_back_to_the_host_is_zero() {
    if !has_user_faults("what_is_given_back_to_the_host_is_zero") {
        return;
    }
    let place = Place::new();
    // So large that it takes a while.
    let build = || GuestRam::builder().ram(256 << 20).build().unwrap();
    let ram = build();
    for page in (0..256 << 20).step_by(4096) {
        ram.memory().write_obj(1_u8, GuestAddress(page)).unwrap();
    }
    save(&ram, place.path("vm"), &RamOptions::new());
    drop(ram);
    let snapshot = Arc::new(Snapshot::open(place.path("vm")).unwrap());
    let loaded = build();
    let lazy = snapshot.load_ram_lazily(&loaded, |_| ()).unwrap();
    let last = GuestAddress((256 << 20) - 4096);
    let read = || loaded.memory().read_obj::<u8>(last).unwrap();
    assert_eq!(read(), 1);
    loaded.discard(last, 4096).unwrap();
    assert_eq!(read(), 0, "complete by then: {}", lazy.is_complete());
    // Stopped in the middle, what has not come is zero.
    drop(lazy);
    assert_eq!(read(), 0);
}

#[test]
fn damage_is_told_and_nothing_wrong_is_given() {
    use std::os::unix::fs::FileExt as _;
    if !has_user_faults("damage_is_told_and_nothing_wrong_is_given") {
        return;
    }
    let place = Place::new();
    let ram = ram(&Backing::Anonymous);
    fill(&ram);
    save(&ram, place.path("vm"), &RamOptions::new());
    let file = std::fs::File::options().write(true).open(place.path("vm")).unwrap();
    file.write_all_at(&[0x77], 4096 + 0x81234).unwrap();
    let snapshot = Arc::new(Snapshot::open(place.path("vm")).unwrap());
    let (loaded, told) = (super::ram(&Backing::Anonymous), Arc::new(Mutex::new(String::new())));
    let tell = Arc::clone(&told);
    let lazy =
        snapshot.load_ram_lazily(&loaded, move |error| *tell.lock().unwrap() = error.to_string()).unwrap();
    holds("the failure", || !told.lock().unwrap().is_empty());
    let problem = told.lock().unwrap().clone();
    assert!(problem.contains("in RAM at 0x80000 to 0xc0000"), "{problem}");
    holds("it to be kept", || lazy.failure().is_some_and(|error| error.to_string() == problem));
    assert!(!lazy.is_complete());
    // What came before it is there.
    assert_eq!(loaded.memory().read_obj::<u8>(GuestAddress(0x5fff)).unwrap(), 1);
}

#[test]
fn memory_that_others_may_see_is_refused() {
    if !has_user_faults("memory_that_others_may_see_is_refused") {
        return;
    }
    let place = Place::new();
    save(&ram(&Backing::Anonymous), place.path("vm"), &RamOptions::new());
    let snapshot = Arc::new(Snapshot::open(place.path("vm")).unwrap());
    let problem = error(snapshot.load_ram_lazily(&ram(&Backing::Memfd), |_| ()));
    assert!(problem.ends_with("that takes anonymous memory of small pages"), "{problem}");
}
