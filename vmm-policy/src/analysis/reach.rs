//! Ways that information can go, from one to the next.

use std::collections::VecDeque;
use std::fmt;

use fixedbitset::FixedBitSet;
use rustc_hash::{FxHashMap, FxHashSet};

use super::scene::party_set;
use crate::compile::{Model, NOBODY, Steps, Table};
use crate::model::{Kind, Op};
use crate::policy::Policy;
use crate::syntax::PolicyError;

/// A place where information can be: a class of subjects, or an object where what one leaves another finds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    Class(u32),
    Station(Kind, u64),
}

/// Why information can go from one place to another.
#[derive(Clone, Copy, Debug)]
struct Way {
    to: u32,
    op: Op,
    value: u64,
    rule: u32,
}

/// All ways. Conditions are taken as fulfilled, histories at walls as empty.
pub(crate) struct Reach {
    places: Vec<Place>,
    place_index: FxHashMap<Place, u32>,
    ways: Vec<Vec<Way>>,
}

impl Reach {
    pub(crate) fn new(model: &Model, table: &Table) -> Result<Self, PolicyError> {
        let mut reach = Self { places: Vec::new(), place_index: FxHashMap::default(), ways: Vec::new() };
        (0..table.class_count()).for_each(|class| {
            reach.place(Place::Class(class));
        });
        let mut known = FxHashSet::default();
        let mut steps = Steps::default();
        for op in Op::all().filter(|op| op.flow().reads() || op.flow().writes()) {
            for (asker, peer) in table.pairs(op, &mut steps)? {
                let mut taken = Ok(());
                table.outcomes(op, asker, peer, |outcome| {
                    if taken.is_err() {
                        return;
                    }
                    if let Some(rule) = outcome.opened_by {
                        let range = (outcome.first, outcome.last);
                        taken =
                            reach.open(model, table, op, asker, peer, range, rule, &mut known, &mut steps);
                    }
                });
                taken?;
            }
        }
        Ok(reach)
    }

    fn place(&mut self, place: Place) -> u32 {
        *self.place_index.entry(place).or_insert_with(|| {
            self.places.push(place);
            self.ways.push(Vec::new());
            self.places.len() as u32 - 1
        })
    }

    fn way(&mut self, from: u32, way: Way, known: &mut FxHashSet<(u32, u32)>) {
        if known.insert((from, way.to))
            && let Some(ways) = self.ways.get_mut(from as usize)
        {
            ways.push(way);
        }
    }

    #[allow(clippy::too_many_arguments, reason = "what a range of a pair is takes so many")]
    fn open(
        &mut self,
        model: &Model,
        table: &Table,
        op: Op,
        asker: u32,
        peer: u32,
        (first, last): (u64, u64),
        rule: u32,
        known: &mut FxHashSet<(u32, u32)>,
        steps: &mut Steps,
    ) -> Result<(), PolicyError> {
        let flow = op.flow();
        let peer_is_object = table.class(peer).is_some_and(|class| class.is_object);
        let both = |reach: &mut Self,
                    known: &mut FxHashSet<(u32, u32)>,
                    one: u32,
                    other: u32,
                    value: u64,
                    out: bool,
                    back: bool| {
            if out {
                reach.way(one, Way { to: other, op, value, rule }, known);
            }
            if back {
                reach.way(other, Way { to: one, op, value, rule }, known);
            }
        };
        if !op.kind().is_station() {
            if peer != NOBODY && !peer_is_object {
                both(self, known, asker, peer, first, flow.writes(), flow.reads());
            }
            return Ok(());
        }
        let names = model.names.get(op.kind() as usize).map_or(0, |names| names.last());
        let last = last.min(names);
        steps.take(usize::try_from(last.saturating_sub(first)).unwrap_or(usize::MAX))?;
        for atom in first..=last {
            let object_class = table.object_class(op.kind(), atom);
            // An object that is declared is its own peer where no other is named.
            if (peer_is_object || peer == NOBODY) && object_class != peer {
                continue;
            }
            let declared =
                model.objects.iter().find(|object| object.kind == op.kind() && object.atom == atom);
            let party = declared.and_then(|object| model.parties.get(object.party as usize));
            if party.is_some_and(|party| party.filtered) {
                continue;
            }
            if let (Some(asker_class), Some(object)) = (table.class(asker), table.class(object_class))
                && table.barrier(op, asker_class, object).is_some()
            {
                continue;
            }
            // What is said of an object itself counts beside its peer, too.
            if object_class != NOBODY
                && !peer_is_object
                && (table.is_contradiction(model, peer, object_class)
                    || table.is_walled_off(peer, object_class)
                    || table.is_denied(op, asker, object_class, atom))
            {
                continue;
            }
            let station = self.place(Place::Station(op.kind(), atom));
            both(self, known, asker, station, atom, flow.writes(), flow.reads());
            if peer != NOBODY && !peer_is_object {
                // Whose it is has it too.
                both(self, known, peer, station, atom, true, true);
            }
        }
        Ok(())
    }

    /// The shortest way from one of `from` to one of `to`, in steps. A guard on the way ends it, if they are trusted.
    fn shortest(
        &self,
        table: &Table,
        from: &[Place],
        to: &[Place],
        trust_guards: bool,
    ) -> Option<Vec<(u32, Way)>> {
        let index = |places: &[Place]| -> Vec<u32> {
            places.iter().filter_map(|place| self.place_index.get(place).copied()).collect()
        };
        let mut wanted = FixedBitSet::with_capacity(self.places.len());
        index(to).iter().for_each(|place| wanted.insert(*place as usize));
        let mut before: FxHashMap<u32, (u32, Way)> = FxHashMap::default();
        let starts = index(from);
        let mut seen = FixedBitSet::with_capacity(self.places.len());
        starts.iter().for_each(|place| seen.insert(*place as usize));
        let mut queue: VecDeque<u32> = starts.iter().copied().collect();
        while let Some(at) = queue.pop_front() {
            for way in self.ways.get(at as usize).into_iter().flatten() {
                if wanted.contains(way.to as usize) {
                    let mut steps = vec![(at, *way)];
                    let mut back = at;
                    while let Some((earlier, way)) = before.get(&back).filter(|_| !starts.contains(&back)) {
                        steps.push((*earlier, *way));
                        back = *earlier;
                    }
                    steps.reverse();
                    return Some(steps);
                }
                if seen.contains(way.to as usize) {
                    continue;
                }
                seen.insert(way.to as usize);
                before.insert(way.to, (at, *way));
                let guard = match self.places.get(way.to as usize) {
                    Some(Place::Class(class)) => table.class(*class).is_some_and(|class| class.exempt),
                    _ => false,
                };
                if !(guard && trust_guards) {
                    queue.push_back(way.to);
                }
            }
        }
        None
    }

    /// Between those that two expressions of the policy are about.
    pub(crate) fn path(
        &self,
        model: &Model,
        table: &Table,
        from: u32,
        to: u32,
        trust_guards: bool,
    ) -> Option<Path> {
        let set = |who: u32| {
            let mut places: Vec<Place> = Vec::new();
            for class in (1..table.class_count()).filter(|class| table.is_member(who, *class)) {
                if table.class(class).is_some_and(|class| !class.is_object) {
                    places.push(Place::Class(class));
                }
            }
            for object in &model.objects {
                if table.is_member(who, table.object_class(object.kind, object.atom)) {
                    places.push(Place::Station(object.kind, object.atom));
                }
            }
            places
        };
        self.between(model, table, &set(from), &set(to), trust_guards)
    }

    pub(crate) fn between(
        &self,
        model: &Model,
        table: &Table,
        from: &[Place],
        to: &[Place],
        trust_guards: bool,
    ) -> Option<Path> {
        let ways = self.shortest(table, from, to, trust_guards)?;
        let name = |place: u32| match self.places.get(place as usize) {
            Some(Place::Class(class)) => class_name(model, table, *class),
            Some(Place::Station(kind, atom)) => format!("{kind} {}", model.atom_name(*kind, *atom)),
            None => String::new(),
        };
        let step = |(from, way): &(u32, Way)| {
            let span = model.rules.get(way.rule as usize).map(|rule| rule.span).unwrap_or_default();
            PathStep {
                from: name(*from),
                to: name(way.to),
                by: describe_op(model, way.op, way.value),
                file: model.sources.name(span).to_owned(),
                line: model.sources.place(span).0,
                rule: model.sources.one_line(span),
            }
        };
        Some(Path { steps: ways.iter().map(step).collect() })
    }
}

/// A member of the class, or its labels where the policy declares none.
pub(crate) fn class_name(model: &Model, table: &Table, class: u32) -> String {
    let Some(key) = table.keys.get(class as usize) else { return String::new() };
    if let Some(party) = model.parties.iter().find(|party| party.class == *key) {
        return party.name.to_string();
    }
    let labels: Vec<&str> =
        key.labels.iter().filter_map(|label| Some(&**model.labels.get(*label as usize)?)).collect();
    format!("[{}]", labels.join(" "))
}

/// `connect vsock 5432`
pub(crate) fn describe_op(model: &Model, op: Op, value: u64) -> String {
    match op.kind().value_kind() {
        crate::ValueKind::Number(_) => format!("{op} {value}"),
        crate::ValueKind::Name => format!("{op} {}", model.atom_name(op.kind(), value)),
        crate::ValueKind::Nothing => op.to_string(),
    }
}

/// `web-red to connect vsock 5432 of db-red`
pub(crate) fn describe_pair(
    model: &Model,
    table: &Table,
    op: Op,
    asker: u32,
    peer: u32,
    value: u64,
) -> String {
    let asker = class_name(model, table, asker);
    let what = describe_op(model, op, value);
    match table.class(peer) {
        Some(class) if peer != NOBODY && !class.is_object => {
            format!("{asker} to {what} of {}", class_name(model, table, peer))
        }
        _ => format!("{asker} to {what}"),
    }
}

/// A way that information can go.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
pub struct Path {
    /// One after the other; there is at least one.
    pub steps: Vec<PathStep>,
}

/// One step of a [`Path`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct PathStep {
    /// From whom.
    pub from: String,
    /// To whom, or to which object.
    pub to: String,
    /// By what.
    pub by: String,
    /// The file of the rule that opens it.
    pub file: String,
    /// Its line.
    pub line: usize,
    /// Its text.
    pub rule: String,
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(first) = self.steps.first() {
            f.write_str(&first.from)?;
        }
        self.steps.iter().try_for_each(|step| write!(f, " -> {} ({}, line {})", step.to, step.by, step.line))
    }
}

impl Policy {
    /// `None` if nothing that one of `from` has can come to one of `to`, through whomever and whatever; else the shortest way.
    ///
    /// Both are expressions as rules have them: a name, a label, `red and not web`. Machines, host principals and objects that the
    /// policy declares count. What is proven holds whenever conditions hold, whatever is connected before: conditions of rules that open
    /// something are taken as fulfilled, those of rules that deny as not. A guard is trusted not to hand on what it learns; see
    /// [`find_path`](Self::find_path) for a proof without that trust.
    ///
    /// # Errors
    /// If an expression is none or is about nobody, or if it would take too many steps.
    pub fn prove_no_path(&self, from: &str, to: &str) -> Result<Option<Path>, PolicyError> {
        self.find_path(from, to, true)
    }

    /// The same, with guards trusted or not.
    ///
    /// # Errors
    /// As [`prove_no_path`](Self::prove_no_path).
    pub fn find_path(&self, from: &str, to: &str, trust_guards: bool) -> Result<Option<Path>, PolicyError> {
        let (from, to) = (party_set(self, from)?, party_set(self, to)?);
        let reach = Reach::new(&self.model, &self.table)?;
        Ok(reach.between(&self.model, &self.table, &from, &to, trust_guards))
    }
}
