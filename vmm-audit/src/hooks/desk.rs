//! Managers' verbs: judged by a policy, confirmed by a second person where it says so, and written down (feature `vmm-policy`).

use std::fmt;
use std::time::Duration;

use vmm_policy::trust::{Desk, DeskError, Proposal, Ticket, TicketId};
use vmm_policy::{Action, Monitor, Object, Principal, Request, SubjectId};

use super::emit;
use super::policy::{PolicyLog, party_of};
use crate::event::{self, Event, Kind, ObjectClass, Outcome, Verdict};
use crate::verb::Verb;

/// Why a manager gets nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerbRefused {
    /// Nobody such is there: he who asks, or the machine that he names.
    #[error("{0} is not registered")]
    Unknown(Principal),
    /// The policy, or the desk, says no.
    #[error(transparent)]
    Desk(#[from] DeskError),
}

/// What becomes of what a manager asks for.
#[derive(Debug)]
#[must_use]
pub enum Asked {
    /// He may do it.
    Granted(Verb),
    /// Somebody else has to say yes: [`AuditedDesk::confirm`].
    Waits(Ticket),
}

/// A [`Desk`] for a monitor's interface to its managers: whoever has been authenticated there is named as he is, a verb is in the log before it is carried
/// out, and so is every attempt that comes to nothing.
///
/// | what happens | event |
/// |---|---|
/// | a rule allows or refuses it, or nobody such is registered | `decision` with `allow` or `deny`, rule and policy |
/// | a second person has to say yes | `decision` with `ask`, and the `ticket` |
/// | he does | the same, with `success` and who he is as `confirmed-by` |
/// | somebody says so who must not | `decision` of his with `deny`, who had asked as `asked-by`, and the `ticket` |
/// | somebody says no, or nobody says anything in time | `decision` with `deny`, and the `ticket` |
/// | it is [begun](Verb::begin) | `administration` without an outcome, with the rule, `operation`, and `confirmed-by` |
/// | it has ended | `administration` with the outcome and the same `operation` |
///
/// ```no_run
/// # fn f(emitter: vmm_audit::pipeline::Emitter) -> Result<(), Box<dyn std::error::Error>> {
/// use vmm_audit::hooks::desk::{Asked, AuditedDesk};
/// use vmm_audit::hooks::policy::PolicyLog;
/// use vmm_policy::{Monitor, Policy, Principal, SubjectSpec, Uuid};
///
/// let policy = Policy::parse(
///     "labels operator  host alice { labels operator }  host bob { labels operator }
///      allow operator to administer pause of any vm
///      ask operator to administer destroy of any vm by operator within 10 minutes",
/// )?;
/// let log = PolicyLog::new(emitter, &policy);
/// let monitor = Monitor::builder(policy).observer(log.clone()).build();
/// for name in ["alice", "bob"] {
///     monitor.register(SubjectSpec::host(name))?;
/// }
/// let (vm, uuid) = ((), Uuid::from_u128(0x1234));
/// monitor.register(SubjectSpec::vm(uuid))?;
/// let desk = AuditedDesk::new(&monitor, &log);
///
/// // A request of the interface's, from somebody who has shown that he is alice.
/// let (who, of) = (Principal::Host("alice".into()), Principal::Vm(uuid));
/// let ticket = match desk.propose(&who, "destroy", Some(&of))? {
///     Asked::Granted(verb) => return Ok(verb.carry_out(|| destroy(&vm))?),
///     Asked::Waits(ticket) => ticket.id, // he is told of the number
/// };
/// // And another one, of bob's.
/// desk.confirm(ticket, &Principal::Host("bob".into()))?.carry_out(|| destroy(&vm))?;
/// # fn destroy(_: &()) -> Result<(), std::io::Error> { Ok(()) }
/// # Ok(()) }
/// ```
pub struct AuditedDesk {
    desk: Desk,
    log: PolicyLog,
    within: Option<Duration>,
}

impl AuditedDesk {
    /// One that asks `monitor`, whose observer `log` is. What is carried out is in the log as of the same source as what is decided.
    pub fn new(monitor: &Monitor, log: &PolicyLog) -> Self {
        Self { desk: Desk::new(monitor), log: log.clone(), within: None }
    }

    /// How long the disk may take to have what is about to be done; see [`Verb::within`].
    #[must_use]
    pub fn within(mut self, within: Duration) -> Self {
        self.within = Some(within);
        self
    }

    /// Asks for something that is to be done to `of`, or to the host.
    ///
    /// # Errors
    /// If it is refused, too many proposals wait, or nobody such is registered.
    pub fn propose(&self, who: &Principal, verb: &str, of: Option<&Principal>) -> Result<Asked, VerbRefused> {
        let unknown = |principal: &Principal| {
            let event = refused(who).object(event::Object::named(ObjectClass::Verb, verb));
            self.unknown(Event { peer: of.map(|of| self.named(of)), ..event }, principal)
        };
        let asker = self.known(who).ok_or_else(|| unknown(who))?;
        let peer = of.map(|of| self.known(of).ok_or_else(|| unknown(of))).transpose()?;
        let request = Request::new(asker, Action::Administer, Object::verb(verb));
        let request = peer.map_or(request, |peer| request.of(peer));
        Ok(match self.desk.propose(&request)? {
            Proposal::Granted(hold) => Asked::Granted(self.verb(hold, None)),
            Proposal::Waits(ticket) => Asked::Waits(ticket),
        })
    }

    /// Says yes to what another has asked for. Who asked and who says so are in the events of what is done.
    ///
    /// # Errors
    /// As [`Desk::confirm`], or if nobody such is registered.
    pub fn confirm(&self, id: TicketId, who: &Principal) -> Result<Verb, VerbRefused> {
        let by = self.answerer(id, who)?;
        let hold = self.desk.confirm(id, by)?;
        Ok(self.verb(hold, Some((id, by))))
    }

    /// Says no to what another has asked for, or takes back what `who` has asked for himself.
    ///
    /// # Errors
    /// As [`Desk::decline`], or if nobody such is registered.
    pub fn decline(&self, id: TicketId, who: &Principal) -> Result<(), VerbRefused> {
        Ok(self.desk.decline(id, self.answerer(id, who)?)?)
    }

    /// What waits. That the time of others is over is written down then, as it is by whatever else is asked here.
    pub fn waiting(&self) -> Vec<Ticket> {
        self.desk.waiting()
    }

    fn known(&self, principal: &Principal) -> Option<SubjectId> {
        let id = self.desk.monitor().subject_of(principal)?;
        if !self.log.knows(id) {
            self.log.learn(self.desk.monitor());
        }
        Some(id)
    }

    fn answerer(&self, id: TicketId, who: &Principal) -> Result<SubjectId, VerbRefused> {
        let event = || refused(who).attribute("ticket", id.get().to_string());
        self.known(who).ok_or_else(|| self.unknown(event(), who))
    }

    /// As the log names him, or by his name alone if nobody such is registered.
    fn named(&self, principal: &Principal) -> event::Party {
        self.known(principal).map_or_else(|| party_of(principal, 0), |id| self.log.party(id))
    }

    fn unknown(&self, event: Event, principal: &Principal) -> VerbRefused {
        let refused = VerbRefused::Unknown(principal.clone());
        emit(self.log.emitter(), &self.log.in_force(event).reason(refused.to_string()));
        refused
    }

    fn verb(&self, hold: vmm_policy::Hold, confirmed: Option<(TicketId, SubjectId)>) -> Verb {
        let (channel, decision) = (hold.channel(), hold.decision());
        let mut event = match channel.request() {
            Some(request) => self.log.event(Kind::Administration, &request, Some(&decision)),
            None => Event::new(Kind::Administration).subject(self.log.party(channel.asker())),
        };
        // The decision is in the log already.
        (event.verdict, event.reason) = (None, None);
        if let Some((id, by)) = confirmed {
            event = event.attribute("ticket", id.get().to_string());
            event = event.attribute("confirmed-by", self.log.party(by).to_string());
        }
        let verb = Verb::with(self.log.emitter().clone(), event).under(move || hold.is_live());
        match self.within {
            Some(within) => verb.within(within),
            None => verb,
        }
    }
}

/// That `who` gets nothing.
fn refused(who: &Principal) -> Event {
    let event = Event::new(Kind::Decision).subject(party_of(who, 0)).action(event::Action::Administer);
    event.verdict(Verdict::Deny).outcome(Outcome::Refused)
}

impl fmt::Debug for AuditedDesk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuditedDesk").field("desk", &self.desk).finish_non_exhaustive()
    }
}
