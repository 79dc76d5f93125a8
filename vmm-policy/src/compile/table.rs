//! What decisions read: classes, and cells with what is said of them.

use fixedbitset::FixedBitSet;
use std::collections::HashMap;

use super::cells::Cells;
use super::classes::{Brief, Class, ClassKey, ClassKind, NOBODY};
use super::front::Front;
use super::lookup::WIDE_FAMILIES;
use super::model::Model;
use super::ranges::Ranges;
use super::ways::Ways;
use crate::limits;
use crate::model::{Kind, Op};
use crate::syntax::PolicyError;

/// It does not change; [`with_class`](Self::with_class) makes another one.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    pub(super) classes: Vec<Class>,
    pub(crate) keys: Vec<ClassKey>,
    /// Of each class, one more than its label of each family of [`Model::wide_families`]; 0 for none.
    pub(super) families: Vec<[u32; WIDE_FAMILIES]>,
    class_index: HashMap<ClassKey, u32>,
    /// Which classes each of [`Model::who`] is about.
    pub(super) members: Vec<FixedBitSet>,
    pub(super) objects: FixedBitSet,
    /// For each kind, the class of each atom.
    pub(super) object_classes: Vec<Vec<u32>>,
    /// The other way round, in order; of nobody, those that were not declared. No kind without names is in it.
    object_atoms: HashMap<(Kind, u32), Vec<u64>>,
    /// By action, the ways in which rules are about asker and peer.
    pub(super) shapes: Vec<u16>,
    pub(super) cells: Cells,
    pub(super) ranges: Ranges,
    pub(super) front: Front,
    pub(super) walls: Vec<u64>,
    pub(super) ways: Ways,
}

impl Table {
    /// For the parties that the policy declares, and for `more`.
    pub(crate) fn new(model: &Model, more: &[ClassKey]) -> Result<Self, PolicyError> {
        let mut table = Self {
            classes: Vec::new(),
            keys: Vec::new(),
            families: Vec::new(),
            class_index: HashMap::default(),
            members: vec![FixedBitSet::new(); model.who.len()],
            objects: FixedBitSet::new(),
            object_classes: vec![Vec::new(); Kind::ALL.len()],
            object_atoms: HashMap::default(),
            shapes: vec![0; Op::COUNT],
            cells: Cells::default(),
            ranges: Ranges::new(),
            front: Front::new(model),
            walls: model.walls.iter().map(|(_, mask)| *mask).collect(),
            ways: Ways::new(),
        };
        table.intern(model, &ClassKey::default())?;
        for key in model.parties.iter().map(|party| &party.class).chain(more) {
            table.intern(model, key)?;
        }
        let mut named = 0_usize;
        model.who.iter().for_each(|who| who.each_label(&mut |_| named += 1));
        if (named + model.who.len()).saturating_mul(table.keys.len()) > limits::MATCHES {
            let hint = String::new();
            return Err(PolicyError::TooLarge {
                what: "labels that rules name, times sets of labels,",
                allowed: limits::MATCHES,
                hint,
            });
        }
        table.enroll(model, 0);
        table.place_objects(model);
        table.fill(model, 0)?;
        Ok(table)
    }

    fn place_objects(&mut self, model: &Model) {
        for object in &model.objects {
            let class =
                model.parties.get(object.party as usize).and_then(|party| self.class_of(&party.class));
            if let (Some(class), Some(of_kind)) = (class, self.object_classes.get_mut(object.kind as usize)) {
                let at = object.atom as usize;
                of_kind.resize(of_kind.len().max(at + 1), NOBODY);
                if let Some(place) = of_kind.get_mut(at) {
                    *place = class;
                }
            }
        }
        for (kind, (of_kind, names)) in Kind::ALL.iter().zip(self.object_classes.iter().zip(&model.names)) {
            if kind.value_kind() != crate::ValueKind::Name {
                continue;
            }
            for atom in 0..=names.last() {
                let class = of_kind.get(atom as usize).copied().unwrap_or(NOBODY);
                self.object_atoms.entry((*kind, class)).or_default().push(atom);
            }
        }
    }

    /// The first object of a range that somebody may be asked for: any where a subject is asked, else one of that class.
    pub(super) fn first_object(&self, op: Op, peer: u32, (first, last): (u64, u64)) -> Option<u64> {
        let is_object = self.objects.contains(peer as usize);
        if op.kind().value_kind() != crate::ValueKind::Name || (peer != NOBODY && !is_object) {
            return (!is_object).then_some(first);
        }
        let atoms = self.object_atoms.get(&(op.kind(), peer))?;
        atoms.get(atoms.partition_point(|atom| *atom < first)).copied().filter(|atom| *atom <= last)
    }

    /// The classes of objects that were declared of a kind.
    pub(super) fn object_classes_of(&self, kind: Kind) -> impl Iterator<Item = u32> {
        let declared = self.objects.ones().map(|class| class as u32);
        declared.filter(move |class| self.object_atoms.contains_key(&(kind, *class)))
    }

    /// The same with a class more, for a subject whose labels nobody had before; itself if somebody had. It takes time for
    /// the rules about that class and a copy of the rest.
    pub(crate) fn with_class(&self, model: &Model, key: &ClassKey) -> Result<Option<Self>, PolicyError> {
        if self.class_index.contains_key(key) {
            return Ok(None);
        }
        let mut table = self.clone();
        let first = table.classes.len() as u32;
        table.intern(model, key)?;
        table.enroll(model, first);
        table.fill(model, first)?;
        Ok(Some(table))
    }

    fn intern(&mut self, model: &Model, key: &ClassKey) -> Result<u32, PolicyError> {
        if let Some(known) = self.class_index.get(key) {
            return Ok(*known);
        }
        if self.classes.len() >= limits::CLASSES {
            let hint = String::new();
            return Err(PolicyError::TooLarge { what: "sets of labels", allowed: limits::CLASSES, hint });
        }
        let class = self.classes.len() as u32;
        self.class_index.insert(key.clone(), class);
        self.keys.push(key.clone());
        let mut made = Class::new(class, key);
        made.level = self.ways.level(&made);
        self.classes.push(made);
        self.families.push(families_of(model, key));
        Ok(class)
    }

    pub(crate) fn class_of(&self, key: &ClassKey) -> Option<u32> {
        self.class_index.get(key).copied()
    }

    /// What most decisions need to know of a class.
    pub(crate) fn brief(&self, class: u32) -> Brief {
        let made = self.class(class).copied().unwrap_or_default();
        const { assert!(limits::CLASSES - 1 <= u16::MAX as usize) };
        let [family, ..] = self.families.get(class as usize).copied().unwrap_or_default();
        Brief { id: made.id as u16, family, level: made.level, exempt: made.exempt }
    }

    pub(crate) fn class_count(&self) -> u32 {
        self.classes.len() as u32
    }

    /// Which of the classes from `first` on each expression is about.
    fn enroll(&mut self, model: &Model, first: u32) {
        self.objects.grow(self.keys.len());
        let new = || {
            self.keys.iter().enumerate().skip(first as usize).filter(|(_, key)| key.kind != ClassKind::Nobody)
        };
        for (class, key) in new() {
            self.objects.set(class, key.kind == ClassKind::Object);
        }
        for (who, members) in model.who.iter().zip(&mut self.members) {
            members.grow(self.keys.len());
            for (class, key) in new() {
                if who.matches(key.kind, &key.labels) {
                    members.insert(class);
                }
            }
        }
    }

    pub(crate) fn is_member(&self, who: u32, class: u32) -> bool {
        self.members.get(who as usize).is_some_and(|members| members.contains(class as usize))
    }

    /// The family's label that a class has.
    pub(crate) fn family_label(&self, model: &Model, class: u32, family: u32) -> Option<u32> {
        model.label_of(&self.keys.get(class as usize)?.labels, family)
    }

    /// Whether asker and peer have to do with each other what a rule wants.
    pub(crate) fn is_related(
        &self,
        model: &Model,
        relation: Option<(bool, u32)>,
        asker: u32,
        peer: u32,
    ) -> bool {
        let Some((same, family)) = relation else { return true };
        match (self.family_label(model, asker, family), self.family_label(model, peer, family)) {
            (Some(one), Some(other)) => (one == other) == same,
            _ => false,
        }
    }

    /// Limits of a list.
    pub(crate) fn limits(&self, list: u32) -> &[u32] {
        self.ranges.limits(list)
    }
}

/// The labels of the families that have cells of their own; 0 for none.
fn families_of(model: &Model, key: &ClassKey) -> [u32; WIDE_FAMILIES] {
    let mut slots = [0; WIDE_FAMILIES];
    for (slot, family) in slots.iter_mut().zip(&model.wide_families) {
        *slot = model.label_of(&key.labels, *family).map_or(0, |label| label + 1);
    }
    slots
}
