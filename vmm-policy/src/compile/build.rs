//! Rules to cells: which rules there are for an action, who asks and who is asked, by ranges of objects.

use std::collections::BTreeMap;

use fixedbitset::FixedBitSet;
use rustc_hash::FxHashMap;

use super::classes::{Class, ClassKey, ClassKind, NOBODY};
use super::model::{Model, Strength, TargetsDef};
use super::who::Who;
use crate::limits;
use crate::model::{Kind, Op};
use crate::syntax::{PolicyError, Span};

/// Whoever, in a cell's key.
pub(super) const ANY: u32 = 0xff_ffff;

/// A rule of a range: its strength in the upper three bits and its number below, so that the least is what holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Entry {
    pub(super) rank: u32,
    pub(super) condition: u32,
}

impl Entry {
    pub(super) fn strength(self) -> Strength {
        match self.rank >> 29 {
            0 => Strength::Never,
            1 => Strength::Deny,
            2 => Strength::Quarantine,
            3 => Strength::Ask,
            4 => Strength::Redirect,
            5 => Strength::Throttle,
            _ => Strength::Allow,
        }
    }

    /// Whether what is weaker never counts. Of what is `never` to be, [`check`](super::check) looks at what would open it.
    pub(super) fn is_last(self) -> bool {
        self.condition == 0 && self.strength() != Strength::Never
    }

    pub(super) fn rule(self) -> u32 {
        self.rank & 0x1fff_ffff
    }
}

/// A range of objects and its rules.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) first: u64,
    pub(super) last: u64,
    /// Where its entries are.
    pub(super) entries: u32,
    pub(super) entry_count: u32,
    /// The number of its list of limits; 0 for none.
    pub(super) limits: u32,
}

/// A place of the hash table; a key of 0 is none.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Cell {
    pub(super) key: u64,
    pub(super) segments: u32,
    pub(super) segment_count: u32,
}

/// What decisions read. It does not change; [`with_class`](Self::with_class) makes another one.
#[derive(Clone, Debug)]
pub(crate) struct Table {
    pub(super) classes: Vec<Class>,
    pub(crate) keys: Vec<ClassKey>,
    class_index: FxHashMap<ClassKey, u32>,
    /// Which classes each of [`Model::who`] is about.
    pub(super) members: Vec<FixedBitSet>,
    pub(super) objects: FixedBitSet,
    /// For each kind, the class of each atom.
    pub(super) object_classes: Vec<Vec<u32>>,
    /// The other way round, in order; of nobody, those that were not declared. No kind without names is in it.
    object_atoms: FxHashMap<(Kind, u32), Vec<u64>>,
    pub(super) shapes: Vec<u16>,
    pub(super) cells: Vec<Cell>,
    pub(super) cell_keys: Vec<u64>,
    pub(super) segments: Vec<Segment>,
    pub(super) entries: Vec<Entry>,
    pub(super) limit_lists: Vec<Vec<u32>>,
    pub(super) walls: Vec<u64>,
    interned: Interned,
}

/// What equal cells have in common.
#[derive(Clone, Debug, Default)]
struct Interned {
    /// The segments of a list of rules and limits.
    lists: FxHashMap<Vec<u32>, (u32, u32)>,
    entries: FxHashMap<Vec<Entry>, (u32, u32)>,
    limits: FxHashMap<Vec<u32>, u32>,
}

/// `op`, who asks and who is asked in a number that is not 0.
pub(super) fn cell_key(op: Op, asker: u32, peer: u32) -> u64 {
    (op.index() as u64 + 1) << 48 | u64::from(asker) << 24 | u64::from(peer)
}

/// Who asks, in the key of a cell for all that have the same label of a family, or different ones.
pub(super) fn related(slot: usize, same: bool) -> u32 {
    ANY - 1 - (slot as u32 * 2 + u32::from(same))
}

/// The number of such a cell's family, and whether the labels are the same.
pub(super) fn split_related(asker: u32) -> Option<(usize, bool)> {
    let at = (ANY - 1).checked_sub(asker)? as usize;
    (at < WIDE_FAMILIES * 2).then_some((at / 2, at % 2 == 1))
}

pub(super) fn split_key(key: u64) -> (usize, u32, u32) {
    ((key >> 48) as usize - 1, (key >> 24) as u32 & ANY, key as u32 & ANY)
}

/// The bit of a shape: whether any asker, and a peer, any peer or none; or what they have to do with each other.
pub(super) fn shape(asker: u32, peer: u32) -> u16 {
    if let Some((slot, same)) = split_related(asker) {
        return 1 << (6 + slot * 2 + usize::from(same));
    }
    let peer = match peer {
        NOBODY => 2,
        ANY => 1,
        _ => 0,
    };
    1 << (peer + if asker == ANY { 3 } else { 0 })
}

pub(super) fn slot(key: u64, places: usize) -> usize {
    let mixed = key.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed ^ mixed >> 29) >> 16) as usize & (places - 1)
}

/// Families of which there are cells for all that have the same label, or different ones.
pub(super) const WIDE_FAMILIES: usize = 4;

/// A `never` that is about more pairs than this is not in the table: it holds, since [`check`](super::check) has seen to it, and
/// [`explain`](crate::Policy::explain) shows it.
const NEVER_PAIRS: usize = 1 << 16;

/// Limits follow rules in lists of both.
const LIMIT: u32 = 1 << 31;

impl Table {
    /// For the parties that the policy declares, and for `more`.
    pub(crate) fn new(model: &Model, more: &[ClassKey]) -> Result<Self, PolicyError> {
        let mut table = Self {
            classes: Vec::new(),
            keys: Vec::new(),
            class_index: FxHashMap::default(),
            members: vec![FixedBitSet::new(); model.who.len()],
            objects: FixedBitSet::new(),
            object_classes: vec![Vec::new(); Kind::ALL.len()],
            object_atoms: FxHashMap::default(),
            shapes: vec![0; Op::COUNT],
            cells: Vec::new(),
            cell_keys: Vec::new(),
            segments: Vec::new(),
            entries: Vec::new(),
            limit_lists: vec![Vec::new()],
            walls: model.walls.iter().map(|(_, mask)| *mask).collect(),
            interned: Interned::default(),
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
        for object in &model.objects {
            let class =
                model.parties.get(object.party as usize).and_then(|party| table.class_of(&party.class));
            if let (Some(class), Some(of_kind)) = (class, table.object_classes.get_mut(object.kind as usize))
            {
                let at = object.atom as usize;
                of_kind.resize(of_kind.len().max(at + 1), NOBODY);
                if let Some(place) = of_kind.get_mut(at) {
                    *place = class;
                }
            }
        }
        for (kind, (of_kind, names)) in Kind::ALL.iter().zip(table.object_classes.iter().zip(&model.names)) {
            if kind.value_kind() != crate::ValueKind::Name {
                continue;
            }
            for atom in 0..=names.last() {
                let class = of_kind.get(atom as usize).copied().unwrap_or(NOBODY);
                table.object_atoms.entry((*kind, class)).or_default().push(atom);
            }
        }
        table.fill(model, 0)?;
        Ok(table)
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
        self.classes.push(Class::from(key));
        let slots = self.families_of(model, key);
        if let Some(class) = self.classes.last_mut() {
            class.families = slots;
        }
        Ok(class)
    }

    /// The labels of the families that have cells of their own; 0 for none.
    fn families_of(&self, model: &Model, key: &ClassKey) -> [u32; WIDE_FAMILIES] {
        let mut slots = [0; WIDE_FAMILIES];
        for (slot, family) in slots.iter_mut().zip(&model.wide_families) {
            let of_family =
                |label: &&u32| model.family_of.get(**label as usize).copied().flatten() == Some(*family);
            *slot = key.labels.iter().find(of_family).map_or(0, |label| label + 1);
        }
        slots
    }

    pub(crate) fn class_of(&self, key: &ClassKey) -> Option<u32> {
        self.class_index.get(key).copied()
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
        let labels = &self.keys.get(class as usize)?.labels;
        let of_family = |label: &u32| model.family_of.get(*label as usize).copied().flatten() == Some(family);
        labels.iter().copied().find(of_family)
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

    /// Makes the cells of all pairs with a class from `first` on.
    fn fill(&mut self, model: &Model, first: u32) -> Result<(), PolicyError> {
        let mut pairs: Vec<(u64, u32)> = Vec::new();
        for (at, rule) in model.rules.iter().enumerate() {
            self.pairs_of(model, &rule.targets, at as u32, first, &mut pairs)
                .map_err(|TooWide| too_wide(model, rule.span))?;
        }
        for (at, limit) in model.limits.iter().enumerate() {
            self.pairs_of(model, &limit.targets, at as u32 | LIMIT, first, &mut pairs)
                .map_err(|TooWide| too_wide(model, limit.span))?;
        }
        // Rules are in the order of their ranks, so each cell's list is.
        pairs.sort_unstable();
        let groups = pairs.chunk_by(|(key, _), (other, _)| key == other);
        let mut fresh = Vec::new();
        let mut list = Vec::new();
        for group in groups {
            let Some((key, _)) = group.first() else { continue };
            list.clear();
            list.extend(group.iter().map(|(_, rule)| *rule));
            let (segments, segment_count) = match self.interned.lists.get(&list) {
                Some(known) => *known,
                None => {
                    let made = self.segments_of(model, &list)?;
                    self.interned.lists.insert(list.clone(), made);
                    made
                }
            };
            fresh.push(Cell { key: *key, segments, segment_count });
            let (op, asker, peer) = split_key(*key);
            if let Some(shapes) = self.shapes.get_mut(op) {
                *shapes |= shape(asker, peer);
            }
        }
        self.cell_keys.extend(fresh.iter().map(|cell| cell.key));
        self.cell_keys.sort_unstable();
        let wanted = (self.cell_keys.len() * 2).next_power_of_two().max(16);
        let mut old = fresh;
        if wanted > self.cells.len() {
            let before = std::mem::replace(&mut self.cells, vec![Cell::default(); wanted]);
            old.extend(before.into_iter().filter(|cell| cell.key != 0));
        }
        for cell in old {
            self.insert(cell);
        }
        Ok(())
    }

    fn insert(&mut self, cell: Cell) {
        let places = self.cells.len();
        let mut at = slot(cell.key, places);
        // There are twice as many places as cells.
        while let Some(place) = self.cells.get_mut(at) {
            if place.key == 0 {
                *place = cell;
                return;
            }
            at = (at + 1) & (places - 1);
        }
    }

    /// The keys of the cells that a rule is in.
    fn pairs_of(
        &self,
        model: &Model,
        targets: &TargetsDef,
        rule: u32,
        first: u32,
        pairs: &mut Vec<(u64, u32)>,
    ) -> Result<(), TooWide> {
        let is_any = |who: u32| model.who.get(who as usize) == Some(&Who::Any);
        let any_peer = targets.peer.is_some_and(is_any);
        let slot = targets
            .relation
            .and_then(|(_, family)| model.wide_families.iter().position(|wide| *wide == family));
        if let (Some((same, _)), Some(slot), true, true) =
            (targets.relation, slot, is_any(targets.asker), any_peer)
        {
            if first == 0 {
                pairs.extend(targets.ops.iter().map(|op| (cell_key(*op, related(slot, same), ANY), rule)));
            }
            return Ok(());
        }
        let whole = targets.relation.is_none();
        let askers = if whole && is_any(targets.asker) { vec![ANY] } else { self.subjects(targets.asker) };
        let peers: Vec<u32> = match targets.peer {
            None => vec![NOBODY],
            Some(_) if whole && any_peer => vec![ANY],
            Some(peer) => {
                let members = self.members.get(peer as usize);
                members.map_or(Vec::new(), |members| members.ones().map(|class| class as u32).collect())
            }
        };
        let never = model.rules.get(rule as usize).is_some_and(|rule| rule.strength == Strength::Never);
        if never && askers.len() * peers.len() * targets.ops.len() > NEVER_PAIRS {
            return Ok(());
        }
        // Those that `any` asks for are there since the table is.
        let is_new = |class: u32| first == 0 || (class != ANY && class >= first);
        for asker in &askers {
            for peer in &peers {
                let wanted = is_new(*asker) || is_new(*peer);
                if wanted && self.is_related(model, targets.relation, *asker, *peer) {
                    pairs.extend(targets.ops.iter().map(|op| (cell_key(*op, *asker, *peer), rule)));
                }
            }
            if pairs.len() > limits::CELL_RULES {
                return Err(TooWide);
            }
        }
        Ok(())
    }

    /// The classes of subjects among those that an expression is about: objects ask for nothing.
    fn subjects(&self, who: u32) -> Vec<u32> {
        let members = self.members.get(who as usize);
        members.map_or(Vec::new(), |members| {
            members.difference(&self.objects).map(|class| class as u32).collect()
        })
    }

    /// The ranges of a list of rules and limits.
    fn segments_of(&mut self, model: &Model, list: &[u32]) -> Result<(u32, u32), PolicyError> {
        // Where each begins and where each has ended, in order.
        let mut edges: BTreeMap<u64, (Vec<u32>, Vec<u32>)> = BTreeMap::new();
        for at in list {
            let rule = (at & LIMIT == 0).then(|| model.rules.get(*at as usize).map(|rule| &rule.targets));
            let targets =
                rule.unwrap_or_else(|| model.limits.get((at & !LIMIT) as usize).map(|limit| &limit.targets));
            let all: &[(u64, u64)] = &[(0, u64::MAX)];
            let Some(targets) = targets else { continue };
            let ranges = if targets.ranges.is_empty() { all } else { &targets.ranges };
            for (first, last) in ranges {
                edges.entry(*first).or_default().0.push(*at);
                if let Some(behind) = last.checked_add(1) {
                    edges.entry(behind).or_default().1.push(*at);
                }
            }
        }
        let begin = self.segments.len();
        // How many ranges of each rule are open here; limits behind rules.
        let mut open: BTreeMap<u32, u32> = BTreeMap::new();
        let mut edges = edges.into_iter().peekable();
        while let Some((first, (begun, ended))) = edges.next() {
            for at in begun {
                *open.entry(at).or_default() += 1;
            }
            for at in ended {
                if let Some(count) = open.get_mut(&at) {
                    *count -= 1;
                    if *count == 0 {
                        open.remove(&at);
                    }
                }
            }
            if open.is_empty() {
                continue;
            }
            let last = edges.peek().map_or(u64::MAX, |(next, _)| next - 1);
            let (entries, entry_count) = self.entries_of(model, &open)?;
            let limits = self.limits_of(model, &open)?;
            let same = |before: &&mut Segment| {
                before.last.checked_add(1) == Some(first)
                    && (before.entries, before.entry_count, before.limits) == (entries, entry_count, limits)
            };
            match self.segments.get_mut(begin..).and_then(<[Segment]>::last_mut).filter(same) {
                Some(before) => before.last = last,
                None => self.segments.push(Segment { first, last, entries, entry_count, limits }),
            }
            if self.segments.len() > limits::SEGMENTS {
                let hint = String::new();
                return Err(PolicyError::TooLarge {
                    what: "ranges of objects",
                    allowed: limits::SEGMENTS,
                    hint,
                });
            }
        }
        Ok((begin as u32, (self.segments.len() - begin) as u32))
    }

    /// The rules that count, up to the first without a condition.
    fn entries_of(&mut self, model: &Model, open: &BTreeMap<u32, u32>) -> Result<(u32, u32), PolicyError> {
        let mut entries: Vec<Entry> = Vec::new();
        for at in open.keys().take_while(|at| **at & LIMIT == 0) {
            let Some(rule) = model.rules.get(*at as usize) else { continue };
            // An earlier rule says the same at the same condition.
            let condition = rule.condition;
            let rank = (rule.strength as u32) << 29 | at;
            let says_the_same = |entry: &Entry| {
                let other = model.rules.get(entry.rule() as usize);
                entry.condition == condition && other.is_some_and(|other| other.says_the_same(rule))
            };
            if entries.iter().any(says_the_same) {
                continue;
            }
            let entry = Entry { rank, condition };
            entries.push(entry);
            if entry.is_last() {
                break;
            }
            if entries.len() > limits::CONDITIONS_AT_ONCE {
                let (line, _) = model.sources.place(rule.span);
                let hint = format!(": line {line} is one too many");
                return Err(PolicyError::TooLarge {
                    what: "rules with conditions that are about one request",
                    allowed: limits::CONDITIONS_AT_ONCE,
                    hint,
                });
            }
        }
        if let Some(known) = self.interned.entries.get(&entries) {
            return Ok(*known);
        }
        let made = (self.entries.len() as u32, entries.len() as u32);
        self.entries.extend_from_slice(&entries);
        self.interned.entries.insert(entries, made);
        Ok(made)
    }

    fn limits_of(&mut self, model: &Model, open: &BTreeMap<u32, u32>) -> Result<u32, PolicyError> {
        let list: Vec<u32> = open.range(LIMIT..).map(|(at, _)| at & !LIMIT).collect();
        if list.is_empty() {
            return Ok(0);
        }
        if list.len() > limits::LIMITS_AT_ONCE {
            let span = list.last().and_then(|at| model.limits.get(*at as usize)).map(|limit| limit.span);
            let (line, _) = model.sources.place(span.unwrap_or_default());
            let hint = format!(": line {line} is one too many");
            return Err(PolicyError::TooLarge {
                what: "limits that are about one request",
                allowed: limits::LIMITS_AT_ONCE,
                hint,
            });
        }
        if let Some(known) = self.interned.limits.get(&list) {
            return Ok(*known);
        }
        let id = self.limit_lists.len() as u32;
        self.limit_lists.push(list.clone());
        self.interned.limits.insert(list, id);
        Ok(id)
    }
}

/// That a rule is about more than there is room for.
struct TooWide;

fn too_wide(model: &Model, span: Span) -> PolicyError {
    let (line, _) = model.sources.place(span);
    let hint = format!(": line {line} of {} is one too many", model.sources.name(span));
    PolicyError::TooLarge {
        what: "pairs of asker and peer that rules are about",
        allowed: limits::CELL_RULES,
        hint,
    }
}
