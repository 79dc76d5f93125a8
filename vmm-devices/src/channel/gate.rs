//! Who decides.

use std::borrow::Cow;
use std::sync::Arc;

use super::grant::GrantId;
use super::request::Request;

/// Decides which channels open. A closure of the request will do:
///
/// ```
/// use vmm_devices::channel::{Gatekeeper, Refusal, Request};
///
/// let gatekeeper = Gatekeeper::new(|_: &Request| Err(Refusal::new("closed for today")));
/// ```
///
/// It is called from any thread, vCPU threads and those that serve devices among them, with no lock of a device's or the
/// gatekeeper's held, so that it may call [`Gatekeeper`](super::Gatekeeper) and does not stall what is open. What it takes to
/// decide, the guest waits.
pub trait Gate: Send + Sync {
    /// Whether the channel may be, or go on being, as `id`. It is asked before a channel opens, and again at
    /// [`Gatekeeper::reconsider`](super::Gatekeeper::reconsider).
    ///
    /// # Errors
    /// If it may not.
    fn decide(&self, id: GrantId, request: &Request) -> Result<(), Refusal>;

    /// There is no such channel (any more), whether it has been refused, revoked or given up. Called once for each that
    /// [`decide`](Self::decide) was asked about.
    fn closed(&self, id: GrantId, request: &Request) {
        let _ = (id, request);
    }
}

/// Why a channel does not open. The guest learns that it is refused, the monitor why.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("refused: {reason}")]
pub struct Refusal {
    reason: Cow<'static, str>,
}

impl Refusal {
    /// For people to read: the rule, and where it stands.
    pub fn new(reason: impl Into<Cow<'static, str>>) -> Self {
        Self { reason: reason.into() }
    }

    /// Why.
    pub fn reason(&self) -> &str {
        &self.reason
    }
}

/// Refuses everything: what there is where nobody has said what may be.
#[derive(Clone, Copy, Debug, Default)]
pub struct DenyAll;

impl Gate for DenyAll {
    fn decide(&self, _: GrantId, _: &Request) -> Result<(), Refusal> {
        Err(Refusal::new("no policy allows it"))
    }
}

/// Refuses nothing: for a monitor of one virtual machine whose operator has named each channel, and for tests.
#[derive(Clone, Copy, Debug, Default)]
pub struct AllowAll;

impl Gate for AllowAll {
    fn decide(&self, _: GrantId, _: &Request) -> Result<(), Refusal> {
        Ok(())
    }
}

impl<F: Fn(&Request) -> Result<(), Refusal> + Send + Sync> Gate for F {
    fn decide(&self, _: GrantId, request: &Request) -> Result<(), Refusal> {
        self(request)
    }
}

impl<G: Gate + ?Sized> Gate for Arc<G> {
    fn decide(&self, id: GrantId, request: &Request) -> Result<(), Refusal> {
        (**self).decide(id, request)
    }

    fn closed(&self, id: GrantId, request: &Request) {
        (**self).closed(id, request);
    }
}
