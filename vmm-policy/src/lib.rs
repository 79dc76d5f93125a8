#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]
#![allow(
    clippy::cast_possible_truncation,
    reason = "whatever is counted in 32 bits has its bound in `limits`, looked at where it is counted"
)]

mod analysis;
mod compile;
mod grant;
pub mod limits;
mod model;
mod monitor;
mod policy;
mod sync;
pub mod syntax;
pub mod trust;

pub use analysis::{
    Change, Coverage, Edge, Entry, Explanation, Finding, Graph, LayerFinding, Node, NodeShape, Path,
    PathStep, RuleReport, Side, Usage,
};
pub use grant::{Ends, Grant, GrantId, Hold, OpenChannel, Revocation, RevokeOutcome, Use, Watch, channel};
pub use model::{
    Action, Decision, Flow, Kind, Layer, Lifecycle, Object, Op, Principal, Rate, Request, RuleId, SubjectId,
    SubjectSpec, Value, ValueKind, Verdict,
};
pub use monitor::{
    Clock, DryRun, History, HistoryError, Honours, Judge, MemoryHistory, Monitor, MonitorBuilder,
    MonitorError, Observer, Refused, Reloaded, ShadowDifference, SystemClock,
};
pub use policy::{Policy, RuleText};
pub use syntax::{Document, PolicyError, Problem, Problems};
pub use uuid::Uuid;
