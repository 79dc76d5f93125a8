//! What those do who manage the host: each verb is judged by the same policy, some take two of them, and all of it is written down, before it is done.

use anyhow::{Context as _, Result, bail};
use vmm_audit::hooks::desk::{Asked, AuditedDesk, VerbRefused};
use vmm_audit::verb::Verb;
use vmm_policy::trust::{DeskError, TicketId};
use vmm_policy::{Action, Principal, Uuid};

use crate::attempts::{Policies, Row};
use crate::host::{Host, Role};
use crate::log::{Done, Rejected};

/// Those whom the policy knows.
pub(crate) const MANAGERS: [&str; 3] = ["alice", "bob", "rita"];

/// A verb, by whom, and of which machine, if it is of one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Deed {
    pub(crate) who: &'static str,
    pub(crate) verb: &'static str,
    pub(crate) of: Option<&'static str>,
}

/// What comes of a deed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Comes {
    Done,
    Waits,
    Refused,
    Withdrawn,
}

/// Whoever has shown that he is the one of that name. The program takes that as given; a monitor's interface asks the kernel who is at the other
/// end of a socket, or a certificate.
fn authenticated(who: &str) -> Principal {
    Principal::Host(who.into())
}

impl Deed {
    pub(crate) fn new(who: &'static str, verb: &'static str, of: &'static str) -> Self {
        Self { who, verb, of: Some(of) }
    }

    /// One that is about the whole host.
    pub(crate) fn of_host(who: &'static str, verb: &'static str) -> Self {
        Self { who, verb, of: None }
    }

    fn what(&self) -> String {
        self.of.map_or_else(|| self.verb.to_owned(), |of| format!("{} {of}", self.verb))
    }

    fn ask(&self, desk: &AuditedDesk) -> Result<std::result::Result<Asked, VerbRefused>> {
        let machine = |of| anyhow::Ok(Principal::Vm(Uuid::from_u128(Role::of(of)?.number.into())));
        let of = self.of.map(machine).transpose()?;
        Ok(desk.propose(&authenticated(self.who), self.verb, of.as_ref()))
    }

    /// Asks for what an operator may do.
    pub(crate) fn granted(&self, host: &Host) -> Result<Verb> {
        match self.ask(&host.desk)? {
            Ok(Asked::Granted(verb)) => Ok(verb),
            Ok(Asked::Waits(ticket)) => bail!("{self:?} waits for somebody: {ticket:?}"),
            Err(refused) => Err(refused).with_context(|| format!("{self:?}")),
        }
    }

    /// Asks for what takes two.
    pub(crate) fn waits(&self, host: &Host, policies: &Policies) -> Result<(TicketId, Row)> {
        match self.ask(&host.desk)? {
            Ok(Asked::Waits(ticket)) => Ok((ticket.id, self.row(host, policies, Comes::Waits)?)),
            Ok(Asked::Granted(_)) => bail!("{self:?} needs nobody else"),
            Err(refused) => Err(refused).with_context(|| format!("{self:?}")),
        }
    }

    /// Asks for what is to be refused.
    pub(crate) fn refused(&self, host: &Host, policies: &Policies) -> Result<Row> {
        match self.ask(&host.desk)? {
            Err(VerbRefused::Desk(DeskError::Refused(_))) => self.row(host, policies, Comes::Refused),
            Err(refused) => {
                // Nobody such is there, so the policy's monitor has not been asked.
                host.trail.refuse();
                Ok(self.rejected(self.what(), self.who, &refused, None))
            }
            Ok(_) => Ok(Row { good: false, ..self.row(host, policies, Comes::Done)? }),
        }
    }

    /// Has `who` confirm it, who is to be one that can.
    pub(crate) fn confirmed(&self, host: &Host, id: TicketId, who: &'static str) -> Result<Verb> {
        let confirmed = host.desk.confirm(id, &authenticated(who));
        confirmed.with_context(|| format!("{who} confirms {self:?}"))
    }

    /// Has `who` confirm it, who is not to be one that can.
    pub(crate) fn not_confirmed(&self, host: &Host, id: TicketId, who: &'static str) -> Row {
        let what = format!("confirm {}'s {}", self.who, self.what());
        match host.desk.confirm(id, &authenticated(who)) {
            Err(refused) => self.rejected(what, who, &refused, Some(id)),
            Ok(_) => Row { who, what, guest: "may".to_owned(), ..Row::default() },
        }
    }

    /// Has `who` say no.
    pub(crate) fn declined(&self, host: &Host, id: TicketId, who: &'static str) -> Row {
        let what = format!("decline {}'s {}", self.who, self.what());
        let declined = host.desk.decline(id, &authenticated(who));
        let rejected = Rejected {
            who: self.who.to_owned(),
            of: self.of.map(str::to_owned),
            ticket: Some(id.get()),
            asked_by: None,
            why: format!("host {who} has said no"),
        };
        let good = declined.is_ok();
        let rejected = good.then_some(rejected);
        Row { who, what, guest: Comes::Withdrawn.to_string(), good, rejected, ..Row::default() }
    }

    /// What was decided of it last, by which rule, and what came of that.
    pub(crate) fn row(&self, host: &Host, policies: &Policies, comes: Comes) -> Result<Row> {
        let monitor = host.enforcement.monitor();
        let subject = |name: &str| monitor.subject(name).with_context(|| format!("{name} is not registered"));
        let (asker, peer) = (subject(self.who)?, self.of.map(subject).transpose()?);
        let asked = host.trail.find(0, |asked| {
            (asked.asker, asked.peer, asked.action) == (asker, peer, Action::Administer)
                && asked.object == self.verb
        });
        let asked = asked.with_context(|| format!("nobody has asked for {self:?}"))?;
        let confirmed_by = asked.by.map(|by| {
            let is_he = |name: &&&str| monitor.subject(name) == Some(by);
            MANAGERS.iter().find(is_he).map_or_else(|| by.to_string(), |name| (*name).to_owned())
        });
        let mut said = policies
            .said(self.who, self.of, Action::Administer, format!("verb {:?}", self.verb), &asked.decision)
            .context("no policy of that number")?;
        said.confirmed_by.clone_from(&confirmed_by);
        let is_allowed = asked.decision.permits() || asked.by.is_some();
        let done = (comes == Comes::Done).then(|| Done {
            who: self.who.to_owned(),
            verb: said.object.clone(),
            of: said.peer.clone(),
            confirmed_by,
            rule: said.rule.clone(),
            policy: said.policy.clone(),
        });
        Ok(Row {
            who: self.who,
            what: self.what(),
            guest: comes.to_string(),
            verdict: format!("{} ({})", asked.decision.verdict, asked.decision.layer),
            rule: policies.rule(&asked.decision),
            good: is_allowed == (comes == Comes::Done),
            said: Some((asked.number, said)),
            done,
            rejected: None,
        })
    }

    /// The same, confirmed by `by`, as it is shown.
    pub(crate) fn done_by(&self, host: &Host, policies: &Policies, by: &'static str) -> Result<Row> {
        let row = self.row(host, policies, Comes::Done)?;
        let what = format!("confirm {}'s {}", self.who, self.what());
        let is_by = row.done.as_ref().is_some_and(|done| done.confirmed_by.as_deref() == Some(by));
        Ok(Row { who: by, what, good: row.good && is_by, ..row })
    }

    fn rejected(&self, what: String, who: &'static str, why: &VerbRefused, id: Option<TicketId>) -> Row {
        let (is_gone, why) = (matches!(why, VerbRefused::Desk(DeskError::NoTicket(_))), why.to_string());
        let rejected = Rejected {
            who: who.to_owned(),
            // Of a ticket that is gone nobody knows what it was about.
            of: self.of.filter(|_| !is_gone).map(str::to_owned),
            ticket: id.map(TicketId::get),
            asked_by: id.filter(|_| !is_gone).map(|_| self.who.to_owned()),
            why: why.clone(),
        };
        Row {
            who,
            what,
            guest: Comes::Refused.to_string(),
            verdict: "deny".to_owned(),
            rule: why,
            good: true,
            rejected: Some(rejected),
            ..Row::default()
        }
    }
}

impl std::fmt::Display for Comes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Done => "done",
            Self::Waits => "waits for another",
            Self::Refused => "refused",
            Self::Withdrawn => "will not be done",
        })
    }
}
