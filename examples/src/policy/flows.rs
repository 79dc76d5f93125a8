//! The policy for what goes from port to port of a switch.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use vmm_devices::net::switch::FlowPort;
use vmm_devices::net::switch::flows::{FlowPolicy, FlowVerdict, NewFlow};
use vmm_devices::virtio::rate::Rate;
use vmm_policy::{Request, Verdict};

use super::gate::PolicyGate;
use super::words;

/// For the flow table of a switch ([`FlowTable`](vmm_devices::net::switch::flows::FlowTable)). Ports are whose the grants are by which they are
/// there: what a frame says of its sender is not asked.
///
/// A flow that is throttled gets a second's worth of bytes at once, and then so many a second, together with the others of the same
/// two under the same rule. Flows are requests that are over when they are decided: limits on how many are open do not count them.
/// What is refused is not kept, so an [`Observer`](vmm_policy::Observer) hears of each frame that would begin what may not be, as fast as a guest sends.
#[derive(Clone)]
pub struct PolicyFlows {
    gate: Arc<PolicyGate>,
}

impl fmt::Debug for PolicyFlows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PolicyFlows").field("monitor", &self.gate.monitor).finish_non_exhaustive()
    }
}

impl PolicyFlows {
    pub(super) fn new(gate: Arc<PolicyGate>) -> Self {
        Self { gate }
    }
}

impl FlowPolicy for PolicyFlows {
    fn epoch(&self) -> u64 {
        self.gate.epoch()
    }

    fn decide(&self, flow: &NewFlow<'_>) -> FlowVerdict {
        let subjects = (self.gate.holder(flow.from.grant), self.gate.holder(flow.to.grant));
        let ((Some(asker), Some(peer)), Some((action, object))) = (subjects, words::flow(flow.kind)) else {
            return FlowVerdict::Drop;
        };
        let request = Request::new(asker, action, object).of(peer);
        let monitor = &self.gate.monitor;
        // What goes on has been counted when it began.
        let decision = if flow.again { monitor.check(&request) } else { monitor.authorize(&request) };
        match decision.verdict {
            Verdict::Allow => FlowVerdict::Pass,
            Verdict::Throttle(limit) => {
                let per_second = (limit.bytes / u64::from(limit.seconds.max(1))).max(1);
                let rule = decision.rule.map_or(u32::MAX, vmm_policy::RuleId::get);
                Rate::new(per_second, per_second)
                    .map_or(FlowVerdict::Drop, |rate| FlowVerdict::Limited { rate, rule })
            }
            _ => FlowVerdict::Drop,
        }
    }

    fn owns(&self, port: &FlowPort, address: IpAddr) -> bool {
        self.gate.holder(port.grant).is_some_and(|holder| self.gate.owns(holder, address))
    }
}
