//! Far RET and IRET, to the same and to outer privilege levels, to virtual-8086 mode, to a calling task (Intel SDM 2A
//! "IRET", 2B "RET").

use iced_x86::{Code, Instruction};

use crate::translate::core::{Flow, Machine};
use crate::translate::cpu::RSP;
use crate::translate::descriptor::{is_null, rpl};
use crate::translate::exception::{is_64_bit, vector};
use crate::translate::flags::bits;
use crate::translate::memory::HostWord;
use crate::translate::ops::op::{Handler, Op};
use crate::translate::segment::{SegmentRegister, index, low16};
use crate::translate::task::TaskSwitch;

fn far_return<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    let extra = if instruction.op_count() == 1 { u64::from(instruction.immediate16()) } else { 0 };
    let bytes = W::BYTES as u64;
    // In this order, as AMD's processors do: where both are absent, the fault is that of the selector.
    let selector = low16(m.peek::<W>(bytes)?);
    let rip = m.peek::<W>(0)?;
    if !m.cpu.protected() || m.cpu.virtual_8086() {
        let mut cs = *m.cpu.cs();
        cs.load_real(selector);
        m.check_target(&cs, rip)?;
        m.drop_stack(2 * bytes + extra);
        m.set_code(cs, rip);
        return Ok(());
    }
    if rpl(selector) != m.mode.cpl {
        // The outer stack, before it is known whether there is a way to it.
        m.peek::<W>(3 * bytes + extra)?;
    }
    let cs = m.returned_code(selector, rip)?;
    let cpl = rpl(selector);
    if cpl > m.mode.cpl {
        let rsp = m.peek::<W>(2 * bytes + extra)?;
        let ss = low16(m.peek::<W>(3 * bytes + extra)?);
        let ss = m.returned_stack(ss, &cs)?;
        let is_64 = m.is_64_in_mode(&cs);
        m.set_stack(ss, rsp.wrapping_add(extra), is_64);
        m.drop_inner_segments(cpl);
    } else {
        m.drop_stack(2 * bytes + extra);
    }
    m.set_code(cs, rip);
    Ok(())
}

fn interrupt_return<W: HostWord>(m: &mut Machine<'_>, _: &Op) -> Flow {
    if !m.cpu.protected() || m.cpu.virtual_8086() {
        m.require_virtual_iopl()?;
        m.interrupt_return_real::<W>()?;
    } else if !m.cpu.flags.control(bits::NT) {
        m.interrupt_return_protected::<W>()?;
    } else if m.cpu.long_mode() {
        return Err(m.gp(0));
    } else {
        let link = m.previous_task()?;
        m.run_task(link, TaskSwitch::Return)?;
    }
    m.serialize();
    m.cpu.nmi_masked = false;
    m.keeps_rf = true;
    m.rf_loaded_at = Some(m.instructions + m.position as u64 + 1);
    Ok(())
}

impl Machine<'_> {
    fn is_64_in_mode(&self, cs: &SegmentRegister) -> bool {
        self.cpu.long_mode() && is_64_bit(cs)
    }

    /// CS of a far return, its RPL being the new privilege level.
    fn returned_code(&mut self, selector: u16, rip: u64) -> Flow<SegmentRegister> {
        let mut code = self.descriptor(selector, vector::GP)?;
        self.require_code(&code)?;
        let level = rpl(selector);
        let fits = if code.is_conforming() { code.dpl() <= level } else { code.dpl() == level };
        if level < self.mode.cpl || !fits {
            return Err(self.selector_fault(vector::GP, selector));
        }
        if !code.is_present() {
            return Err(self.selector_fault(vector::NP, selector));
        }
        self.check_target(&code.register, rip)?;
        self.mark_accessed(&mut code)?;
        Ok(code.register)
    }

    /// SS of a far return to `cs`. 64-bit code that is not at level 3 may have none.
    fn returned_stack(&mut self, selector: u16, cs: &SegmentRegister) -> Flow<SegmentRegister> {
        let cpl = rpl(cs.selector);
        if is_null(selector) && self.is_64_in_mode(cs) && cpl < 3 && rpl(selector) == cpl {
            return Ok(SegmentRegister::null_stack(selector));
        }
        self.stack_segment(selector, cpl, vector::GP)
    }

    /// RFLAGS after IRET.
    fn returned_flags(&self, popped: u64, bytes: usize) -> u64 {
        let mut mask = self.changeable_flags(bytes);
        if bytes > 2 {
            mask |= bits::RF;
            if self.mode.cpl == 0 && self.cpu.protected() {
                mask |= bits::VIF | bits::VIP;
            }
        }
        self.cpu.flags.get() & !mask | popped & mask
    }

    fn interrupt_return_real<W: HostWord>(&mut self) -> Flow {
        let bytes = W::BYTES as u64;
        let rip = self.peek::<W>(0)?;
        let selector = low16(self.peek::<W>(bytes)?);
        let popped = self.peek::<W>(2 * bytes)?;
        let mut cs = *self.cpu.cs();
        cs.load_real(selector);
        self.check_target(&cs, rip)?;
        let flags = self.returned_flags(popped, W::BYTES);
        self.cpu.flags.set(flags);
        self.drop_stack(3 * bytes);
        self.set_code(cs, rip);
        Ok(())
    }

    fn interrupt_return_protected<W: HostWord>(&mut self) -> Flow {
        let bytes = W::BYTES as u64;
        // In the order of AMD's processors.
        let popped = self.peek::<W>(2 * bytes)?;
        let selector = low16(self.peek::<W>(bytes)?);
        let rip = self.peek::<W>(0)?;
        let to_virtual = popped & bits::VM != 0 && bytes == 4 && self.mode.cpl == 0;
        if to_virtual && !self.cpu.long_mode() {
            return self.return_to_virtual_8086(rip, selector, popped);
        }
        let cs = self.returned_code(selector, rip)?;
        let cpl = rpl(selector);
        let goes_outward = cpl > self.mode.cpl;
        let flags = self.returned_flags(popped, W::BYTES);
        if goes_outward || self.is_64() {
            let rsp = self.peek::<W>(3 * bytes)?;
            let ss = low16(self.peek::<W>(4 * bytes)?);
            let ss = self.returned_stack(ss, &cs)?;
            let is_64 = self.is_64_in_mode(&cs);
            self.set_stack(ss, rsp, is_64);
        } else {
            self.drop_stack(3 * bytes);
        }
        if goes_outward {
            self.drop_inner_segments(cpl);
        }
        self.cpu.flags.set(flags);
        self.set_code(cs, rip);
        Ok(())
    }

    fn return_to_virtual_8086(&mut self, rip: u64, cs: u16, flags: u64) -> Flow {
        if rip > 0xffff {
            return Err(self.gp(0));
        }
        let rsp = self.peek::<u32>(12)?;
        let selectors = [
            (index::SS, self.peek::<u32>(16)?),
            (index::ES, self.peek::<u32>(20)?),
            (index::DS, self.peek::<u32>(24)?),
            (index::FS, self.peek::<u32>(28)?),
            (index::GS, self.peek::<u32>(32)?),
        ];
        for (segment, selector) in selectors {
            *self.cpu.segment_mut(segment) = SegmentRegister::virtual_8086(low16(selector));
        }
        self.cpu.set_r(RSP, rsp);
        self.cpu.flags.set(flags);
        self.set_code(SegmentRegister::virtual_8086(cs), rip);
        Ok(())
    }
}

/// The handler of an instruction of this family and whether it ends its block, `None` for others.
pub(super) fn lower(instruction: &Instruction) -> Option<(Handler, bool)> {
    Some(match instruction.code() {
        Code::Retfw | Code::Retfw_imm16 => (far_return::<u16> as Handler, true),
        Code::Retfd | Code::Retfd_imm16 => (far_return::<u32>, true),
        Code::Retfq | Code::Retfq_imm16 => (far_return::<u64>, true),
        Code::Iretw => (interrupt_return::<u16>, true),
        Code::Iretd => (interrupt_return::<u32>, true),
        Code::Iretq => (interrupt_return::<u64>, true),
        _ => return None,
    })
}
