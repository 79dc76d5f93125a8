//! Names of objects to numbers, so that patterns become ranges.

use rustc_hash::FxHashMap;

/// The names and the beginnings of names that a policy knows of one kind of object, in alphabetical order, from 1; all the names
/// that begin alike lie together. 0 is every other name.
#[derive(Clone, Debug, Default)]
pub(crate) struct NameIndex {
    exact: FxHashMap<Box<str>, u64>,
    /// The beginnings by their length, longest first.
    prefixes: Vec<(usize, FxHashMap<Box<str>, u64>)>,
    /// In order; whether it is a whole name.
    all: Vec<(Box<str>, bool)>,
}

impl NameIndex {
    /// Of patterns: a text, and whether it is a whole name.
    pub(crate) fn new(mut all: Vec<(Box<str>, bool)>) -> Self {
        all.sort_unstable();
        all.dedup();
        let mut exact = FxHashMap::default();
        let mut prefixes: Vec<(usize, FxHashMap<Box<str>, u64>)> = Vec::new();
        for ((text, whole), atom) in all.iter().zip(1..) {
            if *whole {
                exact.insert(text.clone(), atom);
                continue;
            }
            let at = match prefixes.binary_search_by(|(length, _)| text.len().cmp(length)) {
                Ok(at) => at,
                Err(at) => {
                    prefixes.insert(at, (text.len(), FxHashMap::default()));
                    at
                }
            };
            if let Some((_, of_length)) = prefixes.get_mut(at) {
                of_length.insert(text.clone(), atom);
            }
        }
        Self { exact, prefixes, all }
    }

    /// The number of the longest pattern that `name` falls under. It takes as many steps as there are lengths of beginnings, at
    /// most [`NAME_BYTES`](crate::limits::NAME_BYTES).
    pub(crate) fn atom(&self, name: &str) -> u64 {
        if let Some(atom) = self.exact.get(name) {
            return *atom;
        }
        let by_length = |(length, of_length): &(usize, FxHashMap<Box<str>, u64>)| {
            of_length.get(name.get(..*length)?).copied()
        };
        self.prefixes.iter().find_map(by_length).unwrap_or(0)
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
}
