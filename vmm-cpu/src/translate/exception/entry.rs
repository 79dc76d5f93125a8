//! Delivery through the IVT of real mode and the IDT of legacy protected mode.

use super::{Event, Exception, Stack, dr6, vector};
use crate::translate::core::{Flow, Machine, Reason};
use crate::translate::cpu::{Activity, RSP};
use crate::translate::descriptor::{Gate, kind, rpl};
use crate::translate::flags::bits;
use crate::translate::segment::{SegmentRegister, attribute, index, low16};
use crate::translate::task::TaskSwitch;

/// What delivery needs to know of an event.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) vector: u8,
    pub(super) error: Option<u32>,
    /// RFLAGS as they are pushed.
    pub(super) flags: u64,
    /// Gates are judged by their DPL.
    pub(super) is_software: bool,
}

impl Entry {
    /// Error code of a fault that the vector's gate is to blame for.
    pub(super) fn gate_error(&self) -> u16 {
        u16::from(self.vector) << 3 | 2
    }
}

impl Machine<'_> {
    /// Delivers an event, or says in [`Reason`] why not; nothing but memory beyond the top of the stack has changed
    /// then. RIP is what the handler shall return to.
    pub(crate) fn deliver(&mut self, event: Event) -> Flow {
        if let Event::Exception(exception) = &event {
            self.note(exception);
        }
        let flags = self.flags();
        let flags = match event {
            Event::Exception(exception) if exception.sets_resume_flag() => flags | bits::RF,
            Event::Exception(_) | Event::External { .. } | Event::Nmi => flags,
            Event::Software { .. } | Event::Breakpoint | Event::Overflow | Event::Int1 => flags & !bits::RF,
        };
        let entry =
            Entry { vector: event.vector(), error: event.error(), flags, is_software: event.is_software() };
        let result = if !self.cpu.protected() {
            self.deliver_real(&entry)
        } else if self.cpu.long_mode() {
            self.deliver_long(&entry)
        } else if self.cpu.virtual_8086() && matches!(event, Event::Software { .. }) && self.cpu.iopl() < 3 {
            Err(self.gp(0))
        } else {
            self.deliver_protected(&entry, &event)
        };
        if result.is_err() {
            if !event.is_software() {
                self.mark_external();
            }
            return result;
        }
        self.cpu.shadow_sti = false;
        self.cpu.shadow_mov_ss = false;
        // Also the trap that follows HLT ends the halt.
        self.cpu.activity = Activity::Running;
        // TF is clear now, so what was about to be a single step is none.
        self.trap_pending = false;
        if event == Event::Int1 {
            // What MOV SS put off comes with the trap of INT1.
            self.cpu.dr6 |= u64::from(self.watch_hits) & dr6::BREAKPOINTS;
            self.watch_hits &= !0xf;
        }
        if event == Event::Nmi {
            self.cpu.nmi_masked = true;
        }
        self.update_mode();
        Ok(())
    }

    /// Sets EXT in the error code of the exception that ended a delivery.
    fn mark_external(&mut self) {
        if let Reason::Exception(Exception { vector, error: Some(error), .. }) = &mut self.reason
            && matches!(*vector, vector::TS | vector::NP | vector::SS | vector::GP)
        {
            *error |= 1;
        }
    }

    /// Intel SDM 3A 22.1.4.
    fn deliver_real(&mut self, entry: &Entry) -> Flow {
        let offset = u64::from(entry.vector) * 4;
        if offset + 3 > u64::from(self.cpu.idtr.limit) {
            return Err(self.gp(entry.gate_error()));
        }
        let pointer: u32 = self.load_system(self.system_address(self.cpu.idtr.base.wrapping_add(offset)))?;
        let mut stack = Stack::current(self, false);
        stack.push(self, 2, entry.flags)?;
        stack.push(self, 2, u64::from(self.cpu.cs().selector))?;
        stack.push(self, 2, self.cpu.rip)?;
        stack.enter(self);
        self.cpu.segment_mut(index::CS).load_real(low16(u64::from(pointer) >> 16));
        self.cpu.rip = u64::from(pointer) & 0xffff;
        self.cpu.flags.set_control(bits::IF | bits::TF | bits::AC | bits::RF, false);
        Ok(())
    }

    /// Intel SDM 3A 7.12.
    fn deliver_protected(&mut self, entry: &Entry, event: &Event) -> Flow {
        let offset = u64::from(entry.vector) * 8;
        if offset + 7 > u64::from(self.cpu.idtr.limit) {
            return Err(self.gp(entry.gate_error()));
        }
        let raw = self.load_system(self.system_address(self.cpu.idtr.base.wrapping_add(offset)))?;
        let gate = Gate::new(raw, 0);
        let is_known = matches!(
            gate.kind,
            kind::TASK_GATE
                | kind::INTERRUPT_GATE_16
                | kind::TRAP_GATE_16
                | kind::INTERRUPT_GATE
                | kind::TRAP_GATE
        );
        self.check_gate(&gate, is_known, entry)?;
        if gate.kind == kind::TASK_GATE {
            let how = TaskSwitch::Event { flags: entry.flags, error: entry.error };
            // An instruction that got as far as the other task is over: what fails there is the other task's.
            return if matches!(event, Event::Exception(_) | Event::External { .. } | Event::Nmi) {
                let task = self.switch_task(gate.selector, how)?;
                self.load_task(&task)
            } else {
                self.run_task(gate.selector, how)
            };
        }
        let cs = self.gate_code(gate.selector)?;
        if gate.target() > u64::from(cs.limit) {
            return Err(self.gp(0));
        }
        let cpl = rpl(cs.selector);
        let bytes = if gate.is_wide() { 4 } else { 2 };
        let goes_inward = cpl < self.mode.cpl;
        let mut stack = if goes_inward { self.inner_stack(cpl)? } else { Stack::current(self, false) };
        let was_virtual = self.cpu.virtual_8086();
        if was_virtual {
            for segment in [index::GS, index::FS, index::DS, index::ES] {
                stack.push(self, bytes, u64::from(self.cpu.segment(segment).selector))?;
            }
        }
        if goes_inward {
            stack.push(self, bytes, u64::from(self.cpu.segment(index::SS).selector))?;
            stack.push(self, bytes, self.cpu.r(RSP))?;
        }
        self.push_frame(&mut stack, bytes, entry)?;
        stack.enter(self);
        if was_virtual {
            for segment in [index::GS, index::FS, index::DS, index::ES] {
                *self.cpu.segment_mut(segment) = SegmentRegister::null_data(0);
            }
        }
        self.enter_handler(&gate, cs);
        Ok(())
    }

    /// Whether a gate may be used.
    pub(super) fn check_gate(&mut self, gate: &Gate, is_known: bool, entry: &Entry) -> Flow {
        if !is_known || entry.is_software && gate.dpl < self.mode.cpl {
            return Err(self.gp(entry.gate_error()));
        }
        if !gate.is_present {
            return Err(self.raise(Exception::with_error(vector::NP, entry.gate_error())));
        }
        Ok(())
    }

    /// Pushes RFLAGS, CS and RIP, and the error code if there is one.
    pub(super) fn push_frame(&mut self, stack: &mut Stack, bytes: u64, entry: &Entry) -> Flow {
        stack.push(self, bytes, entry.flags)?;
        stack.push(self, bytes, u64::from(self.cpu.cs().selector))?;
        stack.push(self, bytes, self.cpu.rip)?;
        if let Some(error) = entry.error {
            stack.push(self, bytes, u64::from(error))?;
        }
        Ok(())
    }

    /// Continues at the target of an interrupt or trap gate.
    pub(super) fn enter_handler(&mut self, gate: &Gate, cs: SegmentRegister) {
        *self.cpu.segment_mut(index::CS) = cs;
        self.cpu.rip = gate.target();
        let is_interrupt = matches!(gate.kind, kind::INTERRUPT_GATE_16 | kind::INTERRUPT_GATE);
        let masked = if is_interrupt { bits::IF } else { 0 };
        self.cpu.flags.set_control(bits::TF | bits::NT | bits::RF | bits::VM | masked, false);
    }

    /// What a gate's selector makes of CS, its RPL being the new privilege level: that of the segment, or the current
    /// one if the segment is conforming. Call gates have the same rules.
    pub(crate) fn gate_code(&mut self, selector: u16) -> Flow<SegmentRegister> {
        let mut code = self.descriptor(selector, vector::GP)?;
        let cpl = if code.is_conforming() { self.mode.cpl } else { code.dpl() };
        let must_be_64 = self.cpu.long_mode();
        let wrong_size =
            must_be_64 && code.register.attributes & (attribute::LONG | attribute::BIG) != attribute::LONG;
        let from_virtual = self.cpu.virtual_8086() && cpl != 0;
        if !code.is_code() || code.dpl() > self.mode.cpl || wrong_size || from_virtual {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !code.is_present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        self.mark_accessed(&mut code)?;
        Ok(code.register.with_rpl(cpl))
    }
}
