//! One right.

use std::fmt;
use std::time::Duration;

use super::life::Life;
use crate::model::{Action, Decision, Flow, Kind, Object, Request, SubjectId, Value};
use crate::monitor::{Charge, Honours};
use crate::sync::{Mutex, lock};

/// Which grant of a [`Monitor`](crate::Monitor)'s; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GrantId(pub(crate) u64);

impl GrantId {
    /// As a number, for logs.
    pub fn get(self) -> u64 {
        self.0
    }
}

impl fmt::Display for GrantId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "grant {}", self.0)
    }
}

/// What ends a channel whose right has been taken back, in this order. They come from the thread that revokes, each once, with no
/// lock of the monitor's held. They may ask the monitor for anything but the revocation of the same grant.
pub trait Ends: Send {
    /// Takes nothing new: no request, no connection. Kicks out who might stay long.
    fn quiesce(&mut self) {}
    /// Takes the channel out of the guest's reach: unmaps memory, shuts a socket. What it is made of stays, as somebody may be using
    /// it still.
    fn unmap(&mut self) {}
    /// Nobody uses it any more: finishes or throws away what is queued.
    fn drain(&mut self) {}
    /// Gives up what it is made of. The value itself is dropped after that, and what it holds with it.
    fn close(&mut self) {}
}

/// A closure for channels that end in one go.
impl<F: FnMut() + Send> Ends for F {
    fn close(&mut self) {
        self();
    }
}

/// How far a revocation has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum RevokeOutcome {
    /// The channel is closed.
    Closed,
    /// Somebody has been using it for longer than the monitor waits. Nobody can begin to, and it is out of the guest's reach;
    /// [`Monitor::reap`](crate::Monitor::reap) closes it once that has ended.
    InUse,
}

#[derive(Default)]
pub(super) struct Sequence {
    pub(super) ends: Option<Box<dyn Ends>>,
    /// Quiesced and unmapped.
    unmapped: bool,
    /// Closed.
    done: bool,
}

/// A request, with a copy of its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OwnedRequest {
    pub(super) asker: SubjectId,
    pub(super) peer: Option<SubjectId>,
    pub(super) action: Action,
    pub(super) kind: Kind,
    pub(super) number: u64,
    pub(super) name: Option<Box<str>>,
    pub(super) bytes: u64,
}

impl OwnedRequest {
    pub(crate) fn new(request: &Request<'_>) -> Self {
        let (number, name) = match request.object.value() {
            Value::Number(number) => (number, None),
            Value::Name(name) => (0, Some(name.into())),
        };
        let kind = request.object.kind();
        let Request { asker, peer, action, bytes, .. } = *request;
        Self { asker, peer, action, kind, number, name, bytes }
    }

    /// `None` for what never was a request.
    pub(crate) fn get(&self) -> Option<Request<'_>> {
        let value = self.name.as_deref().map_or(Value::Number(self.number), Value::Name);
        let object = Object::new(self.kind, value)?;
        Some(Request { asker: self.asker, peer: self.peer, action: self.action, object, bytes: self.bytes })
    }

    pub(crate) fn is_about(&self, subject: SubjectId) -> bool {
        self.asker == subject || self.peer == Some(subject)
    }
}

/// What a grant, the registry and whoever revokes have in common.
pub(crate) struct Right {
    pub(crate) id: GrantId,
    pub(crate) request: OwnedRequest,
    pub(crate) honours: Honours,
    pub(crate) flow: Flow,
    decision: Mutex<Decision>,
    pub(super) life: Life,
    pub(super) sequence: Mutex<Sequence>,
    /// What it takes of limits, until it is dropped.
    charges: Mutex<Vec<Charge>>,
}

impl Right {
    pub(crate) fn new(
        id: GrantId,
        request: OwnedRequest,
        flow: Flow,
        honours: Honours,
        decision: Decision,
        charges: Vec<Charge>,
    ) -> Self {
        Self {
            id,
            request,
            honours,
            flow,
            decision: Mutex::new(decision),
            life: Life::new(),
            sequence: Mutex::default(),
            charges: Mutex::new(charges),
        }
    }

    pub(crate) fn is_live(&self) -> bool {
        self.life.is_live()
    }

    pub(crate) fn decision(&self) -> Decision {
        *lock(&self.decision)
    }

    pub(crate) fn decide_anew(&self, decision: Decision) {
        *lock(&self.decision) = decision;
    }

    /// Ends the right and the channel: quiesce, unmap, wait for those who use it, drain, close. Whoever comes second waits for the
    /// first.
    pub(crate) fn revoke(&self, most: Duration) -> RevokeOutcome {
        self.life.revoke();
        let mut sequence = lock(&self.sequence);
        if sequence.done {
            return RevokeOutcome::Closed;
        }
        if !sequence.unmapped {
            if let Some(ends) = &mut sequence.ends {
                ends.quiesce();
                ends.unmap();
            }
            sequence.unmapped = true;
        }
        if !self.life.wait_idle(Some(most)) {
            return RevokeOutcome::InUse;
        }
        sequence.done = true;
        // What it holds goes here, when nobody can be using it.
        if let Some(mut ends) = sequence.ends.take() {
            ends.drain();
            ends.close();
        }
        RevokeOutcome::Closed
    }

    pub(super) fn on_revoked(&self, mut ends: Box<dyn Ends>) {
        let mut sequence = lock(&self.sequence);
        if !sequence.done && !sequence.unmapped {
            sequence.ends = Some(ends);
            return;
        }
        ends.quiesce();
        ends.unmap();
        if sequence.done {
            drop(sequence);
            ends.drain();
            ends.close();
        } else {
            sequence.ends = Some(ends);
        }
    }

    /// Gives back what it takes of limits.
    pub(crate) fn release(&self) {
        let charges = std::mem::take(&mut *lock(&self.charges));
        charges.iter().for_each(Charge::give_back);
    }
}
