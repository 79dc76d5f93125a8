//! What is open, and what was.

use std::time::{Duration, Instant};

use super::right::{GrantId, OwnedRequest, RevokeOutcome, Right};
use crate::model::{Action, Decision, Kind, Request, SubjectId, Value};

/// A channel that is or was open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenChannel {
    id: GrantId,
    request: OwnedRequest,
}

impl OpenChannel {
    pub(crate) fn new(right: &Right) -> Self {
        Self { id: right.id, request: right.request.clone() }
    }

    /// Its grant.
    pub fn id(&self) -> GrantId {
        self.id
    }

    /// Who has it.
    pub fn asker(&self) -> SubjectId {
        self.request.asker
    }

    /// Whom it leads to, if that is one.
    pub fn peer(&self) -> Option<SubjectId> {
        self.request.peer
    }

    /// What is done.
    pub fn action(&self) -> Action {
        self.request.action
    }

    /// What of.
    pub fn kind(&self) -> Kind {
        self.request.kind
    }

    /// Which one.
    pub fn value(&self) -> Value<'_> {
        self.request.name.as_deref().map_or(Value::Number(self.request.number), Value::Name)
    }

    /// The request for it.
    pub fn request(&self) -> Option<Request<'_>> {
        self.request.get()
    }
}

/// A channel that lost its right.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Revocation {
    /// Which.
    pub channel: OpenChannel,
    /// Why; `None` where somebody revoked it, or its asker or peer is gone.
    pub decision: Option<Decision>,
    /// How far it has come.
    pub outcome: RevokeOutcome,
    /// How long that took.
    pub took: Duration,
}

impl Revocation {
    pub(crate) fn of(right: &Right, decision: Option<Decision>, most: Duration) -> Self {
        let begin = Instant::now();
        let outcome = right.revoke(most);
        Self { channel: OpenChannel::new(right), decision, outcome, took: begin.elapsed() }
    }

    /// Whether the channel is closed.
    pub fn is_closed(&self) -> bool {
        self.outcome == RevokeOutcome::Closed
    }
}
