//! What guests try, and whether that ends as the policy says.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use vmm_audit::Digest;
use vmm_memory::Access;
use vmm_policy::{Action, Decision, Policy};

use crate::host::{DATABASE, Host, Role};
use crate::log::{Done, Rejected, Said};
use crate::machine::{Answer, Machine};
use crate::trail::{Asked, statement};

/// The port of the gateway, and of the web servers.
pub(crate) const HTTPS: u16 = 443;

/// What one tries.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Try {
    /// A connection by vsock.
    Vsock { to: &'static str, port: u32 },
    /// The same, which stays.
    Hold { to: &'static str },
    /// A connection by TCP.
    Tcp { to: &'static str, port: u16 },
    /// An echo request.
    Ping { to: &'static str },
    /// Reads the memory in common, which says that text.
    Read { region: &'static str, says: &'static str },
    /// Writes into memory that it may only read.
    Write { region: &'static str },
    /// Another tenant's memory, which its monitor asks for and it finds no device of.
    Region { region: &'static str },
}

/// A row of the table.
#[derive(Debug, Default)]
pub(crate) struct Row {
    pub(crate) who: &'static str,
    pub(crate) what: String,
    /// What the guest says of it; of a verb, what comes of it.
    pub(crate) guest: String,
    pub(crate) verdict: String,
    pub(crate) rule: String,
    pub(crate) good: bool,
    /// The decision by its number, as it has to be in the audit log.
    pub(crate) said: Option<(u64, Said)>,
    /// A verb that was carried out, or that somebody wanted in vain, likewise.
    pub(crate) done: Option<Done>,
    pub(crate) rejected: Option<Rejected>,
}

impl Try {
    /// In words.
    fn what(self) -> String {
        match self {
            Self::Vsock { to, port } => format!("connect vsock {port} of {to}"),
            Self::Hold { to } => format!("connect vsock {DATABASE} of {to}, and stay"),
            Self::Tcp { to, port } => format!("connect tcp {port} of {to}"),
            Self::Ping { to } => format!("ping {to}"),
            Self::Read { region, .. } => format!("read region {region}"),
            Self::Write { region } => format!("write region {region}"),
            Self::Region { region } => format!("map region {region}"),
        }
    }

    /// What the guest is told.
    fn order(self) -> Result<String> {
        Ok(match self {
            Self::Vsock { to, port } => format!("vsock {} {port}", Role::of(to)?.cid()),
            Self::Hold { to } => format!("hold {} {DATABASE}", Role::of(to)?.cid()),
            Self::Tcp { to, port } => {
                // What is dropped is not heard of, so who expects that does not wait for long.
                let seconds = if to == "gateway" && port == HTTPS { 30 } else { 1 };
                format!("tcp {} {port} {seconds}", Role::of(to)?.address())
            }
            Self::Ping { to } => format!("ping {}", Role::of(to)?.address()),
            Self::Read { .. } | Self::Region { .. } => "region".to_owned(),
            Self::Write { .. } => "scribble".to_owned(),
        })
    }

    /// What the policy is asked then: what is to be done with what, and whose it is.
    fn asks(self) -> (Action, String, Option<&'static str>) {
        match self {
            Self::Vsock { to, port } => (Action::Connect, format!("vsock {port}"), Some(to)),
            Self::Hold { to } => (Action::Connect, format!("vsock {DATABASE}"), Some(to)),
            Self::Tcp { to, port } => (Action::Connect, format!("tcp {port}"), Some(to)),
            Self::Ping { to } => (Action::Send, "icmp 8".to_owned(), Some(to)),
            Self::Read { region, .. } | Self::Region { region } => {
                (Action::MapRo, format!("region {region:?}"), None)
            }
            Self::Write { region } => (Action::MapRw, format!("region {region:?}"), None),
        }
    }
}

/// The policies that have been in force, by their numbers.
pub(crate) struct Policies {
    all: Vec<Policy>,
    /// Names and texts of their files, to find statements that are no rules.
    files: Vec<(String, String)>,
}

impl Policies {
    pub(crate) fn new(files: Vec<(String, String)>) -> Self {
        Self { all: Vec::new(), files }
    }

    pub(crate) fn push(&mut self, policy: Policy) {
        self.all.push(policy);
    }

    /// The policy by which something was decided.
    fn of(&self, decision: &Decision) -> Option<&Policy> {
        usize::try_from(decision.epoch).ok().and_then(|epoch| self.all.get(epoch))
    }

    /// The rule that a decision stands on, with its file and line, if it stands on one.
    fn named(&self, decision: &Decision) -> Option<String> {
        let (policy, rule) = self.of(decision).zip(decision.rule)?;
        Some(policy.rule(rule)?.to_string())
    }

    /// The same, or what there is instead.
    pub(crate) fn rule(&self, decision: &Decision) -> String {
        if let Some(rule) = self.named(decision) {
            return rule;
        }
        let Some(word) = statement(decision.layer) else { return "no rule allows it".to_owned() };
        let begins = |line: &&str| line.split_whitespace().next() == Some(word);
        let find = |(name, text): &(String, String)| {
            let (at, line) = text.lines().enumerate().find(|(_, line)| begins(line))?;
            Some(format!("{name}:{}: {}", at + 1, line.trim()))
        };
        self.files.iter().find_map(find).unwrap_or_else(|| word.to_owned())
    }

    /// What was asked and said, as the audit log has to have it: `object` in its words.
    pub(crate) fn said(
        &self,
        who: &str,
        peer: Option<&str>,
        action: Action,
        object: String,
        decision: &Decision,
    ) -> Option<Said> {
        Some(Said {
            who: who.to_owned(),
            peer: peer.map(str::to_owned),
            action: action.to_string(),
            object,
            verdict: decision.verdict.to_string(),
            layer: decision.layer.to_string(),
            rule: self.named(decision),
            policy: Digest::from_bytes(self.of(decision)?.digest()).to_string(),
            confirmed_by: None,
        })
    }
}

/// Has a guest try something. It goes well if the policy lets it and the guest says so, or both say no.
pub(crate) fn attempt(
    host: &Host,
    policies: &Policies,
    machines: &mut BTreeMap<&'static str, Machine>,
    who: &'static str,
    tries: Try,
    allowed: bool,
) -> Result<Row> {
    let role = Role::of(who)?;
    // What a machine has from its beginning was asked for then; the rest is asked for now.
    let since = if let Try::Read { .. } = tries { 0 } else { host.trail.len() };
    match tries {
        // Its monitor asks, as a guest cannot.
        Try::Write { region } => drop(host.ask_for_region(role, region, Access::ReadWrite)),
        Try::Region { region } => drop(host.ask_for_region(role, region, Access::ReadOnly)),
        _ => {}
    }
    let machine = machines.get_mut(who).with_context(|| format!("{who} is not there"))?;
    let answer = machine.ask(&tries.order()?)?;
    let asked = find(host, tries, role, since)?;
    let worked = worked(tries, &answer);
    let guest = match (&answer, tries) {
        (Ok(text), Try::Region { .. }) => format!("sees {text:?} alone"),
        (Ok(text), _) if text.is_empty() => "works".to_owned(),
        (Ok(text), _) => format!("reads {text:?}"),
        (Err(reason), _) => reason.clone(),
    };
    let (verdict, rule, permits) = match &asked {
        None => ("nobody asked".to_owned(), String::new(), !allowed),
        Some(Asked { decision, .. }) => {
            let verdict = format!("{} ({})", decision.verdict, decision.layer);
            (verdict, policies.rule(decision), decision.permits())
        }
    };
    let good = worked == allowed && permits == allowed;
    let (action, object, peer) = tries.asks();
    let said = asked.and_then(|asked| {
        Some((asked.number, policies.said(role.name, peer, action, object, &asked.decision)?))
    });
    Ok(Row { who, what: tries.what(), guest, verdict, rule, good, said, ..Row::default() })
}

/// Whether the guest got what it tried.
fn worked(tries: Try, answer: &Answer) -> bool {
    match (tries, answer) {
        (Try::Read { says, .. }, Ok(text)) => text == says,
        // Memory that says something else is not that memory.
        (Try::Region { region }, Ok(text)) => region.ends_with(text.as_str()),
        (_, answer) => answer.is_ok(),
    }
}

fn find(host: &Host, tries: Try, role: Role, since: u64) -> Result<Option<Asked>> {
    let (action, object, peer) = tries.asks();
    let monitor = host.enforcement.monitor();
    let subject = |name: &str| monitor.subject(name).with_context(|| format!("{name} is not registered"));
    let asker = subject(role.name)?;
    let peer = peer.map(subject).transpose()?;
    let is = |asked: &Asked| {
        (asked.asker, asked.peer, asked.action) == (asker, peer, action) && asked.object == object
    };
    Ok(host.trail.find(since, is))
}
