//! Without `kvm` no other engine runs programs. See `native/mod.rs`.

use std::ops::ControlFlow;

use super::core::Machine;
use crate::error::Result;
use crate::vcpu::Halt;

/// There are none elsewhere.
#[derive(Debug, Default)]
pub(crate) struct Elsewhere;

impl Elsewhere {
    #[allow(clippy::unused_self, clippy::unnecessary_wraps, reason = "as with the feature")]
    pub(crate) fn run(&mut self, _: &mut Machine<'_>) -> Result<ControlFlow<Option<Halt>>> {
        Ok(ControlFlow::Continue(()))
    }

    #[allow(clippy::unused_self, reason = "as with the feature")]
    pub(crate) fn counts(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }
}

impl Machine<'_> {
    /// Never, since nobody is asked.
    pub(crate) fn runs_program(&self) -> bool {
        false
    }
}
