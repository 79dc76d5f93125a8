//! An audit log to whose files something was done, and the writer that opens it: either it says what is damaged and changes nothing,
//! or what was acknowledged is there and the log is intact afterwards.
#![no_main]

use std::sync::{Arc, OnceLock};

use libfuzzer_sys::fuzz_target;
use vmm_audit::event::{Event, Kind};
use vmm_audit::keys::MemoryKeys;
use vmm_audit::log::{LogOptions, LogWriter};
use vmm_audit::note::Verifier;
use vmm_audit::storage::MemoryStorage;
use vmm_audit::verify::{VerifyOptions, verify};

#[derive(arbitrary::Arbitrary, Debug)]
enum Change {
    Flip { at: u32, bits: u8 },
    Cut { length: u32 },
    Append { bytes: Vec<u8> },
    Repeat { from: u32, length: u16 },
    Replace { bytes: Vec<u8> },
}

fn good() -> &'static (MemoryStorage, MemoryKeys, Verifier, u64) {
    static LOG: OnceLock<(MemoryStorage, MemoryKeys, Verifier, u64)> = OnceLock::new();
    LOG.get_or_init(|| {
        let (storage, keys) = (MemoryStorage::new(), MemoryKeys::new());
        let (mut log, _) =
            LogWriter::open(Arc::new(storage.clone()), Box::new(keys.clone()), "fuzz", LogOptions::new())
                .expect("a log");
        for n in 0..30u32 {
            log.append(1, &Event::new(Kind::Reset).encode().expect("an event")).expect("memory");
            if n % 5 == 4 {
                log.commit().expect("memory");
            }
            if n == 14 {
                log.rotate().expect("memory");
            }
        }
        let (key, size) = (log.verifier().clone(), log.acknowledged());
        drop(log);
        (storage, keys, key, size)
    })
}

fn change(bytes: &mut Vec<u8>, change: Change) {
    let length = bytes.len().max(1);
    match change {
        Change::Flip { at, bits } => {
            if let Some(byte) = bytes.get_mut(at as usize % length) {
                *byte ^= bits;
            }
        }
        Change::Cut { length: to } => bytes.truncate(to as usize % (length + 1)),
        Change::Append { bytes: more } => bytes.extend_from_slice(&more),
        Change::Repeat { from, length: count } => {
            let from = from as usize % length;
            let part = bytes.get(from..(from + count as usize).min(bytes.len())).unwrap_or_default().to_vec();
            bytes.extend_from_slice(&part);
        }
        Change::Replace { bytes: other } => *bytes = other,
    }
}

fuzz_target!(|changes: Vec<(u8, Change)>| {
    let (storage, keys, key, size) = good();
    let storage = storage.copy();
    let whole = storage.files();
    let mut files = whole.clone();
    let names: Vec<_> = files.keys().cloned().collect();
    for (file, what) in changes.into_iter().take(8) {
        let name = &names[file as usize % names.len()];
        if let Some(bytes) = files.get_mut(name) {
            change(bytes, what);
            storage.put(name, bytes.clone());
        }
    }
    let opened = LogWriter::open(Arc::new(storage.clone()), Box::new(keys.copy()), "fuzz", LogOptions::new());
    let segments = |files: std::collections::BTreeMap<String, Vec<u8>>| -> Vec<_> {
        files.into_iter().filter(|(name, _)| name.starts_with("segments/")).collect()
    };
    let (mut log, recovered) = match opened {
        Ok(opened) => opened,
        Err(error) => {
            let is_left = segments(storage.files()) == segments(files);
            assert!(is_left, "a log that is refused is left as it is: {error}");
            return;
        }
    };
    // A published checkpoint that was damaged says nothing about how much there was.
    let checkpoint_is_good = files.get("checkpoint") == whole.get("checkpoint");
    assert!(recovered.entries <= *size);
    assert!(!checkpoint_is_good || recovered.entries > 0);
    log.append(1, &Event::new(Kind::Reset).encode().expect("an event")).expect("memory");
    log.close().expect("memory");
    // The segment before the last, tiles and key files are the verifier's to check; the last segment was recovery's.
    let last_only =
        files.iter().all(|(name, bytes)| name == "segments/0000000001" || whole.get(name) == Some(bytes));
    let result =
        verify(&storage, &VerifyOptions::new(key.clone()), &mut |_, _| ()).expect("memory can be read");
    assert!(!last_only || result.intact, "{:?}", result.findings);
});
