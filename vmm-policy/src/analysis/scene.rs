//! Requests in words, and who is meant by them.

use super::reach::Place;
use crate::compile::{ClassKind, Facts, NOBODY, PartyDef, Who, resolve_who};
use crate::model::{Kind, Lifecycle, Op};
use crate::policy::Policy;
use crate::syntax::{Condition, Fact, PolicyError, ValuePattern, Word, did_you_mean, expression, sentence};

/// The places of those that an expression is about.
pub(super) fn party_set(policy: &Policy, text: &str) -> Result<Vec<Place>, PolicyError> {
    let model = &policy.model;
    let mut unknown = None;
    let who: Who = resolve_who(&expression(text)?, &model.label_index, &mut |word: &Word| {
        unknown = Some(word.text.clone());
    });
    if let Some(label) = unknown {
        let hint = did_you_mean(&label, model.labels.iter().map(|label| &**label));
        let hint = hint.map_or(String::new(), |hint| format!("; {hint}"));
        return Err(PolicyError::UnknownLabel { label: label.into(), hint });
    }
    let meant = model.parties.iter().filter(|party| who.matches(party.class.kind, &party.labels));
    let place = |party: &PartyDef| match party.object {
        Some((kind, atom)) => Some(Place::Station(kind, atom)),
        None => policy.table.class_of(&party.class).map(Place::Class),
    };
    let mut places: Vec<Place> = Vec::new();
    for party in meant {
        if let Some(place) = place(party)
            && !places.contains(&place)
        {
            places.push(place);
        }
    }
    if places.is_empty() { Err(PolicyError::Nobody { text: text.to_owned() }) } else { Ok(places) }
}

/// A request between parties that the policy declares, and what holds at the time.
#[derive(Clone, Debug)]
pub(crate) struct Scene {
    pub(crate) op: Op,
    /// Of [`Model::parties`](crate::compile::Model::parties).
    pub(crate) asker: u32,
    pub(crate) peer: Option<u32>,
    pub(crate) value: u64,
    /// As it was named.
    pub(crate) shown: String,
    pub(crate) facts: Facts,
}

impl Scene {
    /// Of a sentence: `web-red to connect vsock 5432 of db-red when running and attested`. Without a `when`, both run.
    pub(crate) fn new(policy: &Policy, text: &str) -> Result<Self, PolicyError> {
        let sentence = sentence(text)?;
        let model = &policy.model;
        let subject = |word: &Word| {
            let party = model.party_index.get(&word.text).copied();
            let is_subject = |at: &u32| {
                let party = model.parties.get(*at as usize);
                party.is_some_and(|party| party.class.kind != ClassKind::Object)
            };
            party.filter(is_subject).ok_or_else(|| {
                let names =
                    model.parties.iter().filter(|party| party.object.is_none()).map(|party| &*party.name);
                let hint = did_you_mean(&word.text, names).map_or(String::new(), |hint| format!("; {hint}"));
                PolicyError::UnknownLabel { label: word.text.to_string(), hint }
            })
        };
        let nobody = || PolicyError::Nobody { text: text.to_owned() };
        let op = Op::new(sentence.kind, sentence.action).ok_or_else(nobody)?;
        let value = match &sentence.value {
            ValuePattern::Range(number, _) => *number,
            ValuePattern::Name(name) | ValuePattern::Prefix(name) => model.atom(sentence.kind, &name.text),
        };
        let mut facts = Facts {
            asker: 1 << Lifecycle::Running as u8,
            peer: 1 << Lifecycle::Running as u8,
            environment: 0,
        };
        if let Some(when) = &sentence.when {
            state(policy, when, &mut facts);
        }
        Ok(Self {
            op,
            asker: subject(&sentence.asker)?,
            peer: sentence.peer.as_ref().map(subject).transpose()?,
            value,
            shown: text.split_whitespace().collect::<Vec<_>>().join(" "),
            facts,
        })
    }

    /// The class of who asks.
    pub(crate) fn asker_class(&self, policy: &Policy) -> u32 {
        class(policy, self.asker)
    }

    /// The classes of the peer that was named or of the object that stands for it, and of the object beside a peer that was named.
    pub(crate) fn peer_classes(&self, policy: &Policy) -> (u32, u32) {
        let object = object_class(policy, self.op.kind(), self.value);
        self.peer.map_or((object, NOBODY), |peer| (class(policy, peer), object))
    }
}

fn class(policy: &Policy, party: u32) -> u32 {
    let party = policy.model.parties.get(party as usize);
    party.and_then(|party| policy.table.class_of(&party.class)).unwrap_or(NOBODY)
}

fn object_class(policy: &Policy, kind: Kind, value: u64) -> u32 {
    if kind.value_kind() == crate::ValueKind::Name { policy.table.object_class(kind, value) } else { NOBODY }
}

/// Makes true what a sentence says is.
fn state(policy: &Policy, when: &Condition, facts: &mut Facts) {
    match when {
        Condition::And(all) => all.iter().for_each(|one| state(policy, one, facts)),
        Condition::Is { fact, peer } => {
            let Some(bit) = policy.model.conditions.known_bit(fact) else { return };
            match fact {
                Fact::Between { .. } | Fact::Flag(_) => facts.environment |= bit,
                _ => {
                    let side = if *peer { &mut facts.peer } else { &mut facts.asker };
                    // There is one state of life at a time.
                    if matches!(fact, Fact::Lifecycle(_)) {
                        *side &= !0xff;
                    }
                    *side |= bit;
                }
            }
        }
        // What is not said does not hold.
        Condition::Not(_) | Condition::Or(_) => (),
    }
}
