//! One host for both: who is there, and what is asked.

use std::collections::{HashMap, HashSet};
use std::str::FromStr;

use anyhow::{Context as _, Result};
use cedar_policy::{
    Authorizer, Context, Decision, Entities, Entity, EntityId, EntityTypeName, EntityUid, PolicySet, Request,
    RestrictedExpression,
};
use vmm_policy::syntax::{Document, Item, PartyKind};
use vmm_policy::{Action, Lifecycle, Object, Value};

use crate::translate::{action_id, translate};

/// What holds of a machine at the time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct State {
    pub(crate) lifecycle: Lifecycle,
    pub(crate) attested: bool,
}

/// Cedar with a policy and the machines of its document.
pub(crate) struct Cedar {
    authorizer: Authorizer,
    policies: PolicySet,
    entities: Entities,
}

pub(crate) fn uid(kind: &str, id: &str) -> Result<EntityUid> {
    Ok(EntityUid::from_type_name_and_id(EntityTypeName::from_str(kind)?, EntityId::new(id)))
}

impl Cedar {
    pub(crate) fn new(document: &Document) -> Result<Self> {
        let text = translate(document)?;
        let policies = PolicySet::from_str(&text).with_context(|| format!("Cedar does not read\n{text}"))?;
        let level = |levels: &[String], name: Option<&str>| {
            let at = name.and_then(|name| levels.iter().position(|level| level == name));
            RestrictedExpression::new_long(at.unwrap_or(0) as i64)
        };
        let (mut secrecy, mut integrity) = (Vec::new(), Vec::new());
        for statement in &document.statements {
            match &statement.item {
                Item::Secrecy(levels) => {
                    secrecy = levels.iter().map(|level| level.text.to_string()).collect()
                }
                Item::Integrity(levels) => {
                    integrity = levels.iter().map(|level| level.text.to_string()).collect()
                }
                _ => (),
            }
        }
        let mut entities = vec![Entity::new(uid("Nobody", "nobody")?, HashMap::new(), HashSet::new())?];
        for statement in &document.statements {
            let Item::Party(party) = &statement.item else { continue };
            let own = std::iter::once(&party.name).chain(&party.labels);
            let parents = own.map(|label| uid("Label", &label.text)).collect::<Result<HashSet<_>>>()?;
            let categories = party.secrecy.iter().flat_map(|level| &level.categories);
            let categories = categories.map(|name| RestrictedExpression::new_string(name.text.to_string()));
            let attributes = HashMap::from([
                ("vm".to_owned(), RestrictedExpression::new_bool(party.kind == PartyKind::Vm)),
                ("guard".to_owned(), RestrictedExpression::new_bool(party.guard)),
                (
                    "secrecy".to_owned(),
                    level(&secrecy, party.secrecy.as_ref().map(|level| &*level.level.text)),
                ),
                (
                    "integrity".to_owned(),
                    level(&integrity, party.integrity.as_ref().map(|level| &*level.text)),
                ),
                ("categories".to_owned(), RestrictedExpression::new_set(categories)),
            ]);
            entities.push(Entity::new(uid("Party", &party.name.text)?, attributes, parents)?);
        }
        Ok(Self {
            authorizer: Authorizer::new(),
            policies,
            entities: Entities::from_entities(entities, None)?,
        })
    }

    pub(crate) fn request(
        &self,
        asker: (&str, State),
        peer: Option<(&str, State)>,
        action: Action,
        object: &Object<'_>,
        flags: &[&str],
    ) -> Result<Request> {
        let (number, name) = match object.value() {
            Value::Number(number) => (number as i64, ""),
            Value::Name(name) => (0, name),
        };
        let text = |text: &str| RestrictedExpression::new_string(text.to_owned());
        let peer_state = peer.map_or("none", |(_, state)| state.lifecycle.word());
        let context = Context::from_pairs([
            ("number".to_owned(), RestrictedExpression::new_long(number)),
            ("name".to_owned(), text(name)),
            ("asker_state".to_owned(), text(asker.1.lifecycle.word())),
            ("asker_attested".to_owned(), RestrictedExpression::new_bool(asker.1.attested)),
            ("peer_state".to_owned(), text(peer_state)),
            (
                "peer_attested".to_owned(),
                RestrictedExpression::new_bool(peer.is_some_and(|(_, state)| state.attested)),
            ),
            ("flags".to_owned(), RestrictedExpression::new_set(flags.iter().map(|flag| text(flag)))),
        ])?;
        let resource = match peer {
            Some((name, _)) => uid("Party", name)?,
            None => uid("Nobody", "nobody")?,
        };
        let action = uid("Action", &action_id(object.kind(), action))?;
        Ok(Request::new(uid("Party", asker.0)?, action, resource, context, None)?)
    }

    pub(crate) fn allows(&self, request: &Request) -> bool {
        self.authorizer.is_authorized(request, &self.policies, &self.entities).decision() == Decision::Allow
    }
}
