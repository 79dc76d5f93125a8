//! What another policy would answer differently.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use rustc_hash::FxHashMap;

use super::reach::describe_op;
use crate::compile::{ClassKind, NOBODY, Steps, Strength};
use crate::model::{Kind, Op, ValueKind, Verdict};
use crate::policy::Policy;
use crate::syntax::PolicyError;

/// What one policy answers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Side {
    /// The strongest answer there may be, conditions fulfilled.
    pub verdict: Verdict,
    /// The rules that answer, with their lines; empty where nothing is allowed because no rule allows it.
    pub rules: Vec<String>,
}

/// What is answered differently.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Change {
    /// Who asks; those who are treated alike.
    pub askers: Vec<String>,
    /// For what.
    pub access: String,
    /// Of whom; empty for nobody.
    pub peers: Vec<String>,
    /// Before.
    pub before: Side,
    /// After.
    pub after: Side,
}

impl Change {
    /// Whether something is open that was not.
    pub fn opens(&self) -> bool {
        self.before.verdict == Verdict::Deny && self.after.verdict != Verdict::Deny
    }

    /// Whether something was open that is not.
    pub fn closes(&self) -> bool {
        self.before.verdict != Verdict::Deny && self.after.verdict == Verdict::Deny
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mark = if self.opens() {
            '+'
        } else if self.closes() {
            '-'
        } else {
            '~'
        };
        write!(f, "{mark} {} to {}", shortened(&self.askers), self.access)?;
        if !self.peers.is_empty() {
            write!(f, " of {}", shortened(&self.peers))?;
        }
        let side = |side: &Side| match side.rules.as_slice() {
            [] => side.verdict.to_string(),
            rules => format!("{} ({})", side.verdict, rules.join("; ")),
        };
        write!(f, ": {} -> {}", side(&self.before), side(&self.after))
    }
}

/// The first few names.
pub(super) fn shortened(names: &[String]) -> String {
    match names {
        [first, second, third, rest @ ..] if !rest.is_empty() => {
            format!("{first}, {second}, {third} and {} more", rest.len())
        }
        _ => names.join(", "),
    }
}

/// What is said of a range: rules by what they say and under which condition.
type Answer = Vec<(Strength, Verdict, String)>;

/// One of the two policies, and whom it means by a name.
struct View<'a> {
    policy: &'a Policy,
    classes: FxHashMap<&'a str, u32>,
}

impl<'a> View<'a> {
    fn new(policy: &'a Policy) -> Self {
        let class =
            |party: &'a crate::compile::PartyDef| Some((&*party.name, policy.table.class_of(&party.class)?));
        Self { policy, classes: policy.model.parties.iter().filter_map(class).collect() }
    }

    /// The number in this policy of what stands for a name.
    fn number(&self, kind: Kind, value: &Probe) -> u64 {
        match value {
            Probe::Number(number) => *number,
            Probe::Name(name) => self.policy.model.atom(kind, name),
        }
    }

    fn answers(&self, op: Op, asker: Option<u32>, peer: Option<u32>) -> Vec<(u64, u64, Answer, Vec<u32>)> {
        let model = &*self.policy.model;
        let (Some(asker), Some(peer)) = (asker, peer) else { return Vec::new() };
        let mut all = Vec::new();
        self.policy.table.answers(op, asker, peer, |first, last, entries| {
            let opens = |(rule, _): &(u32, u32)| {
                model.rules.get(*rule as usize).is_some_and(|rule| rule.strength.opens())
            };
            // What denies and opens nothing is as good as no rule.
            if !entries.iter().any(opens) {
                return;
            }
            let said = |(rule, condition): &(u32, u32)| {
                let rule = model.rules.get(*rule as usize)?;
                Some((rule.strength, rule.verdict, model.conditions.text(*condition).to_owned()))
            };
            let rules = entries.iter().map(|(rule, _)| *rule).collect();
            all.push((first, last, entries.iter().filter_map(said).collect(), rules));
        });
        all
    }

    fn side(&self, rules: &[u32]) -> Side {
        let model = &*self.policy.model;
        let mut verdict = Verdict::Deny;
        let mut lines = Vec::new();
        for at in rules {
            let Some(rule) = model.rules.get(*at as usize) else { continue };
            if verdict == Verdict::Deny {
                verdict = rule.verdict;
            }
            let (line, _) = model.sources.place(rule.span);
            lines.push(format!("line {line}: {}", model.sources.one_line(rule.span)));
        }
        Side { verdict, rules: lines }
    }
}

/// What is looked at of a kind of object.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Probe {
    Number(u64),
    Name(String),
}

impl Policy {
    /// What `after` answers differently, between those that either of the two declares; those of the same name are the same. An answer is
    /// another one if its verdict is, or the conditions under which there is one. Numbers and lines of rules do not count.
    ///
    /// # Errors
    /// If it would take too many steps.
    pub fn diff(&self, after: &Self) -> Result<Vec<Change>, PolicyError> {
        let (old, new) = (View::new(self), View::new(after));
        let groups = groups(&old, &new);
        let mut steps = Steps::default();
        let mut changes = Vec::new();
        for op in Op::all() {
            let old_pairs: BTreeSet<_> = self.table.pairs(op, &mut steps)?.into_iter().collect();
            let new_pairs: BTreeSet<_> = after.table.pairs(op, &mut steps)?.into_iter().collect();
            if old_pairs.is_empty() && new_pairs.is_empty() {
                continue;
            }
            let nobody = (Some(NOBODY), Some(NOBODY), None);
            let peers = groups.keys().copied().chain([nobody]);
            let peers: Vec<_> =
                peers.filter(|(_, _, object)| object.is_none_or(|kind| kind == op.kind())).collect();
            for asker in groups.keys().filter(|(_, _, object)| object.is_none()) {
                for peer in &peers {
                    steps.take(1)?;
                    let has = |pairs: &BTreeSet<(u32, u32)>, asker: Option<u32>, peer: Option<u32>| {
                        asker.zip(peer).is_some_and(|pair| pairs.contains(&pair))
                    };
                    if has(&old_pairs, asker.0, peer.0) || has(&new_pairs, asker.1, peer.1) {
                        compare(&old, &new, op, *asker, *peer, &groups, &mut changes, &mut steps)?;
                    }
                }
            }
        }
        Ok(changes)
    }
}

/// A class in each of the two, and the kind of object.
type Group = (Option<u32>, Option<u32>, Option<Kind>);

fn groups(old: &View<'_>, new: &View<'_>) -> BTreeMap<Group, Vec<String>> {
    let mut groups: BTreeMap<Group, Vec<String>> = BTreeMap::new();
    let parties = old.policy.model.parties.iter().chain(&new.policy.model.parties);
    let mut seen = BTreeSet::new();
    for party in parties {
        if seen.insert(&*party.name) {
            let (before, after) = (old.classes.get(&*party.name), new.classes.get(&*party.name));
            let kind = party.object.map(|(kind, _)| kind).filter(|_| party.class.kind == ClassKind::Object);
            groups.entry((before.copied(), after.copied(), kind)).or_default().push(party.name.to_string());
        }
    }
    groups
}

#[allow(clippy::too_many_arguments, reason = "two policies, two sides, and where to write to")]
fn compare(
    old: &View<'_>,
    new: &View<'_>,
    op: Op,
    asker: Group,
    peer: Group,
    groups: &BTreeMap<Group, Vec<String>>,
    changes: &mut Vec<Change>,
    steps: &mut Steps,
) -> Result<(), PolicyError> {
    let before = old.answers(op, asker.0, peer.0);
    let after = new.answers(op, asker.1, peer.1);
    if before.is_empty() && after.is_empty() {
        return Ok(());
    }
    let probes = probes(old, new, op.kind(), &before, &after);
    steps.take(probes.len())?;
    let at = |all: &[(u64, u64, Answer, Vec<u32>)], number: u64| {
        let at = all.partition_point(|(first, ..)| *first <= number);
        let found = at.checked_sub(1).and_then(|at| all.get(at)).filter(|(_, last, ..)| number <= *last);
        found.map(|(_, _, answer, rules)| (answer.clone(), rules.clone())).unwrap_or_default()
    };
    let names = |group: &Group| groups.get(group).cloned().unwrap_or_default();
    for (nth, probe) in probes.iter().enumerate() {
        // An object that stands for itself is asked for by its own name.
        if peer.2.is_some() && !matches!(probe, Probe::Name(name) if names(&peer).contains(name)) {
            continue;
        }
        let (was, was_by) = at(&before, old.number(op.kind(), probe));
        let (is, is_by) = at(&after, new.number(op.kind(), probe));
        if was == is {
            continue;
        }
        let access = match probe {
            Probe::Number(first) => {
                let last = probes.get(nth + 1).map_or(u64::MAX, |next| match next {
                    Probe::Number(next) => next - 1,
                    Probe::Name(_) => u64::MAX,
                });
                number_range(&old.policy.model, op, *first, last)
            }
            Probe::Name(name) => format!("{op} {}", name.replace(UNKNOWN, "*")),
        };
        let change = Change {
            askers: names(&asker),
            access,
            peers: if peer.2.is_some() { Vec::new() } else { names(&peer) },
            before: old.side(&was_by),
            after: new.side(&is_by),
        };
        match changes.last_mut() {
            // Neighbours that changed alike are one change of a longer range.
            Some(last)
                if matches!(probe, Probe::Number(_))
                    && (&last.askers, &last.peers, &last.before, &last.after)
                        == (&change.askers, &change.peers, &change.before, &change.after)
                    && joins(&last.access, &change.access) =>
            {
                let begin = last.access.split("..").next().unwrap_or_default().to_owned();
                let end = change.access.rsplit([' ', '.']).next().unwrap_or_default();
                last.access = format!("{begin}..{end}");
            }
            _ => changes.push(change),
        }
    }
    Ok(())
}

/// Whether the range of one ends where that of the other begins; ranges are written by [`number_range`].
fn joins(one: &str, other: &str) -> bool {
    let what = |text: &str| text.rsplit_once(' ').map(|(what, _)| what.to_owned());
    if what(one) != what(other) {
        return false;
    }
    let number = |text: &str| text.parse::<u64>().ok();
    let end = one.rsplit([' ', '.']).next().and_then(number);
    let begin = other.rsplit(' ').next().and_then(|range| range.split("..").next()).and_then(number);
    end.is_some() && end.and_then(|end| end.checked_add(1)) == begin
}

fn number_range(model: &crate::compile::Model, op: Op, first: u64, last: u64) -> String {
    let most = match op.kind().value_kind() {
        ValueKind::Number(most) => most,
        _ => return op.to_string(),
    };
    match (first, last.min(most)) {
        (0, last) if last == most => op.to_string(),
        (first, last) if first == last => describe_op(model, op, first),
        (first, last) => format!("{op} {first}..{last}"),
    }
}

/// What no policy has in a name: stands for whatever else begins so.
const UNKNOWN: char = '\u{fffd}';

/// Objects of which each range of both has one, numbers in order.
fn probes(
    old: &View<'_>,
    new: &View<'_>,
    kind: Kind,
    before: &[(u64, u64, Answer, Vec<u32>)],
    after: &[(u64, u64, Answer, Vec<u32>)],
) -> Vec<Probe> {
    if kind.value_kind() != ValueKind::Name {
        let edges =
            before.iter().chain(after).flat_map(|(first, last, ..)| [Some(*first), last.checked_add(1)]);
        let most = match kind.value_kind() {
            ValueKind::Number(most) => most,
            _ => 0,
        };
        let numbers: BTreeSet<u64> = edges.flatten().filter(|number| *number <= most).collect();
        return numbers.into_iter().map(Probe::Number).collect();
    }
    let mut names: BTreeSet<String> = BTreeSet::new();
    for view in [old, new] {
        if let Some(index) = view.policy.model.names.get(kind as usize) {
            names.extend((0..=index.last()).map(|atom| match index.shown(atom) {
                shown if index.is_whole(atom) => shown,
                mut shown => {
                    shown.pop();
                    shown.push(UNKNOWN);
                    shown
                }
            }));
        }
    }
    names.into_iter().map(Probe::Name).collect()
}
