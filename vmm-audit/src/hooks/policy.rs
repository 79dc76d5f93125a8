//! What a policy decides (feature `vmm-policy`).

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError, RwLock};

use vmm_policy::trust::{DeskError, DeskEvent, TicketId};
use vmm_policy::{
    Decision, Monitor, Observer, Policy, Principal, Request, Revocation, RevokeOutcome, RuleId, RuleText,
    SubjectId, Value,
};

use super::emit;
use crate::digest::Digest;
use crate::event::{Action, Event, Kind, Object, ObjectClass, Outcome, Party, Text, Verdict};
use crate::pipeline::Emitter;

/// Policies that are remembered: decisions that were under way while others came into force name theirs.
const POLICIES: usize = 4;

/// A policy as events name it.
struct Known {
    digest: Digest,
    rules: BTreeMap<u32, Rule>,
}

struct Rule {
    text: Text,
    line: u32,
    /// Where there are several, and so the line does not say it alone.
    file: Option<Text>,
}

impl Known {
    fn of(policy: &Policy) -> Self {
        let texts = || policy.rules().filter_map(|id| Some((id, policy.rule(id)?)));
        let first = texts().next().map(|(_, rule)| rule.file);
        let several = texts().any(|(_, rule)| Some(rule.file) != first);
        let rule = |(id, rule): (RuleId, RuleText<'_>)| {
            let line = u32::try_from(rule.line).unwrap_or(u32::MAX);
            let file = several.then(|| Text::new(rule.file));
            (id.get(), Rule { text: Text::new(rule.text), line, file })
        };
        Self { digest: Digest::from_bytes(policy.digest()), rules: texts().map(rule).collect() }
    }
}

struct Shared {
    emitter: Emitter,
    policies: RwLock<BTreeMap<u64, Arc<Known>>>,
    names: RwLock<HashMap<SubjectId, Party>>,
}

/// Writes down what a [`Monitor`] decides and takes back, with the rule, its line (and `file`, if the rules are in
/// several), and the policy's digest; and what happens at a [`Desk`](vmm_policy::trust::Desk) that asks it. Its clones are the same one: one is
/// given to the monitor, one names its subjects.
///
/// ```no_run
/// # fn f(emitter: vmm_audit::pipeline::Emitter) -> Result<(), Box<dyn std::error::Error>> {
/// use vmm_audit::hooks::policy::PolicyLog;
/// use vmm_policy::{Monitor, Policy};
///
/// let policy = Policy::parse("labels web, db\nallow web to connect vsock 5432 of db")?;
/// let log = PolicyLog::new(emitter, &policy);
/// let monitor = Monitor::builder(policy).observer(log.clone()).build();
/// // After each that is registered:
/// log.learn(&monitor);
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct PolicyLog(Arc<Shared>);

impl std::fmt::Debug for PolicyLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PolicyLog").field("emitter", &self.0.emitter).finish_non_exhaustive()
    }
}

impl PolicyLog {
    /// For a monitor that begins with `policy`, which is written down as the one in force.
    pub fn new(emitter: Emitter, policy: &Policy) -> Self {
        let log = Self(Arc::new(Shared { emitter, policies: RwLock::default(), names: RwLock::default() }));
        log.reloaded(0, policy);
        log
    }

    /// Takes over who is registered, so that events say who asks. A machine that was registered with no incarnation has the number of its
    /// life; those that are not known are named as the monitor counts them.
    pub fn learn(&self, monitor: &Monitor) {
        let named = |(id, principal): (SubjectId, Principal)| {
            (id, party_of(&principal, monitor.incarnation(id).unwrap_or(id.life())))
        };
        let names = monitor.subjects().into_iter().map(named).collect();
        *self.0.names.write().unwrap_or_else(PoisonError::into_inner) = names;
    }

    /// Whether it has learned who that is.
    pub(super) fn knows(&self, id: SubjectId) -> bool {
        self.0.names.read().unwrap_or_else(PoisonError::into_inner).contains_key(&id)
    }

    pub(super) fn emitter(&self) -> &Emitter {
        &self.0.emitter
    }

    pub(super) fn party(&self, id: SubjectId) -> Party {
        let names = self.0.names.read().unwrap_or_else(PoisonError::into_inner);
        names.get(&id).cloned().unwrap_or_else(|| Party::host(id.to_string()))
    }

    /// The policy of that epoch. A decision by a new one may come before it is told that there is one.
    fn known(&self, epoch: u64) -> Option<Arc<Known>> {
        self.0.policies.read().unwrap_or_else(PoisonError::into_inner).get(&epoch).map(Arc::clone)
    }

    /// With the policy that is in force, for what none of its rules has decided.
    pub(super) fn in_force(&self, mut event: Event) -> Event {
        let policies = self.0.policies.read().unwrap_or_else(PoisonError::into_inner);
        event.policy = event.policy.or(policies.last_key_value().map(|(_, known)| known.digest));
        event
    }

    pub(super) fn event(&self, kind: Kind, request: &Request<'_>, decision: Option<&Decision>) -> Event {
        let mut event = Event::new(kind).subject(self.party(request.asker)).object(object(request));
        event.peer = request.peer.map(|peer| self.party(peer));
        event.action = action(request.action);
        event.bytes = request.bytes;
        let Some(decision) = decision else { return event };
        event.verdict = Some(verdict(decision.verdict));
        event.reason = Some(Text::new(&format!("layer {}", decision.layer)));
        let Some(known) = self.known(decision.epoch) else {
            return event.attribute("policy-epoch", decision.epoch.to_string());
        };
        event.policy = Some(known.digest);
        let Some(rule) = decision.rule.and_then(|rule| known.rules.get(&rule.get())) else { return event };
        (event.rule, event.rule_line) = (Some(rule.text.clone()), rule.line);
        match &rule.file {
            Some(file) => event.attribute("file", file.clone()),
            None => event,
        }
    }
}

/// A principal in one of its lives.
pub(super) fn party_of(principal: &Principal, incarnation: u64) -> Party {
    match principal {
        Principal::Vm(uuid) => Party::vm(uuid.as_u128(), incarnation),
        Principal::Host(name) => Party::host(&**name),
        other => Party::host(other.to_string()),
    }
}

fn action(action: vmm_policy::Action) -> Option<Action> {
    use vmm_policy::Action as Asked;
    Some(match action {
        Asked::Create => Action::Create,
        Asked::Connect => Action::Connect,
        Asked::Accept => Action::Accept,
        Asked::Send => Action::Send,
        Asked::MapRo => Action::MapReadOnly,
        Asked::MapRw => Action::MapReadWrite,
        Asked::Notify => Action::Notify,
        Asked::Delegate => Action::Delegate,
        Asked::Attach => Action::Attach,
        Asked::AttachRo => Action::Read,
        Asked::Export => Action::Export,
        Asked::Administer => Action::Administer,
        Asked::Use => Action::Execute,
        _ => return None,
    })
}

fn verdict(verdict: vmm_policy::Verdict) -> Verdict {
    use vmm_policy::Verdict as Said;
    match verdict {
        Said::Quarantine => Verdict::Quarantine,
        Said::Ask => Verdict::Ask,
        Said::Redirect => Verdict::Redirect,
        Said::Throttle(_) => Verdict::Throttle,
        Said::Allow => Verdict::Allow,
        // And whatever a later version may say that this one does not know.
        _ => Verdict::Deny,
    }
}

fn object(request: &Request<'_>) -> Object {
    use vmm_policy::Kind as Of;
    let kind = request.object.kind();
    let class = match kind {
        Of::Vsock => ObjectClass::Vsock,
        Of::Tcp | Of::Udp | Of::Icmp | Of::Ip | Of::Ethernet | Of::Network => ObjectClass::Network,
        Of::Region => ObjectClass::Region,
        Of::Grant => ObjectClass::Grant,
        Of::Doorbell | Of::EventChannel => ObjectClass::Doorbell,
        Of::Disk => ObjectClass::Block,
        Of::Share => ObjectClass::Share,
        Of::Console => ObjectClass::Console,
        Of::Snapshot | Of::Migration => ObjectClass::Snapshot,
        Of::Verb => ObjectClass::Verb,
        Of::Hypercall => ObjectClass::Hypercall,
        Of::Pio => ObjectClass::Pio,
        Of::Mmio => ObjectClass::Mmio,
        Of::Msr => ObjectClass::Msr,
        _ => ObjectClass::Device,
    };
    // Where one class stands for several kinds, the name says which.
    let several = matches!(
        kind,
        Of::Tcp
            | Of::Udp
            | Of::Icmp
            | Of::Ip
            | Of::Ethernet
            | Of::EventChannel
            | Of::Migration
            | Of::Balloon
            | Of::Hotplug
    );
    match request.object.value() {
        Value::Number(number) => {
            let name = several.then(|| Text::new(kind.word()));
            Object { class, number: Some(number), name }
        }
        Value::Name(name) if several => Object::named(class, format!("{} {name}", kind.word())),
        Value::Name(name) => Object::named(class, name),
    }
}

/// What happens at a desk.
impl PolicyLog {
    /// That nothing comes of a proposal.
    fn declined(&self, ticket: TicketId, request: &Request<'_>, reason: &str) -> Event {
        let event = self.event(Kind::Decision, request, None).verdict(Verdict::Deny);
        self.in_force(event.outcome(Outcome::Refused).reason(reason))
            .attribute("ticket", ticket.get().to_string())
    }

    /// That what somebody proposes or answers counts for nothing.
    fn rejected(
        &self,
        id: Option<TicketId>,
        request: Option<&Request<'_>>,
        by: SubjectId,
        why: &DeskError,
    ) -> Event {
        let decision = match why {
            DeskError::Refused(refused) => Some(&refused.decision),
            _ => None,
        };
        let mut event = match request {
            Some(request) => self.event(Kind::Decision, request, decision),
            None => Event::new(Kind::Decision).action(Action::Administer),
        };
        event = self.in_force(event.subject(self.party(by)).verdict(Verdict::Deny));
        event = event.outcome(Outcome::Refused).reason(why.to_string());
        let Some(id) = id else { return event };
        if let Some(request) = request {
            event = event.attribute("asked-by", self.party(request.asker).to_string());
        }
        event.attribute("ticket", id.get().to_string())
    }

    fn at_desk(&self, event: &DeskEvent<'_>) -> Option<Event> {
        Some(match *event {
            DeskEvent::Waits { ticket, request, decision } => {
                let event = self.event(Kind::Decision, request, Some(decision));
                event.attribute("ticket", ticket.id.get().to_string())
            }
            DeskEvent::Confirmed { ticket, request, decision, by } => {
                let event = self.event(Kind::Decision, request, Some(decision)).outcome(Outcome::Success);
                let event = event.attribute("ticket", ticket.id.get().to_string());
                event.attribute("confirmed-by", self.party(by).to_string())
            }
            DeskEvent::Rejected { id, request, by, why } => self.rejected(id, request, by, why),
            DeskEvent::Declined { ticket, request, by } => {
                let by = by.map_or_else(|| "the monitor".to_owned(), |by| self.party(by).to_string());
                self.declined(ticket.id, request, &format!("{by} has said no"))
            }
            DeskEvent::Lapsed { ticket, request } => {
                self.declined(ticket.id, request, "nobody has confirmed it in time")
            }
            // Of a later version.
            _ => return None,
        })
    }
}

impl Observer for PolicyLog {
    fn decided(&self, request: &Request<'_>, decision: &Decision) {
        let outcome = if decision.permits() { Outcome::Success } else { Outcome::Refused };
        emit(&self.0.emitter, &self.event(Kind::Decision, request, Some(decision)).outcome(outcome));
    }

    fn revoked(&self, revocation: &Revocation) {
        let closed = revocation.outcome == RevokeOutcome::Closed;
        let outcome = if closed { Outcome::Success } else { Outcome::Failed };
        let mut event = match revocation.channel.request() {
            Some(request) => self.event(Kind::Revoked, &request, revocation.decision.as_ref()),
            None => Event::new(Kind::Revoked).subject(self.party(revocation.channel.asker())),
        };
        if revocation.decision.is_none() {
            event = event.reason("the monitor took it back, or its asker or peer is gone");
        }
        if !closed {
            event = event.reason("it is still in use; nobody can begin to use it");
        }
        let took = revocation.took.as_micros().to_string();
        emit(&self.0.emitter, &event.outcome(outcome).attribute("took-us", took));
    }

    fn desk(&self, event: &DeskEvent<'_>) {
        if let Some(event) = self.at_desk(event) {
            emit(&self.0.emitter, &event);
        }
    }

    fn reloaded(&self, epoch: u64, policy: &Policy) {
        let known = Arc::new(Known::of(policy));
        let event = Event::new(Kind::PolicyLoaded)
            .policy(known.digest)
            .object(Object::numbered(ObjectClass::Policy, epoch))
            .outcome(Outcome::Success);
        let mut policies = self.0.policies.write().unwrap_or_else(PoisonError::into_inner);
        policies.insert(epoch, known);
        while policies.len() > POLICIES {
            policies.pop_first();
        }
        drop(policies);
        emit(&self.0.emitter, &event);
    }
}
