//! What follows from requests that were none.

use rustc_hash::FxHashMap;

use crate::model::SubjectId;
use crate::monitor::Monitor;
use crate::sync::{Mutex, lock};
use crate::syntax::{Escalation, Step};

/// What a subject has done in the span of time that began last.
#[derive(Debug, Default)]
struct Record {
    /// Nanoseconds of the monitor's clock.
    since: u64,
    violations: u32,
    before: u32,
    step: Option<Step>,
}

/// Counts violations of each subject, and says what the policy's `escalate` wants to be done. Counts are of the last span of time, by
/// two that follow each other; a step that has been taken stays until [`forgive`](Self::forgive).
#[derive(Debug)]
pub struct Standing {
    monitor: Monitor,
    records: Mutex<FxHashMap<SubjectId, Record>>,
}

impl Standing {
    /// Of nobody yet.
    pub fn new(monitor: &Monitor) -> Self {
        Self { monitor: monitor.clone(), records: Mutex::default() }
    }

    /// Counts a violation. The step that is to be taken now, if it is a new one.
    pub fn violation(&self, subject: SubjectId) -> Option<Step> {
        let escalation = self.monitor.escalation(subject)?;
        let now = self.monitor.monotonic();
        let mut records = lock(&self.records);
        // Those who are gone make room: there are never more than twice as many as are there.
        let there = self.monitor.subject_count();
        if records.len() > 2 * there + 16 {
            records.retain(|id, _| self.monitor.is_registered(*id));
        }
        let record = records.entry(subject).or_default();
        record.pass(now, &escalation);
        record.violations = record.violations.saturating_add(1);
        let count = record.count(now, &escalation);
        let due = escalation
            .steps
            .iter()
            .rev()
            .find(|(_, after)| count >= u64::from(*after))
            .map(|(step, _)| *step)?;
        if record.step.is_some_and(|step| step >= due) {
            return None;
        }
        record.step = Some(due);
        Some(due)
    }

    /// The hardest step that has been taken.
    pub fn step(&self, subject: SubjectId) -> Option<Step> {
        lock(&self.records).get(&subject).and_then(|record| record.step)
    }

    /// Begins anew, once somebody has looked.
    pub fn forgive(&self, subject: SubjectId) {
        lock(&self.records).remove(&subject);
    }
}

impl Record {
    fn pass(&mut self, now: u64, escalation: &Escalation) {
        let span = u64::from(escalation.seconds) * 1_000_000_000;
        let gone = now.saturating_sub(self.since);
        if self.violations == 0 && self.before == 0 {
            self.since = now;
        } else if gone >= 2 * span {
            (self.since, self.before, self.violations) = (now, 0, 0);
        } else if gone >= span {
            (self.since, self.before, self.violations) = (self.since + span, self.violations, 0);
        }
    }

    /// Those of this span, and of the one before as much as is not gone.
    fn count(&self, now: u64, escalation: &Escalation) -> u64 {
        let span = u64::from(escalation.seconds) * 1_000_000_000;
        let left = span.saturating_sub(now.saturating_sub(self.since));
        let of_before = u128::from(self.before) * u128::from(left) / u128::from(span.max(1));
        u64::from(self.violations) + u64::try_from(of_before).unwrap_or(u64::MAX)
    }
}
