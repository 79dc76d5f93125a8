//! What is open.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::right::{GrantId, Right};
use crate::sync::{AtomicU64, Mutex, Ordering, lock};

/// The rights that have been given and whose grants are there.
#[derive(Default)]
pub(crate) struct Registry {
    next: AtomicU64,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    rights: BTreeMap<GrantId, Arc<Right>>,
    /// How often what decisions depend on has changed.
    generation: u64,
}

impl Registry {
    pub(crate) fn next_id(&self) -> GrantId {
        GrantId(self.next.fetch_add(1, Ordering::Relaxed) + 1)
    }

    pub(crate) fn generation(&self) -> u64 {
        lock(&self.open).generation
    }

    /// Adds what was decided at `generation`, unless something has changed since.
    pub(crate) fn insert(&self, generation: u64, right: &Arc<Right>) -> bool {
        let mut open = lock(&self.open);
        let current = open.generation == generation;
        if current {
            open.rights.insert(right.id, Arc::clone(right));
        }
        current
    }

    pub(crate) fn remove(&self, id: GrantId) {
        let right = lock(&self.open).rights.remove(&id);
        drop(right);
    }

    /// What is open now; what is decided by what was before is decided again.
    pub(crate) fn changed(&self) -> Vec<Arc<Right>> {
        let mut open = lock(&self.open);
        open.generation += 1;
        open.rights.values().cloned().collect()
    }

    pub(crate) fn all(&self) -> Vec<Arc<Right>> {
        lock(&self.open).rights.values().cloned().collect()
    }

    pub(crate) fn get(&self, id: GrantId) -> Option<Arc<Right>> {
        lock(&self.open).rights.get(&id).cloned()
    }

    pub(crate) fn len(&self) -> usize {
        lock(&self.open).rights.len()
    }
}
