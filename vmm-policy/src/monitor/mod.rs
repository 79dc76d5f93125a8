//! A policy in force: who is there, what is open, and what has been used up.

mod authorize;
mod clock;
mod history;
mod meter;
mod open;
mod reload;
mod shadow;
mod subjects;
#[cfg(test)]
mod tests;
#[cfg(test)]
pub(crate) use tests::Hand;
mod view;
mod wall;

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustc_hash::FxHashMap;

use crate::grant::{Registry, Revocation};
use crate::model::{Decision, Principal, Request};
use crate::policy::Policy;
use crate::sync::{Mutex, lock};
use crate::syntax::PolicyError;
use crate::trust::DeskEvent;

pub use authorize::Judge;
pub use clock::{Clock, SystemClock};
pub use history::{History, HistoryError, MemoryHistory};
pub(crate) use meter::Charge;
pub use open::{Honours, Refused};
pub use reload::{DryRun, Reloaded};
pub use shadow::ShadowDifference;
use view::Snapshot;

/// Why a subject cannot be registered or labelled so, or a policy be put in force.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MonitorError {
    /// The policy does not allow for it.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// There is no such subject (any more).
    #[error("{0} is not registered")]
    NoSubject(crate::SubjectId),
    /// It would be in two of a family.
    #[error("{first:?} and {second:?} are labels of one family, of which a subject has one at most")]
    Family {
        /// One.
        first: String,
        /// The other.
        second: String,
    },
    /// Labels come from the policy.
    #[error("{0:?} is declared by the policy, which says what its labels are")]
    Declared(String),
    /// It would be on two sides of a wall, or has been on the other one.
    #[error("{principal} is, or has been, on another side of the wall {wall:?}")]
    Wall {
        /// Who.
        principal: Principal,
        /// Which.
        wall: String,
    },
    /// Incarnations count up.
    #[error("incarnation {given} of {principal} is not above {last}, which was registered before")]
    Incarnation {
        /// Whose.
        principal: Principal,
        /// Which.
        given: u64,
        /// The last.
        last: u64,
    },
    /// It is there already.
    #[error("{0} is registered already")]
    Registered(Principal),
    /// No condition of the policy asks for it.
    #[error("no condition asks for a flag {0:?}")]
    NoFlag(String),
    /// The history of walls cannot be read.
    #[error(transparent)]
    History(#[from] HistoryError),
}

/// Hears what is decided and done, for an audit log. Called by the thread that asked, with no lock held that a decision takes.
pub trait Observer: Send + Sync {
    /// A request has been decided. One that waits for a second person is told by [`desk`](Self::desk) instead, when it is proposed and when
    /// it is confirmed.
    fn decided(&self, request: &Request<'_>, decision: &Decision) {
        let (_, _) = (request, decision);
    }

    /// A right has been taken back.
    fn revoked(&self, revocation: &Revocation) {
        let _ = revocation;
    }

    /// A policy is in force.
    fn reloaded(&self, epoch: u64, policy: &Policy) {
        let _ = (epoch, policy);
    }

    /// Something has happened at a [`Desk`](crate::trust::Desk).
    fn desk(&self, event: &DeskEvent<'_>) {
        let _ = event;
    }

    /// The policy in the shadow would have decided otherwise.
    fn shadow_differs(&self, request: &Request<'_>, difference: &ShadowDifference) {
        let _ = (request, difference);
    }
}

/// What just one at a time changes.
#[derive(Default)]
struct Writer {
    flags: BTreeSet<String>,
    incarnations: FxHashMap<Principal, u64>,
    lives: u64,
}

struct Shared {
    now: Arc<ArcSwap<Snapshot>>,
    writer: Mutex<Writer>,
    registry: Arc<Registry>,
    history: Box<dyn History>,
    /// Held by who changes a history.
    wall: Mutex<()>,
    clock: Box<dyn Clock>,
    observer: Option<Box<dyn Observer>>,
    /// How long a revocation waits for those who use a channel.
    patience: Duration,
    shadow_count: crate::sync::AtomicU64,
}

/// A policy in force. Its clones are the same one.
///
/// It knows who is there ([`register`](Self::register)), answers requests ([`authorize`](Self::authorize)), gives rights to channels
/// ([`open`](Self::open)) and takes back those that a change has made wrong: a [`reload`](Self::reload), other labels, another state, the
/// time.
///
/// ```
/// use vmm_policy::{Action, Monitor, Object, Policy, Request, SubjectSpec, Uuid, channel};
///
/// let monitor = Monitor::new(Policy::parse("labels web, db\nallow web to connect vsock 5432 of db")?);
/// let shop = monitor.register(SubjectSpec::vm(Uuid::from_u128(1)).label("web"))?;
/// let orders = monitor.register(SubjectSpec::vm(Uuid::from_u128(2)).label("db"))?;
///
/// let request = Request::new(shop, Action::Connect, Object::vsock(5432)).of(orders);
/// let grant = monitor.open::<channel::Vsock>(&request)?;
/// assert!(grant.enter().is_some());
///
/// let reloaded = monitor.reload(Policy::deny_all())?;
/// assert_eq!(reloaded.revoked.len(), 1);
/// assert!(grant.enter().is_none());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Monitor {
    shared: Arc<Shared>,
}

/// Makes a [`Monitor`] that is not like the default.
pub struct MonitorBuilder {
    policy: Policy,
    history: Box<dyn History>,
    clock: Box<dyn Clock>,
    observer: Option<Box<dyn Observer>>,
    patience: Duration,
}

impl MonitorBuilder {
    /// Where it is kept who has had to do with whom; otherwise in memory, for as long as the monitor runs.
    #[must_use]
    pub fn history(mut self, history: impl History + 'static) -> Self {
        self.history = Box::new(history);
        self
    }

    /// What time it is; otherwise the system's.
    #[must_use]
    pub fn clock(mut self, clock: impl Clock + 'static) -> Self {
        self.clock = Box::new(clock);
        self
    }

    /// Who hears of what is decided.
    #[must_use]
    pub fn observer(mut self, observer: impl Observer + 'static) -> Self {
        self.observer = Some(Box::new(observer));
        self
    }

    /// How long a revocation waits for those who are using the channel; otherwise a second.
    #[must_use]
    pub fn patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The monitor.
    pub fn build(self) -> Monitor {
        let snapshot = Snapshot::empty(self.policy, &*self.clock);
        Monitor {
            shared: Arc::new(Shared {
                now: Arc::new(ArcSwap::from_pointee(snapshot)),
                writer: Mutex::default(),
                registry: Arc::default(),
                history: self.history,
                wall: Mutex::new(()),
                clock: self.clock,
                observer: self.observer,
                patience: self.patience,
                shadow_count: crate::sync::AtomicU64::new(0),
            }),
        }
    }
}

impl Monitor {
    /// One that enforces `policy`, with nobody registered.
    pub fn new(policy: Policy) -> Self {
        Self::builder(policy).build()
    }

    /// One that is not like the default.
    pub fn builder(policy: Policy) -> MonitorBuilder {
        MonitorBuilder {
            policy,
            history: Box::new(MemoryHistory::default()),
            clock: Box::new(SystemClock::default()),
            observer: None,
            patience: Duration::from_secs(1),
        }
    }

    /// The policy that is in force.
    pub fn policy(&self) -> Policy {
        self.shared.now.load().main.policy.clone()
    }

    /// How often the policy has been changed.
    pub fn epoch(&self) -> u64 {
        self.shared.now.load().epoch
    }

    pub(crate) fn observe(&self, tell: impl FnOnce(&dyn Observer)) {
        if let Some(observer) = &self.shared.observer {
            tell(&**observer);
        }
    }
}

impl Default for Monitor {
    /// Allows nothing.
    fn default() -> Self {
        Self::new(Policy::deny_all())
    }
}

impl fmt::Debug for Monitor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let now = self.shared.now.load();
        f.debug_struct("Monitor")
            .field("epoch", &now.epoch)
            .field("policy", &now.main.policy)
            .field("open", &self.shared.registry.len())
            .field("incarnations", &lock(&self.shared.writer).incarnations.len())
            .finish_non_exhaustive()
    }
}
