//! Whatever is changed in a log is seen, and it is said where.

// The lints spare test functions only, not what they call.
#![allow(clippy::unwrap_used, clippy::panic, clippy::indexing_slicing, clippy::cast_possible_truncation)]

mod support;

use std::sync::Arc;

use support::{ORIGIN, append, check, decision, small_log, storage_of};
use vmm_audit::event::{Event, Kind};
use vmm_audit::keys::MemoryKeys;
use vmm_audit::log::segment::HEADER;
use vmm_audit::log::{LogOptions, LogWriter};
use vmm_audit::storage::MemoryStorage;
use vmm_audit::verify::{Severity, VerifyOptions, verify};

/// Frames of a segment: where each begins and ends, and whether it is a checkpoint.
fn frames(bytes: &[u8]) -> Vec<(usize, usize, bool)> {
    let (mut at, mut found) = (HEADER, Vec::new());
    while at + 12 <= bytes.len() {
        assert_eq!(bytes[at], 0xa5);
        let end = at + 12 + usize::from(u16::from_le_bytes([bytes[at + 2], bytes[at + 3]]));
        found.push((at, end, bytes[at + 1] == 2));
        at = end;
    }
    assert_eq!(at, bytes.len());
    found
}

#[test]
fn an_untouched_log_is_intact() {
    let (storage, _, key) = small_log(12, 3);
    let result = check(&storage, &key);
    assert!(result.intact && result.findings.is_empty(), "{:?}", result.findings);
    assert!(result.closed);
    let chain_only = VerifyOptions::new(key.clone()).tree(false);
    assert!(verify(&storage, &chain_only, &mut |_, _| ()).unwrap().intact);
    assert_eq!((result.segments, result.epoch, result.first_entry), (3, 2, 0));
    assert_eq!(result.size, 12 * 3 + 2);
    // keys/0, keys/1, checkpoint, three segments, partial tiles.
    assert!(storage.files().keys().filter(|path| path.starts_with("keys/")).count() == 2);
}

#[test]
fn every_flipped_byte_of_every_file_is_seen_and_located() {
    let (storage, _, key) = small_log(9, 3);
    let files = storage.files();
    let mut flips = 0;
    for (path, bytes) in &files {
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << (at % 8);
            let copy = storage.copy();
            copy.put(path, changed);
            let result = check(&copy, &key);
            assert!(!result.intact, "{path} byte {at}");
            let named = result.findings.iter().any(|finding| finding.file == *path);
            assert!(named, "{path} byte {at}: {:?}", result.findings);
            if !path.starts_with("tile/") {
                let chain_only = VerifyOptions::new(key.clone()).tree(false);
                let result = verify(&copy, &chain_only, &mut |_, _| ()).unwrap();
                assert!(!result.intact, "{path} byte {at}, by the chain alone");
            }
            if path.starts_with("segments/") && at >= HEADER {
                // The frame that has the byte is where the damage begins.
                let frame =
                    frames(bytes).into_iter().find(|(start, end, _)| (*start..*end).contains(&at)).unwrap();
                let found =
                    result.findings.iter().any(|f| f.file == *path && f.offset == Some(frame.0 as u64));
                assert!(found, "{path} byte {at}, frame at {}: {:?}", frame.0, result.findings);
            }
            flips += 1;
        }
    }
    assert!(flips > 5000, "{flips}");
}

#[test]
fn every_missing_file_is_seen() {
    let (storage, _, key) = small_log(300, 3);
    for path in storage.files().keys() {
        let mut files = storage.files();
        files.remove(path);
        // A narrower tile that a wider one stands for may go: the specification says so.
        let superseded = path.rsplit_once(".p/").is_some_and(|(tile, width)| {
            let width: u64 = width.parse().unwrap();
            let wider = |other: &String| {
                other == tile
                    || other
                        .rsplit_once(".p/")
                        .is_some_and(|(t, w)| t == tile && w.parse::<u64>().unwrap() > width)
            };
            files.keys().any(wider)
        });
        let result = check(&storage_of(&files), &key);
        assert!(!result.intact || superseded, "{path}");
    }
    // All of the segments but none, too.
    let result = check(&MemoryStorage::new(), &key);
    assert!(!result.intact);
}

#[test]
fn every_truncation_is_seen() {
    let (storage, _, key) = small_log(9, 3);
    for (path, bytes) in storage.files() {
        for length in 0..bytes.len() {
            let copy = storage.copy();
            copy.put(&path, bytes[..length].to_vec());
            assert!(!check(&copy, &key).intact, "{path} cut to {length}");
        }
    }
}

#[test]
fn records_that_are_deleted_repeated_or_reordered_are_seen() {
    let (storage, _, key) = small_log(12, 2);
    for (path, bytes) in storage.files().into_iter().filter(|(path, _)| path.starts_with("segments/")) {
        let frames = frames(&bytes);
        let bad = |changed: Vec<u8>, what: String| {
            let copy = storage.copy();
            copy.put(&path, changed);
            let result = check(&copy, &key);
            assert!(!result.intact, "{path}: {what}");
            // Without its last checkpoint, a segment that has all its entries ends well, and the next one does not continue it.
            let next = "segments/0000000001";
            let named = |file: &str| {
                file == path || (what.contains(&format!(" {}", frames.len() - 1)) && file == next)
            };
            assert!(
                result.findings.iter().any(|finding| named(&finding.file)),
                "{path}: {what}: {:?}",
                result.findings
            );
        };
        for (n, (start, end, _)) in frames.iter().enumerate() {
            bad([&bytes[..*start], &bytes[*end..]].concat(), format!("without frame {n}"));
            bad([&bytes[..*end], &bytes[*start..]].concat(), format!("frame {n} twice"));
            for (m, (other_start, other_end, _)) in frames.iter().enumerate().skip(n + 1) {
                let swapped = [
                    &bytes[..*start],
                    &bytes[*other_start..*other_end],
                    &bytes[*end..*other_start],
                    &bytes[*start..*end],
                    &bytes[*other_end..],
                ];
                bad(swapped.concat(), format!("frames {n} and {m} swapped"));
            }
        }
    }
}

#[test]
fn swapped_and_missing_segments_are_seen() {
    let (storage, _, key) = small_log(6, 4);
    let paths: Vec<_> = storage.files().into_keys().filter(|path| path.starts_with("segments/")).collect();
    for a in 0..paths.len() {
        for b in a + 1..paths.len() {
            let files = storage.files();
            let copy = storage.copy();
            copy.put(&paths[a], files[&paths[b]].clone());
            copy.put(&paths[b], files[&paths[a]].clone());
            assert!(!check(&copy, &key).intact, "{a} and {b}");
        }
    }
}

/// Events with good frames and checksums that nobody has signed.
#[test]
fn appended_records_are_seen() {
    let (storage, _, key) = small_log(6, 1);
    let path = "segments/0000000000";
    let mut bytes = storage.files()[path].clone();
    let (start, end, _) = frames(&bytes)[0];
    let frame = bytes[start..end].to_vec();
    let end = bytes.len() as u64;
    bytes.extend_from_slice(&frame);
    storage.put(path, bytes);
    let result = check(&storage, &key);
    assert!(!result.intact);
    assert!(result.findings.iter().any(|f| f.file == path && f.offset == Some(end)), "{:?}", result.findings);
}

#[test]
fn an_old_log_does_not_continue_a_later_checkpoint() {
    let (storage, keys) = (MemoryStorage::new(), MemoryKeys::new());
    let open = || {
        LogWriter::open(Arc::new(storage.clone()), Box::new(keys.clone()), ORIGIN, LogOptions::new())
            .unwrap()
            .0
    };
    let mut log = open();
    (0..5).for_each(|n| append(&mut log, n));
    let key = log.verifier().clone();
    log.close().unwrap();
    let old = storage.copy();
    let old_note = check(&old, &key).checkpoint.unwrap();
    let mut log = open();
    (5..9).for_each(|n| append(&mut log, n));
    log.close().unwrap();
    let note = check(&storage, &key).checkpoint.unwrap();

    // Nothing is wrong with the old one by itself. Who remembers sees it.
    assert!(check(&old, &key).intact);
    let options = VerifyOptions::new(key.clone()).since(note.into_bytes());
    let result = verify(&old, &options, &mut |_, _| ()).unwrap();
    assert!(!result.intact);
    assert!(result.findings[0].what.contains("old copy"), "{:?}", result.findings);
    assert!(verify(&storage, &options, &mut |_, _| ()).unwrap().intact);
    let options = VerifyOptions::new(key).since(old_note.into_bytes());
    assert!(verify(&storage, &options, &mut |_, _| ()).unwrap().intact);

    // And the writer sees it too: by its own keys, or by what it has published.
    old.put("checkpoint", storage.files()["checkpoint"].clone());
    let opened = LogWriter::open(Arc::new(old), Box::new(keys), ORIGIN, LogOptions::new());
    assert!(opened.err().unwrap().to_string().contains("old copy"));
}

#[test]
fn a_log_that_was_written_again_with_another_key_is_not_the_log() {
    let (_, _, key) = small_log(6, 2);
    let (forged, _, _) = small_log(6, 2);
    let result = check(&forged, &key);
    assert!(!result.intact && result.checkpoints == 0);
}

/// The same entries signed by the right key, in another order: what whoever has the present key could do, and a kept checkpoint shows.
#[test]
fn a_log_that_was_written_again_with_its_own_key_does_not_continue_what_was_kept() {
    let (storage, keys) = (MemoryStorage::new(), MemoryKeys::new());
    let open = |storage: &MemoryStorage, keys: &MemoryKeys| {
        LogWriter::open(Arc::new(storage.clone()), Box::new(keys.clone()), ORIGIN, LogOptions::new())
            .unwrap()
            .0
    };
    drop(open(&storage, &keys));
    let (other, other_keys) = (storage.copy(), keys.copy());
    let write = |storage: &MemoryStorage, keys: &MemoryKeys, numbers: [u64; 2]| {
        let mut log = open(storage, keys);
        numbers.iter().for_each(|n| append(&mut log, *n));
        let key = log.verifier().clone();
        log.close().unwrap();
        key
    };
    let key = write(&storage, &keys, [1, 2]);
    write(&other, &other_keys, [2, 1]);
    let kept = check(&storage, &key).checkpoint.unwrap();
    for tree in [true, false] {
        let options = VerifyOptions::new(key.clone()).since(kept.clone().into_bytes()).tree(tree);
        let result = verify(&other, &options, &mut |_, _| ()).unwrap();
        assert!(!result.intact);
        assert!(result.findings.iter().any(|f| f.what.contains("another root")), "{:?}", result.findings);
        assert!(verify(&storage, &options, &mut |_, _| ()).unwrap().intact);
    }
}

/// Whoever takes over the host has the present key, and no earlier one.
#[test]
fn the_present_key_signs_nothing_of_an_earlier_epoch() {
    let (storage, _, key) = small_log(6, 3);
    let (_, thief, _) = small_log(1, 1);
    let mut files = storage.files();
    // The first segment is replaced by one that another key has signed.
    let (forged, _, _) = small_log(6, 3);
    files.insert("segments/0000000000".to_owned(), forged.files()["segments/0000000000"].clone());
    drop(thief);
    let result = check(&storage_of(&files), &key);
    assert!(!result.intact);
    assert!(result.findings.iter().any(|f| f.file == "segments/0000000000"));
}

#[test]
fn removed_segments_are_missed_unless_the_log_says_that_they_went() {
    let (storage, keys) = (MemoryStorage::new(), MemoryKeys::new());
    let options = LogOptions::new().keep_segments(2);
    let (mut log, _) =
        LogWriter::open(Arc::new(storage.clone()), Box::new(keys.clone()), ORIGIN, options).unwrap();
    let key = log.verifier().clone();
    for n in 0..5 {
        (0..300).for_each(|n| append(&mut log, n));
        log.commit().unwrap();
        if n < 4 {
            log.rotate().unwrap();
        }
    }
    log.commit().unwrap();
    log.close().unwrap();
    let result = check(&storage, &key);
    assert!(result.intact, "{:?}", result.findings);
    assert_eq!(result.segments, 2);
    assert!(result.first_entry > 800);
    // One more that nobody speaks of.
    let mut files = storage.files();
    let first = files.keys().find(|path| path.starts_with("segments/")).unwrap().clone();
    files.remove(&first);
    assert!(!check(&storage_of(&files), &key).intact);
    // Tiles of removed entries are still checked, and what is left goes on.
    for path in storage.files().keys().filter(|path| path.starts_with("tile/")) {
        let copy = storage.copy();
        let mut bytes = copy.files()[path].clone();
        bytes[7] ^= 1;
        copy.put(path, bytes);
        assert!(!check(&copy, &key).intact, "{path}");
    }
    let reopened = LogWriter::open(Arc::new(storage.clone()), Box::new(keys), ORIGIN, LogOptions::new());
    let mut log = reopened.unwrap().0;
    append(&mut log, 1);
    log.close().unwrap();
    assert!(check(&storage, &key).intact);
}

#[test]
fn damage_in_one_place_leaves_the_rest_verified() {
    let (storage, _, key) = small_log(40, 3);
    let path = "segments/0000000000";
    let mut bytes = storage.files()[path].clone();
    let (start, _, _) = frames(&bytes)[5];
    bytes[start + 20] ^= 1;
    storage.put(path, bytes);
    let result = check(&storage, &key);
    let damage: Vec<_> = result.findings.iter().filter(|f| f.severity == Severity::Damage).collect();
    assert!(damage.iter().all(|finding| finding.file == path), "{damage:?}");
    assert_eq!((damage.len(), result.size), (2, 40 * 3 + 2));
}

/// What the writer's own process writes as its own events cannot be written by another source.
#[test]
fn a_source_cannot_speak_for_the_log() {
    let (storage, keys) = (MemoryStorage::new(), MemoryKeys::new());
    let (mut log, _) =
        LogWriter::open(Arc::new(storage.clone()), Box::new(keys), ORIGIN, LogOptions::new()).unwrap();
    let key = log.verifier().clone();
    let lie = Event::new(Kind::Retention)
        .object(vmm_audit::event::Object::numbered(vmm_audit::event::ObjectClass::Log, 1000));
    log.append(1, &lie.encode().unwrap()).unwrap();
    log.append(1, &decision(1).encode().unwrap()).unwrap();
    log.rotate().unwrap();
    log.close().unwrap();
    let mut files = storage.files();
    files.remove("segments/0000000000");
    assert!(!check(&storage_of(&files), &key).intact);
}
