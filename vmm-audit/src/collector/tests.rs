use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::ring::{Class, Slot};
use super::*;
use crate::event::{Event, Kind, Party};
use crate::gaps::gaps;
use crate::keys::MemoryKeys;
use crate::log::{LogOptions, LogWriter};
use crate::pipeline::{Emitted, Refused};
use crate::storage::MemoryStorage;
use crate::verify::{VerifyOptions, verify};

const LONG: Duration = Duration::from_secs(60);

fn small() -> RingOptions {
    RingOptions { critical_events: 8, bulk_events: 4, slot_bytes: 512 }
}

#[test]
fn a_ring_is_first_in_first_out_and_bounded() {
    let ring = Ring::create(small()).unwrap();
    let other = Ring::from_fd(rustix::io::fcntl_dupfd_cloexec(ring.fd(), 0).unwrap()).unwrap();
    for round in 0..5u64 {
        for n in 0..4 {
            assert_eq!(ring.push(Class::Bulk, &[n; 3], &|| ()), Some(round * 4 + u64::from(n)));
        }
        assert_eq!(ring.push(Class::Bulk, &[9], &|| ()), None);
        assert!(ring.is_waiting(Class::Bulk));
        for n in 0..4 {
            assert_eq!(other.read(Class::Bulk, round * 4 + u64::from(n)), Slot::Filled(vec![n; 3]));
        }
        assert_eq!(other.read(Class::Bulk, round * 4 + 4), Slot::Empty);
        // Giving back twice gives back once.
        other.give_back(Class::Bulk, round * 4, round * 4 + 4);
        other.give_back(Class::Bulk, round * 4, round * 4 + 4);
        assert!(!ring.is_waiting(Class::Bulk));
    }
    assert_eq!(ring.push(Class::Critical, &[1], &|| ()), Some(0));
}

#[test]
fn slots_that_are_used_again_are_not_given_back_a_second_time() {
    let ring = Ring::create(small()).unwrap();
    (0..4).for_each(|_| assert!(ring.push(Class::Bulk, b"old", &|| ()).is_some()));
    // A collector dies after half of this.
    ring.give_back(Class::Bulk, 0, 4);
    assert_eq!(ring.push(Class::Bulk, b"new", &|| ()), Some(4));
    ring.give_back(Class::Bulk, 0, 4);
    assert_eq!(ring.read(Class::Bulk, 4), Slot::Filled(b"new".to_vec()));
}

#[test]
fn memory_that_can_shrink_or_is_no_ring_is_refused() {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
    let memory = |size: u64, seals: SealFlags| {
        let fd = memfd_create("test", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&fd, size).unwrap();
        fcntl_add_seals(&fd, seals).unwrap();
        Ring::from_fd(fd)
    };
    let both = SealFlags::SHRINK | SealFlags::GROW;
    for (size, seals) in
        [(1 << 20, SealFlags::SHRINK), (1 << 20, SealFlags::GROW), (100, both), (1 << 20, both)]
    {
        assert!(memory(size, seals).is_err());
    }
    // Sizes that do not fit the memory.
    for options in
        [RingOptions { slot_bytes: 100, ..small() }, small().rings(3, 4), small().rings(4, 1 << 20)]
    {
        assert!(Ring::create(options).is_err(), "{options:?}");
    }
}

struct Running {
    folder: tempfile::TempDir,
    storage: MemoryStorage,
    keys: MemoryKeys,
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<Result<(), CollectorError>>>,
}

impl Running {
    fn new() -> Self {
        let mut running = Self {
            folder: tempfile::tempdir().unwrap(),
            storage: MemoryStorage::new(),
            keys: MemoryKeys::new(),
            stop: Arc::new(AtomicBool::new(false)),
            thread: None,
        };
        running.start(|_| ());
        running
    }

    fn socket(&self) -> std::path::PathBuf {
        self.folder.path().join("socket")
    }

    fn start(&mut self, step: impl Fn(Step) + Send + 'static) {
        let (storage, keys) = (Arc::new(self.storage.clone()), Box::new(self.keys.clone()));
        let (log, _) = LogWriter::open(storage, keys, "log.example", LogOptions::new()).unwrap();
        let collector =
            Collector::bind(self.socket(), log, CollectorOptions::default()).unwrap().on_step(step);
        let stop = Arc::clone(&self.stop);
        self.thread = Some(std::thread::spawn(move || collector.run(&stop)));
    }

    fn stop(&mut self) {
        self.stop.store(true, Ordering::Release);
        self.thread.take().unwrap().join().unwrap().unwrap();
    }

    fn check(&self) {
        let key = crate::keys::KeyStore::load(&mut self.keys.clone()).unwrap().unwrap().root;
        let result = verify(&self.storage, &VerifyOptions::new(key), &mut |_, _| ()).unwrap();
        assert!(result.intact, "{:?}", result.findings);
    }
}

/// What the entries of a log are about, where they are events.
fn kinds(storage: &MemoryStorage) -> Vec<Kind> {
    let mut entries = crate::Entries::new(Arc::new(storage.clone()));
    let mut kinds = Vec::new();
    while let Some(item) = entries.next().unwrap() {
        if let crate::Item::Entry(found) = item {
            kinds.extend(found.event.ok().map(|event| event.kind));
        }
    }
    kinds
}

#[test]
fn events_of_another_side_of_a_socket_are_in_the_log() {
    let mut running = Running::new();
    let attached = attach(running.socket(), &Party::vm(5, 1), RingOptions::default(), LONG).unwrap();
    let emitter = attached.emitter();
    for n in 0..500 {
        let event = Event::new(Kind::Traffic).amount(0, n);
        assert_eq!(emitter.emit(&event), Ok(Emitted::Queued));
    }
    emitter.admit(&Event::new(Kind::Opened)).unwrap().wait(LONG).unwrap();
    assert!(attached.is_collected());
    drop(attached);
    let begun = Instant::now();
    while !gaps(Arc::new(running.storage.clone())).unwrap().accounts.iter().any(|account| account.ended) {
        assert!(begun.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(5));
    }
    running.stop();
    running.check();
    let accounts = gaps(Arc::new(running.storage.clone())).unwrap().accounts;
    assert_eq!((accounts[0].written, accounts[0].issued, accounts[0].missing), (501, 501, 0));
    assert_eq!(accounts[0].who.as_deref(), Some("vm 00000000-0000-0000-0000-000000000005#1"));
}

#[test]
fn an_emitter_outlives_its_collector() {
    let mut running = Running::new();
    let attached = attach(running.socket(), &Party::vm(5, 1), small().rings(64, 64), LONG).unwrap();
    let emitter = attached.emitter();
    emitter.admit(&Event::new(Kind::Opened)).unwrap().wait(LONG).unwrap();
    running.stop();
    for _ in 0..40 {
        assert_eq!(emitter.emit(&Event::new(Kind::Closed)), Ok(Emitted::Queued));
    }
    running.stop.store(false, Ordering::Release);
    running.start(|_| ());
    emitter.admit(&Event::new(Kind::Opened)).unwrap().wait(LONG).unwrap();
    running.stop();
    running.check();
    let accounts = gaps(Arc::new(running.storage.clone())).unwrap().accounts;
    assert_eq!((accounts.len(), accounts[0].written, accounts[0].missing), (1, 42, 0), "{accounts:?}");
}

#[test]
fn a_ring_without_a_collector_refuses_after_the_deadline() {
    let mut running = Running::new();
    let deadline = Duration::from_millis(200);
    let attached = attach(running.socket(), &Party::vm(5, 1), small(), deadline).unwrap();
    let emitter = attached.emitter();
    emitter.admit(&Event::new(Kind::Opened)).unwrap().wait(LONG).unwrap();
    running.stop();
    let begun = Instant::now();
    let mut admitted = 0;
    while emitter.admit(&Event::new(Kind::Opened)).is_ok() {
        admitted += 1;
        assert!(begun.elapsed() < LONG);
    }
    assert!(begun.elapsed() >= deadline / 2 && admitted <= 8, "{admitted}");
    let bulk = (0..10).filter(|_| emitter.emit(&Event::new(Kind::Traffic)) == Ok(Emitted::Queued)).count();
    assert_eq!(bulk, 4);
}

#[test]
fn who_attaches_once_has_no_other_collector() {
    let mut running = Running::new();
    let once = attach_once(running.socket(), &Party::vm(1, 1), RingOptions::default(), LONG).unwrap();
    once.emitter().admit(&Event::new(Kind::Opened)).unwrap().wait(LONG).unwrap();
    running.stop();
    running.stop = Arc::default();
    running.start(|_| ());
    // At once, and not after the deadline.
    let begun = Instant::now();
    while let Ok(receipt) = once.emitter().admit(&Event::new(Kind::Opened)) {
        drop(receipt);
        assert!(begun.elapsed() < LONG / 2, "it is admitted by a collector that has ended");
        std::thread::sleep(Duration::from_millis(10));
    }
    let refused = once.emitter().admit(&Event::new(Kind::Opened)).unwrap_err();
    assert!(matches!(refused, Refused::Closed(_)), "{refused}");
    let other = attach(running.socket(), &Party::vm(2, 1), RingOptions::default(), LONG).unwrap();
    other.emitter().admit(&Event::new(Kind::Closed)).unwrap().wait(LONG).unwrap();
    assert!(other.is_collected() && !once.is_collected());
    drop((once, other));
    running.stop();
    running.check();
    // However soon it ends after an emitter, it says that this one is gone. The other outlived its collector.
    let accounts = gaps(Arc::new(running.storage.clone())).unwrap().accounts;
    let ended: Vec<bool> = accounts.iter().map(|account| account.ended).collect();
    assert_eq!(ended, [false, true]);
    let opened = kinds(&running.storage).into_iter().filter(|kind| *kind == Kind::Opened).count();
    assert_eq!(opened, 1);
}

#[test]
fn silent_connections_without_end_keep_nobody_from_the_log() {
    let mut running = Running::new();
    let good = attach(running.socket(), &Party::vm(1, 1), RingOptions::default(), LONG).unwrap();
    good.emitter().admit(&Event::new(Kind::Opened)).unwrap().wait(LONG).unwrap();
    // Each is waited for: all of them take longer than anything else here.
    let silent: Vec<_> = (0..100).map(|_| UnixStream::connect(running.socket()).unwrap()).collect();
    good.emitter().admit(&Event::new(Kind::Closed)).unwrap().wait(LONG).unwrap();
    running.stop();
    running.check();
    let kinds = kinds(&running.storage);
    let count = |kind: Kind| kinds.iter().filter(|found| **found == kind).count();
    assert_eq!((count(Kind::Opened), count(Kind::Closed)), (1, 1));
    assert!(count(Kind::Malformed) < silent.len(), "it was written after all of them were turned away");
}

/// An emitter that writes into the ring what it likes spoils nothing but its own events.
#[test]
fn a_hostile_emitter_is_written_down() {
    let mut running = Running::new();
    let good = attach(running.socket(), &Party::vm(1, 1), RingOptions::default(), LONG).unwrap();
    // Nothing, garbage, and no memory at all.
    drop(UnixStream::connect(running.socket()).unwrap());
    std::io::Write::write_all(&mut UnixStream::connect(running.socket()).unwrap(), b"hello").unwrap();
    let bad = attach(running.socket(), &Party::vm(2, 1), RingOptions::default(), LONG).unwrap();
    let begun = Instant::now();
    while !bad.is_collected() {
        assert!(begun.elapsed() < LONG);
        std::thread::sleep(Duration::from_millis(1));
    }
    bad.scribble();
    good.emitter().admit(&Event::new(Kind::Opened)).unwrap().wait(LONG).unwrap();
    drop(bad);
    good.emitter().admit(&Event::new(Kind::Opened)).unwrap().wait(LONG).unwrap();
    drop(good);
    running.stop();
    running.check();
    let malformed = kinds(&running.storage).into_iter().filter(|kind| *kind == Kind::Malformed).count();
    assert!(malformed >= 4, "{malformed}");
}
