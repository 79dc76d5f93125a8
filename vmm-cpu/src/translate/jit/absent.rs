//! In place of the translator on hosts for which there is none: everything is interpreted.

use super::block::BlockCache;
use super::core::{Flow, Machine};
use super::memory::Tlb;
use super::vm::Shared;

/// What came of an attempt to run translated code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ran {
    /// There is none; the interpreter goes on.
    Nothing,
    /// Some ran. The loop has to look around.
    #[allow(dead_code, reason = "that is what the translator says")]
    Something,
}

/// What lasts as long as the vCPU runs: nothing.
#[derive(Debug)]
pub(crate) struct Prepared;

/// Translated code of one vCPU, of which there is none.
#[derive(Debug)]
pub(crate) enum Tier1 {}

impl Tier1 {
    pub(crate) fn new(_: &Shared) -> Option<Self> {
        None
    }

    pub(crate) fn prepare(&mut self, _: &mut Machine<'_>) -> Prepared {
        Prepared
    }

    pub(crate) fn run(&mut self, _: &mut Machine<'_>, _: &mut BlockCache) -> Flow<Ran> {
        match *self {}
    }

    /// Figures by name.
    pub(crate) fn counts(&self, _: &Tlb) -> Vec<(&'static str, u64)> {
        match *self {}
    }
}
