//! Delivery of interrupts and exceptions, and the way back.

use vmm_cpu::Halt;
use vmm_cpu::state::rflags;

use super::{DOUBLE_FAULT, Fault, GENERAL_PROTECTION, GP, Interpreter, Stop};

impl Interpreter<'_> {
    pub(super) fn software_interrupt(&mut self, vector: u8) -> Result<(), Fault> {
        self.through_gate(vector, None)
    }

    /// Delivers an interrupt or exception; one that cannot be delivered ends in a shutdown.
    pub(in super::super) fn deliver(&mut self, vector: u8, error_code: Option<u32>) -> Result<(), Stop> {
        let attempts = [(vector, error_code), (GENERAL_PROTECTION, Some(0)), (DOUBLE_FAULT, Some(0))];
        for (vector, error_code) in attempts {
            match self.through_gate(vector, error_code) {
                Ok(()) => return Ok(()),
                Err(Fault::Exception(..)) => {}
                Err(Fault::Halt(halt)) => return Err(Stop::Halt(halt)),
                Err(Fault::Unhandled(reason)) => return Err(Stop::Unhandled { reason, bytes: Vec::new() }),
            }
        }
        Err(Stop::Halt(Halt::Shutdown))
    }

    /// Enters a handler at the same privilege level (Intel SDM 3A 7.14).
    pub(super) fn through_gate(&mut self, vector: u8, error_code: Option<u32>) -> Result<(), Fault> {
        let (idtr, cs, ss) = {
            let system = &self.cpu.state.system;
            (system.idtr, system.cs, system.ss)
        };
        if cs.dpl != 0 {
            return Err(Fault::Unhandled(
                "the toy backend delivers interrupts at privilege level 0 only".to_owned(),
            ));
        }
        let offset = u64::from(vector) * 16;
        if offset + 15 > u64::from(idtr.limit) {
            return Err(GP);
        }
        let mut gate = [0; 16];
        self.load(idtr.base.wrapping_add(offset), &mut gate[..8])?;
        self.load(idtr.base.wrapping_add(offset + 8), &mut gate[8..])?;
        let gate = u128::from_le_bytes(gate);
        let (kind, present) = (gate >> 40 & 0xf, gate >> 47 & 1 != 0);
        if !present || !matches!(kind, 0xe | 0xf) {
            return Err(GP);
        }
        // The three parts of the offset in a 64-bit gate.
        let handler = (gate & 0xffff | gate >> 32 & 0xffff_ffff_ffff_0000) as u64;
        let old = self.cpu.state.general;
        self.cpu.state.general.rsp &= !0xf;
        for value in [ss.selector.into(), old.rsp, old.rflags, cs.selector.into(), old.rip] {
            self.push(value)?;
        }
        if let Some(error_code) = error_code {
            self.push(error_code.into())?;
        }
        let cleared = if kind == 0xe { rflags::IF | rflags::TF } else { rflags::TF };
        self.cpu.state.general.rflags &= !cleared;
        self.cpu.state.general.rip = handler;
        Ok(())
    }

    pub(super) fn interrupt_return(&mut self) -> Result<(), Fault> {
        let [rip, _cs, flags, rsp, _ss] = [self.pop()?, self.pop()?, self.pop()?, self.pop()?, self.pop()?];
        self.jump(rip)?;
        self.cpu.state.general.rsp = rsp;
        self.cpu.state.general.rflags = flags | rflags::FIXED;
        self.cpu.state.events.nmi.masked = false;
        Ok(())
    }

    pub(super) fn push(&mut self, value: u64) -> Result<(), Fault> {
        let rsp = self.cpu.state.general.rsp.wrapping_sub(8);
        self.store(rsp, &value.to_le_bytes())?;
        self.cpu.state.general.rsp = rsp;
        Ok(())
    }

    pub(super) fn pop(&mut self) -> Result<u64, Fault> {
        let mut value = [0; 8];
        let rsp = self.cpu.state.general.rsp;
        self.load(rsp, &mut value)?;
        self.cpu.state.general.rsp = rsp.wrapping_add(8);
        Ok(u64::from_le_bytes(value))
    }
}
