//! Conditions as masks of bits.

use crate::limits;
use crate::model::Lifecycle;
use crate::syntax::{Clock, Condition, Fact, Weekdays};
use std::collections::HashMap;

/// What holds at the time of a request, a bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Of the asker: its lifecycle, whether it is attested, which digests it has.
    pub(crate) asker: u64,
    /// Of the peer.
    pub(crate) peer: u64,
    /// Of the host: spans of time in the lower half, flags in the upper.
    pub(crate) environment: u64,
}

/// Clauses that are looked at all at once: each of the first has a bit in words of terms.
pub(crate) const TERMS: usize = 64;

const ATTESTED: u64 = 1 << 8;
const FIRST_DIGEST: usize = 16;
const FIRST_FLAG: usize = 32;

/// Bits that must be set and bits that must not.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Mask {
    set: u64,
    clear: u64,
}

impl Mask {
    fn holds(self, bits: u64) -> bool {
        bits & self.set == self.set && bits & self.clear == 0
    }

    fn and(self, other: Self) -> Self {
        Self { set: self.set | other.set, clear: self.clear | other.clear }
    }
}

/// One way in which a condition holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
struct Clause {
    asker: Mask,
    peer: Mask,
    environment: Mask,
}

impl Clause {
    fn holds(&self, facts: &Facts) -> bool {
        self.asker.holds(facts.asker)
            && self.peer.holds(facts.peer)
            && self.environment.holds(facts.environment)
    }

    fn and(&self, other: &Self) -> Self {
        Self {
            asker: self.asker.and(other.asker),
            peer: self.peer.and(other.peer),
            environment: self.environment.and(other.environment),
        }
    }
}

/// The conditions of a policy, and what they ask about.
#[derive(Debug, Default)]
pub(crate) struct Conditions {
    clauses: Vec<Clause>,
    /// Where each condition's clauses are; the first is that which always holds.
    ranges: Vec<(u32, u32)>,
    known: HashMap<Condition, u32>,
    texts: Vec<String>,
    digests: Vec<Vec<u8>>,
    windows: Vec<(Clock, Clock, Weekdays)>,
    flags: Vec<Box<str>>,
}

impl Conditions {
    /// With one that always holds, 0.
    pub(crate) fn new() -> Self {
        Self {
            clauses: vec![Clause::default()],
            ranges: vec![(0, 1)],
            texts: vec![String::new()],
            ..Self::default()
        }
    }

    /// The number of `condition`.
    pub(crate) fn add(&mut self, condition: &Condition) -> Result<u32, String> {
        if let Some(known) = self.known.get(condition) {
            return Ok(*known);
        }
        let clauses = self.clauses_of(condition, false)?;
        let range = (self.clauses.len() as u32, clauses.len() as u32);
        self.clauses.extend(clauses);
        self.ranges.push(range);
        self.texts.push(condition.to_string());
        let id = self.ranges.len() as u32 - 1;
        self.known.insert(condition.clone(), id);
        Ok(id)
    }

    /// In disjunctive form; of its contrary if `contrary`.
    fn clauses_of(&mut self, condition: &Condition, contrary: bool) -> Result<Vec<Clause>, String> {
        let too_many = || format!("the condition can hold in more than {} ways", limits::CLAUSES);
        match (condition, contrary) {
            (Condition::Not(inner), _) => self.clauses_of(inner, !contrary),
            (Condition::Is { fact, peer }, _) => {
                let bit = self.bit(fact)?;
                let mask = if contrary { Mask { set: 0, clear: bit } } else { Mask { set: bit, clear: 0 } };
                let clause = match fact {
                    Fact::Between { .. } | Fact::Flag(_) => Clause { environment: mask, ..Clause::default() },
                    _ if *peer => Clause { peer: mask, ..Clause::default() },
                    _ => Clause { asker: mask, ..Clause::default() },
                };
                Ok(vec![clause])
            }
            (Condition::Or(all), false) | (Condition::And(all), true) => {
                let mut clauses = Vec::new();
                for one in all {
                    clauses.extend(self.clauses_of(one, contrary)?);
                    if clauses.len() > limits::CLAUSES {
                        return Err(too_many());
                    }
                }
                Ok(clauses)
            }
            (Condition::And(all), false) | (Condition::Or(all), true) => {
                let mut clauses = vec![Clause::default()];
                for one in all {
                    let more = self.clauses_of(one, contrary)?;
                    clauses = clauses
                        .iter()
                        .flat_map(|clause| more.iter().map(|other| clause.and(other)))
                        .collect();
                    if clauses.len() > limits::CLAUSES {
                        return Err(too_many());
                    }
                }
                Ok(clauses)
            }
        }
    }

    fn bit(&mut self, fact: &Fact) -> Result<u64, String> {
        match fact {
            Fact::Lifecycle(state) => Ok(1 << *state as u8),
            Fact::Attested => Ok(ATTESTED),
            Fact::Measured(digest) => {
                let digest = bytes(&digest.text).ok_or("a digest is an even number of hexadecimal digits")?;
                let at = place(&mut self.digests, digest, limits::DIGESTS, "digests")?;
                Ok(1 << (FIRST_DIGEST + at))
            }
            Fact::Between { from, to, days } => {
                let at = place(&mut self.windows, (*from, *to, *days), limits::ENVIRONMENT, "spans of time")?;
                Ok(1 << at)
            }
            Fact::Flag(name) => {
                let at = place(&mut self.flags, name.text.clone(), limits::ENVIRONMENT, "flags")?;
                Ok(1 << (FIRST_FLAG + at))
            }
        }
    }

    /// The bit of a fact, if a condition is about it.
    pub(crate) fn known_bit(&self, fact: &Fact) -> Option<u64> {
        match fact {
            Fact::Lifecycle(state) => Some(1 << *state as u8),
            Fact::Attested => Some(ATTESTED),
            Fact::Measured(digest) => {
                let digest = bytes(&digest.text)?;
                self.digests.iter().position(|known| *known == digest).map(|at| 1 << (FIRST_DIGEST + at))
            }
            Fact::Between { from, to, days } => {
                self.windows.iter().position(|known| *known == (*from, *to, *days)).map(|at| 1 << at)
            }
            Fact::Flag(name) => self.flag(&name.text),
        }
    }

    /// A condition as a policy writes it; empty for that which always holds.
    pub(crate) fn text(&self, condition: u32) -> &str {
        self.texts.get(condition as usize).map_or("", |text| text)
    }

    pub(crate) fn holds(&self, condition: u32, facts: &Facts) -> bool {
        let Some((first, count)) = self.ranges.get(condition as usize) else { return false };
        let clauses = self.clauses.get(*first as usize..(*first + *count) as usize).unwrap_or(&[]);
        clauses.iter().any(|clause| clause.holds(facts))
    }

    /// The terms of an asker: of the clauses whose part about the asker holds.
    pub(crate) fn asker_terms(&self, facts: u64) -> u64 {
        self.terms(|clause| clause.asker.holds(facts))
    }

    /// Those of a peer. What is among the asker's, the peer's and the host's terms holds.
    pub(crate) fn peer_terms(&self, facts: u64) -> u64 {
        self.terms(|clause| clause.peer.holds(facts))
    }

    /// Those of the host.
    pub(crate) fn environment_terms(&self, environment: u64) -> u64 {
        self.terms(|clause| clause.environment.holds(environment))
    }

    fn terms(&self, holds: impl Fn(&Clause) -> bool) -> u64 {
        let all = self.clauses.iter().take(TERMS).enumerate();
        all.filter(|(_, clause)| holds(clause)).fold(0, |terms, (at, _)| terms | 1 << at)
    }

    /// The terms with each of which a condition holds, if they have bits.
    pub(super) fn terms_of(&self, condition: u32) -> Option<std::ops::Range<u32>> {
        let (first, count) = *self.ranges.get(condition as usize)?;
        Some(first..first + count).filter(|terms| terms.end as usize <= TERMS)
    }

    /// The bit of a flag that a condition names.
    pub(crate) fn flag(&self, name: &str) -> Option<u64> {
        self.flags.iter().position(|known| &**known == name).map(|at| 1 << (FIRST_FLAG + at))
    }

    pub(crate) fn flags(&self) -> impl Iterator<Item = &str> {
        self.flags.iter().map(|name| &**name)
    }

    /// The bits of the spans of time that `seconds` since 1970 falls into.
    fn time_bits(&self, seconds: u64) -> u64 {
        let minute = (seconds / 60 % 1440) as u16;
        // The first of January 1970 was a Thursday.
        let day = (seconds / 86_400 + 3) % 7;
        let mut bits = 0;
        for (at, (from, to, days)) in self.windows.iter().enumerate() {
            let on = |day: u64| days.0 >> day & 1 == 1;
            let inside = if from <= to {
                on(day) && (from.0..to.0).contains(&minute)
            } else {
                // It began today, or yesterday.
                (on(day) && minute >= from.0) || (on((day + 6) % 7) && minute < to.0)
            };
            bits |= u64::from(inside) << at;
        }
        bits
    }

    /// In how many seconds after `seconds` since 1970 a span begins or ends; a minute at most is looked ahead for each.
    pub(crate) fn next_change(&self, seconds: u64) -> Option<u64> {
        let now = seconds % 86_400;
        let edges = self.windows.iter().flat_map(|(from, to, _)| [from.0, to.0, 0]);
        let until = |edge: u16| (u64::from(edge) * 60 + 86_400 - now - 1) % 86_400 + 1;
        edges.map(until).min()
    }
}

fn place<T: PartialEq>(all: &mut Vec<T>, one: T, most: usize, what: &str) -> Result<usize, String> {
    if let Some(at) = all.iter().position(|known| *known == one) {
        return Ok(at);
    }
    if all.len() >= most {
        return Err(format!("the policy's conditions name more than {most} {what}"));
    }
    all.push(one);
    Ok(all.len() - 1)
}

fn bytes(digits: &str) -> Option<Vec<u8>> {
    (0..digits.len()).step_by(2).map(|at| u8::from_str_radix(digits.get(at..at + 2)?, 16).ok()).collect()
}

/// The bits of a subject.
pub(crate) fn subject_facts(
    conditions: &Conditions,
    state: Lifecycle,
    attested: bool,
    digest: Option<&[u8]>,
) -> u64 {
    let at = digest.and_then(|digest| conditions.digests.iter().position(|known| known == digest));
    1 << state as u8 | if attested { ATTESTED } else { 0 } | at.map_or(0, |at| 1 << (FIRST_DIGEST + at))
}

/// The bits of the host, at so many seconds since 1970.
pub(crate) fn environment_bits<'a>(
    conditions: &Conditions,
    seconds: u64,
    flags: impl IntoIterator<Item = &'a str>,
) -> u64 {
    let flags = flags.into_iter().filter_map(|name| conditions.flag(name)).fold(0, |bits, flag| bits | flag);
    conditions.time_bits(seconds) | flags
}

#[cfg(test)]
mod tests {
    use super::*;

    fn window(from: u16, to: u16, days: u8) -> (Conditions, u32) {
        let mut conditions = Conditions::new();
        let fact = Fact::Between { from: Clock(from), to: Clock(to), days: Weekdays(days) };
        let id = conditions.add(&Condition::Is { fact, peer: false }).unwrap();
        (conditions, id)
    }

    fn holds(conditions: &Conditions, id: u32, seconds: u64) -> bool {
        let environment = environment_bits(conditions, seconds, []);
        conditions.holds(id, &Facts { environment, ..Facts::default() })
    }

    #[test]
    fn days_and_times_are_those_of_the_calendar() {
        // 2026-11-29, a Sunday, at noon UTC.
        let sunday = 1_795_953_600;
        let (conditions, id) = window(8 * 60, 18 * 60, 0b100_0000);
        assert!(holds(&conditions, id, sunday));
        assert!(!holds(&conditions, id, sunday + 86_400), "a Monday");
        assert!(!holds(&conditions, id, sunday + 6 * 3600), "it ends before 18:00");
        assert!(holds(&conditions, id, sunday + 6 * 3600 - 1));
    }

    #[test]
    fn a_night_goes_on_in_the_morning() {
        let sunday = 1_795_953_600;
        let (conditions, id) = window(22 * 60, 6 * 60, 0b100_0000);
        assert!(!holds(&conditions, id, sunday));
        assert!(holds(&conditions, id, sunday + 11 * 3600), "Sunday at 23:00");
        assert!(holds(&conditions, id, sunday + 17 * 3600), "Monday at 5:00");
        assert!(!holds(&conditions, id, sunday - 7 * 3600), "Sunday at 5:00: no Saturday's night");
        assert_eq!(conditions.next_change(sunday), Some(10 * 3600));
    }

    #[test]
    fn forms_with_too_many_ways_are_refused() {
        let is = |name: String| Condition::Is { fact: Fact::Flag(name.as_str().into()), peer: false };
        let either = |n: usize| Condition::Or(vec![is(format!("a{n}")), is(format!("b{n}"))]);
        let mut conditions = Conditions::new();
        assert!(conditions.add(&Condition::And((0..4).map(either).collect())).is_ok());
        assert!(conditions.add(&Condition::And((0..5).map(either).collect())).is_err());
    }

    #[test]
    fn contraries_are_contrary() {
        let is = |name: &str| Condition::Is { fact: Fact::Flag(name.into()), peer: false };
        let plain = Condition::Or(vec![Condition::And(vec![is("a"), is("b")]), is("c")]);
        let contrary = Condition::Not(Box::new(plain.clone()));
        let mut conditions = Conditions::new();
        let (plain, contrary) = (conditions.add(&plain).unwrap(), conditions.add(&contrary).unwrap());
        for set in 0..8_u32 {
            let flags = ["a", "b", "c"]
                .into_iter()
                .enumerate()
                .filter(|(at, _)| set >> at & 1 == 1)
                .map(|(_, name)| name);
            let environment = environment_bits(&conditions, 0, flags);
            let facts = Facts { environment, ..Facts::default() };
            assert_ne!(conditions.holds(plain, &facts), conditions.holds(contrary, &facts), "{set:b}");
            assert_eq!(conditions.holds(plain, &facts), set & 3 == 3 || set & 4 != 0);
        }
    }
}
