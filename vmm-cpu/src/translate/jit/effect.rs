//! What instructions do with the status flags, as far as the translator has to know.

use iced_x86::{Instruction, Mnemonic, OpKind, Register, RflagsBits};

/// The six status flags in iced's numbering.
const STATUS: u32 =
    RflagsBits::OF | RflagsBits::SF | RflagsBits::ZF | RflagsBits::AF | RflagsBits::CF | RflagsBits::PF;

/// What an instruction makes of the status flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Effect {
    /// Nothing.
    None,
    /// Those that it leaves do not depend on those before.
    Overwrites,
    /// It depends on some, or leaves some as they were.
    Reads,
}

/// What `instruction` makes of them when the host executes it.
pub(super) fn effect(instruction: &Instruction) -> Effect {
    let read = instruction.rflags_read() & STATUS;
    let modified = instruction.rflags_modified() & STATUS;
    if read == 0 && modified == 0 {
        Effect::None
    } else if read != 0 || modified != STATUS || keeps_some(instruction) {
        Effect::Reads
    } else {
        Effect::Overwrites
    }
}

/// Whether it does something else if status flags are others, not counting those that it keeps.
pub(super) fn reads_status(instruction: &Instruction) -> bool {
    instruction.rflags_read() & STATUS != 0
}

/// Whether flags may stay as they were that the manuals call undefined, or those of a shift by zero.
fn keeps_some(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    match instruction.mnemonic() {
        M::Mul
        | M::Imul
        | M::Div
        | M::Idiv
        | M::Bt
        | M::Btc
        | M::Btr
        | M::Bts
        | M::Bsf
        | M::Bsr
        | M::Lzcnt
        | M::Tzcnt
        | M::Bextr
        | M::Bzhi => true,
        M::Shl | M::Sal | M::Shr | M::Sar | M::Shld | M::Shrd | M::Rcl | M::Rcr | M::Rol | M::Ror => {
            let count = instruction.op_count() - 1;
            match instruction.op_kind(count) {
                OpKind::Immediate8 => instruction.immediate(count) & 31 == 0,
                _ => instruction.op_register(count) == Register::CL,
            }
        }
        _ => false,
    }
}

/// Whether an access to memory comes with it.
pub(super) fn accesses_memory(instruction: &Instruction) -> bool {
    if matches!(instruction.mnemonic(), Mnemonic::Lea | Mnemonic::Nop) || is_prefetch(instruction) {
        return false;
    }
    instruction.is_stack_instruction()
        || (0..instruction.op_count()).any(|n| {
            !matches!(
                instruction.op_kind(n),
                OpKind::Register
                    | OpKind::NearBranch16
                    | OpKind::NearBranch32
                    | OpKind::NearBranch64
                    | OpKind::Immediate8
                    | OpKind::Immediate8_2nd
                    | OpKind::Immediate16
                    | OpKind::Immediate32
                    | OpKind::Immediate64
                    | OpKind::Immediate8to16
                    | OpKind::Immediate8to32
                    | OpKind::Immediate8to64
                    | OpKind::Immediate32to64
            )
        })
}

/// Whether it is a hint that touches no memory as far as a program can tell.
pub(super) fn is_prefetch(instruction: &Instruction) -> bool {
    matches!(
        instruction.mnemonic(),
        Mnemonic::Prefetchnta
            | Mnemonic::Prefetcht0
            | Mnemonic::Prefetcht1
            | Mnemonic::Prefetcht2
            | Mnemonic::Prefetchw
            | Mnemonic::Prefetch
    )
}

#[cfg(test)]
mod tests {
    use iced_x86::{Decoder, DecoderOptions};

    use super::*;

    fn of(bytes: &[u8]) -> Effect {
        effect(&Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode())
    }

    #[test]
    fn flags_that_stay_are_read() {
        // ADD, XOR, TEST, SHL by 3, SHR by 1.
        for bytes in [&[0x01, 0xd8][..], &[0x31, 0xd8], &[0x85, 0xd8], &[0xc1, 0xe0, 3], &[0xd1, 0xe8]] {
            assert_eq!(of(bytes), Effect::Overwrites, "{bytes:x?}");
        }
        // INC, ADC, SHL by CL, BT, IMUL, SETE, JE, CMC.
        for bytes in [
            &[0xff, 0xc0][..],
            &[0x11, 0xd8],
            &[0xd3, 0xe0],
            &[0x0f, 0xa3, 0xd8],
            &[0x0f, 0xaf, 0xc3],
            &[0x0f, 0x94, 0xc0],
            &[0x74, 0],
            &[0xf5],
        ] {
            assert_eq!(of(bytes), Effect::Reads, "{bytes:x?}");
        }
        // MOV, NOT, LEA, SHL by 32.
        for bytes in [&[0x89, 0xd8][..], &[0xf7, 0xd0], &[0x8d, 0x03], &[0xc1, 0xe0, 32]] {
            assert_eq!(of(bytes), Effect::None, "{bytes:x?}");
        }
    }

    #[test]
    fn hints_and_addresses_are_no_accesses() {
        let accesses =
            |bytes: &[u8]| accesses_memory(&Decoder::with_ip(64, bytes, 0, DecoderOptions::NONE).decode());
        // MOV to memory, PUSH, RET, MOVSB, CALL.
        for bytes in [&[0x89, 0x18][..], &[0x50], &[0xc3], &[0xa4], &[0xe8, 0, 0, 0, 0]] {
            assert!(accesses(bytes), "{bytes:x?}");
        }
        // LEA, MOV, JMP, NOP, PREFETCHT0.
        for bytes in [&[0x8d, 0x03][..], &[0x89, 0xd8], &[0xeb, 0], &[0x0f, 0x1f, 0], &[0x0f, 0x18, 0x08]] {
            assert!(!accesses(bytes), "{bytes:x?}");
        }
    }
}
