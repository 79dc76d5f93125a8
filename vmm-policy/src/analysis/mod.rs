//! Questions about a policy as a whole, and about one decision.

mod coverage;
mod diff;
mod explain;
mod graph;
mod picture;
mod reach;
mod scene;
#[cfg(test)]
mod tests;
mod usage;

pub use coverage::{Coverage, Entry};
pub use diff::{Change, Side};
#[cfg(test)]
pub(crate) use explain::evaluate;
pub use explain::{Explanation, Finding, LayerFinding};
pub use graph::{Edge, Graph, Node, NodeShape};
pub use reach::{Path, PathStep};
pub(crate) use reach::{Reach, describe_pair};
pub use usage::{RuleReport, Usage};
