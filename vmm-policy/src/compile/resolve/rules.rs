//! What rules and limits are about, and what they say.

use std::sync::Arc;

use super::Resolver;
use crate::compile::classes::ClassKind;
use crate::compile::model::{LimitDef, RuleDef, Strength, TargetsDef};
use crate::compile::who::resolve_who;
use crate::limits;
use crate::model::{Op, Verdict};
use crate::syntax::{
    Access, Effect, Expr, Item, Rule, Span, Statement, Targets, ValuePattern, Word, did_you_mean,
};

impl Resolver<'_> {
    fn who(&mut self, expr: &Expr) -> u32 {
        if let Some(known) = self.who_index.get(expr) {
            return *known;
        }
        let mut unknown = Vec::new();
        let who = resolve_who(expr, &self.model.label_index, &mut |word: &Word| unknown.push(word.clone()));
        unknown.iter().for_each(|word| self.unknown_label(word));
        self.model.who.push(who);
        let id = self.model.who.len() as u32 - 1;
        // What has been reported is reported each time.
        if unknown.is_empty() {
            self.who_index.insert(expr.clone(), id);
        }
        id
    }

    fn targets(&mut self, targets: &Targets) -> TargetsDef {
        let asker = self.who(&targets.asker);
        let peer = targets.peer.as_ref().map(|peer| self.who(peer));
        let relation = targets.relation.as_ref().map(|relation| {
            let family = self.model.families.iter().position(|name| *name == relation.family.text);
            if family.is_none() {
                let help =
                    did_you_mean(&relation.family.text, self.model.families.iter().map(|name| &**name));
                let message = format!("no family is called {:?}", &*relation.family.text);
                self.report.add(relation.family.span, message, help);
            }
            (relation.same, family.unwrap_or(0) as u32)
        });
        let Access { actions, kind, values } = &targets.access;
        let ops = self.ops_index.entry((actions.clone(), *kind)).or_insert_with(|| {
            let wanted = |op: &Op| {
                kind.is_none_or(|kind| op.kind() == kind)
                    && (actions.is_empty() || actions.contains(&op.action()))
            };
            let mut ops: Vec<Op> = Op::all().filter(wanted).collect();
            ops.sort_unstable();
            ops.into()
        });
        let ops = Arc::clone(ops);
        let range = |value: &ValuePattern| match (value, kind) {
            (ValuePattern::Range(first, last), _) => (*first, *last),
            (ValuePattern::Name(name), Some(kind)) => {
                self.model.names.get(*kind as usize).map_or((0, 0), |names| names.range(&name.text, true))
            }
            (ValuePattern::Prefix(prefix), Some(kind)) => {
                self.model.names.get(*kind as usize).map_or((0, 0), |names| names.range(&prefix.text, false))
            }
            _ => (0, u64::MAX),
        };
        let ranges = values.iter().map(range).collect();
        TargetsDef { asker, peer, relation, ops, ranges }
    }

    pub(super) fn rules(&mut self, statements: &[Statement]) {
        for statement in statements {
            if self.report.is_full() {
                return;
            }
            match &statement.item {
                Item::Rule(rule) => self.rule(rule, statement.span),
                Item::Limit(limit) => {
                    if self.model.limits.len() >= limits::LIMITS {
                        self.report.add(
                            statement.span,
                            format!("there are more than {} limits", limits::LIMITS),
                            None,
                        );
                        continue;
                    }
                    let targets = self.targets(&limit.targets);
                    self.model.limits.push(LimitDef {
                        targets,
                        quantity: limit.quantity,
                        span: statement.span,
                    });
                }
                Item::Escalate(escalation) => {
                    let who = self.who(&escalation.asker);
                    self.model.escalations.push((who, escalation.clone(), statement.span));
                }
                _ => (),
            }
        }
    }

    fn rule(&mut self, rule: &Rule, span: Span) {
        if rule.effect == Effect::NeverReach {
            let asker = self.who(&rule.targets.asker);
            let peer = self.who(rule.targets.peer.as_ref().unwrap_or(&Expr::Any));
            self.model.never_reach.push((asker, peer, span));
            return;
        }
        let targets = self.targets(&rule.targets);
        let condition = rule.when.as_ref().map_or(Ok(0), |when| self.model.conditions.add(when));
        let condition = condition.unwrap_or_else(|message| {
            self.report.add(span, message, None);
            0
        });
        let (mut ask, mut redirect) = (None, None);
        let (strength, verdict) = match &rule.effect {
            Effect::Allow => (Strength::Allow, Verdict::Allow),
            Effect::Deny => (Strength::Deny, Verdict::Deny),
            Effect::Quarantine => (Strength::Quarantine, Verdict::Quarantine),
            Effect::Throttle(rate) => (Strength::Throttle, Verdict::Throttle(*rate)),
            Effect::Never | Effect::NeverReach => (Strength::Never, Verdict::Deny),
            Effect::Ask { by, seconds } => {
                ask = Some((self.who(by), *seconds));
                (Strength::Ask, Verdict::Ask)
            }
            Effect::Redirect { onto, number } => {
                let party = self.model.party_index.get(&onto.text).copied();
                let subject = |at: u32| {
                    self.model
                        .parties
                        .get(at as usize)
                        .is_some_and(|party| party.class.kind != ClassKind::Object)
                };
                match party.filter(|at| subject(*at)) {
                    Some(at) => redirect = Some((at, *number)),
                    None => {
                        let names = self.model.parties.iter().map(|party| &*party.name);
                        let help = did_you_mean(&onto.text, names);
                        self.report.add(
                            onto.span,
                            format!("{:?} is no virtual machine and no host principal", &*onto.text),
                            help,
                        );
                    }
                }
                (Strength::Redirect, Verdict::Redirect)
            }
        };
        self.model.rules.push(RuleDef { strength, verdict, targets, condition, ask, redirect, span });
    }
}
