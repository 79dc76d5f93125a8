//! Who a domain may talk to.

use std::fmt;
use std::sync::Arc;

use super::abi::domid;

/// Decides on every request of a guest that names another domain. Called on the thread of the virtual processor
/// that asks, with no lock held.
pub trait Gate: fmt::Debug + Send + Sync {
    /// Whether the guest may offer event channels and grants to `domid`, which then may take them or not.
    fn may_reach(&self, domid: u16) -> bool;

    /// The other end of a port that `domid` offers; `None` refuses.
    fn bind(&self, domid: u16, port: u32) -> Option<Arc<dyn EventSink>> {
        let _ = (domid, port);
        None
    }
}

/// The other end of an event channel.
pub trait EventSink: fmt::Debug + Send + Sync {
    /// The guest sent an event. Called on the thread of the virtual processor that sent it, with no lock held;
    /// events may be merged.
    fn notify(&self);
}

/// Only the virtual machine monitor's own back ends, which stand for domain 0.
#[derive(Clone, Copy, Debug, Default)]
pub struct BackendsOnly;

impl Gate for BackendsOnly {
    fn may_reach(&self, domid: u16) -> bool {
        domid == domid::BACKEND
    }
}
