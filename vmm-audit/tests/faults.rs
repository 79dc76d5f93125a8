//! Disks that are full, fail or end, and machines that lose their power.

// The lints spare test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::cast_possible_truncation)]
#![cfg(feature = "testkit")]

mod support;

use std::sync::Arc;

use support::{ORIGIN, append, check, small_log};
use vmm_audit::event::Kind;
use vmm_audit::keys::MemoryKeys;
use vmm_audit::log::{LogError, LogOptions, LogWriter};
use vmm_audit::note::Verifier;
use vmm_audit::storage::MemoryStorage;
use vmm_audit::storage::faulty::{Faults, FaultyStorage};
use vmm_audit::{Entries, Item};

fn open(storage: &MemoryStorage, keys: &MemoryKeys) -> Result<LogWriter, LogError> {
    LogWriter::open(Arc::new(storage.clone()), Box::new(keys.clone()), ORIGIN, LogOptions::new())
        .map(|(log, _)| log)
}

fn requests(storage: &MemoryStorage) -> Vec<vmm_audit::Digest> {
    let mut entries = Entries::new(Arc::new(storage.clone()));
    let mut found = Vec::new();
    while let Some(item) = entries.next().unwrap() {
        match item {
            Item::Entry(entry) if entry.source == 1 => found.push(entry.event.unwrap().request.unwrap()),
            Item::Damage { place, why, .. } => panic!("{place}: {why}"),
            _ => {}
        }
    }
    found
}

/// A log with one decision in it that is acknowledged, on a disk that fails as it is told.
struct Begun {
    memory: MemoryStorage,
    keys: MemoryKeys,
    faults: Faults,
    log: LogWriter,
    key: Verifier,
}

fn begun() -> Begun {
    let (memory, keys) = (MemoryStorage::new(), MemoryKeys::new());
    let (faulty, faults) = FaultyStorage::new(memory.clone());
    let (mut log, _) =
        LogWriter::open(Arc::new(faulty), Box::new(keys.clone()), ORIGIN, LogOptions::new()).unwrap();
    let key = log.verifier().clone();
    append(&mut log, 0);
    log.commit().unwrap();
    Begun { memory, keys, faults, log, key }
}

#[test]
fn a_full_disk_loses_nothing_and_is_tried_again() {
    let Begun { memory, faults, mut log, key, .. } = begun();
    // However many bytes still fit: nothing of the batch may be taken for a batch.
    for room in [0, 1, 11, 12, 13, 100, 400] {
        faults.disk_has_room_for(Some(room));
        append(&mut log, room);
        let error = log.commit().unwrap_err();
        assert!(error.is_transient(), "{error}");
        assert!(error.to_string().contains("takes no more"), "{error}");
        let before = check(&memory, &key);
        assert!(before.intact, "{:?}", before.findings);
    }
    faults.disk_has_room_for(None);
    log.commit().unwrap();
    log.close().unwrap();
    assert_eq!(requests(&memory).len(), 8);
    assert!(check(&memory, &key).intact);
}

#[test]
fn a_failed_synchronisation_closes_the_log_and_keeps_what_was_acknowledged() {
    let Begun { memory, keys, faults, mut log, key } = begun();
    let acknowledged = log.acknowledged();
    faults.sync_fails(true);
    append(&mut log, 1);
    assert!(matches!(log.commit(), Err(LogError::Sync { .. })));
    // Not even if the disk works again: nobody knows what it has.
    faults.sync_fails(false);
    assert!(matches!(log.commit(), Err(LogError::Poisoned(_))));
    assert!(matches!(log.append(1, b""), Err(LogError::Poisoned(_))));
    drop(log);

    let left = memory.after_power_loss(0);
    let mut log = open(&left, &keys).unwrap();
    assert_eq!(log.acknowledged(), acknowledged + 1, "and the event that it was opened");
    append(&mut log, 2);
    log.close().unwrap();
    assert!(check(&left, &key).intact);
    assert_eq!(requests(&left).len(), 2);
}

/// The machine ends at every single operation, with every kind of tail; whatever was acknowledged is there, and recovery is clean.
#[test]
fn power_may_fail_at_every_operation() {
    let script = |log: &mut LogWriter, acknowledged: &mut u64| -> Result<(), LogError> {
        for n in 0..6 {
            log.append(1, &support::decision(n).encode().unwrap())?;
            log.commit()?;
            *acknowledged = n + 1;
            if n % 2 == 1 {
                log.rotate()?;
            }
        }
        Ok(())
    };
    let mut operations = 0;
    loop {
        let mut done = false;
        for torn in [0, 1, 30, 200, usize::MAX] {
            let (memory, keys) = (MemoryStorage::new(), MemoryKeys::new());
            let (faulty, faults) = FaultyStorage::new(memory.clone());
            faults.dies_after(Some(operations));
            let mut acknowledged = 0;
            let opened = LogWriter::open(Arc::new(faulty), Box::new(keys.clone()), ORIGIN, LogOptions::new());
            let result = opened.and_then(|(mut log, _)| script(&mut log, &mut acknowledged));
            done = result.is_ok();
            let left = memory.after_power_loss(torn);
            let mut log = open(&left, &keys)
                .unwrap_or_else(|e| panic!("after {operations} operations, {torn} bytes torn: {e}"));
            let key = log.verifier().clone();
            append(&mut log, 99);
            log.rotate().unwrap();
            append(&mut log, 100);
            log.close().unwrap();
            let result = check(&left, &key);
            assert!(result.intact, "after {operations} operations, {torn} torn: {:?}", result.findings);
            let found = requests(&left);
            assert!(found.len() as u64 >= acknowledged + 2, "after {operations} operations, {torn} torn");
            for n in 0..acknowledged {
                assert_eq!(found[n as usize], support::decision(n).request.unwrap());
            }
        }
        if done {
            break;
        }
        operations += 1;
    }
    assert!(operations > 30, "{operations}");
}

#[test]
fn what_recovery_cuts_is_kept_and_written_down() {
    let (storage, keys, key) = small_log(5, 1);
    let path = "segments/0000000000";
    let whole = storage.files()[path].clone();
    let size = check(&storage, &key).size;
    let tail = [&whole[108..180], b"torn"].concat();
    storage.put(path, [whole, tail.clone()].concat());
    assert!(!check(&storage, &key).intact);
    let (log, recovered) =
        LogWriter::open(Arc::new(storage.clone()), Box::new(keys), ORIGIN, LogOptions::new()).unwrap();
    assert_eq!((recovered.entries, recovered.cut_bytes), (size, tail.len() as u64));
    log.close().unwrap();
    let kept = recovered.cut_file.unwrap();
    assert_eq!(storage.files()[&kept], tail);
    assert!(check(&storage, &key).intact);
    let mut entries = Entries::new(Arc::new(storage.clone()));
    let mut events = Vec::new();
    while let Some(item) = entries.next().unwrap() {
        if let Item::Entry(found) = item {
            events.extend(found.event.ok().filter(|event| event.kind == Kind::Recovery));
        }
    }
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].bytes, tail.len() as u64);
    // What was kept is evidence like everything else.
    for at in 0..tail.len() {
        let mut changed = tail.clone();
        changed[at] ^= 1;
        let copy = storage.copy();
        copy.put(&kept, changed);
        assert!(!check(&copy, &key).intact);
    }
}

#[test]
fn damage_to_what_was_acknowledged_is_never_cut_off() {
    let (storage, keys, _) = small_log(9, 1);
    let path = "segments/0000000000";
    let whole = storage.files()[path].clone();
    // All but the last frame, which is a checkpoint that nothing comes after.
    for at in (0..whole.len() - 400).step_by(3) {
        let copy = storage.copy();
        let mut changed = whole.clone();
        changed[at] ^= 0x10;
        copy.put(path, changed.clone());
        let opened =
            LogWriter::open(Arc::new(copy.clone()), Box::new(keys.copy()), ORIGIN, LogOptions::new());
        assert!(matches!(opened, Err(LogError::Damaged { .. })), "byte {at}");
        assert_eq!(copy.files()[path], changed, "byte {at}");
    }
}

/// A guest's disk requests, each of which is written down, while the log's disk stands still: they take what they take otherwise.
/// A tile and the published checkpoint are made of the segments: one that has become whatever it is, of whatever length, is made again.
#[test]
fn what_is_made_of_the_segments_is_made_again_however_long_it_has_become() {
    for length in [1, 8192, 1 << 20] {
        let (storage, keys, key) = support::small_log(10, 2);
        let spoiled: Vec<String> = storage
            .files()
            .into_keys()
            .filter(|path| path.contains(".p/") || path == "checkpoint")
            .inspect(|path| storage.put(path, vec![b'x'; length]))
            .collect();
        assert!(spoiled.len() >= 2, "{spoiled:?}");
        assert!(!check(&storage, &key).intact);
        open(&storage, &keys).unwrap().close().unwrap();
        let result = check(&storage, &key);
        assert!(result.intact && result.closed, "{length}: {:?}", result.findings);
    }
}

#[test]
fn a_log_that_is_refused_is_left_as_it_is() {
    let Begun { memory, keys, faults, mut log, .. } = begun();
    let others = keys.copy();
    log.rotate().unwrap();
    append(&mut log, 1);
    faults.disk_has_room_for(Some(40));
    assert!(log.commit().unwrap_err().is_transient());
    drop(log);
    let name = "segments/0000000001";
    let mut bytes = memory.files().remove(name).unwrap();
    // A tail that nobody has acknowledged, and the keys of the epoch before.
    bytes.extend_from_slice(b"tail");
    memory.put(name, bytes);
    let before = memory.files();
    let error = open(&memory, &others).err().unwrap();
    assert!(error.to_string().contains("the key store has a key of epoch 0"), "{error}");
    assert!(memory.files() == before, "something has changed");
    // With its own keys it is opened, and the tail is kept.
    drop(open(&memory, &keys).unwrap());
    assert!(memory.files().keys().any(|path| path.starts_with("cut/")));
}

#[test]
fn a_disk_that_stands_still_is_not_felt_by_a_guest() {
    use std::os::unix::fs::FileExt as _;
    use std::time::{Duration, Instant};
    use vmm_audit::event::Party;
    use vmm_audit::pipeline::{AuditLog, PipelineOptions, Refused};

    let (faulty, faults) = FaultyStorage::new(MemoryStorage::new());
    let deadline = Duration::from_millis(500);
    let options = PipelineOptions::new().deadline(deadline).rings(64, 1024);
    let (log, _) =
        AuditLog::open(Arc::new(faulty), Box::new(MemoryKeys::new()), ORIGIN, LogOptions::new(), options)
            .unwrap();
    let emitter = log.emitter(Party::vm(1, 1));
    let disk = tempfile::tempfile().unwrap();
    disk.write_all_at(&vec![7; 1 << 20], 0).unwrap();
    let request = |n: u64, buffer: &mut [u8]| {
        let begun = Instant::now();
        disk.read_exact_at(buffer, n * 4096 % (1 << 20)).unwrap();
        emitter.emit(&support::traffic(n)).unwrap();
        begun.elapsed()
    };
    let median = |count: u64| {
        let mut buffer = [0; 4096];
        let mut times: Vec<_> = (0..count).map(|n| request(n, &mut buffer)).collect();
        times.sort_unstable();
        times[times.len() / 2]
    };
    median(2000);
    let before = median(20_000);
    faults.stall(true);
    let begun = Instant::now();
    // Past the ring's size, so that most are counted, and past the deadline.
    let mut during = Duration::ZERO;
    while begun.elapsed() < deadline * 2 {
        during = during.max(median(5000));
    }
    assert!(during <= before * 2 + Duration::from_micros(2), "{during:?} instead of {before:?}");
    assert!(matches!(emitter.admit(&support::decision(1)), Err(Refused::Stalled(_))));
    assert!(emitter.counted() > 1000);
    faults.stall(false);
    log.flush(Duration::from_secs(60)).unwrap();
    log.close().unwrap();
}

#[test]
fn only_one_writer_has_a_log() {
    let (storage, keys, _) = small_log(1, 1);
    let log = open(&storage, &keys).unwrap();
    assert!(matches!(open(&storage, &keys), Err(LogError::Locked)));
    drop(log);
    assert!(open(&storage, &keys).is_ok());
}
