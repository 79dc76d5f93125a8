//! What the manuals leave open, and a comparison therefore leaves out.
//!
//! Sections are those of the instruction in question in chapters 3 to 5 of Intel's SDM 2 and in chapter 3 of AMD's APM 3
//! (revision 3.36). Where one of the two defines what the other does not, the definition holds: the interpreter is
//! of AMD's make, and what both vendors' processors do is what programs have come to rely on.
//!
//! | instructions | when | undefined | manual |
//! |---|---|---|---|
//! | AND OR XOR TEST | | AF | SDM 2, APM 3 |
//! | MUL IMUL | | SF ZF AF PF | SDM 2, APM 3 |
//! | DIV IDIV | | all six | SDM 2, APM 3 |
//! | SHL SHR SAR | count 0 | none, nor are any written | SDM 2, APM 3 |
//! | | count not 0 | AF | SDM 2, APM 3 |
//! | | count above 1 | also OF | SDM 2, APM 3 |
//! | SHL SHR | count at least the operand's size (8 and 16 bits) | also CF | SDM 2, APM 3 |
//! | ROL ROR RCL RCR | count 0 | none, nor are any written | SDM 2, APM 3 |
//! | | count above 1 | OF | SDM 2, APM 3 |
//! | SHLD SHRD | count 0 | none, nor are any written | SDM 2, APM 3 |
//! | | count not 0 | AF | SDM 2, APM 3 |
//! | | count above 1 | also OF | SDM 2, APM 3 |
//! | | count above the operand's size (16 bits) | all six, and the result | SDM 2, APM 3 |
//! | BSF BSR | | CF OF SF AF PF | SDM 2, APM 3; the destination of a zero source is unchanged: APM 3 |
//! | BT BTC BTR BTS | | OF SF AF PF | SDM 2; APM 3 has ZF too |
//! | LZCNT TZCNT | | OF SF AF PF | SDM 2, APM 3 |
//! | ANDN BLSI BLSMSK BLSR BZHI | | AF PF | SDM 2, APM 3 |
//! | BEXTR | | SF AF PF | SDM 2, APM 3 |
//! | AAA AAS | | OF SF ZF PF | SDM 2, APM 3 |
//! | AAD AAM | | OF AF CF | SDM 2, APM 3 |
//! | DAA DAS | | OF | SDM 2, APM 3 |
//!
//! Everything else has none: iced's `rflags_undefined` agrees with the table, which a test keeps so.

use iced_x86::{Instruction, Mnemonic, OpKind};

use crate::case::Registers;

const CF: u64 = 1;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;
const ALL: u64 = CF | PF | AF | ZF | SF | OF;
const RCX: usize = 1;

/// What an instruction that has completed did to the status flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Flags {
    /// Have a value that the manuals define.
    pub(crate) defined: u64,
    /// May have any value.
    pub(crate) undefined: u64,
}

impl Flags {
    /// The flags that may have any value after `instruction`, where those of `mask` might before.
    pub(crate) fn carry(self, mask: u64) -> u64 {
        mask & !self.defined | self.undefined
    }
}

/// What `instruction` does to flags of a processor with registers `before`.
pub(crate) fn flags(instruction: &Instruction, before: &Registers) -> Flags {
    let count = count(instruction, before);
    if count == Some(0) || is_idle(instruction, before) {
        return Flags::default();
    }
    let undefined = undefined(instruction, count);
    Flags { defined: written(instruction) & !undefined, undefined }
}

/// Whether even the result of `instruction` is undefined: double shifts of 16 bits by more.
pub(crate) fn is_result_undefined(instruction: &Instruction, before: &Registers) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd)
        && count(instruction, before).is_some_and(|count| count > size(instruction))
}

/// Flags that `instruction` may leave undefined.
pub(crate) fn possible(instruction: &Instruction) -> u64 {
    match count_operand(instruction) {
        Some(OpKind::Register) => undefined(instruction, Some(32)),
        Some(_) => undefined(instruction, immediate_count(instruction)),
        None => undefined(instruction, None),
    }
}

/// Flags that have a defined value after `instruction` whatever came before.
pub(crate) fn always_written(instruction: &Instruction) -> u64 {
    if count_operand(instruction).is_some() || instruction.is_string_instruction() {
        return 0;
    }
    written(instruction) & !undefined(instruction, None)
}

/// Status flags that `instruction` depends on.
pub(crate) fn read(instruction: &Instruction) -> u64 {
    match instruction.mnemonic() {
        Mnemonic::Pushf | Mnemonic::Pushfd | Mnemonic::Pushfq => ALL,
        _ => iced(instruction.rflags_read()),
    }
}

/// Whether `instruction` may leave its result undefined.
pub(crate) fn may_leave_result(instruction: &Instruction) -> bool {
    matches!(instruction.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd)
        && size(instruction) == 16
        && immediate_count(instruction).is_none_or(|count| count > 16)
}

/// The table. `count` is that of a shift or rotation, which is not 0.
fn undefined(instruction: &Instruction, count: Option<u32>) -> u64 {
    use Mnemonic as M;
    let count = count.unwrap_or(1);
    let beyond_one = if count > 1 { OF } else { 0 };
    match instruction.mnemonic() {
        M::And | M::Or | M::Xor | M::Test => AF,
        M::Mul | M::Imul => SF | ZF | AF | PF,
        M::Div | M::Idiv => ALL,
        M::Shl | M::Sal | M::Shr => {
            let carry = if count >= size(instruction) { CF } else { 0 };
            AF | beyond_one | carry
        }
        M::Sar => AF | beyond_one,
        M::Rol | M::Ror | M::Rcl | M::Rcr => beyond_one,
        M::Shld | M::Shrd if count > size(instruction) => ALL,
        M::Shld | M::Shrd => AF | beyond_one,
        M::Bsf | M::Bsr => CF | OF | SF | AF | PF,
        M::Bt | M::Btc | M::Btr | M::Bts | M::Lzcnt | M::Tzcnt => OF | SF | AF | PF,
        M::Andn | M::Blsi | M::Blsmsk | M::Blsr | M::Bzhi => AF | PF,
        M::Bextr => SF | AF | PF,
        M::Aaa | M::Aas => OF | SF | ZF | PF,
        M::Aad | M::Aam => OF | AF | CF,
        M::Daa | M::Das => OF,
        _ => 0,
    }
}

/// Status flags that `instruction` writes where it writes any.
fn written(instruction: &Instruction) -> u64 {
    iced(instruction.rflags_modified())
}

/// The kind of operand that is the count, if `instruction` shifts or rotates.
fn count_operand(instruction: &Instruction) -> Option<OpKind> {
    use Mnemonic as M;
    match instruction.mnemonic() {
        M::Rol | M::Ror | M::Rcl | M::Rcr | M::Shl | M::Sal | M::Shr | M::Sar => Some(instruction.op1_kind()),
        M::Shld | M::Shrd => Some(instruction.op2_kind()),
        _ => None,
    }
}

fn immediate_count(instruction: &Instruction) -> Option<u32> {
    matches!(count_operand(instruction), Some(OpKind::Immediate8))
        .then(|| masked(instruction, u64::from(instruction.immediate8())))
}

/// The count of a shift or rotation as it is executed.
fn count(instruction: &Instruction, before: &Registers) -> Option<u32> {
    match count_operand(instruction)? {
        OpKind::Register => {
            let [_, rcx, ..] = before.general;
            Some(masked(instruction, rcx))
        }
        _ => immediate_count(instruction),
    }
}

fn masked(instruction: &Instruction, count: u64) -> u32 {
    let mask = if size(instruction) == 64 { 0x3f } else { 0x1f };
    // Six bits at most.
    u32::try_from(count & mask).unwrap_or(0)
}

/// Bits of the first operand.
fn size(instruction: &Instruction) -> u32 {
    let bytes = match instruction.op0_kind() {
        OpKind::Register => instruction.op0_register().size(),
        _ => instruction.memory_size().size(),
    };
    u32::try_from(8 * bytes).unwrap_or(64)
}

/// Whether `instruction` is repeated no times.
fn is_idle(instruction: &Instruction, before: &Registers) -> bool {
    if !instruction.is_string_instruction()
        || !(instruction.has_rep_prefix() || instruction.has_repne_prefix())
    {
        return false;
    }
    let address = [instruction.op0_kind(), instruction.op1_kind()];
    let mask = match address {
        [OpKind::MemorySegSI | OpKind::MemoryESDI, _] | [_, OpKind::MemorySegSI | OpKind::MemoryESDI] => {
            0xffff
        }
        [OpKind::MemorySegESI | OpKind::MemoryESEDI, _] | [_, OpKind::MemorySegESI | OpKind::MemoryESEDI] => {
            0xffff_ffff
        }
        _ => u64::MAX,
    };
    before.general.get(RCX).is_some_and(|rcx| rcx & mask == 0)
}

/// Status flags among iced's bits.
fn iced(bits: u32) -> u64 {
    use iced_x86::RflagsBits as B;
    [(B::CF, CF), (B::PF, PF), (B::AF, AF), (B::ZF, ZF), (B::SF, SF), (B::OF, OF)]
        .into_iter()
        .filter(|(bit, _)| bits & bit != 0)
        .fold(0, |flags, (_, flag)| flags | flag)
}

#[cfg(test)]
mod tests {
    use iced_x86::{Code, EncodingKind, Register};

    use super::*;
    use crate::forms::is_beyond;

    fn of(code: Code) -> Instruction {
        let mut instruction = Instruction::new();
        instruction.set_code(code);
        if let [_, second, ..] = code.op_code().op_kinds() {
            // As if all were in memory, with a count that is given by CL or an immediate.
            let kind = match second {
                iced_x86::OpCodeOperandKind::cl => OpKind::Register,
                _ => OpKind::Immediate8,
            };
            instruction.set_op0_kind(OpKind::Memory);
            instruction.set_op1_kind(kind);
        }
        instruction
    }

    #[test]
    fn iced_leaves_open_what_the_table_does() {
        let codes = Code::values().filter(|code| {
            !is_beyond(*code) && matches!(code.op_code().encoding(), EncodingKind::Legacy | EncodingKind::VEX)
        });
        let mut others = Vec::new();
        for code in
            codes.filter(|code| code.op_code().decoder_option() == 0 && !code.op_code().is_privileged())
        {
            let instruction = of(code);
            if count_operand(&instruction).is_some() {
                continue;
            }
            let theirs = iced(instruction.rflags_undefined());
            if possible(&instruction) != theirs {
                others.push((code, possible(&instruction), theirs));
            }
        }
        assert!(others.is_empty(), "{others:x?}");
    }

    #[test]
    fn counts_decide() {
        let mut before = Registers { general: [0; 16], rflags: 0, fs_base: 0, gs_base: 0, fxsave: [0; 512] };
        let shift = Instruction::with2(Code::Shl_rm8_CL, Register::AL, Register::CL).unwrap();
        for (count, flags) in [(0, 0), (1, AF), (2, AF | OF), (8, AF | OF | CF), (0x20, 0), (0x121, AF)] {
            before.general[RCX] = count;
            assert_eq!(super::flags(&shift, &before).undefined, flags, "{count:#x}");
        }
        let double = Instruction::with3(Code::Shld_rm16_r16_imm8, Register::AX, Register::BX, 17).unwrap();
        assert!(is_result_undefined(&double, &before) && may_leave_result(&double));
        let double = Instruction::with3(Code::Shld_rm16_r16_imm8, Register::AX, Register::BX, 16).unwrap();
        assert!(!is_result_undefined(&double, &before) && !may_leave_result(&double));
    }

    #[test]
    fn a_shift_by_nothing_leaves_open_what_was() {
        let mut before = Registers { general: [0; 16], rflags: 0, fs_base: 0, gs_base: 0, fxsave: [0; 512] };
        let shift = Instruction::with2(Code::Shl_rm32_CL, Register::EAX, Register::CL).unwrap();
        assert_eq!(flags(&shift, &before).carry(OF | AF), OF | AF);
        before.general[RCX] = 1;
        assert_eq!(flags(&shift, &before).carry(OF | AF | ZF), AF);
    }
}
