//! Another policy, while guests run.

use std::sync::Arc;

use super::subjects::class_key;
use super::view::{Environment, Seat, Snapshot, Subject, View};
use super::{Monitor, MonitorError};
use crate::analysis::Change;
use crate::compile::environment_bits;
use crate::grant::{OpenChannel, Revocation};
use crate::model::{Decision, SubjectId};
use crate::policy::Policy;
use crate::sync::lock;

/// What putting a policy in force has done.
#[derive(Debug)]
#[non_exhaustive]
pub struct Reloaded {
    /// How often the policy has been changed.
    pub epoch: u64,
    /// The channels that lost their right.
    pub revoked: Vec<Revocation>,
    /// Labels that subjects had, and that the policy does not know.
    pub forgotten: Vec<(SubjectId, String)>,
}

/// What putting a policy in force would do.
#[derive(Debug)]
#[non_exhaustive]
pub struct DryRun {
    /// The channels that would lose their right, and what would be said to them.
    pub closes: Vec<(OpenChannel, Decision)>,
    /// What would be answered differently between those that either policy declares.
    pub changes: Vec<Change>,
}

impl Monitor {
    /// Puts `policy` in force. Whatever is decided from then on is decided by it, and when this returns each open channel that it does not
    /// allow is closed: stopped, out of the guest's reach, drained and closed, in that order. Limits that say the same go on counting.
    ///
    /// # Errors
    /// If those who are registered make true what the policy says is never to be, or stand on two sides of a wall of its. The policy
    /// before stays in force.
    pub fn reload(&self, policy: Policy) -> Result<Reloaded, MonitorError> {
        let (epoch, forgotten) = {
            let writer = lock(&self.shared.writer);
            // Histories are read and written under the policy that counts them.
            let _wall = lock(&self.shared.wall);
            let before = self.shared.now.load_full();
            let (main, forgotten) =
                self.view_of(&policy, &before.main, writer.flags.iter().map(String::as_str))?;
            let epoch = before.epoch + 1;
            let shadow = before.shadow.as_ref().map(View::clone_view);
            self.shared.now.store(Arc::new(Snapshot { epoch, main, shadow }));
            (epoch, forgotten)
        };
        self.observe(|observer| observer.reloaded(epoch, &policy));
        Ok(Reloaded { epoch, revoked: self.reconsider(), forgotten })
    }

    /// What [`reload`](Self::reload) would do, with nothing done.
    ///
    /// # Errors
    /// As `reload`, or if the comparison would take too many steps.
    pub fn dry_run(&self, policy: &Policy) -> Result<DryRun, MonitorError> {
        let now = self.shared.now.load_full();
        let flags: Vec<String> = lock(&self.shared.writer).flags.iter().cloned().collect();
        let (main, _) = self.view_of(policy, &now.main, flags.iter().map(String::as_str))?;
        let after = Arc::new(Snapshot { epoch: now.epoch + 1, main, shadow: None });
        let mut closes = Vec::new();
        for right in self.shared.registry.all().iter().filter(|right| right.is_live()) {
            let Some(request) = right.request.get() else { continue };
            let decision = self.decide(&after, &request, super::authorize::Mode::Look, None);
            if !right.honours.accepts(decision.verdict) {
                closes.push((OpenChannel::new(right), decision));
            }
        }
        Ok(DryRun { closes, changes: now.main.policy.diff(policy)? })
    }

    /// What `policy` makes of those who are there.
    pub(super) fn view_of<'a>(
        &self,
        policy: &Policy,
        before: &View,
        flags: impl IntoIterator<Item = &'a str>,
    ) -> Result<(View, Vec<(SubjectId, String)>), MonitorError> {
        let conditions = &policy.model.conditions;
        let bits = environment_bits(conditions, self.shared.clock.wall(), flags);
        let mut view = View {
            policy: policy.clone(),
            table: Arc::clone(&policy.table),
            seats: before.seats.iter().map(|_| None).collect(),
            environment: Environment::new(policy, bits),
        };
        if let Some(first) = view.seats.first_mut() {
            *first = Some(Seat::nobody(policy));
        }
        let mut forgotten = Vec::new();
        let mut known = Vec::new();
        for seat in before.subjects() {
            let subject = seat.subject();
            let (kept, lost): (Vec<String>, Vec<String>) = subject
                .labels
                .iter()
                .flatten()
                .cloned()
                .partition(|label| policy.model.label_index.contains_key(label.as_str()));
            forgotten.extend(lost.into_iter().map(|label| (subject.id, label)));
            let trimmed = Subject {
                id: subject.id,
                principal: subject.principal.clone(),
                incarnation: subject.incarnation,
                labels: subject.labels.as_ref().map(|_| kept),
                digest: subject.digest.clone(),
                state: crate::sync::Mutex::new(*lock(&subject.state)),
            };
            known.push((Arc::clone(subject), class_key(policy, &trimmed)?));
        }
        let keys: Vec<_> = known.iter().map(|(_, key)| key.clone()).collect();
        view.table = policy.table_for(&keys)?;
        for (subject, key) in &known {
            let seat = self.seat(&view, key, subject, &before.meters_of(subject.id))?;
            if let Some(slot) = view.seats.get_mut(subject.id.slot as usize) {
                *slot = Some(seat);
            }
        }
        Ok((view, forgotten))
    }

    /// Sets or clears a flag that conditions ask for, and takes back what depends on it.
    ///
    /// # Errors
    /// If no condition of the policy in force asks for it.
    pub fn set_flag(&self, name: &str, set: bool) -> Result<Vec<Revocation>, MonitorError> {
        {
            let mut writer = lock(&self.shared.writer);
            let now = self.shared.now.load();
            if set && now.main.policy.model.conditions.flag(name).is_none() {
                return Err(MonitorError::NoFlag(name.to_owned()));
            }
            if set {
                writer.flags.insert(name.to_owned());
            } else {
                writer.flags.remove(name);
            }
            self.refresh(&now, &writer.flags);
        }
        Ok(self.reconsider())
    }

    /// Looks at the clock, and takes back what depends on another time of day. Conditions are about the time of the last call; it is for a
    /// timer, which need not come before [`next_tick`](Self::next_tick).
    pub fn tick(&self) -> Vec<Revocation> {
        let changed = {
            let writer = lock(&self.shared.writer);
            let now = self.shared.now.load();
            self.refresh(&now, &writer.flags)
        };
        if changed { self.reconsider() } else { Vec::new() }
    }

    /// In how many seconds a span of time that the policy names begins or ends; `None` if it names none.
    pub fn next_tick(&self) -> Option<u64> {
        let now = self.shared.now.load();
        now.main.policy.model.conditions.next_change(self.shared.clock.wall())
    }

    fn refresh(&self, now: &Snapshot, flags: &std::collections::BTreeSet<String>) -> bool {
        let seconds = self.shared.clock.wall();
        let mut changed = false;
        for view in std::iter::once(&now.main).chain(&now.shadow) {
            let bits =
                environment_bits(&view.policy.model.conditions, seconds, flags.iter().map(String::as_str));
            changed |= view.environment.set(&view.policy, bits);
        }
        changed
    }
}
