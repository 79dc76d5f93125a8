//! Which rules a log of requests has needed.

use std::fmt;

use super::scene::Scene;
use crate::compile::NOBODY;
use crate::model::{Layer, RuleId, Verdict};
use crate::policy::Policy;
use crate::syntax::PolicyError;

/// A request of a log, and what this policy says to it.
#[derive(Clone, Debug)]
#[cfg_attr(feature = "serde", derive(serde::Serialize))]
#[non_exhaustive]
pub struct Entry {
    /// The request.
    pub request: String,
    /// The answer.
    pub verdict: Verdict,
    /// Which layer said so.
    pub layer: Layer,
    /// The rule that said so.
    #[cfg_attr(feature = "serde", serde(skip))]
    pub rule: Option<RuleId>,
    /// Its line.
    pub line: Option<usize>,
}

/// How often each rule has answered.
///
/// ```
/// # use vmm_policy::{Coverage, Policy, Verdict};
/// let policy = Policy::parse("labels l\nvm a { labels l }\nvm b\nallow l to connect vsock 1..9 of b\ndeny l to connect vsock 9 of b")?;
/// let mut coverage = Coverage::new(&policy);
/// assert_eq!(coverage.record("a to connect vsock 5 of b")?.verdict, Verdict::Allow);
/// assert_eq!(coverage.unused().count(), 1, "nobody has asked for port 9");
/// # Ok::<(), vmm_policy::PolicyError>(())
/// ```
#[derive(Clone, Debug)]
pub struct Coverage {
    policy: Policy,
    counts: Vec<u64>,
    denied_by_default: u64,
}

impl Coverage {
    /// Of no request yet.
    pub fn new(policy: &Policy) -> Self {
        Self { policy: policy.clone(), counts: vec![0; policy.model.rules.len()], denied_by_default: 0 }
    }

    /// Answers a request, a sentence as [`Policy::explain`] takes it, and counts the rule.
    ///
    /// # Errors
    /// If it is no request between those that the policy declares.
    pub fn record(&mut self, sentence: &str) -> Result<Entry, PolicyError> {
        let scene = Scene::new(&self.policy, sentence)?;
        let (model, table) = (&*self.policy.model, &*self.policy.table);
        let (peer, object) = scene.peer_classes(&self.policy);
        let asker = scene.asker_class(&self.policy);
        let mut ruling = table.decide(model, scene.op, asker, peer, scene.value, &scene.facts);
        if object != NOBODY
            && let (Some(asker), Some(peer), Some(object)) =
                (table.class(asker), table.class(peer), table.class(object))
        {
            let (op, facts) = (scene.op, &scene.facts);
            ruling = table.decide_beside(model, op, asker, peer, object, scene.value, facts, ruling);
        }
        let line = ruling.rule().and_then(|rule| self.policy.rule(rule)).map(|rule| rule.line);
        let entry = Entry {
            request: scene.shown,
            verdict: ruling.verdict(model),
            layer: ruling.layer,
            rule: ruling.rule(),
            line,
        };
        self.tally(entry.rule);
        Ok(entry)
    }

    /// Counts a decision that a [`Monitor`](crate::Monitor) with the same policy made.
    pub fn count(&mut self, decision: &crate::Decision) {
        self.tally(decision.rule);
    }

    fn tally(&mut self, rule: Option<RuleId>) {
        match rule.and_then(|rule| self.counts.get_mut(rule.0 as usize)) {
            Some(count) => *count += 1,
            None => self.denied_by_default += 1,
        }
    }

    /// How often a rule has answered.
    pub fn count_of(&self, rule: RuleId) -> u64 {
        self.counts.get(rule.0 as usize).copied().unwrap_or(0)
    }

    /// How often no rule has, but the absence of one, levels or a wall.
    pub fn denied_by_default(&self) -> u64 {
        self.denied_by_default
    }

    /// The rules that never have.
    pub fn unused(&self) -> impl Iterator<Item = RuleId> + '_ {
        (0..).zip(&self.counts).filter(|(_, count)| **count == 0).map(|(at, _)| RuleId(at))
    }
}

impl fmt::Display for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<10} {}", self.verdict.to_string(), self.request)?;
        match self.line {
            Some(line) => write!(f, "  ({}, line {line})", self.layer),
            None => write!(f, "  ({})", self.layer),
        }
    }
}
