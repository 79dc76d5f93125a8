//! The instructions. Each module lowers those of its family: it picks the handler and puts the operands where the
//! handler wants them. Handlers change nothing before the last thing that can fault.

mod alu;
mod bcd;
mod bits;
mod bmi;
mod branch;
mod far;
mod io;
mod misc;
mod mov;
mod muldiv;
mod op;
mod shift;
mod simd;
mod string;
mod system;
mod x87;

use iced_x86::{Instruction, Mnemonic};

pub(crate) use op::{Handler, Op, implicit_segment, segment_slot};
pub(crate) use simd::Tables;

use self::op::is_invalid;
use super::core::{Core, Flow, Machine};

/// The instance of a generic handler for operands of that many bytes.
macro_rules! by_width {
    ($bytes:expr, $handler:ident $(, $operation:ty)*) => {
        match $bytes {
            1 => $handler::<u8 $(, $operation)*> as $crate::translate::ops::Handler,
            2 => $handler::<u16 $(, $operation)*>,
            4 => $handler::<u32 $(, $operation)*>,
            _ => $handler::<u64 $(, $operation)*>,
        }
    };
}
use by_width;

/// What a family makes of an instruction.
pub(crate) struct Lowered {
    pub(crate) op: Op,
    /// Its memory operand is too far from the block's start: it begins a block of its own.
    pub(crate) is_far: bool,
    /// Nothing can follow in the same block.
    pub(crate) ends_block: bool,
}

/// Lowers an instruction that was decoded from `bytes` at offset `start` of a block of code of that width.
pub(crate) fn lower(
    core: &mut Core,
    instruction: &Instruction,
    bytes: &[u8],
    start: u16,
    code_bits: u32,
) -> Lowered {
    let mut op = Op::new(undefined, start);
    let (mut ends_block, mut is_far) = (true, false);
    if !is_invalid(instruction) {
        let fits = op.take_memory(instruction, code_bits);
        if !fits {
            // Only MOV of the accumulator has absolute 64-bit addresses.
            match mov::lower_absolute(instruction, &mut op) {
                Some(run) => {
                    op.run = run;
                    ends_block = false;
                }
                None => {
                    op.run = too_far;
                    is_far = true;
                }
            }
        } else if let Some(run) = plain(instruction, &mut op) {
            op.run = run;
            ends_block = false;
        } else if let Some(run) = branch::lower(instruction, &mut op, code_bits) {
            op.run = run;
        } else if let Some((run, ends)) = rare(instruction) {
            op.run = run;
            op.imm = core.keep_rare(*instruction);
            x87::note_opcode(instruction, bytes, &mut op);
            far::note_width(instruction, bytes, &mut op);
            ends_block = ends;
        }
    }
    Lowered { op, is_far, ends_block }
}

/// Instructions that go on with the next one.
fn plain(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    if instruction.has_lock_prefix() && !may_lock(instruction) {
        return None;
    }
    alu::lower(instruction, op)
        .or_else(|| mov::lower(instruction, op))
        .or_else(|| shift::lower(instruction, op))
        .or_else(|| bits::lower(instruction, op))
        .or_else(|| muldiv::lower(instruction, op))
        .or_else(|| misc::lower(instruction, op))
        .or_else(|| simd::lower(instruction, op))
}

/// Instructions whose handlers look at the decoded form again, and whether they end their block.
fn rare(instruction: &Instruction) -> Option<(Handler, bool)> {
    if instruction.has_lock_prefix() && !may_lock(instruction) {
        return None;
    }
    string::lower(instruction)
        .or_else(|| far::lower(instruction))
        .or_else(|| system::lower(instruction))
        .or_else(|| io::lower(instruction))
        .or_else(|| bcd::lower(instruction))
        .or_else(|| bmi::lower(instruction))
        .or_else(|| x87::lower(instruction))
        .or_else(|| simd::lower_rare(instruction))
}

/// Whether LOCK is no #UD: a memory destination, and one of the instructions of Intel SDM 2A, "LOCK". The decoder sees
/// to most of it.
fn may_lock(instruction: &Instruction) -> bool {
    use Mnemonic as M;
    instruction.op0_kind() == iced_x86::OpKind::Memory
        && matches!(
            instruction.mnemonic(),
            M::Add
                | M::Or
                | M::Adc
                | M::Sbb
                | M::And
                | M::Sub
                | M::Xor
                | M::Not
                | M::Neg
                | M::Inc
                | M::Dec
                | M::Bts
                | M::Btr
                | M::Btc
                | M::Xchg
                | M::Xadd
                | M::Cmpxchg
                | M::Cmpxchg8b
                | M::Cmpxchg16b
        )
}

/// The last bytes that a RIP-relative address can reach.
fn too_far(m: &mut Machine<'_>, _: &Op) -> Flow {
    Err(m.unhandled("a RIP-relative address at the very end of its range"))
}

/// What does not exist.
fn undefined(m: &mut Machine<'_>, _: &Op) -> Flow {
    Err(m.ud())
}

impl Core {
    /// Keeps an instruction for its handler.
    fn keep_rare(&mut self, instruction: Instruction) -> u64 {
        self.rare.push(instruction);
        self.rare.len() as u64 - 1
    }

    /// The instruction behind an operation of [`rare`].
    pub(crate) fn rare(&self, op: &Op) -> Instruction {
        let instruction = usize::try_from(op.imm).ok().and_then(|index| self.rare.get(index));
        instruction.copied().unwrap_or_default()
    }
}
