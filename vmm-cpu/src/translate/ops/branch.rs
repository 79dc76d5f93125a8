//! Near branches: Jcc, JMP, CALL, RET, LOOPcc, JCXZ.

use iced_x86::{Code, Instruction, Mnemonic, OpKind};

use super::by_width;
use super::mov::{by_condition, condition};
use super::op::{Handler, Op, register_slot};
use crate::translate::core::{Flow, Machine};
use crate::translate::cpu::{BLOCK, RCX};
use crate::translate::exception::{Exception, vector};
use crate::translate::memory::HostWord;
use crate::translate::word::Word;

impl Machine<'_> {
    /// The target of a relative branch in 64-bit code. The decoder counts from the block's start.
    #[inline(always)]
    fn target(&self, op: &Op) -> u64 {
        self.cpu.r(BLOCK).wrapping_add(op.imm)
    }

    /// Continues at `rip`, which the operand size cuts to its width.
    #[inline(always)]
    fn go_to<W: Word>(&mut self, rip: u64) -> Flow {
        if W::BITS == 64 {
            // A relative branch from canonical code leads out of it just at the edges.
            if !self.is_canonical(rip) {
                return Err(self.gp(0));
            }
            self.cpu.rip = rip;
            return Ok(());
        }
        let rip = rip & W::MASK;
        if !self.is_64() && rip > u64::from(self.cpu.cs().limit) {
            return Err(self.raise(Exception::with_error(vector::GP, 0)));
        }
        self.cpu.rip = rip;
        Ok(())
    }
}

fn jump_if<const CC: u8>(m: &mut Machine<'_>, op: &Op) -> Flow {
    if m.cpu.flags.condition::<CC>() {
        return m.go_to::<u64>(m.target(op));
    }
    Ok(())
}

/// Jcc of legacy modes; the operand size in bytes is in `a`.
fn legacy_jump_if<const CC: u8>(m: &mut Machine<'_>, op: &Op) -> Flow {
    if m.cpu.flags.condition::<CC>() { legacy_jump(m, op) } else { Ok(()) }
}

fn jump(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.go_to::<u64>(m.target(op))
}

fn legacy_jump(m: &mut Machine<'_>, op: &Op) -> Flow {
    let target = m.target(op);
    if op.a == 2 { m.go_to::<u16>(target) } else { m.go_to::<u32>(target) }
}

fn jump_register<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let target = m.cpu.get::<W>(op.a);
    m.go_to::<W>(target)
}

fn jump_memory<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, W::BYTES, false)?;
    let target = m.load::<W>(place)?.extend();
    m.go_to::<W>(target)
}

fn call_target<W: HostWord>(m: &mut Machine<'_>, target: u64) -> Flow {
    let next = m.cpu.rip;
    if m.is_64() && !m.is_canonical(target) {
        // A stack that takes nothing comes first.
        m.probe_push::<W>()?;
    }
    m.go_to::<W>(target)?;
    m.push::<W>(next)
}

fn call<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let target = m.target(op);
    call_target::<W>(m, target)
}

fn call_register<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let target = m.cpu.get::<W>(op.a);
    call_target::<W>(m, target)
}

fn call_memory<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let place = m.place(op, W::BYTES, false)?;
    let target = m.load::<W>(place)?.extend();
    call_target::<W>(m, target)
}

/// RET; the immediate is what it drops beyond the return address.
fn ret<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let target = m.peek::<W>(0)?;
    m.go_to::<W>(target)?;
    m.drop_stack(W::BYTES as u64 + op.imm);
    Ok(())
}

/// What ends a loop early.
const WHILE_EQUAL: u8 = 1;
const WHILE_NOT_EQUAL: u8 = 2;

/// LOOP, LOOPE, LOOPNE with a counter of width `W`; the operand size in bytes is in `a`.
fn count_down<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    let count = m.cpu.get::<W>(RCX).wrapping_sub(1) & W::MASK;
    let zero = m.cpu.flags.zf();
    let goes_on = match op.b {
        WHILE_EQUAL => zero,
        WHILE_NOT_EQUAL => !zero,
        _ => true,
    };
    if goes_on && count != 0 {
        short(m, op)?;
    }
    m.cpu.set::<W>(RCX, count);
    Ok(())
}

/// JCXZ, JECXZ, JRCXZ.
fn jump_if_zero<W: HostWord>(m: &mut Machine<'_>, op: &Op) -> Flow {
    if m.cpu.get::<W>(RCX) == 0 { short(m, op) } else { Ok(()) }
}

fn short(m: &mut Machine<'_>, op: &Op) -> Flow {
    if op.a == 8 { jump(m, op) } else { legacy_jump(m, op) }
}

/// Width in bytes of the counter of LOOPcc.
fn counter_bytes(code: Code) -> usize {
    use Code as C;
    match code {
        C::Loop_rel8_16_CX
        | C::Loop_rel8_32_CX
        | C::Loope_rel8_16_CX
        | C::Loope_rel8_32_CX
        | C::Loopne_rel8_16_CX
        | C::Loopne_rel8_32_CX => 2,
        C::Loop_rel8_16_RCX
        | C::Loop_rel8_64_RCX
        | C::Loope_rel8_16_RCX
        | C::Loope_rel8_64_RCX
        | C::Loopne_rel8_16_RCX
        | C::Loopne_rel8_64_RCX => 8,
        _ => 4,
    }
}

/// The handler of an instruction of this family, all of which end their block; `None` for others.
pub(super) fn lower(instruction: &Instruction, op: &mut Op, code_bits: u32) -> Option<Handler> {
    let is_near =
        matches!(instruction.op0_kind(), OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64);
    if is_near {
        op.imm = instruction.near_branch_target();
        op.a = match instruction.op0_kind() {
            OpKind::NearBranch16 => 2,
            OpKind::NearBranch32 => 4,
            _ => 8,
        };
    }
    let operand = instruction.op0_kind();
    Some(match instruction.mnemonic() {
        Mnemonic::Jmp | Mnemonic::Call if !is_near => {
            let is_jump = instruction.mnemonic() == Mnemonic::Jmp;
            let is_memory = operand == OpKind::Memory;
            if !is_memory && operand != OpKind::Register
                || instruction.is_jmp_far_indirect()
                || instruction.is_call_far_indirect()
            {
                return None;
            }
            let bytes = if is_memory {
                instruction.memory_size().size()
            } else {
                op.a = register_slot(instruction.op0_register());
                instruction.op0_register().size()
            };
            match (is_jump, is_memory) {
                (true, true) => by_width!(bytes, jump_memory),
                (true, false) => by_width!(bytes, jump_register),
                (false, true) => by_width!(bytes, call_memory),
                (false, false) => by_width!(bytes, call_register),
            }
        }
        Mnemonic::Jmp => {
            if op.a == 8 {
                jump
            } else {
                legacy_jump
            }
        }
        Mnemonic::Call => by_width!(op.a, call),
        Mnemonic::Ret => {
            op.imm = if instruction.op_count() == 1 { instruction.immediate(0) } else { 0 };
            by_width!(return_bytes(instruction.code()), ret)
        }
        Mnemonic::Loop | Mnemonic::Loope | Mnemonic::Loopne => {
            // On AMD's processors, as with string instructions, a prefix says which of the two it is.
            op.b = match instruction.mnemonic() {
                Mnemonic::Loop => 0,
                _ if instruction.has_rep_prefix() => WHILE_EQUAL,
                _ if instruction.has_repne_prefix() => WHILE_NOT_EQUAL,
                Mnemonic::Loope => WHILE_EQUAL,
                _ => WHILE_NOT_EQUAL,
            };
            by_width!(counter_bytes(instruction.code()), count_down)
        }
        Mnemonic::Jcxz => jump_if_zero::<u16>,
        Mnemonic::Jecxz => jump_if_zero::<u32>,
        Mnemonic::Jrcxz => jump_if_zero::<u64>,
        _ if instruction.is_jcc_short_or_near() => {
            let cc = condition(instruction);
            if code_bits == 64 && op.a == 8 {
                by_condition!(cc, jump_if)
            } else {
                by_condition!(cc, legacy_jump_if)
            }
        }
        _ => return None,
    })
}

/// Width in bytes of the return address.
fn return_bytes(code: Code) -> u8 {
    match code {
        Code::Retnw | Code::Retnw_imm16 => 2,
        Code::Retnd | Code::Retnd_imm16 => 4,
        _ => 8,
    }
}

#[cfg(test)]
#[path = "branch_tests.rs"]
mod tests;
