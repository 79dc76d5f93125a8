//! A guest's request, from its bytes to its effect.

use super::protocol::{OutOfOrder, Session};
use super::standing::Standing;
use crate::model::{Decision, Request, SubjectId};
use crate::monitor::Monitor;
use crate::syntax::Step;

/// Why a request has no effect.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Rejected<E> {
    /// It cannot be read.
    #[error("malformed: {error}")]
    Malformed {
        /// What it lacks.
        error: E,
        /// What follows.
        step: Option<Step>,
    },
    /// It does not follow from what was before.
    #[error("{error}")]
    OutOfOrder {
        /// From what.
        error: OutOfOrder,
        /// What follows.
        step: Option<Step>,
    },
    /// The policy refuses it.
    #[error("{verdict} ({layer})", verdict = .decision.verdict, layer = .decision.layer)]
    Refused {
        /// Why.
        decision: Decision,
        /// What follows.
        step: Option<Step>,
    },
    /// It was allowed and has failed. The state is what it was before.
    #[error("failed: {0}")]
    Failed(E),
}

impl<E> Rejected<E> {
    /// What is to be done to who asked, if that is new.
    pub fn step(&self) -> Option<Step> {
        match self {
            Self::Malformed { step, .. } | Self::OutOfOrder { step, .. } | Self::Refused { step, .. } => {
                *step
            }
            Self::Failed(_) => None,
        }
    }
}

/// Takes requests of guests through all that they have to pass, in one order: fetch once and decode, the object's state machine,
/// policy and limits, effect. None of it comes twice, and what comes later does not come if what was before has refused.
#[derive(Debug)]
pub struct Mediator {
    monitor: Monitor,
    standing: Standing,
}

impl Mediator {
    /// One that asks `monitor`.
    pub fn new(monitor: &Monitor) -> Self {
        Self { monitor: monitor.clone(), standing: Standing::new(monitor) }
    }

    /// Who has asked for what is none.
    pub fn standing(&self) -> &Standing {
        &self.standing
    }

    /// Mediates a request of `guest`'s. `fetch` copies it out of guest memory and decodes it; it is called once, and what it returns is all that
    /// the others see, so that the guest cannot change it after it has been checked. `asks` says which step of `session` it is, and what
    /// it is for. `execute` carries it out.
    ///
    /// # Errors
    /// If it is refused, or fails.
    pub fn mediate<'t, T, R, E>(
        &self,
        guest: SubjectId,
        session: &mut Session,
        fetch: impl FnOnce() -> Result<T, E>,
        asks: impl FnOnce(&T) -> (&'t str, Request<'t>),
        execute: impl FnOnce(T) -> Result<R, E>,
    ) -> Result<R, Rejected<E>> {
        let violation = || self.standing.violation(guest);
        let decoded = fetch().map_err(|error| Rejected::Malformed { error, step: violation() })?;
        let (step, mut request) = asks(&decoded);
        if let Err(error) = session.look(step) {
            return Err(Rejected::OutOfOrder { error, step: violation() });
        }
        // Whatever the request says of who asks.
        request.asker = guest;
        let decision = self.monitor.authorize(&request);
        if !decision.permits() {
            return Err(Rejected::Refused { decision, step: violation() });
        }
        let result = execute(decoded).map_err(Rejected::Failed)?;
        session.take(step).map_err(|error| Rejected::OutOfOrder { error, step: None })?;
        Ok(result)
    }
}
