//! Management verbs, and those that a second person has to confirm.

use std::collections::BTreeMap;

use crate::grant::{Hold, OwnedRequest};
use crate::model::{Principal, Request, SubjectId, Verdict};
use crate::monitor::{Honours, Monitor, Refused};
use crate::sync::{Mutex, lock};

/// How many proposals wait at a time; for each of who asks an eighth of that.
const TICKETS: usize = 1024;

/// Which proposal; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TicketId(u64);

impl TicketId {
    /// As a number, for people who are told of it.
    pub fn get(self) -> u64 {
        self.0
    }

    /// What somebody names.
    pub fn from_number(number: u64) -> Self {
        Self(number)
    }
}

/// What waits for a yes.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Ticket {
    /// Which.
    pub id: TicketId,
    /// Who asks.
    pub asker: Principal,
    /// When it lapses, in nanoseconds of the monitor's clock.
    pub deadline: u64,
}

/// What becomes of a proposal.
#[derive(Debug)]
#[must_use]
pub enum Proposal {
    /// It may be done, for as long as this is held.
    Granted(Hold),
    /// Somebody else has to say yes.
    Waits(Ticket),
}

/// Why nothing comes of a yes.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeskError {
    /// The policy refuses it, or refuses it by now.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// There is no such proposal, it has been answered, or its time is over.
    #[error("no proposal {0} waits: it has been answered, or its time is over")]
    NoTicket(u64),
    /// It takes two.
    #[error("{0} cannot confirm what {0} has asked for")]
    Same(Principal),
    /// Somebody who may not say yes has.
    #[error("{0} is none of those who may confirm it")]
    NotAsked(Principal),
    /// There is no such subject (any more).
    #[error("{0} is not registered")]
    NoSubject(SubjectId),
    /// So many wait already.
    #[error("{0} proposals wait already, which is the most")]
    Full(usize),
}

struct Waiting {
    ticket: Ticket,
    request: OwnedRequest,
}

#[derive(Default)]
struct Tickets {
    last: u64,
    waiting: BTreeMap<TicketId, Waiting>,
}

/// Where managers ask for what they want to do.
///
/// A verb that a rule allows is granted; one for which a rule says `ask .. by .. within ..` waits for another principal among those to
/// confirm it in time. The policy is asked again then: who lost the right to ask meanwhile gets nothing.
pub struct Desk {
    monitor: Monitor,
    tickets: Mutex<Tickets>,
}

impl Desk {
    /// One that asks `monitor`.
    pub fn new(monitor: &Monitor) -> Self {
        Self { monitor: monitor.clone(), tickets: Mutex::default() }
    }

    /// Asks for something.
    ///
    /// # Errors
    /// If it is refused, or too many proposals wait.
    pub fn propose(&self, request: &Request<'_>) -> Result<Proposal, DeskError> {
        let decision = self.monitor.check(request);
        if decision.verdict != Verdict::Ask {
            return Ok(Proposal::Granted(self.monitor.hold(request, Honours::NONE)?));
        }
        let asker = self.principal(request.asker)?;
        let (_, seconds) = self.monitor.asked(&decision).ok_or_else(|| self.monitor.refused(decision))?;
        let now = self.monitor.monotonic();
        let mut tickets = lock(&self.tickets);
        tickets.waiting.retain(|_, waiting| waiting.ticket.deadline > now);
        let own = tickets.waiting.values().filter(|waiting| waiting.ticket.asker == asker).count();
        if own >= TICKETS / 8 || tickets.waiting.len() >= TICKETS {
            return Err(DeskError::Full(own));
        }
        tickets.last += 1;
        let id = TicketId(tickets.last);
        let deadline = now.saturating_add(u64::from(seconds) * 1_000_000_000);
        let ticket = Ticket { id, asker, deadline };
        tickets.waiting.insert(id, Waiting { ticket: ticket.clone(), request: OwnedRequest::new(request) });
        Ok(Proposal::Waits(ticket))
    }

    /// Says yes to what another has asked for. The right to do it is for who holds what is returned, once.
    ///
    /// # Errors
    /// If there is nothing to say yes to, or `who` is not one to say so. What was waiting waits on, unless the policy refuses it by now.
    pub fn confirm(&self, id: TicketId, who: SubjectId) -> Result<Hold, DeskError> {
        let principal = self.principal(who)?;
        let now = self.monitor.monotonic();
        let mut tickets = lock(&self.tickets);
        tickets.waiting.retain(|_, waiting| waiting.ticket.deadline > now);
        let waiting = tickets.waiting.get(&id).ok_or(DeskError::NoTicket(id.0))?;
        if waiting.ticket.asker == principal {
            return Err(DeskError::Same(principal));
        }
        let request = waiting.request.get().ok_or(DeskError::NoTicket(id.0))?;
        let decision = self.monitor.check(&request);
        if decision.verdict == Verdict::Ask && !self.monitor.may_confirm(&decision, who) {
            return Err(DeskError::NotAsked(principal));
        }
        let waiting = tickets.waiting.remove(&id).ok_or(DeskError::NoTicket(id.0))?;
        drop(tickets);
        let request = waiting.request.get().ok_or(DeskError::NoTicket(id.0))?;
        Ok(self.monitor.hold(&request, Honours::CONFIRMED)?)
    }

    /// Says no, or takes back what one has asked for oneself; whether it was waiting.
    pub fn withdraw(&self, id: TicketId) -> bool {
        lock(&self.tickets).waiting.remove(&id).is_some()
    }

    /// What waits.
    pub fn waiting(&self) -> Vec<Ticket> {
        let now = self.monitor.monotonic();
        let tickets = lock(&self.tickets);
        tickets
            .waiting
            .values()
            .map(|waiting| waiting.ticket.clone())
            .filter(|ticket| ticket.deadline > now)
            .collect()
    }

    fn principal(&self, id: SubjectId) -> Result<Principal, DeskError> {
        self.monitor.principal(id).ok_or(DeskError::NoSubject(id))
    }
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk").field("waiting", &lock(&self.tickets).waiting.len()).finish_non_exhaustive()
    }
}
