//! Who has had to do with whom, for walls.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::Principal;
use crate::sync::{Mutex, lock};

/// That the history cannot be read, or not be written.
#[derive(Debug, thiserror::Error)]
#[error("the history of {principal}: {source}")]
pub struct HistoryError {
    /// Whose.
    pub principal: Principal,
    /// Why.
    pub source: Box<dyn std::error::Error + Send + Sync>,
}

/// Keeps which labels at walls each principal has had to do with, over all its incarnations.
pub trait History: Send + Sync {
    /// The labels.
    ///
    /// # Errors
    /// If they cannot be told; the principal is not registered then.
    fn load(&self, principal: &Principal) -> Result<Vec<String>, HistoryError>;

    /// Adds one. It is kept when this returns, whatever happens then: what is decided on it goes on before the caller can lose it.
    ///
    /// # Errors
    /// If that cannot be; the request is denied then.
    fn record(&self, principal: &Principal, label: &str) -> Result<(), HistoryError>;
}

impl<H: History + ?Sized> History for std::sync::Arc<H> {
    fn load(&self, principal: &Principal) -> Result<Vec<String>, HistoryError> {
        (**self).load(principal)
    }

    fn record(&self, principal: &Principal, label: &str) -> Result<(), HistoryError> {
        (**self).record(principal, label)
    }
}

/// Keeps it in memory, which is as durable as the process.
#[derive(Debug, Default)]
pub struct MemoryHistory {
    all: Mutex<BTreeMap<Principal, BTreeSet<String>>>,
}

impl History for MemoryHistory {
    fn load(&self, principal: &Principal) -> Result<Vec<String>, HistoryError> {
        Ok(lock(&self.all).get(principal).map_or(Vec::new(), |labels| labels.iter().cloned().collect()))
    }

    fn record(&self, principal: &Principal, label: &str) -> Result<(), HistoryError> {
        lock(&self.all).entry(principal.clone()).or_default().insert(label.to_owned());
        Ok(())
    }
}
