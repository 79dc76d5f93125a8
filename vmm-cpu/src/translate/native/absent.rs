//! Without `kvm` no other engine runs programs. See `native/mod.rs`.

use std::ops::ControlFlow;

use super::core::Machine;
use crate::error::Result;
use crate::vcpu::Halt;

/// There are none elsewhere.
#[derive(Debug, Default)]
pub(crate) struct Elsewhere(());

impl Elsewhere {
    #[allow(clippy::unused_self, clippy::unnecessary_wraps, reason = "as with the feature")]
    pub(crate) fn run(&mut self, _: &mut Machine<'_>, _: bool) -> Result<ControlFlow<Option<Halt>>> {
        Ok(ControlFlow::Continue(()))
    }

    #[allow(clippy::unused_self, reason = "as with the feature")]
    pub(crate) fn goes_on(&mut self, _: &Machine<'_>) {}

    #[allow(clippy::unused_self, reason = "as with the feature")]
    pub(crate) fn has_it(&mut self, _: &mut Machine<'_>) -> bool {
        false
    }

    #[allow(clippy::unused_self, reason = "as with the feature")]
    pub(crate) fn counts(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

impl Machine<'_> {
    /// Nobody is asked.
    pub(crate) fn runs_program(&self) -> bool {
        false
    }
}
