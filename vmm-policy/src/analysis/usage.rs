//! Rules that do nothing.

use std::fmt;

use fixedbitset::FixedBitSet;

use super::reach::{class_name, describe_pair};
use crate::compile::{NOBODY, Steps, Strength, Table};
use crate::model::{Op, RuleId};
use crate::policy::Policy;
use crate::syntax::PolicyError;

/// What a rule is good for, among those that the policy declares.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[cfg_attr(feature = "serde", serde(rename_all = "kebab-case"))]
#[non_exhaustive]
pub enum Usage {
    /// There is a request that it answers, or would answer if its condition held.
    Used,
    /// Nobody whom the policy declares is meant by it.
    Dead,
    /// Levels or walls keep apart all whom it would join.
    Barred {
        /// Such a request.
        example: String,
    },
    /// Others answer whatever it is about before it.
    Shadowed {
        /// Such a request.
        example: String,
        /// The line of the rule that answers it.
        by_line: usize,
    },
}

/// A rule and what it is good for.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct RuleReport {
    /// Which.
    #[cfg_attr(feature = "serde", serde(skip))]
    pub id: RuleId,
    /// Its file.
    pub file: String,
    /// Its line.
    pub line: usize,
    /// Its text.
    pub rule: String,
    /// What it is good for.
    pub usage: Usage,
}

impl fmt::Display for RuleReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}: ", self.file, self.line, self.rule)?;
        match &self.usage {
            Usage::Used => f.write_str("used"),
            Usage::Dead => f.write_str("nobody who is declared is meant by it"),
            Usage::Barred { example } => {
                write!(f, "levels or walls forbid all that it allows, such as {example}")
            }
            Usage::Shadowed { example, by_line } => {
                write!(f, "line {by_line} answers all that it is about, such as {example}")
            }
        }
    }
}

impl Policy {
    /// What each rule and limit is good for, in the order of their lines.
    ///
    /// # Errors
    /// If it would take too many steps.
    pub fn usage(&self) -> Result<Vec<RuleReport>, PolicyError> {
        let (model, table) = (&*self.model, &*self.table);
        let mut steps = Steps::default();
        let mut used = FixedBitSet::with_capacity(model.rules.len());
        let mut met = FixedBitSet::with_capacity(model.rules.len());
        for op in Op::all() {
            for (asker, peer) in table.pairs(op, &mut steps)? {
                table.winners(model, op, asker, peer, |rule, effective| {
                    met.insert(rule as usize);
                    if effective {
                        used.insert(rule as usize);
                    }
                });
            }
        }
        let mut reports = Vec::new();
        for (at, rule) in model.rules.iter().enumerate() {
            let usage = if used.contains(at) {
                Usage::Used
            } else {
                self.useless(table, at, met.contains(at), rule.strength, &mut steps)?
            };
            reports.push((rule.span, RuleId(at as u32), usage));
        }
        for (at, limit) in model.limits.iter().enumerate() {
            let pair = self.a_pair(
                table,
                limit.targets.asker,
                limit.targets.peer,
                limit.targets.relation,
                &mut steps,
            )?;
            let usage = if pair.is_some() { Usage::Used } else { Usage::Dead };
            reports.push((limit.span, model.limit_id(at), usage));
        }
        reports.sort_by_key(|(span, ..)| (span.file, span.start));
        let report = |(span, id, usage)| RuleReport {
            id,
            file: model.sources.name(span).to_owned(),
            line: model.sources.place(span).0,
            rule: model.sources.one_line(span),
            usage,
        };
        Ok(reports.into_iter().map(report).collect())
    }

    /// A pair of classes that a rule is about.
    fn a_pair(
        &self,
        table: &Table,
        asker: u32,
        peer: Option<u32>,
        relation: Option<(bool, u32)>,
        steps: &mut Steps,
    ) -> Result<Option<(u32, u32)>, PolicyError> {
        let is_object = |class: u32| table.class(class).is_some_and(|class| class.is_object);
        let everybody = || 1..table.class_count();
        for one in everybody().filter(|class| table.is_member(asker, *class) && !is_object(*class)) {
            steps.take(1)?;
            let Some(who) = peer else { return Ok(Some((one, NOBODY))) };
            for other in everybody().filter(|class| table.is_member(who, *class)) {
                steps.take(1)?;
                if table.is_related(&self.model, relation, one, other) {
                    return Ok(Some((one, other)));
                }
            }
        }
        Ok(None)
    }

    fn useless(
        &self,
        table: &Table,
        at: usize,
        met: bool,
        strength: Strength,
        steps: &mut Steps,
    ) -> Result<Usage, PolicyError> {
        let model = &*self.model;
        let Some(rule) = model.rules.get(at) else { return Ok(Usage::Dead) };
        let targets = &rule.targets;
        let Some((asker, peer)) = self.a_pair(table, targets.asker, targets.peer, targets.relation, steps)?
        else {
            return Ok(Usage::Dead);
        };
        // What is never to be may be too wide for the table, and holds.
        if strength == Strength::Never {
            return Ok(Usage::Used);
        }
        let Some(op) = targets.ops.first().copied() else { return Ok(Usage::Dead) };
        let value = targets.ranges.first().map_or(0, |range| range.0);
        let example = describe_pair(model, table, op, asker, peer, value);
        if met {
            return Ok(Usage::Barred { example });
        }
        let mut by_line = 0;
        table.strongest(op, asker, peer, value, |rule| {
            let span = model.rules.get(rule as usize).map(|rule| rule.span).unwrap_or_default();
            by_line = model.sources.place(span).0;
        });
        Ok(Usage::Shadowed { example, by_line })
    }

    /// The class that a declared machine, host principal or object is in, by a name of a member: for people who wonder why two are
    /// treated alike.
    pub fn class_of(&self, party: &str) -> Option<String> {
        let party = self.model.parties.get(*self.model.party_index.get(party)? as usize)?;
        let class = self.table.class_of(&party.class)?;
        Some(class_name(&self.model, &self.table, class))
    }
}
