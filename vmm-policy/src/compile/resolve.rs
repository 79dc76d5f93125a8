//! Names to numbers. Whatever names nothing, or two things, is reported.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::sync::Arc;

use rustc_hash::{FxHashMap, FxHashSet};
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::classes::{ClassKey, ClassKind};
use super::conditions::Conditions;
use super::model::{LimitDef, Model, ObjectDef, PartyDef, RuleDef, Strength, TargetsDef};
use super::names::NameIndex;
use super::who::{Who, resolve_who};
use crate::limits;
use crate::model::{Kind, Op, Verdict};
use crate::syntax::{
    Access, Document, Effect, Expr, Item, Party, PartyKind, Report, Rule, Sources, Span, Statement, Targets,
    ValuePattern, Word, did_you_mean,
};

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
    who_index: FxHashMap<Expr, u32>,
    ops_index: FxHashMap<ActionsOfKind, Arc<[Op]>>,
    declared: FxHashMap<Box<str>, Span>,
    /// Names of machines, host principals and objects.
    party_names: FxHashSet<Box<str>>,
    /// What `secrecy` and its like have been said before.
    once: FxHashSet<&'static str>,
}

impl<'r> Resolver<'r> {
    fn new(document: Document, sources: Sources, report: &'r mut Report) -> Self {
        let model = Model {
            title: String::new(),
            document,
            sources,
            digest: [0; 32],
            labels: Vec::new(),
            label_index: FxHashMap::default(),
            label_used: Vec::new(),
            family_of: Vec::new(),
            families: Vec::new(),
            wide_families: Vec::new(),
            secrecy: Vec::new(),
            integrity: Vec::new(),
            categories: Vec::new(),
            wall_bit: FxHashMap::default(),
            wall_labels: Vec::new(),
            walls: Vec::new(),
            parties: Vec::new(),
            party_index: FxHashMap::default(),
            uuid_index: FxHashMap::default(),
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
            who_index: FxHashMap::default(),
            ops_index: FxHashMap::default(),
            declared: FxHashMap::default(),
            party_names: FxHashSet::default(),
            once: FxHashSet::default(),
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

    fn only_once(&mut self, what: &'static str, span: Span) -> bool {
        let first = self.once.insert(what);
        if !first {
            self.report.add(span, format!("{what:?} is said twice: there is one order, and one list"), None);
        }
        first
    }

    fn distinct(&mut self, words: &[Word], most: usize, what: &str) -> Vec<Box<str>> {
        let mut names: Vec<Box<str>> = Vec::new();
        for word in words {
            if names.contains(&word.text) {
                self.report.add(word.span, format!("{:?} is twice in it", &*word.text), None);
            } else if names.len() >= most {
                self.report.add(word.span, format!("there are more than {most} {what}"), None);
                break;
            } else {
                names.push(word.text.clone());
            }
        }
        names
    }

    fn declarations(&mut self, statements: &[Statement]) {
        for statement in statements {
            match &statement.item {
                // The first one counts; those of files that are included further on are notes.
                Item::Policy(title) if self.model.title.is_empty() => self.model.title.clone_from(title),
                Item::Policy(_) => (),
                Item::Labels(labels) => labels.iter().for_each(|label| self.label(label, None)),
                Item::Family { name, labels } => {
                    let family = self.model.families.len() as u32;
                    if self.model.families.contains(&name.text) {
                        self.report.add(
                            name.span,
                            format!("there is a family {:?} already", &*name.text),
                            None,
                        );
                    }
                    self.model.families.push(name.text.clone());
                    labels.iter().for_each(|label| self.label(label, Some(family)));
                }
                Item::Secrecy(levels) if self.only_once("secrecy", statement.span) => {
                    self.model.secrecy = self.distinct(levels, limits::LEVELS, "levels");
                }
                Item::Integrity(levels) if self.only_once("integrity", statement.span) => {
                    self.model.integrity = self.distinct(levels, limits::LEVELS, "levels");
                }
                Item::Categories(names) if self.only_once("categories", statement.span) => {
                    self.model.categories = self.distinct(names, limits::CATEGORIES, "categories");
                }
                _ => (),
            }
        }
        for statement in statements {
            if let Item::Party(party) = &statement.item {
                self.label(&party.name, None);
                self.party_names.insert(party.name.text.clone());
            }
        }
        for statement in statements {
            if let Item::Wall { name, labels } = &statement.item {
                self.wall(name, labels);
            }
        }
    }

    fn wall(&mut self, name: &Word, labels: &[Word]) {
        if labels.len() < 2 {
            self.report.add(name.span, "a wall is between two labels at least", None);
        }
        let mut mask = 0;
        for word in labels {
            let Some(label) = self.known_label(word) else { continue };
            let next = self.model.wall_labels.len() as u32;
            if next as usize >= limits::WALL_LABELS && !self.model.wall_bit.contains_key(&label) {
                return self.report.add(
                    word.span,
                    format!("more than {} labels are at walls", limits::WALL_LABELS),
                    None,
                );
            }
            let bit = *self.model.wall_bit.entry(label).or_insert(next);
            if bit == next {
                self.model.wall_labels.push(label);
            }
            mask |= 1 << bit;
        }
        self.model.walls.push((name.text.clone(), mask));
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

    fn level(&mut self, word: &Word, of_secrecy: bool) -> u8 {
        let levels = if of_secrecy { &self.model.secrecy } else { &self.model.integrity };
        if let Some(at) = levels.iter().position(|level| *level == word.text) {
            return at as u8;
        }
        let what = if of_secrecy { "secrecy" } else { "integrity" };
        let near = did_you_mean(&word.text, levels.iter().map(|level| &**level));
        let help = near.unwrap_or_else(|| format!("declare it: {what} LOW < {word}"));
        self.report.add(word.span, format!("there is no level of {what} {:?}", &*word.text), Some(help));
        0
    }

    fn parties(&mut self, statements: &[Statement]) {
        for statement in statements {
            if let Item::Party(party) = &statement.item
                && !self.report.is_full()
            {
                self.party(party);
            }
        }
    }

    fn party(&mut self, party: &Party) {
        let mut labels = BTreeSet::new();
        labels.extend(self.model.label_index.get(&party.name.text));
        let mut families: FxHashMap<u32, &Word> = FxHashMap::default();
        for word in &party.labels {
            let Some(label) = self.known_label(word) else { continue };
            if self.party_names.contains(&word.text) || !labels.insert(label) {
                let message = format!(
                    "{:?} cannot be given to {:?}: it is another's name, or given twice",
                    &*word.text, &*party.name.text
                );
                self.report.add(word.span, message, None);
            }
            if let Some(family) = self.model.family_of.get(label as usize).copied().flatten()
                && let Some(before) = families.insert(family, word)
            {
                let family = self.model.families.get(family as usize).cloned().unwrap_or_default();
                let message = format!(
                    "{:?} and {:?} are both of the family {:?}",
                    &*before.text, &*word.text, &*family
                );
                self.report.add(word.span, message, Some("one of a family excludes the others".into()));
            }
        }
        let secrecy = party.secrecy.as_ref().map_or(0, |level| self.level(&level.level, true));
        let integrity = party.integrity.as_ref().map_or(0, |level| self.level(level, false));
        let mut categories = 0;
        for word in party.secrecy.iter().flat_map(|level| &level.categories) {
            match self.model.categories.iter().position(|name| *name == word.text) {
                Some(at) => categories |= 1 << at,
                None => {
                    let help = did_you_mean(&word.text, self.model.categories.iter().map(|name| &**name));
                    self.report.add(word.span, format!("there is no category {:?}", &*word.text), help);
                }
            }
        }
        let index = self.model.parties.len() as u32;
        self.uuid(party, index);
        let labels: Vec<u32> = labels.into_iter().collect();
        let wall = self.model.wall_mask(&labels);
        if let (Some(name), false) = (self.model.wall_conflict(wall), party.guard) {
            let message = format!("{:?} stands on both sides of the wall {name:?}", &*party.name.text);
            self.report.add(
                party.name.span,
                message,
                Some("a guard may, which is trusted to keep them apart".into()),
            );
        }
        let kind = match party.kind {
            PartyKind::Vm => ClassKind::Vm,
            PartyKind::Host => ClassKind::Host,
            PartyKind::Object(_) => ClassKind::Object,
        };
        let class = ClassKey {
            kind,
            labels: labels.clone(),
            secrecy,
            integrity,
            categories,
            guard: party.guard,
            wall,
        };
        self.model.party_index.insert(party.name.text.clone(), index);
        self.model.parties.push(PartyDef {
            name: party.name.text.clone(),
            class,
            object: None,
            labels,
            filtered: party.filtered,
        });
    }

    fn uuid(&mut self, party: &Party, index: u32) {
        let Some(word) = &party.uuid else { return };
        let Ok(uuid) = Uuid::try_parse(&word.text) else {
            let help = Some("it looks like 6f9619ff-8b86-d011-b42d-00c04fc964ff".into());
            return self.report.add(word.span, format!("{:?} is no UUID", &*word.text), help);
        };
        if let Some(other) = self.model.uuid_index.insert(uuid, index) {
            let name = self.model.parties.get(other as usize).map_or("", |party| &party.name);
            self.report.add(word.span, format!("{name:?} has that UUID already"), None);
        }
    }

    /// The names of objects that statements have, and what is declared of them.
    fn names(&mut self, statements: &[Statement]) {
        let mut patterns: Vec<Vec<(Box<str>, bool)>> = vec![Vec::new(); Kind::ALL.len()];
        let mut add = |kind: Kind, text: &str, whole: bool| {
            if let Some(of_kind) = patterns.get_mut(kind as usize) {
                of_kind.push((text.into(), whole));
            }
        };
        for statement in statements {
            let access = match &statement.item {
                Item::Party(Party { kind: PartyKind::Object(kind), name, .. }) => {
                    add(*kind, &name.text, true);
                    continue;
                }
                Item::Rule(rule) => &rule.targets.access,
                Item::Limit(limit) => &limit.targets.access,
                _ => continue,
            };
            let Some(kind) = access.kind else { continue };
            for value in &access.values {
                match value {
                    ValuePattern::Name(name) => add(kind, &name.text, true),
                    ValuePattern::Prefix(prefix) if !prefix.text.is_empty() => add(kind, &prefix.text, false),
                    _ => (),
                }
            }
        }
        self.model.names = patterns.into_iter().map(NameIndex::new).collect();
        for statement in statements {
            if let Item::Party(Party { kind: PartyKind::Object(kind), name, .. }) = &statement.item
                && let Some(party) = self.model.party_index.get(&name.text).copied()
            {
                let atom = self.model.atom(*kind, &name.text);
                if let Some(def) = self.model.parties.get_mut(party as usize) {
                    def.object = Some((*kind, atom));
                }
                self.model.objects.push(ObjectDef { kind: *kind, atom, party });
            }
        }
    }

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

    fn rules(&mut self, statements: &[Statement]) {
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
        for targets in model
            .rules
            .iter()
            .map(|rule| &rule.targets)
            .chain(model.limits.iter().map(|limit| &limit.targets))
        {
            if let Some(family) = wide(targets)
                && !model.wide_families.contains(&family)
                && model.wide_families.len() < super::lookup::WIDE_FAMILIES
            {
                model.wide_families.push(family);
            }
        }
        let targets = model
            .rules
            .iter()
            .map(|rule| &rule.targets)
            .chain(model.limits.iter().map(|limit| &limit.targets));
        let families: FxHashSet<u32> =
            targets.filter_map(|targets| targets.relation.map(|(_, family)| family)).collect();
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
