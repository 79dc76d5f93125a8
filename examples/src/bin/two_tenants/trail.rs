//! What the policy was asked, and what it said.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_audit::hooks::policy::PolicyLog;
use vmm_policy::trust::DeskEvent;
use vmm_policy::{Action, Decision, Layer, Observer, Policy, Request, Revocation, SubjectId, Verdict};

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
    /// Who has confirmed it, if it takes two.
    pub(crate) by: Option<SubjectId>,
}

#[derive(Default)]
struct Kept {
    next: u64,
    asked: VecDeque<Asked>,
    /// What was refused without a decision of the policy.
    refused: usize,
}

/// How often something was allowed, was to be confirmed or was, and was refused.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Counts {
    pub(crate) allowed: usize,
    pub(crate) asked: usize,
    pub(crate) refused: usize,
}

/// Keeps all decisions, the last ones if there are too many. Clones are the same.
#[derive(Clone, Default)]
pub(crate) struct Trail(Arc<Mutex<Kept>>);

impl Observer for Trail {
    fn decided(&self, request: &Request<'_>, decision: &Decision) {
        self.keep(request, decision, None);
    }

    fn desk(&self, event: &DeskEvent<'_>) {
        match *event {
            DeskEvent::Waits { request, decision, .. } => self.keep(request, decision, None),
            DeskEvent::Confirmed { request, decision, by, .. } => self.keep(request, decision, Some(by)),
            _ => self.refuse(),
        }
    }
}

impl Trail {
    fn keep(&self, request: &Request<'_>, decision: &Decision, by: Option<SubjectId>) {
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
            by,
        });
    }

    /// Counts what is refused without a decision of the policy.
    pub(crate) fn refuse(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).refused += 1;
    }

    /// How many there were.
    pub(crate) fn len(&self) -> u64 {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).next
    }

    /// The last since the one of that number that `is` the one.
    pub(crate) fn find(&self, since: u64, is: impl Fn(&Asked) -> bool) -> Option<Asked> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.asked.iter().rev().take_while(|asked| asked.number >= since).find(|asked| is(asked)).cloned()
    }

    pub(crate) fn counts(&self) -> Counts {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count =
            |is: &dyn Fn(&Decision) -> bool| kept.asked.iter().filter(|asked| is(&asked.decision)).count();
        let (allowed, asked) =
            (count(&Decision::permits), count(&|decision| decision.verdict == Verdict::Ask));
        Counts { allowed, asked, refused: kept.asked.len() - allowed - asked + kept.refused }
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

    fn desk(&self, event: &DeskEvent<'_>) {
        self.0.desk(event);
        self.1.desk(event);
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
