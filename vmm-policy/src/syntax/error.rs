//! What is wrong with a policy, and where.

use std::fmt;
use std::io;
use std::path::PathBuf;

use super::source::{Sources, Span};
use crate::limits;

/// Why a policy is none.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// It says what cannot be, in so many places.
    #[error("{0}")]
    Invalid(Problems),
    /// It cannot be read.
    #[error("{path}: {source}", path = .path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It cannot be compiled within bounds.
    #[error("{what} come to more than {allowed}{hint}")]
    TooLarge {
        /// What there would be too many of.
        what: &'static str,
        /// How many may be.
        allowed: usize,
        /// The rule that was one too many.
        hint: String,
    },
    /// A document has something in it that is read as something else.
    #[error("statement {statement} of the document is read otherwise than it was meant: {text}")]
    Unlike {
        /// Which, from 1.
        statement: usize,
        /// What it is as text.
        text: String,
    },
    /// It says nothing of a label that a registered subject was to have.
    #[error("no label is called {label:?}{hint}")]
    UnknownLabel {
        /// The label.
        label: String,
        /// What may be meant.
        hint: String,
    },
    /// It says nothing of who was asked about.
    #[error("{text:?} stands for nobody in this policy")]
    Nobody {
        /// Who.
        text: String,
    },
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Problem {
    /// The file.
    pub file: String,
    /// The line, from 1.
    pub line: usize,
    /// The column in characters, from 1.
    pub column: usize,
    /// What stands there; empty at the end of a file.
    pub text: String,
    /// The whole line.
    pub source: String,
    /// What is wrong with it.
    pub message: String,
    /// What would be right.
    pub help: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: {}", self.file, self.line, self.column, self.message)?;
        self.help.as_ref().map_or(Ok(()), |help| write!(f, "; {help}"))
    }
}

/// All that is wrong, in the order of the text; the first [`limits::PROBLEMS`] of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problems(Vec<Problem>);

impl Problems {
    /// One after the other; there is at least one.
    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.0.iter()
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, problem) in self.0.iter().enumerate() {
            if nth > 0 {
                f.write_str("\n")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

/// Takes down what is wrong.
#[derive(Debug, Default)]
pub(crate) struct Report {
    found: Vec<(Span, String, Option<String>)>,
}

impl Report {
    pub(crate) fn add(&mut self, span: Span, message: impl Into<String>, help: Option<String>) {
        if !self.is_full() {
            self.found.push((span, message.into(), help));
        }
    }

    pub(crate) fn is_full(&self) -> bool {
        self.found.len() >= limits::PROBLEMS
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// `Ok` if nothing was.
    pub(crate) fn finish(mut self, sources: &Sources) -> Result<(), PolicyError> {
        if self.found.is_empty() {
            return Ok(());
        }
        self.found.sort_by_key(|(span, ..)| (span.file, span.start));
        let short = |text: &str| text.chars().take(limits::SHOWN_CHARACTERS).collect();
        let problem = |(span, message, help): (Span, String, Option<String>)| {
            let (line, column) = sources.place(span);
            Problem {
                file: sources.name(span).to_owned(),
                line,
                column,
                text: short(sources.text(span)),
                source: short(sources.line(span)),
                message,
                help,
            }
        };
        Err(PolicyError::Invalid(Problems(self.found.into_iter().map(problem).collect())))
    }
}

/// `did you mean "x"?`, if one of `known` is near enough.
pub(crate) fn did_you_mean<'a>(text: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    // Long names are not near anything, and the distance takes time that is the product of both.
    if text.len() > limits::SUGGESTED_BYTES {
        return None;
    }
    let near =
        known.into_iter().take(limits::SUGGESTED_FROM).filter(|word| word.len() <= limits::SUGGESTED_BYTES);
    let (distance, word) = near.map(|word| (strsim::damerau_levenshtein(text, word), word)).min()?;
    (distance <= 1 + text.chars().count() / 4).then(|| format!("did you mean {word:?}?"))
}

/// `a, b or c`.
pub(crate) fn one_of<'a>(words: impl IntoIterator<Item = &'a str>) -> String {
    let words: Vec<_> = words.into_iter().collect();
    match words.split_last() {
        Some((last, rest)) if !rest.is_empty() => format!("{} or {last}", rest.join(", ")),
        Some((last, _)) => (*last).to_owned(),
        None => String::new(),
    }
}
