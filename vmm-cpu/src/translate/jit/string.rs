//! Translates repeated MOVS and STOS, as far as they stay within a page.

use iced_x86::{Code, Instruction, Register};

use super::builder::{ABOVE, Builder, NOT_EQUAL, SCRATCH, state};
use super::emit::{RAX, RCX, Rm};
use super::instruction::{Outcome, Untranslated};
use super::registers::{GUEST_RAX, GUEST_RCX};
use crate::translate::flags::bits;

const RSI: u8 = 6;
const RDI: u8 = 7;

/// What is repeated.
struct Form {
    /// Binary logarithm of the size of an element.
    size: u8,
    moves: bool,
    code: &'static [u8],
}

fn form(code: Code) -> Option<Form> {
    let (size, moves, code): (u8, bool, &[u8]) = match code {
        Code::Movsb_m8_m8 => (0, true, &[0xf3, 0xa4]),
        Code::Movsd_m32_m32 => (2, true, &[0xf3, 0xa5]),
        Code::Movsq_m64_m64 => (3, true, &[0xf3, 0x48, 0xa5]),
        Code::Stosb_m8_AL => (0, false, &[0xf3, 0xaa]),
        Code::Stosd_m32_EAX => (2, false, &[0xf3, 0xab]),
        Code::Stosq_m64_RAX => (3, false, &[0xf3, 0x48, 0xab]),
        _ => return None,
    };
    Some(Form { size, moves, code })
}

impl Builder<'_> {
    /// Translates such an instruction: upwards, with 64-bit addresses, no segment.
    pub(super) fn string(&mut self, instruction: &Instruction) -> Outcome {
        let Some(form) = form(instruction.code()) else { return Err(Untranslated) };
        let is_plain = instruction.has_rep_prefix()
            && !instruction.has_repne_prefix()
            && instruction.segment_prefix() == Register::None
            && (0..instruction.op_count()).all(|n| {
                !matches!(
                    instruction.op_kind(n),
                    iced_x86::OpKind::MemoryESEDI | iced_x86::OpKind::MemorySegESI
                )
            });
        if !is_plain {
            return Err(Untranslated);
        }
        self.clobber_flags();
        // TEST of DF
        self.e.op(false, &[0xf7], 0, Rm::Frame(state!(control)));
        self.e.imm32(0x400);
        const { assert!(bits::DF == 0x400) };
        self.interpret_if(NOT_EQUAL);
        self.e.group1(true, 7, Rm::Reg(GUEST_RCX), 4096 >> form.size);
        self.interpret_if(ABOVE);
        if form.moves {
            self.within_page(RSI, form.size);
            self.e.mov(RAX, RSI);
            self.lookup(1, false, false);
            self.e.store(SCRATCH[1], RAX);
        }
        self.within_page(RDI, form.size);
        self.e.mov(RAX, RDI);
        self.lookup(1, true, false);
        self.e.store(SCRATCH[0], RDI);
        self.e.mov(RDI, RAX);
        if form.moves {
            self.e.load(RAX, SCRATCH[1]);
            self.e.store(SCRATCH[1], RSI);
            self.e.mov(RSI, RAX);
        } else {
            self.e.mov(RAX, GUEST_RAX);
        }
        self.e.mov(RCX, GUEST_RCX);
        self.e.bytes(form.code);
        self.e.load(RDI, SCRATCH[0]);
        self.e.lea(RDI, Rm::Indexed(RDI, GUEST_RCX, form.size, 0));
        if form.moves {
            self.e.load(RSI, SCRATCH[1]);
            self.e.lea(RSI, Rm::Indexed(RSI, GUEST_RCX, form.size, 0));
        }
        self.e.mov(GUEST_RCX, RCX);
        Ok(())
    }

    /// The elements from the address in `register` on lie in one page, or the interpreter executes the instruction.
    fn within_page(&mut self, register: u8, size: u8) {
        self.e.op(false, &[0x8b], RCX, Rm::Reg(register));
        self.e.group1(false, 4, Rm::Reg(RCX), 0xfff);
        self.e.lea(RCX, Rm::Indexed(RCX, GUEST_RCX, size, 0));
        self.e.group1(false, 7, Rm::Reg(RCX), 4096);
        self.interpret_if(ABOVE);
    }
}
