//! What a policy speaks about: who ([`Principal`]), what is done ([`Action`]) with what ([`Kind`], [`Object`]), and what is said to
//! it ([`Verdict`], [`Decision`]).

mod decision;
mod object;
mod op;
mod subject;

pub use decision::{Decision, Layer, Rate, RuleId, Verdict};
pub use object::{Object, Request, Value};
pub use op::{Action, Flow, Kind, Op, ValueKind};
pub use subject::{Lifecycle, Principal, SubjectId, SubjectSpec};
