//! Management verbs, and those that a second person has to confirm.

use std::collections::BTreeMap;

use crate::grant::{Hold, OwnedRequest};
use crate::model::{Decision, Principal, Request, SubjectId, Verdict};
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

/// What has happened at a desk, for an [`Observer`](crate::Observer).
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub enum DeskEvent<'a> {
    /// A proposal waits for somebody else to say yes.
    Waits {
        /// Which.
        ticket: &'a Ticket,
        /// What is asked for.
        request: &'a Request<'a>,
        /// The rule that says so.
        decision: &'a Decision,
    },
    /// Somebody else has said yes, and the policy, asked again, lets it be.
    Confirmed {
        /// To which.
        ticket: &'a Ticket,
        /// What was asked for.
        request: &'a Request<'a>,
        /// By which rule it may be now.
        decision: &'a Decision,
        /// Who has said so.
        by: SubjectId,
    },
    /// What somebody proposes or answers counts for nothing.
    Rejected {
        /// The ticket that he names, if he answers one.
        id: Option<TicketId>,
        /// What is asked for, if there is such a ticket.
        request: Option<&'a Request<'a>>,
        /// Who.
        by: SubjectId,
        /// Why.
        why: &'a DeskError,
    },
    /// Somebody has said no, or has taken back what he asked for himself.
    Declined {
        /// To which.
        ticket: &'a Ticket,
        /// What was asked for.
        request: &'a Request<'a>,
        /// Who; `None` where that was the monitor itself ([`Desk::withdraw`]).
        by: Option<SubjectId>,
    },
    /// Nobody has said yes in time. That is told as soon as the desk is asked for anything.
    Lapsed {
        /// Which.
        ticket: &'a Ticket,
        /// What was asked for.
        request: &'a Request<'a>,
    },
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

impl Tickets {
    /// Takes out those whose time is over.
    fn lapsed(&mut self, now: u64) -> Vec<Waiting> {
        self.waiting
            .extract_if(.., |_, waiting| waiting.ticket.deadline <= now)
            .map(|(_, lapsed)| lapsed)
            .collect()
    }
}

/// Where managers ask for what they want to do.
///
/// A verb that a rule allows is granted; one for which a rule says `ask .. by .. within ..` waits for another principal among those to
/// confirm it in time. The policy is asked again then: who lost the right to ask meanwhile gets nothing. The monitor's
/// [`Observer`](crate::Observer) hears of all of it.
pub struct Desk {
    monitor: Monitor,
    tickets: Mutex<Tickets>,
}

impl Desk {
    /// One that asks `monitor`.
    pub fn new(monitor: &Monitor) -> Self {
        Self { monitor: monitor.clone(), tickets: Mutex::default() }
    }

    /// Whom it asks.
    pub fn monitor(&self) -> &Monitor {
        &self.monitor
    }

    /// Asks for something.
    ///
    /// # Errors
    /// If it is refused, or too many proposals wait.
    pub fn propose(&self, request: &Request<'_>) -> Result<Proposal, DeskError> {
        self.expire();
        let decision = self.monitor.check(request);
        if decision.verdict != Verdict::Ask {
            return Ok(Proposal::Granted(self.monitor.hold(request, Honours::NONE)?));
        }
        let asked = self.principal(request.asker).and_then(|asker| {
            let (_, seconds) = self.monitor.asked(&decision).ok_or_else(|| self.monitor.refused(decision))?;
            self.add(asker, request, seconds)
        });
        let ticket = asked.inspect_err(|why| self.reject(None, Some(request), request.asker, why))?;
        self.tell(&DeskEvent::Waits { ticket: &ticket, request, decision: &decision });
        Ok(Proposal::Waits(ticket))
    }

    /// Says yes to what another has asked for. The right to do it is for who holds what is returned, once.
    ///
    /// # Errors
    /// If there is nothing to say yes to, or `who` is not one to say so. What was waiting waits on, unless the policy refuses it by now.
    pub fn confirm(&self, id: TicketId, who: SubjectId) -> Result<Hold, DeskError> {
        let Waiting { ticket, request } = self.answered(id, who, true)?;
        let request = request.get().ok_or(DeskError::NoTicket(id.0))?;
        let hold = self.monitor.hold_confirmed(&request).map_err(DeskError::from).and_then(|hold| {
            // A policy that came into force after the first look may ask others.
            let decision = hold.decision();
            if decision.verdict == Verdict::Ask && !self.monitor.may_confirm(&decision, who) {
                return Err(DeskError::NotAsked(self.principal(who)?));
            }
            Ok(hold)
        });
        let hold = hold.inspect_err(|why| self.reject(Some(id), Some(&request), who, why))?;
        let decision = hold.decision();
        self.tell(&DeskEvent::Confirmed { ticket: &ticket, request: &request, decision: &decision, by: who });
        Ok(hold)
    }

    /// Says no to what another has asked for, or takes back what `who` has asked for himself.
    ///
    /// # Errors
    /// If there is nothing to say no to, or `who` is neither the asker nor one who might say yes. It waits on then.
    pub fn decline(&self, id: TicketId, who: SubjectId) -> Result<(), DeskError> {
        let declined = self.answered(id, who, false)?;
        self.tell_declined(&declined, Some(who));
        Ok(())
    }

    /// Has no more come of a proposal, whoever it is of: for the monitor itself. Whether it was waiting.
    pub fn withdraw(&self, id: TicketId) -> bool {
        self.expire();
        let declined = lock(&self.tickets).waiting.remove(&id);
        if let Some(declined) = &declined {
            self.tell_declined(declined, None);
        }
        declined.is_some()
    }

    /// What waits.
    pub fn waiting(&self) -> Vec<Ticket> {
        self.expire();
        lock(&self.tickets).waiting.values().map(|waiting| waiting.ticket.clone()).collect()
    }

    /// Takes away what has waited for too long, and says so. Everything else here does so first; whoever wants to hear of it at
    /// once asks when a [deadline](Ticket::deadline) is over.
    pub fn expire(&self) {
        let now = self.monitor.monotonic();
        // Observers may ask the desk.
        let lapsed = lock(&self.tickets).lapsed(now);
        for Waiting { ticket, request } in &lapsed {
            if let Some(request) = &request.get() {
                self.tell(&DeskEvent::Lapsed { ticket, request });
            }
        }
    }

    fn add(&self, asker: Principal, request: &Request<'_>, seconds: u32) -> Result<Ticket, DeskError> {
        let now = self.monitor.monotonic();
        let mut tickets = lock(&self.tickets);
        let own = tickets.waiting.values().filter(|waiting| waiting.ticket.asker == asker).count();
        if own >= TICKETS / 8 || tickets.waiting.len() >= TICKETS {
            return Err(DeskError::Full(own));
        }
        tickets.last += 1;
        let id = TicketId(tickets.last);
        let deadline = now.saturating_add(u64::from(seconds) * 1_000_000_000);
        let ticket = Ticket { id, asker, deadline };
        tickets.waiting.insert(id, Waiting { ticket: ticket.clone(), request: OwnedRequest::new(request) });
        Ok(ticket)
    }

    /// Takes what waits under that number for somebody who says yes or no to it, if he is one to say so.
    fn answered(&self, id: TicketId, who: SubjectId, is_yes: bool) -> Result<Waiting, DeskError> {
        self.expire();
        let mut tickets = lock(&self.tickets);
        let waiting = tickets.waiting.get(&id);
        let request = waiting.map(|waiting| waiting.request.clone());
        let asked = request.as_ref().and_then(OwnedRequest::get);
        let why = match (self.principal(who), waiting, &asked) {
            (Err(why), ..) => why,
            (Ok(principal), Some(waiting), Some(request)) => {
                let is_own = waiting.ticket.asker == principal;
                let decision = self.monitor.check(request);
                // Where nobody is asked any more, the policy has the last word on a yes.
                let may =
                    self.monitor.may_confirm(&decision, who) || is_yes && decision.verdict != Verdict::Ask;
                match (is_own, is_yes) {
                    (true, true) => DeskError::Same(principal),
                    (false, _) if !may => DeskError::NotAsked(principal),
                    _ => match tickets.waiting.remove(&id) {
                        Some(waiting) => return Ok(waiting),
                        None => DeskError::NoTicket(id.0),
                    },
                }
            }
            (Ok(_), ..) => DeskError::NoTicket(id.0),
        };
        drop(tickets);
        self.reject(Some(id), asked.as_ref(), who, &why);
        Err(why)
    }

    fn principal(&self, id: SubjectId) -> Result<Principal, DeskError> {
        self.monitor.principal(id).ok_or(DeskError::NoSubject(id))
    }

    fn tell(&self, event: &DeskEvent<'_>) {
        self.monitor.observe(|observer| observer.desk(event));
    }

    fn reject(&self, id: Option<TicketId>, request: Option<&Request<'_>>, by: SubjectId, why: &DeskError) {
        self.tell(&DeskEvent::Rejected { id, request, by, why });
    }

    fn tell_declined(&self, Waiting { ticket, request }: &Waiting, by: Option<SubjectId>) {
        if let Some(request) = &request.get() {
            self.tell(&DeskEvent::Declined { ticket, request, by });
        }
    }
}

impl std::fmt::Debug for Desk {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Desk").field("waiting", &lock(&self.tickets).waiting.len()).finish_non_exhaustive()
    }
}
