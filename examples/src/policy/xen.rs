//! Which domains a paravirtual guest may offer event channels and grants to.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use vmm_cpu::xen_pv::{EventSink, Gate};
use vmm_policy::{Action, Monitor, Object, Request, SubjectId};

use super::gate::Enforcement;

/// Domain 0: the monitor's own back ends, which the guest needs to run at all.
const BACKENDS: u16 = 0;

/// A gate for [`XenPvHypervisor`](vmm_cpu::xen_pv) whose answers are the policy's. The backend asks one question for both, so a domain is within
/// reach if the policy allows both: that the guest connects event channels of it, and that it maps pages which the guest grants.
pub struct XenGate {
    monitor: Monitor,
    guest: SubjectId,
    domains: BTreeMap<u16, SubjectId>,
}

impl fmt::Debug for XenGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("XenGate")
            .field("guest", &self.guest)
            .field("domains", &self.domains)
            .finish_non_exhaustive()
    }
}

impl XenGate {
    /// For that guest, to which others are the domains of those numbers.
    #[must_use]
    pub fn new(
        enforcement: &Enforcement,
        guest: SubjectId,
        domains: impl IntoIterator<Item = (u16, SubjectId)>,
    ) -> Self {
        Self { monitor: enforcement.monitor().clone(), guest, domains: domains.into_iter().collect() }
    }
}

impl Gate for XenGate {
    fn may_reach(&self, domid: u16) -> bool {
        if domid == BACKENDS {
            return true;
        }
        let Some(&other) = self.domains.get(&domid) else { return false };
        let asks = |asker, peer, action, object| {
            self.monitor.authorize(&Request::new(asker, action, object).of(peer)).permits()
        };
        // A guest offers a port before it has a number to the other side, so the rule is about all of them.
        asks(self.guest, other, Action::Connect, Object::event_channel(0))
            && asks(other, self.guest, Action::MapRw, Object::grant())
    }

    fn bind(&self, _: u16, _: u32) -> Option<Arc<dyn EventSink>> {
        // There is no domain of another process yet.
        None
    }
}
