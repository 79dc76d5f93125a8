//! Names to numbers. Whatever names nothing, or two things, is reported.

mod declare;
mod rules;

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::conditions::Conditions;
use super::model::{Model, RuleDef, TargetsDef};
use super::who::Who;
use crate::limits;
use crate::model::{Kind, Op, Verdict};
use crate::syntax::{Document, Expr, Report, Sources, Span, Statement, Word, did_you_mean};

/// What a policy's statements mean; `report` has what they cannot.
pub(crate) fn resolve(
    document: Document,
    statements: &[Statement],
    sources: Sources,
    report: &mut Report,
) -> Model {
    let mut resolver = Resolver::new(document, sources, report);
    resolver.declarations(statements);
    resolver.parties(statements);
    resolver.names(statements);
    resolver.rules(statements);
    resolver.finish(statements)
}

/// The actions that a rule names, and the kind if it names one.
type ActionsOfKind = (Vec<crate::model::Action>, Option<Kind>);

struct Resolver<'r> {
    model: Model,
    report: &'r mut Report,
    who_index: HashMap<Expr, u32>,
    ops_index: HashMap<ActionsOfKind, Arc<[Op]>>,
    declared: HashMap<Box<str>, Span>,
    /// Names of machines, host principals and objects.
    party_names: HashSet<Box<str>>,
    /// What `secrecy` and its like have been said before.
    once: HashSet<&'static str>,
}

impl<'r> Resolver<'r> {
    fn new(document: Document, sources: Sources, report: &'r mut Report) -> Self {
        let model = Model {
            title: String::new(),
            document,
            sources,
            digest: [0; 32],
            labels: Vec::new(),
            label_index: HashMap::default(),
            label_used: Vec::new(),
            family_of: Vec::new(),
            families: Vec::new(),
            wide_families: Vec::new(),
            secrecy: Vec::new(),
            integrity: Vec::new(),
            categories: Vec::new(),
            wall_bit: HashMap::default(),
            wall_labels: Vec::new(),
            walls: Vec::new(),
            parties: Vec::new(),
            party_index: HashMap::default(),
            uuid_index: HashMap::default(),
            objects: Vec::new(),
            who: Vec::new(),
            rules: Vec::new(),
            limits: Vec::new(),
            never_reach: Vec::new(),
            escalations: Vec::new(),
            conditions: Conditions::new(),
            names: Vec::new(),
        };
        Self {
            model,
            report,
            who_index: HashMap::default(),
            ops_index: HashMap::default(),
            declared: HashMap::default(),
            party_names: HashSet::default(),
            once: HashSet::default(),
        }
    }

    /// A label, unless there is one of that name.
    fn label(&mut self, word: &Word, family: Option<u32>) {
        if let Some(before) = self.declared.get(&word.text) {
            let (line, _) = self.model.sources.place(*before);
            let message = format!(
                "{:?} is declared already, in line {line} of {}",
                &*word.text,
                self.model.sources.name(*before)
            );
            return self.report.add(word.span, message, None);
        }
        if self.model.labels.len() >= limits::LABELS {
            return self.report.add(
                word.span,
                format!("there are more than {} labels and names", limits::LABELS),
                None,
            );
        }
        self.declared.insert(word.text.clone(), word.span);
        self.model.label_index.insert(word.text.clone(), self.model.labels.len() as u32);
        self.model.labels.push(word.text.clone());
        self.model.family_of.push(family);
    }

    fn unknown_label(&mut self, word: &Word) {
        let help = did_you_mean(&word.text, self.model.labels.iter().map(|label| &**label));
        let help = help.or_else(|| Some(format!("declare it: labels {word}")));
        self.report.add(word.span, format!("nobody is called {:?}, and no label is", &*word.text), help);
    }

    fn known_label(&mut self, word: &Word) -> Option<u32> {
        let label = self.model.label_index.get(&word.text).copied();
        if label.is_none() {
            self.unknown_label(word);
        }
        label
    }

    fn finish(mut self, statements: &[Statement]) -> Model {
        let model = &mut self.model;
        // The strictest of what throttles is the stronger.
        let pace = |rule: &RuleDef| match rule.verdict {
            Verdict::Throttle(rate) => u128::from(rate.bytes) * 1_000_000 / u128::from(rate.seconds.max(1)),
            _ => 0,
        };
        model.rules.sort_by_key(|rule| (rule.strength, pace(rule)));
        model.label_used = vec![false; model.labels.len()];
        let used = &mut model.label_used;
        let mut mark = |label: u32| {
            if let Some(used) = used.get_mut(label as usize) {
                *used = true;
            }
        };
        model.who.iter().for_each(|who: &Who| who.each_label(&mut mark));
        model.wall_labels.iter().for_each(|label| mark(*label));
        let any = |who: u32| model.who.get(who as usize) == Some(&Who::Any);
        let wide = |targets: &TargetsDef| match (targets.relation, targets.peer) {
            (Some((_, family)), Some(peer)) if any(targets.asker) && any(peer) => Some(family),
            _ => None,
        };
        let of_rules = model.rules.iter().map(|rule| &rule.targets);
        let mut families: HashSet<u32> = HashSet::new();
        for targets in of_rules.chain(model.limits.iter().map(|limit| &limit.targets)) {
            families.extend(targets.relation.map(|(_, family)| family));
            if let Some(family) = wide(targets)
                && !model.wide_families.contains(&family)
                && model.wide_families.len() < super::lookup::WIDE_FAMILIES
            {
                model.wide_families.push(family);
            }
        }
        // A peer of another label of a family than an object's is not whose the object is.
        let objects = model.parties.iter().filter(|party| party.object.is_some());
        families.extend(
            objects
                .flat_map(|party| &party.labels)
                .filter_map(|label| *model.family_of.get(*label as usize)?),
        );
        for (label, family) in model.family_of.iter().enumerate() {
            if family.is_some_and(|family| families.contains(&family)) {
                mark(label as u32);
            }
        }
        for party in &mut model.parties {
            let used = |label: &u32| model.label_used.get(*label as usize).copied().unwrap_or(false);
            party.class.labels.retain(used);
        }
        let mut digest = Sha256::new();
        let mut text = String::new();
        for statement in statements {
            text.clear();
            // Writing to a string does not fail.
            if writeln!(text, "{}", statement.item).is_ok() {
                digest.update(text.as_bytes());
            }
        }
        model.digest = digest.finalize().into();
        self.model
    }
}
