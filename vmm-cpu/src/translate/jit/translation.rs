//! A translation, and what in the vCPU's frame leads to it.

use super::access::Access;
use super::builder::Mode;
use crate::translate::memory::frame::{BRANCHES, Branch, Frame, Gate};

#[derive(Debug)]
pub(super) struct Translation {
    pub(super) rip: u64,
    pub(super) mode: Mode,
    /// Its block in the interpreter's cache.
    pub(super) block: u32,
    pub(super) page: u32,
    /// The page in which it ends, if that is another one.
    pub(super) second: Option<u32>,
    /// Offset in code memory.
    pub(super) start: usize,
    /// Its accesses through the window, by where they begin.
    pub(super) accesses: Box<[Access]>,
    /// Where it is entered.
    pub(super) open: Gate,
    /// Where jumps of the same page lead.
    pub(super) near: Gate,
    /// Where its gate leads while it must not be entered.
    pub(super) shut: Gate,
    /// Sites whose jumps lead here. Some may be those of translations that are dropped.
    pub(super) incoming: Vec<u32>,
    pub(super) dropped: bool,
}

impl Translation {
    pub(super) fn open(&self, number: u32, frame: &mut Frame) {
        set_gate(number, self.open, frame);
    }

    pub(super) fn shut(&self, number: u32, frame: &mut Frame) {
        set_gate(number, self.shut, frame);
        if let Some(branch) = branch(frame, self.mode, self.rip)
            && branch.rip == self.rip
        {
            *branch = Branch::nothing(branch_index(self.rip));
        }
    }

    /// Nothing leads to it any more.
    pub(super) fn drop(&mut self, number: u32, frame: &mut Frame) {
        self.shut(number, frame);
        set_gate(number, Gate::NOWHERE, frame);
        (self.dropped, self.accesses) = (true, Box::default());
    }

    /// Lets indirect branches find it.
    pub(super) fn remember(&self, frame: &mut Frame) {
        if let Some(branch) = branch(frame, self.mode, self.rip) {
            *branch = Branch { rip: self.rip, code: self.open.saved };
        }
    }
}

fn set_gate(number: u32, to: Gate, frame: &mut Frame) {
    if let Some(gate) = frame.gates.get_mut(number as usize) {
        *gate = to;
    }
}

/// Where the translation that the table of branch targets has for `rip` is entered.
pub(super) fn branch_target(rip: u64, mode: Mode, frame: &Frame) -> Option<u64> {
    let branch = frame.branches.get(mode.branch_table())?.get(branch_index(rip))?;
    (branch.rip == rip).then_some(branch.code)
}

/// The entry of the table of branch targets that `rip` uses.
fn branch(frame: &mut Frame, mode: Mode, rip: u64) -> Option<&mut Branch> {
    frame.branches.get_mut(mode.branch_table())?.get_mut(branch_index(rip))
}

fn branch_index(rip: u64) -> usize {
    usize::try_from(rip % BRANCHES as u64).unwrap_or(0)
}
