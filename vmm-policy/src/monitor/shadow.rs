//! A policy that is looked at and not followed.

use std::sync::Arc;

use super::view::{Snapshot, View};
use super::{Monitor, MonitorError};
use crate::compile::Ruling;
use crate::model::{Decision, Layer, Request, RuleId, Verdict};
use crate::policy::Policy;
use crate::sync::{Ordering, lock};

/// What the policy in the shadow says otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ShadowDifference {
    /// What was decided.
    pub decided: Decision,
    /// What would have been.
    pub verdict: Verdict,
    /// By which layer.
    pub layer: Layer,
    /// By which rule of the policy in the shadow.
    pub rule: Option<RuleId>,
}

impl Monitor {
    /// Has each request looked at by `policy`, too, and the observer told where it says another thing. What is decided stays as it is. Limits
    /// and histories of the policy in the shadow are not counted. `None` ends it.
    ///
    /// # Errors
    /// As [`reload`](Self::reload).
    pub fn set_shadow(&self, policy: Option<&Policy>) -> Result<(), MonitorError> {
        let writer = lock(&self.shared.writer);
        let _wall = lock(&self.shared.wall);
        let before = self.shared.now.load_full();
        let view = |policy| self.view_of(policy, &before.main, writer.flags.iter().map(String::as_str));
        let shadow = policy.map(view).transpose()?.map(|(view, _)| view);
        self.shared.now.store(Arc::new(Snapshot {
            epoch: before.epoch,
            main: before.main.clone_view(),
            shadow,
        }));
        self.shared.shadow_count.store(0, Ordering::Relaxed);
        Ok(())
    }

    /// How many requests the policy in the shadow would have answered with another verdict.
    pub fn shadow_differences(&self) -> u64 {
        self.shared.shadow_count.load(Ordering::Relaxed)
    }

    pub(super) fn compare_shadow(&self, shadow: &View, request: &Request<'_>, decided: &Decision) {
        let resolved = shadow.resolve(request);
        let ruling = resolved.and_then(|resolved| {
            let (asker, peer) = shadow.classes(&resolved)?;
            Some(shadow.judge(&resolved, (asker.wall, peer.wall)))
        });
        let ruling = ruling.unwrap_or(Ruling::denied(Layer::Identity));
        let verdict = ruling.verdict(&shadow.policy.model);
        // What a limit or a history has refused would not have come to the rules.
        if verdict == decided.verdict || matches!(decided.layer, Layer::Quota | Layer::Wall) {
            return;
        }
        self.shared.shadow_count.fetch_add(1, Ordering::Relaxed);
        let difference =
            ShadowDifference { decided: *decided, verdict, layer: ruling.layer, rule: ruling.rule() };
        self.observe(|observer| observer.shadow_differs(request, &difference));
    }
}
