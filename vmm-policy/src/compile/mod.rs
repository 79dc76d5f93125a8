//! From statements to a table that answers in nanoseconds.
//!
//! 1. [`resolve`]: names to numbers, and whatever names nothing to an error ([`Model`]).
//! 2. [`classes`]: subjects and objects that no rule tells apart are one class.
//! 3. [`fill`]: for each action, class that asks and class that is asked a [cell](cells), with the [ranges] of objects and the rules for each,
//!    strongest first; together the [`Table`]. Where a rule says `any`, there is one cell for it and not one for each class, so
//!    that there are at most ten cells to look at, however many rules there are.
//!    What most decisions read of it lies together in its [`front`].
//! 4. [`check`]: what `never` says.
//!
//! Maps by what a policy chooses have the standard library's hash, whose seed nobody knows: a policy does not choose names that take
//! quadratic time.

mod beside;
mod cells;
mod check;
mod classes;
mod conditions;
mod fill;
mod front;
mod lookup;
mod model;
mod names;
mod pairs;
mod ranges;
mod resolve;
mod said;
mod table;
#[cfg(test)]
mod tests;
mod ways;
mod who;

pub(crate) use beside::contradiction;
pub(crate) use check::check;
pub(crate) use classes::{Brief, Class, ClassKey, ClassKind, NOBODY};
pub(crate) use conditions::{Conditions, Facts, environment_bits, subject_facts};
pub(crate) use front::{Asked, Row};
pub(crate) use lookup::{Limits, Ruling};
pub(crate) use model::{LimitDef, Model, PartyDef, RuleDef, Strength};
pub(crate) use pairs::Steps;
pub(crate) use resolve::resolve;
pub(crate) use table::Table;
#[cfg(test)]
pub(crate) use tests::{random_facts as random_facts_for_tests, random_policy as random_policy_for_tests};
pub(crate) use who::{Who, resolve_who};
