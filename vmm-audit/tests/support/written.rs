//! A log in memory, on a disk that can be told to stand still.

use std::sync::Arc;
use std::time::Duration;

use vmm_audit::event::{Event, Kind};
use vmm_audit::keys::MemoryKeys;
use vmm_audit::log::LogOptions;
use vmm_audit::pipeline::{AuditLog, PipelineOptions};
use vmm_audit::storage::MemoryStorage;
use vmm_audit::storage::faulty::{Faults, FaultyStorage};
use vmm_audit::verify::{VerifyOptions, verify};
use vmm_audit::{Entries, Item};

pub(crate) const LONG: Duration = Duration::from_secs(60);

pub(crate) struct Written {
    memory: MemoryStorage,
    pub(crate) faults: Faults,
    pub(crate) log: AuditLog,
}

pub(crate) fn log(options: PipelineOptions) -> Written {
    let memory = MemoryStorage::new();
    let (storage, faults) = FaultyStorage::new(memory.clone());
    let published = LogOptions::new().publish_every(LONG * 60);
    let opened =
        AuditLog::open(Arc::new(storage), Box::new(MemoryKeys::new()), "log.example", published, options);
    Written { memory, faults, log: opened.unwrap().0 }
}

impl Written {
    /// Closes the log, and returns the events that were not the log's own, after checking that it is intact.
    pub(crate) fn events(self) -> Vec<Event> {
        let key = self.log.verifier().clone();
        self.log.close().unwrap();
        let result = verify(&self.memory, &VerifyOptions::new(key), &mut |_, _| ()).unwrap();
        assert!(result.intact && result.closed, "{:?}", result.findings);
        let mut entries = Entries::new(Arc::new(self.memory));
        let mut events = Vec::new();
        while let Some(item) = entries.next().unwrap() {
            if let Item::Entry(found) = item
                && found.source != 0
            {
                events.push(found.event.unwrap());
            }
        }
        events.retain(|event| event.kind != Kind::EmitterAttached);
        events
    }
}
