//! The language: text to [`Document`] and back. The README has the grammar.
//!
//! A policy is the operator's, yet it may come from anywhere: whatever the text, reading it ends in time and memory that are
//! proportional to it and bounded by [`crate::limits`], and a refusal says where.

mod ast;
mod condition;
mod cursor;
mod error;
mod expr;
mod facts;
mod format;
mod parse;
mod rule;
mod source;
#[cfg(test)]
mod tests;
mod token;

pub use ast::{
    Access, Clock, Condition, Document, Effect, Escalation, Expr, Fact, Item, Level, Limit, Party, PartyKind,
    Quantity, Relation, Rule, Statement, Step, Targets, ValuePattern, Weekdays, Word,
};
pub use error::{PolicyError, Problem, Problems};
pub(crate) use error::{Report, did_you_mean, one_of};
pub(crate) use expr::{expression, sentence};
pub(crate) use parse::parse_all;
pub(crate) use source::read_bounded;
pub use source::{FileLoader, Loader, MemoryLoader, NoIncludes, Sources, Span};

/// `text`, by the name of `name`, as `vmm-policy fmt` writes it: what it includes is not read, and what its names stand for is not
/// asked.
///
/// # Errors
/// With what cannot be read.
pub fn format(name: &str, text: &str) -> Result<String, PolicyError> {
    let mut report = Report::default();
    let (document, sources) = parse::parse_one(name, text.to_owned(), &mut report);
    report.finish(&sources)?;
    Ok(document.to_string())
}
