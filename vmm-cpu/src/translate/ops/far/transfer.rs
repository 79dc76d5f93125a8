//! Far JMP and CALL: within and between segments, through call gates to inner privilege levels, to tasks (Intel SDM 3A
//! 6.8 and 9.3).

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use crate::translate::core::{Flow, Machine};
use crate::translate::cpu::RSP;
use crate::translate::descriptor::{Descriptor, Gate, kind, rpl};
use crate::translate::exception::{Stack, is_64_bit, vector};
use crate::translate::ops::op::{Handler, Op};
use crate::translate::segment::{SegmentRegister, attribute, index};
use crate::translate::task::TaskSwitch;

/// Where a far branch leads.
#[derive(Clone, Copy)]
struct Target {
    selector: u16,
    offset: u64,
    /// Operand size in bytes.
    bytes: u64,
}

/// In an operation's `b`: the instruction has REX.W.
const REX_W: u8 = 1;

/// Notes what of a far branch of 64-bit code the decoder does not tell.
pub(in super::super) fn note_width(instruction: &Instruction, code: &[u8], op: &mut Op) {
    let is_far = instruction.is_jmp_far_indirect() || instruction.is_call_far_indirect();
    let is_prefix = |byte: &u8| matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3);
    // Others in front of the last prefix mean nothing.
    let rex =
        code.iter().take_while(|byte| is_prefix(byte)).last().is_some_and(|byte| matches!(byte, 0x48..=0x4f));
    if is_far && rex && instruction.code_size() == iced_x86::CodeSize::Code64 {
        op.b = REX_W;
    }
}

fn jump(m: &mut Machine<'_>, op: &Op) -> Flow {
    let target = m.far_target(op)?;
    m.far_branch(target, false)
}

fn call(m: &mut Machine<'_>, op: &Op) -> Flow {
    let target = m.far_target(op)?;
    m.far_branch(target, true)
}

impl Machine<'_> {
    fn far_target(&mut self, op: &Op) -> Flow<Target> {
        let instruction = self.rare(op);
        let selector = instruction.far_branch_selector();
        let (selector, offset, bytes) = match instruction.code() {
            Code::Jmp_ptr1616 | Code::Call_ptr1616 => (selector, u64::from(instruction.far_branch16()), 2),
            Code::Jmp_ptr1632 | Code::Call_ptr1632 => (selector, u64::from(instruction.far_branch32()), 4),
            Code::Jmp_m1616 | Code::Call_m1616 | Code::Jmp_m1632 | Code::Call_m1632 if op.b == REX_W => {
                // AMD's processors have no pointer with 64 bits of offset, and push quadwords.
                let (selector, offset) = self.far_pointer::<u32>(op)?;
                (selector, offset, 8)
            }
            Code::Jmp_m1616 | Code::Call_m1616 => {
                let (selector, offset) = self.far_pointer::<u16>(op)?;
                (selector, offset, 2)
            }
            Code::Jmp_m1632 | Code::Call_m1632 => {
                let (selector, offset) = self.far_pointer::<u32>(op)?;
                (selector, offset, 4)
            }
            _ => {
                let (selector, offset) = self.far_pointer::<u64>(op)?;
                (selector, offset, 8)
            }
        };
        Ok(Target { selector, offset, bytes })
    }

    fn far_branch(&mut self, target: Target, is_call: bool) -> Flow {
        if !self.cpu.protected() || self.cpu.virtual_8086() {
            return self.far_branch_real(target, is_call);
        }
        let selector = target.selector;
        let code = self.descriptor(selector, vector::GP)?;
        let Some(system_kind) = code.system_kind() else {
            let cs = self.far_code(code, rpl(selector))?;
            return self.far_branch_to(cs, target.offset, target.bytes, is_call);
        };
        let in_long_mode = self.cpu.long_mode();
        let is_known = match system_kind {
            kind::CALL_GATE => true,
            kind::CALL_GATE_16 | kind::TASK_GATE | kind::TSS | kind::TSS_16 => !in_long_mode,
            _ => false,
        };
        if !is_known || !code.is_reachable(self.mode.cpl) {
            return Err(self.selector_fault(vector::GP, selector));
        }
        let how = if is_call { TaskSwitch::Call } else { TaskSwitch::Jump };
        match system_kind {
            kind::TSS | kind::TSS_16 => return self.run_task(selector, how),
            _ if !code.is_present() => return Err(self.selector_fault(vector::NP, selector)),
            kind::TASK_GATE => return self.run_task(Gate::new(code.raw, 0).selector, how),
            _ => {}
        }
        let upper = if in_long_mode { self.upper_half(&code, vector::GP)? } else { 0 };
        self.through_call_gate(&Gate::new(code.raw, upper), is_call)
    }

    /// In real and virtual-8086 mode.
    fn far_branch_real(&mut self, target: Target, is_call: bool) -> Flow {
        let mut cs = *self.cpu.cs();
        cs.load_real(target.selector);
        self.far_branch_to(cs, target.offset, target.bytes, is_call)
    }

    /// Continues in `cs` at the same privilege level. A call pushes words of that many bytes.
    fn far_branch_to(&mut self, cs: SegmentRegister, rip: u64, bytes: u64, is_call: bool) -> Flow {
        self.check_target(&cs, rip)?;
        if is_call {
            // A call gate of long mode pushes as 64-bit code does, even from compatibility mode.
            let mut stack = Stack::current(self, self.is_64() || bytes == 8);
            self.push_return(&mut stack, bytes)?;
            stack.enter(self);
        }
        self.set_code(cs, rip);
        Ok(())
    }

    fn push_return(&mut self, stack: &mut Stack, bytes: u64) -> Flow {
        stack.push(self, bytes, u64::from(self.cpu.cs().selector))?;
        stack.push(self, bytes, self.cpu.rip)
    }

    pub(super) fn set_code(&mut self, cs: SegmentRegister, rip: u64) {
        *self.cpu.segment_mut(index::CS) = cs;
        self.cpu.rip = rip;
        self.update_mode();
    }

    /// #GP(0) unless code of `cs` can be at `rip`.
    pub(super) fn check_target(&mut self, cs: &SegmentRegister, rip: u64) -> Flow {
        let fits = if self.cpu.long_mode() && is_64_bit(cs) {
            self.is_canonical(rip)
        } else {
            rip <= u64::from(cs.limit)
        };
        if fits { Ok(()) } else { Err(self.gp(0)) }
    }

    /// #GP unless a segment can hold code: one that asks for both 64 and 32 bits cannot.
    pub(super) fn require_code(&mut self, code: &Descriptor) -> Flow {
        let both = self.cpu.long_mode() && code.register.has(attribute::LONG | attribute::BIG);
        if code.is_code() && !both { Ok(()) } else { Err(self.selector_fault(vector::GP, code.selector())) }
    }

    /// CS after a branch to a code segment at the current privilege level, which a selector with that RPL asks for.
    fn far_code(&mut self, mut code: Descriptor, rpl: u8) -> Flow<SegmentRegister> {
        self.require_code(&code)?;
        let cpl = self.mode.cpl;
        let is_allowed =
            if code.is_conforming() { code.dpl() <= cpl } else { code.dpl() == cpl && rpl <= cpl };
        if !is_allowed {
            return Err(self.selector_fault(vector::GP, code.selector()));
        }
        if !code.is_present() {
            return Err(self.selector_fault(vector::NP, code.selector()));
        }
        self.mark_accessed(&mut code)?;
        Ok(code.register.with_rpl(cpl))
    }

    /// The gate's own rights and presence are checked.
    fn through_call_gate(&mut self, gate: &Gate, is_call: bool) -> Flow {
        let cs = self.gate_code(gate.selector)?;
        let cpl = rpl(cs.selector);
        let bytes = match gate.kind {
            _ if self.cpu.long_mode() => 8,
            kind::CALL_GATE => 4,
            _ => 2,
        };
        if cpl == self.mode.cpl {
            return self.far_branch_to(cs, gate.target(), bytes, is_call);
        }
        if !is_call {
            return Err(self.selector_fault(vector::GP, gate.selector));
        }
        self.check_target(&cs, gate.target())?;
        let mut stack = self.inner_stack(cpl)?;
        stack.push(self, bytes, u64::from(self.cpu.segment(index::SS).selector))?;
        stack.push(self, bytes, self.cpu.r(RSP))?;
        let parameters = if self.cpu.long_mode() { 0 } else { gate.parameters };
        for parameter in (0..parameters).rev() {
            let value = self.peek_sized(bytes, parameter * bytes)?;
            stack.push(self, bytes, value)?;
        }
        self.push_return(&mut stack, bytes)?;
        stack.enter(self);
        self.set_code(cs, gate.target());
        Ok(())
    }
}

/// The handler of an instruction of this family and whether it ends its block, `None` for others.
pub(super) fn lower(instruction: &Instruction) -> Option<(Handler, bool)> {
    let is_far = matches!(instruction.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32)
        || instruction.is_jmp_far_indirect()
        || instruction.is_call_far_indirect();
    if !is_far {
        return None;
    }
    match instruction.mnemonic() {
        Mnemonic::Jmp => Some((jump as Handler, true)),
        Mnemonic::Call => Some((call, true)),
        _ => None,
    }
}
