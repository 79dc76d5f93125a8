//! Delivery in long mode (Intel SDM 3A 7.14): 64-bit handlers, aligned stacks, the interrupt stack table.

use super::Stack;
use super::entry::Entry;
use crate::translate::core::{Flow, Machine};
use crate::translate::cpu::RSP;
use crate::translate::descriptor::{Gate, kind, rpl};
use crate::translate::segment::index;

impl Machine<'_> {
    pub(super) fn deliver_long(&mut self, entry: &Entry) -> Flow {
        let offset = u64::from(entry.vector) * 16;
        if offset + 15 > u64::from(self.cpu.idtr.limit) {
            return Err(self.gp(entry.gate_error()));
        }
        let address = self.cpu.idtr.base.wrapping_add(offset);
        let low = self.load_system(address)?;
        let high = self.load_system(address.wrapping_add(8))?;
        let gate = Gate::new(low, high);
        let is_known = matches!(gate.kind, kind::INTERRUPT_GATE | kind::TRAP_GATE);
        self.check_gate(&gate, is_known, entry)?;
        let cs = self.gate_code(gate.selector)?;
        if !self.is_canonical(gate.target()) {
            return Err(self.gp(0));
        }
        let cpl = rpl(cs.selector);
        let goes_inward = cpl < self.mode.cpl;
        let stack = match (gate.ist, goes_inward) {
            (0, false) => Stack::current(self, true),
            (0, true) => self.inner_stack(cpl)?,
            (ist, true) => Stack::null(self.interrupt_stack(ist)?, cpl),
            (ist, false) => Stack::current(self, true).at(self.interrupt_stack(ist)?),
        };
        let mut stack = stack.aligned();
        stack.push(self, 8, u64::from(self.cpu.segment(index::SS).selector))?;
        // 32-bit code has no more of it, whatever 64-bit code left in the rest.
        let pointer = if self.is_64() { self.cpu.r(RSP) } else { self.cpu.r(RSP) & 0xffff_ffff };
        stack.push(self, 8, pointer)?;
        self.push_frame(&mut stack, 8, entry)?;
        stack.enter(self);
        self.enter_handler(&gate, cs);
        Ok(())
    }
}
