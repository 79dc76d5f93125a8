//! What is declared: labels, levels, walls, machines and objects.

use std::collections::{BTreeSet, HashMap};

use uuid::Uuid;

use super::Resolver;
use crate::compile::classes::{ClassKey, ClassKind};
use crate::compile::model::{ObjectDef, PartyDef};
use crate::compile::names::NameIndex;
use crate::limits;
use crate::model::Kind;
use crate::syntax::{Item, Party, PartyKind, Span, Statement, ValuePattern, Word, did_you_mean};

impl Resolver<'_> {
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

    pub(super) fn declarations(&mut self, statements: &[Statement]) {
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

    pub(super) fn parties(&mut self, statements: &[Statement]) {
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
        let mut families: HashMap<u32, &Word> = HashMap::default();
        for word in &party.labels {
            let Some(label) = self.known_label(word) else { continue };
            if self.party_names.contains(&word.text) || !labels.insert(label) {
                let message = format!(
                    "{:?} cannot be given to {:?}: it is another's name, or given twice",
                    &*word.text, &*party.name.text
                );
                self.report.add(word.span, message, None);
            }
            if let Some(family) = self.model.family(label)
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
    pub(super) fn names(&mut self, statements: &[Statement]) {
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
}
