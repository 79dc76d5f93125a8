//! Translates what ends a block.

use iced_x86::{Code, ConditionCode, FlowControl, Instruction, OpKind};

use super::builder::{Builder, state};
use super::emit::{RAX, RCX, Rm};
use super::instruction::{Outcome, Untranslated};
use super::registers::{GUEST_RCX, number};
use crate::translate::core::is_canonical;

impl Builder<'_> {
    /// Translates `instruction` if it may go elsewhere than to the next one; whether the block ends with it.
    pub(super) fn branch(&mut self, instruction: &Instruction) -> Option<bool> {
        if instruction.flow_control() == FlowControl::Next {
            return None;
        }
        let mark = self.mark();
        let outcome = match instruction.flow_control() {
            FlowControl::ConditionalBranch => self.conditional(instruction),
            FlowControl::UnconditionalBranch => self.near_target(instruction).map(|target| {
                self.jump_to(target, instruction.ip());
            }),
            FlowControl::Call => self.call(instruction),
            FlowControl::IndirectCall => self.indirect_call(instruction),
            FlowControl::IndirectBranch => self.indirect_jump(instruction),
            FlowControl::Return => self.ret(instruction),
            _ => Err(Untranslated),
        };
        if outcome.is_err() {
            self.back_to(mark);
            self.interpret();
        }
        Some(true)
    }

    /// The target of a direct branch of 64 bits.
    fn near_target(&self, instruction: &Instruction) -> Result<u64, Untranslated> {
        let target = instruction.near_branch64();
        let fits = instruction.op0_kind() == OpKind::NearBranch64
            && is_canonical(target)
            && is_canonical(instruction.next_ip());
        if fits { Ok(target) } else { Err(Untranslated) }
    }

    fn conditional(&mut self, instruction: &Instruction) -> Outcome {
        let target = self.near_target(instruction)?;
        let (here, next) = (instruction.ip(), instruction.next_ip());
        match instruction.code() {
            Code::Jrcxz_rel8_64 => {
                self.e.mov(RCX, GUEST_RCX);
                let zero = self.e.jump_short(0xe3);
                self.jump_to(next, here);
                self.e.land_short(zero);
                self.jump_to(target, here);
                return Ok(());
            }
            Code::Loop_rel8_64_RCX => {
                self.e.lea(GUEST_RCX, Rm::At(GUEST_RCX, -1));
                self.e.mov(RCX, GUEST_RCX);
                let zero = self.e.jump_short(0xe3);
                self.jump_to(target, here);
                self.e.land_short(zero);
                self.jump_to(next, here);
                return Ok(());
            }
            _ if !instruction.is_jcc_short_or_near() => return Err(Untranslated),
            _ => {}
        }
        let condition = condition(instruction)?;
        self.need_flags();
        if target > here && self.is_near(target) {
            self.jump_to_if(condition, target);
        } else {
            let not_taken = self.e.jump_if(condition ^ 1);
            self.jump_to(target, here);
            self.e.land_here(not_taken);
        }
        self.jump_to(next, here);
        Ok(())
    }

    fn call(&mut self, instruction: &Instruction) -> Outcome {
        let target = self.near_target(instruction)?;
        let place = self.stack_at(-8, true);
        self.store_return_address(place, instruction.next_ip());
        self.move_stack(-8);
        self.jump_to(target, instruction.ip());
        Ok(())
    }

    fn store_return_address(&mut self, to: Rm, rip: u64) {
        if let Ok(short) = i32::try_from(rip.cast_signed()) {
            self.e.op(true, &[0xc7], 0, to);
            self.e.imm32(short);
        } else {
            let free = if let Rm::At(..) = to { RCX } else { RAX };
            self.e.constant(free, rip);
            self.e.store(to, free);
        }
    }

    /// The target of an indirect branch of 64 bits, in RCX. The flags are in the frame then.
    fn indirect_target(&mut self, instruction: &Instruction) -> Outcome {
        match instruction.code() {
            Code::Call_rm64 | Code::Jmp_rm64 => {}
            _ => return Err(Untranslated),
        }
        if instruction.op0_kind() == OpKind::Memory {
            let from = self.operand_at(instruction, 8, false)?;
            self.e.load(RCX, from);
            self.clobber_flags();
        } else {
            self.clobber_flags();
            let from = self.in_host(number(instruction.op0_register()), RCX);
            if from != RCX {
                self.e.mov(RCX, from);
            }
        }
        Ok(())
    }

    fn indirect_jump(&mut self, instruction: &Instruction) -> Outcome {
        self.indirect_target(instruction)?;
        self.lookup_branch();
        let code = self.branch_code();
        self.jump_through(code);
        Ok(())
    }

    fn indirect_call(&mut self, instruction: &Instruction) -> Outcome {
        self.indirect_target(instruction)?;
        self.lookup_branch();
        let code = self.branch_code();
        self.e.load(RCX, code);
        self.e.store(Rm::Frame(state!(target)), RCX);
        let place = self.stack_at(-8, true);
        self.store_return_address(place, instruction.next_ip());
        self.move_stack(-8);
        self.jump_through(Rm::Frame(state!(target)));
        Ok(())
    }

    fn ret(&mut self, instruction: &Instruction) -> Outcome {
        let dropped = match instruction.code() {
            Code::Retnq => 0,
            Code::Retnq_imm16 => i32::from(instruction.immediate16()),
            _ => return Err(Untranslated),
        };
        let from = self.stack_at(0, false);
        self.e.load(RCX, from);
        self.clobber_flags();
        self.lookup_branch();
        self.move_stack(8 + dropped);
        let code = self.branch_code();
        self.jump_through(code);
        Ok(())
    }
}

/// The low four bits of Jcc's opcode.
fn condition(instruction: &Instruction) -> Result<u8, Untranslated> {
    Ok(match instruction.condition_code() {
        ConditionCode::o => 0,
        ConditionCode::no => 1,
        ConditionCode::b => 2,
        ConditionCode::ae => 3,
        ConditionCode::e => 4,
        ConditionCode::ne => 5,
        ConditionCode::be => 6,
        ConditionCode::a => 7,
        ConditionCode::s => 8,
        ConditionCode::ns => 9,
        ConditionCode::p => 10,
        ConditionCode::np => 11,
        ConditionCode::l => 12,
        ConditionCode::ge => 13,
        ConditionCode::le => 14,
        ConditionCode::g => 15,
        ConditionCode::None => return Err(Untranslated),
    })
}
