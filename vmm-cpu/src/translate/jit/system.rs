//! Translates what kernels do with flags, interrupts and segments all the time.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::builder::{Builder, EQUAL, LESS, NOT_EQUAL, SAVED_FLAGS, SAVED_FLAGS_HIGH, slot, state};
use super::emit::{RAX, RCX, RDX, Rm};
use super::instruction::{Outcome, Untranslated};
use super::registers::{GUEST_RAX, GUEST_RCX, Home, home, number};
use crate::translate::block::MAX_OPS;
use crate::translate::flags::bits;
use crate::translate::memory::Reach;
use crate::translate::ops::segment_slot;

/// Bits of RFLAGS as a 32-bit immediate.
#[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "of the low half")]
const fn imm(flags: u64) -> i32 {
    flags as i32
}

/// As many instructions as any block has.
const MAX_OPS_BUDGET: i32 = 64;
const _: () = assert!(MAX_OPS == 64);

/// Extensions of the first group's opcodes.
const OR: u8 = 1;
const AND: u8 = 4;

impl Builder<'_> {
    /// Translates an instruction of this family.
    pub(super) fn system(&mut self, instruction: &Instruction) -> Outcome {
        match instruction.mnemonic() {
            Mnemonic::Pushfq => self.push_flags(),
            Mnemonic::Popfq => self.pop_flags(),
            Mnemonic::Cli => self.disable_interrupts(),
            Mnemonic::Sti => self.enable_interrupts(instruction),
            Mnemonic::Swapgs => self.swap_gs(),
            Mnemonic::Rdtsc | Mnemonic::Rdtscp => self.read_counter(instruction),
            // With more bytes it may be XCHG.
            Mnemonic::Pause if instruction.len() == 2 => self.pause(),
            _ => Err(Untranslated),
        }
    }

    fn supervisor(&self) -> Outcome {
        if self.mode.reach == Reach::User { Err(Untranslated) } else { Ok(()) }
    }

    fn push_flags(&mut self) -> Outcome {
        self.lookup_stack(-8, true);
        // The byte that LAHF made is that of RFLAGS.
        self.e.op(false, &[0x0f, 0xb6], RCX, SAVED_FLAGS_HIGH);
        self.e.op(true, &[0x0b], RCX, Rm::Frame(state!(control)));
        self.e.store(Rm::At(RAX, 0), RCX);
        self.e.op(false, &[0x0f, 0xb6], RCX, SAVED_FLAGS);
        // SHL ECX, 11
        self.e.bytes(&[0xc1, 0xe1, 11]);
        self.e.op(false, &[0x09], RCX, Rm::At(RAX, 0));
        self.move_stack(-8);
        Ok(())
    }

    /// POPF of an image that changes nothing but status flags and maybe IF.
    fn pop_flags(&mut self) -> Outcome {
        if self.mode.traced {
            // The interpreter's block may end with it.
            return Err(Untranslated);
        }
        self.lookup_stack(0, false);
        self.e.load(RCX, Rm::At(RAX, 0));
        self.e.mov(RAX, RCX);
        // XOR
        self.e.op(true, &[0x33], RAX, Rm::Frame(state!(control)));
        // TEST
        let changeable = if self.mode.reach == Reach::User { bits::STATUS } else { bits::STATUS | bits::IF };
        self.e.op(true, &[0xf7], 0, Rm::Reg(RAX));
        self.e.imm32(!imm(changeable));
        self.interpret_if(NOT_EQUAL);
        if self.mode.reach != Reach::User {
            // TEST ECX, IF
            self.e.op(false, &[0xf7], 0, Rm::Reg(RCX));
            self.e.imm32(imm(bits::IF));
            let stays_off = self.e.jump_short(0x70 | EQUAL);
            self.e.group1(true, 7, Rm::Frame(state!(held)), 0);
            self.interpret_if(NOT_EQUAL);
            self.e.land_short(stays_off);
            self.e.op(false, &[0x8b], RAX, Rm::Reg(RCX));
            self.e.group1(false, AND, Rm::Reg(RAX), imm(bits::IF));
            self.e.group1(false, AND, Rm::Frame(state!(control)), !imm(bits::IF));
            self.e.op(false, &[0x09], RAX, Rm::Frame(state!(control)));
        }
        // MOV of CL
        self.e.op(false, &[0x88], RCX, SAVED_FLAGS_HIGH);
        // SHR ECX, 11; AND ECX, 1
        self.e.bytes(&[0xc1, 0xe9, 11]);
        self.e.group1(false, AND, Rm::Reg(RCX), 1);
        self.e.op(false, &[0x88], RCX, SAVED_FLAGS);
        self.move_stack(8);
        Ok(())
    }

    fn disable_interrupts(&mut self) -> Outcome {
        self.supervisor()?;
        self.clobber_flags();
        self.e.group1(false, AND, Rm::Frame(state!(control)), !imm(bits::IF));
        Ok(())
    }

    /// STI, which ends its block; the next instruction runs before an interrupt is taken. So nothing may leave translated
    /// code between the two. Where IF is set already, it holds nothing off (Intel SDM 2B, STI), which is rare.
    fn enable_interrupts(&mut self, instruction: &Instruction) -> Outcome {
        self.supervisor()?;
        if self.mode.traced || !self.is_near(instruction.next_ip()) {
            return Err(Untranslated);
        }
        self.clobber_flags();
        if self.mode.counted {
            // The next block can begin, whatever its length.
            self.e.group1(true, 7, Rm::Frame(state!(budget)), MAX_OPS_BUDGET);
            self.interpret_if(LESS);
        }
        self.e.group1(true, 7, Rm::Frame(state!(held)), 0);
        self.interpret_if(NOT_EQUAL);
        // TEST
        self.e.op(false, &[0xf7], 0, Rm::Frame(state!(control)));
        self.e.imm32(imm(bits::IF));
        self.interpret_if(NOT_EQUAL);
        self.e.group1(false, OR, Rm::Frame(state!(control)), imm(bits::IF));
        self.shadow = true;
        Ok(())
    }

    fn swap_gs(&mut self) -> Outcome {
        self.supervisor()?;
        self.e.load(RAX, Rm::Frame(state!(gs_base)));
        self.e.load(RCX, Rm::Frame(state!(kernel_gs_base)));
        self.e.store(Rm::Frame(state!(kernel_gs_base)), RAX);
        self.e.store(Rm::Frame(state!(gs_base)), RCX);
        Ok(())
    }

    /// RDTSC and RDTSCP where the counter counts instructions: what it will be when the budget is used up, less what is left of that.
    fn read_counter(&mut self, instruction: &Instruction) -> Outcome {
        self.supervisor()?;
        if !self.mode.ticking {
            return Err(Untranslated);
        }
        let left = self.count - usize::from(self.op);
        self.clobber_flags();
        self.e.load(RAX, Rm::Frame(state!(tsc)));
        self.e.op(true, &[0x2b], RAX, Rm::Frame(state!(budget)));
        self.e.group1(true, 5, Rm::Reg(RAX), i32::try_from(left).map_err(|_| Untranslated)?);
        self.e.mov(RDX, RAX);
        // SHR RDX, 32; MOV of EAX
        self.e.bytes(&[0x48, 0xc1, 0xea, 32]);
        self.e.op(false, &[0x8b], GUEST_RAX, Rm::Reg(RAX));
        if instruction.mnemonic() == Mnemonic::Rdtscp {
            self.e.op(false, &[0x8b], GUEST_RCX, Rm::Frame(state!(tsc_aux)));
        }
        Ok(())
    }

    /// PAUSE. Where there are others, the interpreter lets them have a turn.
    fn pause(&mut self) -> Outcome {
        if !self.mode.alone {
            return Err(Untranslated);
        }
        if !self.mode.counted {
            self.e.bytes(&[0xf3, 0x90]);
        }
        Ok(())
    }

    /// MOV of a segment register's selector to a register.
    pub(super) fn read_selector(&mut self, instruction: &Instruction) -> Outcome {
        if instruction.op0_kind() != OpKind::Register
            || instruction.op1_kind() != OpKind::Register
            || !instruction.op1_register().is_segment_register()
            || instruction.op0_register().size() < 4
        {
            return Err(Untranslated);
        }
        let offset = i32::try_from(8 * segment_slot(instruction.op1_register())).map_err(|_| Untranslated)?;
        let from = Rm::Frame(state!(selectors) + offset);
        let to = number(instruction.op0_register());
        match home(to) {
            Home::Host(host) => self.e.load(host, from),
            Home::Frame => {
                self.e.load(RCX, from);
                self.e.store(slot(to), RCX);
            }
        }
        Ok(())
    }
}
