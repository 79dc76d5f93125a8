//! What the policy was asked, and what it said.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_audit::hooks::policy::PolicyLog;
use vmm_policy::{Action, Decision, Layer, Observer, Policy, Request, Revocation, SubjectId};

/// Decisions that are kept: more than a run has, however much its guests ask.
const MOST: usize = 1 << 16;

/// A decision.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) number: u64,
    pub(crate) asker: SubjectId,
    pub(crate) peer: Option<SubjectId>,
    pub(crate) action: Action,
    pub(crate) object: String,
    pub(crate) decision: Decision,
}

#[derive(Default)]
struct Kept {
    next: u64,
    asked: VecDeque<Asked>,
}

/// Keeps all decisions, the last ones if there are too many. Clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Trail(Arc<Mutex<Kept>>);

impl Observer for Trail {
    fn decided(&self, request: &Request<'_>, decision: &Decision) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let number = kept.next;
        kept.next += 1;
        if kept.asked.len() >= MOST {
            kept.asked.pop_front();
        }
        kept.asked.push_back(Asked {
            number,
            asker: request.asker,
            peer: request.peer,
            action: request.action,
            object: request.object.to_string(),
            decision: *decision,
        });
    }
}

impl Trail {
    /// How many there were.
    pub(crate) fn len(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).next
    }

    /// The last since the one of that number that `is` the one.
    pub(crate) fn find(&self, since: u64, is: impl Fn(&Asked) -> bool) -> Option<Asked> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.asked.iter().rev().take_while(|asked| asked.number >= since).find(|asked| is(asked)).cloned()
    }

    /// How many were allowed, and how many not.
    pub(crate) fn counts(&self) -> (usize, usize) {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let allowed = kept.asked.iter().filter(|asked| asked.decision.permits()).count();
        (allowed, kept.asked.len() - allowed)
    }
}

/// Tells the trail and the audit log.
pub(crate) struct Both(pub(crate) Trail, pub(crate) PolicyLog);

impl Observer for Both {
    fn decided(&self, request: &Request<'_>, decision: &Decision) {
        self.0.decided(request, decision);
        self.1.decided(request, decision);
    }

    fn revoked(&self, revocation: &Revocation) {
        self.1.revoked(revocation);
    }

    fn reloaded(&self, epoch: u64, policy: &Policy) {
        self.1.reloaded(epoch, policy);
    }
}

/// The word with which the statement begins on which a layer's answers stand, where they stand on no rule.
pub(crate) fn statement(layer: Layer) -> Option<&'static str> {
    match layer {
        Layer::Wall => Some("wall"),
        Layer::Lattice => Some("secrecy"),
        _ => None,
    }
}
