//! Where QEMU is known not to do what the manuals say, or to be another processor.
//!
//! Each difference is settled as narrowly as it can be told: in the words that it is about, where ours has what the manual
//! says and QEMU's what it is known to have instead. Anything else about the same scenario is still compared.

mod branches;
mod debug;
mod delivery;
mod descriptors;
mod paging;
mod returns;
mod settle;
mod system;

use crate::topics::Scenario;

/// A reviewed difference.
#[derive(Clone, Copy)]
pub struct Known {
    pub name: &'static str,
    /// Why `translate` is right.
    pub reason: &'static str,
    /// Makes QEMU's side equal to ours in what the difference is about, where the scenario has it.
    pub settle: fn(&Scenario, ours: &[u8], theirs: &mut [u8]),
}

/// All of them. Those that settle which exception it was come before those about what all exceptions push.
pub fn known() -> impl Iterator<Item = &'static Known> {
    [
        paging::KNOWN,
        descriptors::KNOWN,
        branches::KNOWN,
        returns::KNOWN,
        delivery::KNOWN,
        system::KNOWN,
        debug::KNOWN,
    ]
    .into_iter()
    .flatten()
}
