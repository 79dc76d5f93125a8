//! Audit logs whose files are anything: reading, verifying, accounting and reporting end, and take nothing for what it is not.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use vmm_audit::Entries;
use vmm_audit::event::{Entry, Event};
use vmm_audit::gaps::gaps;
use vmm_audit::note::Signer;
use vmm_audit::report::collect;
use vmm_audit::storage::{MemoryStorage, Storage};
use vmm_audit::verify::{VerifyOptions, verify};

#[derive(arbitrary::Arbitrary, Debug)]
struct Input {
    event: Vec<u8>,
    files: Vec<(u8, u8, Vec<u8>)>,
}

fn name(kind: u8, number: u8) -> String {
    match kind % 7 {
        0 | 1 => format!("segments/{:010}", number % 3),
        2 => format!("keys/{:08}", number % 3),
        3 => format!("tile/{}/{:03}", number % 2, number / 2 % 3),
        4 => format!("tile/{}/{:03}.p/{}", number % 2, number / 2 % 3, number / 8 + 1),
        5 => "checkpoint".to_owned(),
        _ => format!("cut/{:020}-0", number),
    }
}

fuzz_target!(|input: Input| {
    if let Ok(event) = Event::decode(&input.event) {
        let again = event.encode().expect("what was decoded is within the limits");
        if event.unknown.is_empty() {
            assert_eq!(Event::decode(&again).expect("it was written here"), event);
        }
        let json = serde_json::to_string(&event).expect("an event is JSON");
        assert_eq!(serde_json::from_str::<Event>(&json).expect("it was written here"), event);
    }
    drop(Entry::decode(&input.event));
    let storage = MemoryStorage::new();
    for (kind, number, bytes) in input.files {
        storage.put(&name(kind, number), bytes);
    }
    let shared: Arc<dyn Storage> = Arc::new(storage.clone());
    for live in [false, true] {
        let mut entries = Entries::new(Arc::clone(&shared));
        if live {
            entries = entries.live();
        }
        while entries.next().expect("memory can be read").is_some() {}
    }
    drop(gaps(Arc::clone(&shared)).expect("memory can be read"));
    drop(collect(&shared).expect("memory can be read"));
    // Nothing here is signed by this key.
    let signer = Signer::from_seed("fuzz", &[7; 32]).expect("a name");
    let options = VerifyOptions::new(signer.verifier().clone());
    let result = verify(&storage, &options, &mut |_, _| ()).expect("memory can be read");
    assert!(!result.intact && result.size == 0);
});
