//! Names of objects to numbers, so that patterns become ranges.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};

/// The names and the beginnings of names that a policy knows of one kind of object, in alphabetical order, from 1; all the names
/// that begin alike lie together. 0 is every other name.
///
/// Decisions look names up in it. Patterns of at most 16 bytes, which is most, are found by two words, without a comparison of texts. The hashes
/// have seeds: whoever writes a policy does not choose patterns that all lie in one place.
#[derive(Clone, Debug)]
pub(crate) struct NameIndex {
    short: Short,
    /// Whole names and beginnings.
    long: [HashMap<Box<str>, u32>; 2],
    /// Of long beginnings, longest first.
    long_lengths: Vec<usize>,
    /// In order; whether it is a whole name.
    all: Vec<(Box<str>, bool)>,
}

/// Of so many pairs of seeds the one is taken with which the most patterns are where they are looked for first.
const SEEDS: usize = 16;
/// Of more patterns than this about as many are there with one pair as with another.
const ENOUGH: usize = 1 << 13;

/// Bytes of a short pattern.
const SHORT: usize = 16;

/// Up to 16 bytes as a number; those behind the end are 0.
#[inline(always)]
fn words(text: &[u8]) -> [u64; 2] {
    let word = |bytes: &[u8]| bytes.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    let half = |bytes: &[u8]| bytes.first_chunk().map_or(0, |bytes| u64::from(u32::from_le_bytes(*bytes)));
    let from = |at: usize| text.get(at..).unwrap_or(&[]);
    match text.len() {
        SHORT.. => [word(text), word(from(8))],
        // The last eight bytes are there, and some of them are in the first word already.
        length @ 8.. => {
            [word(text), word(from(length - 8)).checked_shr(128 - length as u32 * 8).unwrap_or(0)]
        }
        // Those that are in both are the same.
        length @ 4.. => [half(text) | half(from(length - 4)) << ((length - 4) * 8), 0],
        _ => [text.iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte)), 0],
    }
}

/// Short patterns.
#[derive(Clone, Debug)]
struct Short {
    seeds: [u64; 2],
    /// A power of two, at least four times as many as patterns, so that most are where they are looked for first.
    places: Vec<Place>,
    /// Of beginnings, longest first.
    lengths: Vec<Length>,
    /// Whether there is a whole name.
    has_whole: bool,
}

/// A pattern; an atom of 0 is none.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    words: [u64; 2],
    /// In bytes; the upper bit says that it is a whole name.
    length: u32,
    atom: u32,
}

/// The length of a beginning, and which bits of a name's words are in it.
#[derive(Clone, Copy, Debug)]
struct Length {
    bytes: u32,
    mask: [u64; 2],
}

const WHOLE: u32 = 1 << 31;

impl Short {
    fn new(all: &[(Box<str>, bool)]) -> Self {
        let short = || (1..).zip(all).filter(|(_, (text, _))| text.len() <= SHORT);
        let count = short().count();
        let mut lengths: Vec<usize> =
            short().filter(|(_, (_, whole))| !whole).map(|(_, (text, _))| text.len()).collect();
        lengths.sort_unstable_by(|one, other| other.cmp(one));
        lengths.dedup();
        let ones = |bits: usize| u64::MAX.checked_shr(64 - bits.min(64) as u32).unwrap_or(0);
        let length = |bytes: &usize| Length {
            bytes: *bytes as u32,
            mask: [ones(bytes * 8), ones((bytes * 8).saturating_sub(64))],
        };
        let lengths: Vec<Length> = lengths.iter().map(length).collect();
        let has_whole = short().any(|(_, (_, whole))| *whole);
        let with_seeds = || {
            let random = RandomState::new();
            let mut index = Self {
                seeds: [random.hash_one(1), random.hash_one(2)],
                places: vec![Place::default(); (count * 4).next_power_of_two()],
                lengths: lengths.clone(),
                has_whole,
            };
            let elsewhere = short().filter(|(atom, (text, whole))| {
                let length = text.len() as u32 | if *whole { WHOLE } else { 0 };
                index.insert(Place { words: words(text.as_bytes()), length, atom: *atom })
            });
            (elsewhere.count(), index)
        };
        let (mut least, mut index) = with_seeds();
        for _ in 1..SEEDS.min(ENOUGH / count.max(1)) {
            if least == 0 {
                break;
            }
            let (elsewhere, other) = with_seeds();
            if elsewhere < least {
                (least, index) = (elsewhere, other);
            }
        }
        index
    }

    #[inline(always)]
    fn begin(&self, [first, last]: [u64; 2], length: u32) -> usize {
        let [one, other] = self.seeds;
        // Each bit of the product depends on all bits of both.
        let product = u128::from(first ^ one) * u128::from(last ^ other ^ u64::from(length).rotate_left(24));
        (product as u64 ^ (product >> 64) as u64) as usize & (self.places.len() - 1)
    }

    /// Whether it is elsewhere than where it is looked for first.
    fn insert(&mut self, new: Place) -> bool {
        let begin = self.begin(new.words, new.length);
        let mut at = begin;
        // Most of the places are free.
        while let Some(place) = self.places.get_mut(at) {
            if place.atom == 0 {
                *place = new;
                break;
            }
            at = (at + 1) & (self.places.len() - 1);
        }
        at != begin
    }

    /// The number of a pattern, or 0.
    #[inline(always)]
    fn find(&self, words: [u64; 2], length: u32) -> u32 {
        let [first, last] = words;
        let mut at = self.begin(words, length);
        while let Some(place) = self.places.get(at) {
            let [known_first, known_last] = place.words;
            let differs = (first ^ known_first) | (last ^ known_last) | u64::from(length ^ place.length);
            if differs == 0 {
                return place.atom;
            }
            if place.atom == 0 {
                return 0;
            }
            at = (at + 1) & (self.places.len() - 1);
        }
        0
    }

    /// The number of the longest of them that `name` falls under.
    #[inline(always)]
    fn atom(&self, name: &[u8]) -> u32 {
        let [first, last] = words(name);
        if self.has_whole && name.len() <= SHORT {
            let atom = self.find([first, last], name.len() as u32 | WHOLE);
            if atom != 0 {
                return atom;
            }
        }
        for length in &self.lengths {
            let [one, other] = length.mask;
            // What is behind a name's end is no 0 of a pattern.
            if length.bytes as usize > name.len() {
                continue;
            }
            let atom = self.find([first & one, last & other], length.bytes);
            if atom != 0 {
                return atom;
            }
        }
        0
    }
}

impl Default for NameIndex {
    fn default() -> Self {
        Self::new(Vec::new())
    }
}

impl NameIndex {
    /// Of patterns: a text, and whether it is a whole name.
    pub(crate) fn new(mut all: Vec<(Box<str>, bool)>) -> Self {
        all.sort_unstable();
        all.dedup();
        let mut long = [HashMap::new(), HashMap::new()];
        let mut long_lengths = Vec::new();
        for (atom, (text, whole)) in (1..).zip(&all).filter(|(_, (text, _))| text.len() > SHORT) {
            let [names, beginnings] = &mut long;
            if *whole { names } else { beginnings }.insert(text.clone(), atom);
            if !whole {
                long_lengths.push(text.len());
            }
        }
        long_lengths.sort_unstable_by(|one, other| other.cmp(one));
        long_lengths.dedup();
        Self { short: Short::new(&all), long, long_lengths, all }
    }

    /// The number of the longest pattern that `name` falls under. It takes as many steps as there are lengths of beginnings, at
    /// most [`NAME_BYTES`](crate::limits::NAME_BYTES).
    #[inline(always)]
    pub(crate) fn atom(&self, name: &str) -> u64 {
        let long = if name.len() > SHORT { self.long_atom(name) } else { None };
        long.unwrap_or_else(|| self.short.atom(name.as_bytes())).into()
    }

    #[inline(never)]
    fn long_atom(&self, name: &str) -> Option<u32> {
        let [names, beginnings] = &self.long;
        let beginning = |length: &usize| beginnings.get(name.get(..*length)?).copied();
        names.get(name).copied().or_else(|| self.long_lengths.iter().find_map(beginning))
    }

    /// The numbers of what falls under a pattern that the index was made of.
    pub(crate) fn range(&self, text: &str, whole: bool) -> (u64, u64) {
        if text.is_empty() && !whole {
            return (0, u64::MAX);
        }
        let begin = self.all.partition_point(|(known, known_whole)| (&**known, *known_whole) < (text, whole));
        let first = begin as u64 + 1;
        if whole {
            return (first, first);
        }
        let below =
            self.all.get(begin..).unwrap_or(&[]).partition_point(|(known, _)| known.starts_with(text));
        (first, first + below.max(1) as u64 - 1)
    }

    /// The highest number.
    pub(crate) fn last(&self) -> u64 {
        self.all.len() as u64
    }

    /// Whether a number stands for one name.
    pub(crate) fn is_whole(&self, atom: u64) -> bool {
        let at = atom.checked_sub(1).and_then(|at| usize::try_from(at).ok());
        at.and_then(|at| self.all.get(at)).is_some_and(|(_, whole)| *whole)
    }

    /// What a number stands for, for people.
    pub(crate) fn shown(&self, atom: u64) -> String {
        match atom.checked_sub(1).and_then(|at| self.all.get(usize::try_from(at).ok()?)) {
            Some((name, true)) => name.to_string(),
            Some((prefix, false)) => format!("{prefix}*"),
            None => "*".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_falls_under_its_patterns_and_no_other() {
        let patterns = [
            ("a", true),
            ("a-", false),
            ("a-b", true),
            ("a-b", false),
            ("a-bc", true),
            ("b", false),
            ("", false),
        ];
        let index = NameIndex::new(patterns.map(|(text, whole)| (text.into(), whole)).to_vec());
        for name in ["a", "a-", "a-b", "a-bc", "a-bcd", "a-x", "b", "bb", "c", "", "\u{e9}"] {
            let atom = index.atom(name);
            for (text, whole) in patterns {
                let (first, last) = index.range(text, whole);
                let falls = if whole { name == text } else { name.starts_with(text) };
                assert_eq!((first..=last).contains(&atom), falls, "{name:?} and {text:?}, {whole}");
            }
        }
    }

    #[test]
    fn names_of_all_lengths_are_told_apart() {
        let mut rng = fastrand::Rng::with_seed(1);
        // Few letters, so that beginnings and ends agree.
        let text = |rng: &mut fastrand::Rng| -> String {
            (0..rng.usize(..40)).map(|_| ['a', 'b', '\u{e9}'][rng.usize(..3)]).collect()
        };
        for _ in 0..50 {
            let mut patterns: Vec<(Box<str>, bool)> =
                (0..60).map(|_| (text(&mut rng).into(), rng.bool())).collect();
            // One that differs in its middle alone.
            let long = "a".repeat(8) + &text(&mut rng) + "b" + &"a".repeat(8);
            patterns.push((long.clone().into(), true));
            let index = NameIndex::new(patterns.clone());
            let mut names: Vec<String> = (0..500).map(|_| text(&mut rng)).collect();
            names.extend(patterns.iter().map(|(text, _)| format!("{text}{}", ["", "a"][rng.usize(..2)])));
            names.extend([long.replacen('b', "a", 1), long]);
            for name in names {
                let longest = patterns.iter().filter(|(text, whole)| !whole && name.starts_with(&**text));
                let longest = longest.max_by_key(|(text, _)| text.len());
                let wanted = patterns.iter().find(|(text, whole)| *whole && **text == *name).or(longest);
                let found = index.atom(&name).checked_sub(1).map(|at| &index.all[at as usize]);
                assert_eq!(found, wanted, "{name:?}");
            }
        }
    }
}
