//! Logs for the tests.
#![allow(dead_code, reason = "each test uses some of it")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vmm_audit::Digest;
use vmm_audit::event::{Action, Event, Kind, Object, ObjectClass, Outcome, Party, Verdict};
use vmm_audit::keys::{FileKeys, KeyStore, MemoryKeys};
use vmm_audit::log::{LogOptions, LogWriter};
use vmm_audit::note::Verifier;
use vmm_audit::storage::{FsStorage, MemoryStorage};
use vmm_audit::verify::{Verification, VerifyOptions, verify};

pub(crate) const ORIGIN: &str = "host.example/audit";

/// A decision about a connection of one of a few machines to another.
pub(crate) fn decision(n: u64) -> Event {
    let denied = n.is_multiple_of(3);
    let event = Event::new(Kind::Decision)
        .subject(Party::vm(0x1111_0000 + u128::from(n % 5), 1))
        .peer(Party::vm(0x2222_0000 + u128::from(n % 4), 1))
        .action(Action::Connect)
        .object(Object::numbered(ObjectClass::Vsock, 5000 + n % 7))
        .policy(Digest::of(b"policy"))
        .request(Digest::of(&n.to_be_bytes()));
    if denied {
        event.verdict(Verdict::Deny).outcome(Outcome::Refused).rule("tenants-apart", 12)
    } else {
        event.verdict(Verdict::Allow).outcome(Outcome::Success).rule("web-to-db", 7)
    }
}

pub(crate) fn traffic(n: u64) -> Event {
    Event::new(Kind::Traffic)
        .subject(Party::vm(1, 1))
        .action(Action::Send)
        .verdict(Verdict::Allow)
        .amount(0, n)
}

pub(crate) fn append(log: &mut LogWriter, n: u64) {
    log.append(1, &decision(n).encode().unwrap()).unwrap();
}

/// A log in memory with some segments, a full tile, partial ones and keys that changed, closed in the ordinary way.
pub(crate) fn small_log(entries_each: u64, segments: u64) -> (MemoryStorage, MemoryKeys, Verifier) {
    let (storage, keys) = (MemoryStorage::new(), MemoryKeys::new());
    let (mut log, _) =
        LogWriter::open(Arc::new(storage.clone()), Box::new(keys.clone()), ORIGIN, LogOptions::new())
            .unwrap();
    let verifier = log.verifier().clone();
    for segment in 0..segments {
        for n in 0..entries_each {
            append(&mut log, n);
            if n % 4 == 3 {
                log.commit().unwrap();
            }
        }
        if segment + 1 < segments {
            log.rotate().unwrap();
        }
    }
    log.close().unwrap();
    (storage, keys, verifier)
}

pub(crate) fn check(storage: &MemoryStorage, key: &Verifier) -> Verification {
    verify(storage, &VerifyOptions::new(key.clone()), &mut |_, _| ()).unwrap()
}

pub(crate) fn storage_of(files: &BTreeMap<String, Vec<u8>>) -> MemoryStorage {
    let storage = MemoryStorage::new();
    for (path, bytes) in files {
        storage.put(path, bytes.clone());
    }
    storage
}

/// A directory and a key file beside it.
pub(crate) struct OnDisk {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) log: PathBuf,
    pub(crate) keys: PathBuf,
}

impl OnDisk {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (log, keys) = (folder.path().join("log"), folder.path().join("keys"));
        Self { folder, log, keys }
    }

    pub(crate) fn storage(&self) -> Arc<FsStorage> {
        Arc::new(FsStorage::create(&self.log).unwrap())
    }

    pub(crate) fn open(&self, options: LogOptions) -> LogWriter {
        LogWriter::open(self.storage(), Box::new(FileKeys::new(&self.keys)), ORIGIN, options).unwrap().0
    }

    pub(crate) fn verifier(&self) -> Verifier {
        FileKeys::new(&self.keys).load().unwrap().unwrap().root
    }

    pub(crate) fn verify(&self, live: bool) -> Verification {
        let options = VerifyOptions::new(self.verifier()).live(live);
        verify(&*self.storage(), &options, &mut |_, _| ()).unwrap()
    }
}

/// Where a program is, if it is there.
pub(crate) fn program(names: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let extra = [PathBuf::from("/usr/sbin"), PathBuf::from("/sbin")];
    let folders: Vec<_> = std::env::split_paths(&path).chain(extra).collect();
    names.iter().flat_map(|name| folders.iter().map(move |folder| folder.join(name))).find(|p| p.is_file())
}

pub(crate) fn manifest(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}
