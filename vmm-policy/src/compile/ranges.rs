//! Ranges of objects, and which rules there are for each.

use std::collections::{BTreeMap, HashMap};

use super::cells::{Body, Cell};
use super::model::Model;
use super::said::{Entry, Said};
use crate::limits;
use crate::syntax::PolicyError;

/// Rules and limits of a range, where that is more than one rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct List {
    entries: u32,
    entry_count: u32,
    /// The number of its list of limits; 0 for none.
    limits: u32,
}

/// Where a range of objects begins that ends where the next one does.
#[derive(Clone, Copy, Debug)]
struct Edge<N> {
    first: N,
    said: Said,
}

/// A range of objects of a cell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) first: u64,
    pub(super) last: u64,
    pub(super) said: Said,
}

/// All ranges of all cells; equal ones are there once.
#[derive(Clone, Debug, Default)]
pub(super) struct Ranges {
    edges: Vec<Edge<u32>>,
    wide_edges: Vec<Edge<u64>>,
    lists: Vec<List>,
    entries: Vec<Entry>,
    limit_lists: Vec<Vec<u32>>,
    interned: Interned,
}

#[derive(Clone, Debug, Default)]
struct Interned {
    /// The bodies of lists of rules and limits, of kinds of objects with wide numbers and of others.
    bodies: HashMap<(bool, Vec<u32>), Body>,
    entries: HashMap<Vec<Entry>, (u32, u32)>,
    limits: HashMap<Vec<u32>, u32>,
    lists: HashMap<List, u32>,
}

/// Limits follow rules in lists of both.
pub(super) const LIMIT: u32 = 1 << 31;

impl Ranges {
    pub(super) fn new() -> Self {
        Self { limit_lists: vec![Vec::new()], ..Self::default() }
    }

    /// What is said of an object in a cell that has one range; of one that has more, anything.
    #[inline(always)]
    pub(super) fn of_range(&self, cell: Cell, value: u64) -> Said {
        let (first, length, said) = cell.range();
        let inside =
            (value >= first) & ((length == Body::ENDLESS) | (value.wrapping_sub(first) < length.into()));
        Said::from_bits(said).only_if(inside)
    }

    /// What is said of an object in a cell that has edges.
    #[inline(always)]
    pub(super) fn of_edges(&self, cell: Cell, value: u64) -> Said {
        let (all, wide) = cell.edges();
        if wide {
            return last_edge(self.wide_edges.get(all).unwrap_or(&[]), value);
        }
        // No number of such a kind is above that.
        last_edge(self.edges.get(all).unwrap_or(&[]), u32::try_from(value).unwrap_or(u32::MAX))
    }

    /// The rules of a list, strongest first.
    #[inline(always)]
    pub(super) fn listed(&self, list: u32) -> (&[Entry], u32) {
        let Some(list) = self.lists.get(list as usize) else { return (&[], 0) };
        let first = list.entries as usize;
        (self.entries.get(first..first + list.entry_count as usize).unwrap_or(&[]), list.limits)
    }

    /// The rules that are said, strongest first.
    pub(super) fn entries(&self, said: Said) -> impl Iterator<Item = Entry> + '_ {
        let more = said.listed().map_or(&[][..], |list| self.listed(list).0);
        said.entry().into_iter().chain(more.iter().copied())
    }

    /// The ranges of a cell of which something is said, in order.
    pub(super) fn of(&self, cell: &Cell) -> impl Iterator<Item = Range> + use<'_> {
        let (mut at, end, wide, single) = match cell.body() {
            Body::Edges { from, count, wide } => (from as usize, (from + count) as usize, wide, None),
            Body::Range { first, length, said } => {
                let first = u64::from(first);
                let last = if length == Body::ENDLESS { u64::MAX } else { first + u64::from(length) - 1 };
                (0, 0, false, Some(Range { first, last, said: Said::from_bits(said) }))
            }
        };
        let edge = move |at: usize| -> Option<(u64, Said)> {
            if at >= end {
                None
            } else if wide {
                self.wide_edges.get(at).map(|edge| (edge.first, edge.said))
            } else {
                self.edges.get(at).map(|edge| (u64::from(edge.first), edge.said))
            }
        };
        let next = move || {
            let (first, said) = edge(at)?;
            at += 1;
            Some(Range { first, last: edge(at).map_or(u64::MAX, |(next, _)| next - 1), said })
        };
        single.into_iter().chain(std::iter::from_fn(next)).filter(|range| range.said != Said::NOTHING)
    }

    /// Limits of a list.
    pub(super) fn limits(&self, list: u32) -> &[u32] {
        self.limit_lists.get(list as usize).map_or(&[], |list| list)
    }

    /// The body of a cell with these rules and limits, in ascending order.
    pub(super) fn body(&mut self, model: &Model, wide: bool, list: &[u32]) -> Result<Body, PolicyError> {
        let key = (wide, list.to_vec());
        if let Some(known) = self.interned.bodies.get(&key) {
            return Ok(*known);
        }
        let ranges = self.ranges_of(model, list)?;
        let body = match ranges.as_slice() {
            [range] if let Some(body) = single(range) => body,
            _ => self.edges_of(&ranges, wide)?,
        };
        self.interned.bodies.insert(key, body);
        Ok(body)
    }

    fn edges_of(&mut self, ranges: &[Range], wide: bool) -> Result<Body, PolicyError> {
        let mut edges: Vec<(u64, Said)> = Vec::with_capacity(ranges.len() + 1);
        let mut behind = None;
        for range in ranges {
            // Where the one before has ended and this one has not begun, nothing is said.
            edges
                .extend(behind.filter(|behind| *behind != range.first).map(|behind| (behind, Said::NOTHING)));
            edges.push((range.first, range.said));
            behind = range.last.checked_add(1);
        }
        edges.extend(behind.map(|behind| (behind, Said::NOTHING)));
        let from = if wide { self.wide_edges.len() } else { self.edges.len() };
        for (first, said) in edges {
            if wide {
                self.wide_edges.push(Edge { first, said });
            } else if let Ok(first) = u32::try_from(first) {
                // What begins above is about no object of the kind.
                self.edges.push(Edge { first, said });
            }
        }
        if self.edges.len() + self.wide_edges.len() > limits::SEGMENTS {
            let hint = String::new();
            return Err(PolicyError::TooLarge { what: "ranges of objects", allowed: limits::SEGMENTS, hint });
        }
        let end = if wide { self.wide_edges.len() } else { self.edges.len() };
        Ok(Body::Edges { from: from as u32, count: (end - from) as u32, wide })
    }

    /// The ranges of a list of rules and limits; of two that lie side by side something different is said.
    fn ranges_of(&mut self, model: &Model, list: &[u32]) -> Result<Vec<Range>, PolicyError> {
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
        let mut found: Vec<Range> = Vec::new();
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
            let said = self.said_by(model, &open)?;
            let same = |before: &&mut Range| before.last.checked_add(1) == Some(first) && before.said == said;
            match found.last_mut().filter(same) {
                Some(before) => before.last = last,
                None => found.push(Range { first, last, said }),
            }
        }
        Ok(found)
    }

    fn said_by(&mut self, model: &Model, open: &BTreeMap<u32, u32>) -> Result<Said, PolicyError> {
        let entries = entries_of(model, open)?;
        let limits = self.limits_of(model, open)?;
        if let ([one], 0) = (entries.as_slice(), limits)
            && let Some(said) = Said::one(*one)
        {
            return Ok(said);
        }
        let (first, entry_count) = match self.interned.entries.get(&entries) {
            Some(known) => *known,
            None => {
                let made = (self.entries.len() as u32, entries.len() as u32);
                self.entries.extend_from_slice(&entries);
                self.interned.entries.insert(entries, made);
                made
            }
        };
        let list = List { entries: first, entry_count, limits };
        let next = self.lists.len() as u32;
        let number = *self.interned.lists.entry(list).or_insert(next);
        if number == next {
            self.lists.push(list);
        }
        Ok(Said::list(number))
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

/// What is said from the last edge on that does not lie above.
#[inline]
fn last_edge<N: Copy + PartialOrd>(edges: &[Edge<N>], value: N) -> Said {
    let at = edges.partition_point(|edge| edge.first <= value);
    at.checked_sub(1).and_then(|at| edges.get(at)).map_or(Said::NOTHING, |edge| edge.said)
}

/// A range that fits into its cell.
fn single(range: &Range) -> Option<Body> {
    let first = u32::try_from(range.first).ok()?;
    let length = match range.last {
        u64::MAX => Body::ENDLESS,
        last => u32::try_from(last - range.first + 1).ok().filter(|length| *length < Body::ENDLESS)?,
    };
    let said = range.said.bits();
    Some(Body::Range { first, length, said })
}

/// The rules that count, up to the first without a condition.
fn entries_of(model: &Model, open: &BTreeMap<u32, u32>) -> Result<Vec<Entry>, PolicyError> {
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
    Ok(entries)
}
