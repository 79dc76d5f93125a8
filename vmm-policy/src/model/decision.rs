//! What is said to a request.

use std::fmt;

/// How much in how long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
pub struct Rate {
    /// Bytes.
    pub bytes: u64,
    /// In so many seconds; at least 1.
    pub seconds: u32,
}

/// What is said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Verdict {
    /// It may not be. What there is where no rule says another thing.
    #[default]
    Deny,
    /// It may be, where nobody but the monitor sees it: a network of its own, a copy of the disk.
    Quarantine,
    /// It may be once somebody has said yes ([`Desk`](crate::trust::Desk)).
    Ask,
    /// It may be, and leads to somebody else than who was asked for ([`Policy::redirection`](crate::Policy::redirection)).
    Redirect,
    /// It may be, no faster than this.
    Throttle(Rate),
    /// It may be.
    Allow,
}

impl Verdict {
    /// Whether it may be as it was asked for, perhaps slower.
    pub fn permits(self) -> bool {
        matches!(self, Self::Allow | Self::Throttle(_))
    }

    /// As a policy writes it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Deny => "deny",
            Self::Quarantine => "quarantine",
            Self::Ask => "ask",
            Self::Redirect => "redirect",
            Self::Throttle(_) => "throttle",
            Self::Allow => "allow",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.word())
    }
}

/// Which of the layers said so. All of them must let a request pass; the first that does not is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Layer {
    /// Before any: the asker or the peer is not registered (any more), or the action is none of the object's.
    Identity,
    /// Levels and categories: information goes up in secrecy (Bell and LaPadula) and down in integrity (Biba).
    Lattice,
    /// Whom the two have had to do with before (Brewer and Nash).
    Wall,
    /// Rules about labels: nothing is allowed that no rule allows.
    Type,
    /// Conditions of rules: the state of the machine, attestation, time.
    Attribute,
    /// Limits: so many, so fast.
    Quota,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Identity => "identity",
            Self::Lattice => "lattice",
            Self::Wall => "wall",
            Self::Type => "type",
            Self::Attribute => "attribute",
            Self::Quota => "quota",
        })
    }
}

/// A rule or a limit of the policy that was in force; [`Policy::rule`](crate::Policy::rule) says which.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RuleId(pub(crate) u32);

impl RuleId {
    /// As a number, for logs; it means something together with the policy's [`digest`](crate::Policy::digest).
    pub fn get(self) -> u32 {
        self.0
    }
}

/// What is said to a request, by whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Decision {
    /// What.
    pub verdict: Verdict,
    /// The layer that said so.
    pub layer: Layer,
    /// The rule that said so; `None` where it is the absence of one, or the lattice or a wall.
    pub rule: Option<RuleId>,
    /// Which policy was in force: how often it had been changed.
    pub epoch: u64,
}

impl Decision {
    /// Whether it may be as it was asked for ([`Verdict::permits`]).
    pub fn permits(&self) -> bool {
        self.verdict.permits()
    }
}
