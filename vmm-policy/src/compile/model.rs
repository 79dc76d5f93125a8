//! A policy whose names have become numbers.

use std::collections::HashMap;
use std::sync::Arc;

use uuid::Uuid;

use super::classes::ClassKey;
use super::conditions::Conditions;
use super::names::NameIndex;
use super::who::Who;
use crate::model::{Kind, Op, RuleId, Verdict};
use crate::syntax::{Document, Escalation, Quantity, Sources, Span};

/// What a rule says, from what overrides all to what is overridden by all.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Strength {
    Never,
    Deny,
    Quarantine,
    Ask,
    Redirect,
    Throttle,
    Allow,
}

impl Strength {
    /// Whether it lets something happen, of whatever kind.
    pub(crate) fn opens(self) -> bool {
        self > Self::Deny
    }
}

/// Who, what, of whom: as numbers.
#[derive(Clone, Debug)]
pub(crate) struct TargetsDef {
    /// Of [`Model::who`].
    pub(crate) asker: u32,
    /// Of [`Model::who`]; `None` where it leads to nobody.
    pub(crate) peer: Option<u32>,
    /// Whether they have the same label of the family of this number, or different ones.
    pub(crate) relation: Option<(bool, u32)>,
    /// In ascending order, shared by rules that are about the same.
    pub(crate) ops: Arc<[Op]>,
    /// Of object numbers or of atoms of names; empty for all.
    pub(crate) ranges: Vec<(u64, u64)>,
}

/// `allow` and its like.
#[derive(Clone, Debug)]
pub(crate) struct RuleDef {
    pub(crate) strength: Strength,
    pub(crate) verdict: Verdict,
    pub(crate) targets: TargetsDef,
    /// Of [`Model::conditions`]; 0 for always.
    pub(crate) condition: u32,
    /// Of [`Model::who`]: who may say yes to what is asked for, and within so many seconds.
    pub(crate) ask: Option<(u32, u32)>,
    /// The party, and the port, that it leads to.
    pub(crate) redirect: Option<(u32, Option<u64>)>,
    pub(crate) span: Span,
}

impl RuleDef {
    /// Whether it says what `other` says, of whomever.
    pub(crate) fn says_the_same(&self, other: &Self) -> bool {
        self.strength == other.strength
            && self.verdict == other.verdict
            && self.redirect == other.redirect
            && self.ask == other.ask
    }
}

/// `limit`.
#[derive(Clone, Debug)]
pub(crate) struct LimitDef {
    pub(crate) targets: TargetsDef,
    pub(crate) quantity: Quantity,
    pub(crate) span: Span,
}

/// `vm` and `host`, and objects.
#[derive(Clone, Debug)]
pub(crate) struct PartyDef {
    pub(crate) name: Box<str>,
    pub(crate) class: ClassKey,
    /// Its kind and atom, if it is an object.
    pub(crate) object: Option<(Kind, u64)>,
    /// All its labels, its name among them.
    pub(crate) labels: Vec<u32>,
    pub(crate) filtered: bool,
}

/// An object that the policy declares.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ObjectDef {
    pub(crate) kind: Kind,
    pub(crate) atom: u64,
    pub(crate) party: u32,
}

#[derive(Debug)]
pub(crate) struct Model {
    pub(crate) title: String,
    pub(crate) document: Document,
    pub(crate) sources: Sources,
    pub(crate) digest: [u8; 32],

    pub(crate) labels: Vec<Box<str>>,
    pub(crate) label_index: HashMap<Box<str>, u32>,
    /// Which labels rules ask for: the others make no class.
    pub(crate) label_used: Vec<bool>,
    /// The family of each label.
    pub(crate) family_of: Vec<Option<u32>>,
    pub(crate) families: Vec<Box<str>>,
    /// Families that rules name of `any` and `any`, the first few.
    pub(crate) wide_families: Vec<u32>,
    pub(crate) secrecy: Vec<Box<str>>,
    pub(crate) integrity: Vec<Box<str>>,
    pub(crate) categories: Vec<Box<str>>,
    /// Which bit of a history each label at a wall has.
    pub(crate) wall_bit: HashMap<u32, u32>,
    /// The label of each bit.
    pub(crate) wall_labels: Vec<u32>,
    /// The bits of each wall.
    pub(crate) walls: Vec<(Box<str>, u64)>,

    pub(crate) parties: Vec<PartyDef>,
    pub(crate) party_index: HashMap<Box<str>, u32>,
    pub(crate) uuid_index: HashMap<Uuid, u32>,
    pub(crate) objects: Vec<ObjectDef>,

    pub(crate) who: Vec<Who>,
    /// Strongest first, and of equal ones the first in the text: the index is the [`RuleId`].
    pub(crate) rules: Vec<RuleDef>,
    /// Their ids follow those of the rules.
    pub(crate) limits: Vec<LimitDef>,
    /// Pairs of [`Model::who`].
    pub(crate) never_reach: Vec<(u32, u32, Span)>,
    pub(crate) escalations: Vec<(u32, Escalation, Span)>,
    pub(crate) conditions: Conditions,
    /// By kind.
    pub(crate) names: Vec<NameIndex>,
}

impl Model {
    pub(crate) fn rule(&self, id: RuleId) -> Option<&RuleDef> {
        self.rules.get(id.0 as usize)
    }

    pub(crate) fn limit_id(&self, limit: usize) -> RuleId {
        RuleId((self.rules.len() + limit) as u32)
    }

    pub(crate) fn span_of(&self, id: RuleId) -> Option<Span> {
        let at = id.0 as usize;
        let rule = self.rules.get(at).map(|rule| rule.span);
        rule.or_else(|| self.limits.get(at.checked_sub(self.rules.len())?).map(|limit| limit.span))
    }

    /// The number that stands for an object's name.
    pub(crate) fn atom(&self, kind: Kind, name: &str) -> u64 {
        self.names.get(kind as usize).map_or(0, |names| names.atom(name))
    }

    /// A name of that atom's.
    pub(crate) fn atom_name(&self, kind: Kind, atom: u64) -> String {
        self.names.get(kind as usize).map_or_else(|| "*".to_owned(), |names| names.shown(atom))
    }

    /// The family of a label.
    pub(crate) fn family(&self, label: u32) -> Option<u32> {
        self.family_of.get(label as usize).copied().flatten()
    }

    /// The first of the labels that is of a family.
    pub(crate) fn label_of(&self, labels: &[u32], family: u32) -> Option<u32> {
        labels.iter().copied().find(|label| self.family(*label) == Some(family))
    }

    /// The history that labels begin with.
    pub(crate) fn wall_mask(&self, labels: &[u32]) -> u64 {
        labels.iter().filter_map(|label| self.wall_bit.get(label)).fold(0, |mask, bit| mask | 1 << bit)
    }

    /// Whether two of the labels of one wall are among them.
    pub(crate) fn wall_conflict(&self, mask: u64) -> Option<&str> {
        let conflict = |(_, wall): &&(Box<str>, u64)| (mask & wall).count_ones() > 1;
        self.walls.iter().find(conflict).map(|(name, _)| &**name)
    }
}
