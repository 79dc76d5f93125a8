//! What a machine that goes on from a snapshot has changed since, which is all that a snapshot based on that one has.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
use vmm_cpu::Vm;
use vmm_memory::snapshot::{Snapshot, SnapshotError};
use vmm_memory::{DirtyPages, DirtyTracker, GuestRam, is_read_only};

/// A snapshot, and those that it is based on: each on the one before it.
pub(crate) struct Chain {
    bases: Vec<Arc<Snapshot>>,
    last: Arc<Snapshot>,
}

impl Chain {
    pub(crate) fn open(bases: &[PathBuf], path: &Path) -> Result<Self, SnapshotError> {
        let open = |base: Option<&Arc<Snapshot>>, path: &Path| {
            base.map_or_else(|| Snapshot::open(path), |base| Snapshot::open_on(base, path)).map(Arc::new)
        };
        let mut opened = Vec::new();
        for path in bases {
            opened.push(open(opened.last(), path)?);
        }
        let last = open(opened.last(), path)?;
        Ok(Self { bases: opened, last })
    }

    /// The one that the machine goes on from.
    pub(crate) fn last(&self) -> &Arc<Snapshot> {
        &self.last
    }

    /// All of them.
    pub(crate) fn snapshots(&self) -> impl Iterator<Item = &Arc<Snapshot>> {
        self.bases.iter().chain([&self.last])
    }

    /// Whether a snapshot at `path` would take the place of none of these.
    pub(crate) fn check_apart(&self, path: &Path) -> Result<()> {
        // What is not there yet is none of them.
        let Ok(place) = path.canonicalize() else { return Ok(()) };
        for snapshot in self.snapshots() {
            let own = snapshot.path();
            let is_own = own.canonicalize().is_ok_and(|own| own == place);
            ensure!(!is_own, "{} would be based on {}, whose place it takes", path.display(), own.display());
        }
        Ok(())
    }
}

/// Pages that have changed since RAM was as in the snapshot.
pub(crate) struct Changes {
    base: Arc<Snapshot>,
    tracker: DirtyTracker,
}

impl Changes {
    /// From now on, before anything has run that writes RAM, which is as in `base`.
    pub(crate) fn since(base: &Arc<Snapshot>, vm: &dyn Vm, ram: &GuestRam) -> Result<Self> {
        let log = vm.dirty_log().context("the backend does not tell what its guest has written")?;
        for region in ram.regions().iter().filter(|region| !is_read_only(region)) {
            log.start(vmm_memory::vm_memory::GuestMemoryRegion::start_addr(&**region))?;
        }
        let tracker = DirtyTracker::new(ram);
        tracker.add_log(log);
        Ok(Self { base: Arc::clone(base), tracker })
    }

    pub(crate) fn base(&self) -> &Snapshot {
        &self.base
    }

    /// Those until now, when nothing writes RAM.
    pub(crate) fn harvest(&self) -> Result<DirtyPages> {
        Ok(self.tracker.harvest()?)
    }
}
