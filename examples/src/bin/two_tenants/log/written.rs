//! What is in the log, in the words in which the program shows it.

use std::collections::BTreeMap;

use vmm_audit::event::{Action, Event, Kind, ObjectClass, Outcome, Party, Verdict};

use super::{Done, GATE, POLICY, Rejected, Said, Taken};
use crate::host::ROLES;

/// What is in the log of this run.
#[derive(Default)]
pub(super) struct Written {
    pub(super) entries: u64,
    pub(super) said: Vec<Said>,
    /// Decisions, by verdict; with those that were counted and not written one by one.
    pub(super) verdicts: BTreeMap<Option<Verdict>, u64>,
    pub(super) counted: BTreeMap<(Option<Action>, Option<Verdict>), u64>,
    /// With the rule, where there is one.
    pub(super) taken: Vec<(Taken, Option<String>)>,
    /// Verbs that were begun, by their number: in which entry, and what of them was decided before.
    pub(super) begun: BTreeMap<String, (u64, Done)>,
    pub(super) done: Vec<(u64, Done)>,
    pub(super) rejected: Vec<Rejected>,
    /// The first and the last event of each machine, with their entries.
    pub(super) machines: BTreeMap<String, [(u64, Event); 2]>,
}

impl Written {
    pub(super) fn add(&mut self, seq: u64, source: &str, event: Event) {
        self.entries += 1;
        match (source, event.kind) {
            (POLICY, Kind::Decision) => {
                *self.verdicts.entry(event.verdict).or_default() += 1;
                match said(&event) {
                    Some(said) => self.said.push(said),
                    None => self.rejected.extend(rejected(&event)),
                }
            }
            (POLICY, Kind::Administration) => self.verb(seq, &event),
            (POLICY, Kind::Revoked) => {
                let (who, peer) = (name(event.subject.as_ref()), event.peer.as_ref());
                let peer = peer.map(|peer| name(Some(peer)));
                let taken = Taken { who, peer, object: object(&event), why: String::new() };
                self.taken.push((taken, rule(&event)));
            }
            (POLICY, Kind::Coalesced) if event.get("of") == Some("decision") => {
                self.counted.insert((event.action, event.verdict), event.count);
            }
            (POLICY | GATE, _) | (_, Kind::Coalesced) => {}
            (machine, _) => {
                let of = self.machines.entry(machine.to_owned());
                let [_, last] = of.or_insert_with(|| [(seq, event.clone()), (seq, event.clone())]);
                *last = (seq, event);
            }
        }
    }

    /// One that is begun, if it has been allowed before, or that has ended well, if it has begun.
    fn verb(&mut self, seq: u64, event: &Event) {
        let Some(number) = event.get("operation") else { return };
        if event.outcome == Some(Outcome::Success) {
            self.done.extend(self.begun.remove(number));
        }
        let Some(done) = done(event).filter(|_| event.outcome.is_none()) else { return };
        let is_allowed = |said: &Said| {
            let may = said.verdict == Verdict::Allow.to_string() || said.confirmed_by.is_some();
            let same = (&said.who, &said.object, &said.peer, &said.rule, &said.policy, &said.confirmed_by);
            may && same == (&done.who, &done.verb, &done.of, &done.rule, &done.policy, &done.confirmed_by)
        };
        if self.said.iter().any(is_allowed) {
            self.begun.insert(number.to_owned(), (seq, done));
        }
    }

    /// Whether a verb was begun before the machine noticed anything of it, which it did.
    pub(super) fn is_before_effect(&self, (seq, done): &(u64, Done)) -> bool {
        let machine = done.of.as_ref().and_then(|of| self.machines.get(of));
        match done.verb.as_str() {
            "verb \"launch\"" => {
                machine.is_some_and(|[(first, event), _]| seq < first && event.kind == Kind::Launch)
            }
            "verb \"destroy\"" => {
                machine.is_some_and(|[_, (last, event)]| seq < last && event.kind == Kind::Shutdown)
            }
            _ => done.of.is_none(),
        }
    }
}

/// What the policy calls it.
pub(super) fn name(party: Option<&Party>) -> String {
    let role = |number: u128| ROLES.into_iter().find(|role| u128::from(role.number) == number);
    match party {
        Some(Party::Vm(vm)) => role(vm.uuid).map_or_else(|| vm.to_string(), |role| role.name.to_owned()),
        Some(Party::Host(name)) => name.to_string(),
        _ => String::new(),
    }
}

/// In the policy's words.
fn object(event: &Event) -> String {
    let Some(object) = &event.object else { return String::new() };
    match (object.class, &object.name, object.number) {
        (ObjectClass::Network, Some(name), Some(number)) => format!("{name} {number}"),
        (class, _, Some(number)) => format!("{class} {number}"),
        (class, Some(name), _) => format!("{class} {:?}", name.as_str()),
        (class, ..) => class.to_string(),
    }
}

fn rule(event: &Event) -> Option<String> {
    let words: Vec<&str> = event.rule.as_ref()?.as_str().split_whitespace().collect();
    Some(format!("{}:{}: {}", event.get("file").unwrap_or("policy"), event.rule_line, words.join(" ")))
}

pub(super) fn said(event: &Event) -> Option<Said> {
    Some(Said {
        who: name(event.subject.as_ref()),
        peer: event.peer.as_ref().map(|peer| name(Some(peer))),
        action: event.action?.to_string(),
        object: object(event),
        verdict: event.verdict?.to_string(),
        layer: event.reason.as_ref()?.as_str().strip_prefix("layer ")?.to_owned(),
        rule: rule(event),
        policy: event.policy?.to_string(),
        confirmed_by: named(event, "confirmed-by"),
    })
}

/// Who that is, by an attribute.
fn named(event: &Event, attribute: &str) -> Option<String> {
    event.get(attribute).map(|who| name(who.parse().ok().as_ref()))
}

fn done(event: &Event) -> Option<Done> {
    Some(Done {
        who: name(event.subject.as_ref()),
        verb: object(event),
        of: event.peer.as_ref().map(|peer| name(Some(peer))),
        confirmed_by: named(event, "confirmed-by"),
        rule: rule(event),
        policy: event.policy?.to_string(),
    })
}

fn rejected(event: &Event) -> Option<Rejected> {
    Some(Rejected {
        who: name(event.subject.as_ref()),
        of: event.peer.as_ref().map(|peer| name(Some(peer))),
        ticket: event.get("ticket").and_then(|ticket| ticket.parse().ok()),
        asked_by: named(event, "asked-by"),
        why: event.reason.as_ref()?.to_string(),
    })
}
