//! Who takes part.

use std::fmt;
use std::num::NonZeroU64;
use std::sync::Arc;

use uuid::Uuid;

/// A subject's name beyond this run of the monitor: what a [`History`](crate::History) is kept by.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Principal {
    /// A virtual machine.
    Vm(Uuid),
    /// A program or user of the host, by a name that the monitor gives.
    Host(Arc<str>),
}

impl fmt::Display for Principal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vm(uuid) => write!(f, "vm {uuid}"),
            Self::Host(name) => write!(f, "host {name}"),
        }
    }
}

/// A subject that is registered with a [`Monitor`](crate::Monitor). It names one life: what starts again gets another one, and
/// the old one never means it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SubjectId {
    pub(crate) slot: u32,
    /// There is none in the place of nobody, so that a request has no choice to make between a peer and none.
    pub(crate) life: NonZeroU64,
}

impl SubjectId {
    /// Which life, counted over all subjects of the monitor; never used twice.
    pub fn life(self) -> u64 {
        self.life.get()
    }
}

impl fmt::Display for SubjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "subject {}#{}", self.slot, self.life)
    }
}

/// Where a virtual machine is in its life; conditions of rules ask for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
#[repr(u8)]
pub enum Lifecycle {
    /// Is being built; its guest has not run.
    #[default]
    Starting,
    /// Runs.
    Running,
    /// Stands still and may go on.
    Paused,
    /// Is on its way to another host, or from there.
    Migrating,
    /// Runs no more and gives up what it has.
    Stopping,
}

impl Lifecycle {
    /// All of them.
    pub const ALL: &'static [Self] =
        &[Self::Starting, Self::Running, Self::Paused, Self::Migrating, Self::Stopping];

    /// As a policy writes it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Migrating => "migrating",
            Self::Stopping => "stopping",
        }
    }

    /// What a policy means by `word`.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|state| state.word() == word)
    }
}

/// What [`Monitor::register`](crate::Monitor::register) is told about a subject.
///
/// A subject that the policy declares (by its UUID, or a host principal by its name) has the labels and levels that stand there. One
/// that it does not declare has the labels that are given here, and the lowest levels.
#[derive(Clone, Debug)]
pub struct SubjectSpec {
    pub(crate) principal: Principal,
    pub(crate) labels: Vec<String>,
    pub(crate) incarnation: Option<u64>,
    pub(crate) digest: Option<Vec<u8>>,
    pub(crate) attested: bool,
}

impl SubjectSpec {
    /// A virtual machine.
    pub fn vm(uuid: Uuid) -> Self {
        Self::new(Principal::Vm(uuid))
    }

    /// A program or user of the host.
    pub fn host(name: &str) -> Self {
        Self::new(Principal::Host(name.into()))
    }

    /// Any of them.
    pub fn new(principal: Principal) -> Self {
        Self { principal, labels: Vec::new(), incarnation: None, digest: None, attested: false }
    }

    /// Adds a label. It must be one that the policy knows.
    #[must_use]
    pub fn label(mut self, label: &str) -> Self {
        self.labels.push(label.to_owned());
        self
    }

    /// Which incarnation of the virtual machine this is, where the caller counts them: one that is not above all that were
    /// registered for the same principal is refused.
    #[must_use]
    pub fn incarnation(mut self, incarnation: u64) -> Self {
        self.incarnation = Some(incarnation);
        self
    }

    /// The digest of what it was launched from, for conditions `measured`.
    #[must_use]
    pub fn digest(mut self, digest: &[u8]) -> Self {
        self.digest = Some(digest.to_vec());
        self
    }

    /// Whether somebody has verified that digest.
    #[must_use]
    pub fn attested(mut self, attested: bool) -> Self {
        self.attested = attested;
        self
    }
}
