//! Translates instructions whose operands need care: AH and the like, bit strings, 16 bytes that are exchanged.

use iced_x86::{Code, Instruction, Mnemonic, OpKind, Register};

use super::builder::{Builder, Flags, SCRATCH};
use super::effect::{Effect, effect};
use super::emit::{RAX, RCX, Rm};
use super::instruction::{Outcome, Untranslated, use_host_address, writes_memory};
use super::registers::{GUEST_RAX, GUEST_RCX, is_high_byte, number};

const RSI: u8 = 6;

/// Whether an operand is AH, CH, DH or BH.
pub(super) fn has_high_byte(instruction: &Instruction) -> bool {
    (0..instruction.op_count())
        .any(|n| instruction.op_kind(n) == OpKind::Register && is_high_byte(instruction.op_register(n)))
}

impl Builder<'_> {
    /// An instruction with such an operand. It has no REX prefix, so its registers are the first eight; RAX and RCX are
    /// where they are for the guest while it runs.
    pub(super) fn high_byte(&mut self, instruction: &Instruction) -> Outcome {
        let registers = (0..instruction.op_count())
            .filter(|n| instruction.op_kind(*n) == OpKind::Register)
            .map(|n| instruction.op_register(n));
        let (mut uses_rax, mut uses_rcx) = (false, false);
        for register in registers {
            match number(register) {
                0 => uses_rax = true,
                1 => uses_rcx = true,
                2 | 3 => {}
                // The number is that of a register with another home, or of one that would need a REX prefix.
                5..=7 if register.size() > 1 => {}
                _ => return Err(Untranslated),
            }
        }
        let in_memory = (0..instruction.op_count()).any(|n| instruction.op_kind(n) == OpKind::Memory);
        let reads_flags = effect(instruction) == Effect::Reads;
        let mut rewritten = *instruction;
        if in_memory {
            if reads_flags || uses_rax && uses_rcx {
                return Err(Untranslated);
            }
            self.operand(instruction, instruction.memory_size().size(), writes_memory(instruction))?;
            if uses_rax {
                self.e.mov(RCX, RAX);
            }
            use_host_address(&mut rewritten, if uses_rax { RCX } else { RAX });
        } else if reads_flags {
            self.need_flags();
        }
        if uses_rax {
            self.e.mov(RAX, GUEST_RAX);
        }
        if uses_rcx {
            self.e.mov(RCX, GUEST_RCX);
        }
        self.encode(&rewritten)?;
        if uses_rax {
            self.e.mov(GUEST_RAX, RAX);
        }
        if uses_rcx {
            self.e.mov(GUEST_RCX, RCX);
        }
        self.note_flags(instruction);
        Ok(())
    }

    /// BT and its kind with a bit string in memory.
    pub(super) fn bit_string(&mut self, instruction: &Instruction) -> Outcome {
        let register = instruction.op1_register();
        let (wide, shift) = match register.size() {
            8 => (true, 6),
            4 => (false, 5),
            _ => return Err(Untranslated),
        };
        let opcode = match instruction.mnemonic() {
            Mnemonic::Bt => 0xa3,
            Mnemonic::Bts => 0xab,
            Mnemonic::Btr => 0xb3,
            _ => 0xbb,
        };
        // The distance is added to the offset, before that is cut to 32 bits or added to a segment's base.
        let base = instruction.memory_base();
        let is_plain = base.is_gpr64() || base == Register::RIP;
        if !is_plain || matches!(instruction.memory_segment(), Register::FS | Register::GS) {
            return Err(Untranslated);
        }
        let guest = number(register);
        let writes = opcode != 0xa3;
        self.clobber_flags();
        self.address(instruction)?;
        // The word is that many words away.
        let from = self.in_host(guest, RCX);
        if wide {
            self.e.mov(RCX, from);
        } else {
            // MOVSXD
            self.e.op(true, &[0x63], RCX, Rm::Reg(from));
        }
        self.e.op(true, &[0xc1], 7, Rm::Reg(RCX));
        self.e.bytes(&[shift]);
        self.e.lea(RAX, Rm::Indexed(RAX, RCX, shift - 3, 0));
        self.lookup(1 << (shift - 3), writes, false);
        if !writes {
            self.e.op(wide, &[0x8b], RCX, Rm::At(RAX, 0));
            self.need_flags();
            let from = self.in_host(guest, RAX);
            self.e.op(wide, &[0x0f, opcode], from, Rm::Reg(RCX));
            self.flags = Flags::Live;
            return Ok(());
        }
        let from = self.in_host(guest, RCX);
        if from != RCX {
            self.e.mov(RCX, from);
        }
        self.e.group1(false, 4, Rm::Reg(RCX), (1 << shift) - 1);
        self.e.store(SCRATCH[0], RSI);
        self.e.mov(RSI, RAX);
        self.need_flags();
        if instruction.has_lock_prefix() {
            self.e.bytes(&[0xf0]);
        }
        self.e.op(wide, &[0x0f, opcode], RCX, Rm::At(RSI, 0));
        self.e.load(RSI, SCRATCH[0]);
        self.flags = Flags::Live;
        Ok(())
    }

    /// CMPXCHG8B and CMPXCHG16B.
    pub(super) fn compare_exchange_pair(&mut self, instruction: &Instruction) -> Outcome {
        let (bytes, wide) = match instruction.code() {
            Code::Cmpxchg8b_m64 => (8, false),
            Code::Cmpxchg16b_m128 => (16, true),
            _ => return Err(Untranslated),
        };
        self.operand(instruction, bytes, true)?;
        self.e.store(SCRATCH[0], RSI);
        self.e.mov(RSI, RAX);
        self.need_flags();
        self.e.mov(RAX, GUEST_RAX);
        self.e.mov(RCX, GUEST_RCX);
        if instruction.has_lock_prefix() {
            self.e.bytes(&[0xf0]);
        }
        self.e.op(wide, &[0x0f, 0xc7], 1, Rm::At(RSI, 0));
        self.e.mov(GUEST_RAX, RAX);
        self.e.load(RSI, SCRATCH[0]);
        self.flags = Flags::Live;
        Ok(())
    }

    /// What an instruction that the host has executed did to the flags.
    pub(super) fn note_flags(&mut self, instruction: &Instruction) {
        let effect = effect(instruction);
        if effect == Effect::None || instruction.rflags_modified() == 0 {
            return;
        }
        self.flags_lost = effect == Effect::Reads && (self.flags == Flags::Saved || self.flags_lost);
        self.flags = Flags::Live;
    }
}
