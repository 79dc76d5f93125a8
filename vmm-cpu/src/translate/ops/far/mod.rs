//! What changes segments, privilege and the interrupt flag: segment loads, far branches and returns, software interrupts,
//! system calls, descriptor tables, and the flags register as a whole.

mod flags;
mod interrupt;
mod leave;
mod segment;
mod syscall;
mod table;
mod transfer;

use iced_x86::Instruction;

pub(super) use transfer::note_width;

use super::op::Handler;

/// The handler of an instruction of this family and whether it ends its block, `None` for others.
pub(super) fn lower(instruction: &Instruction) -> Option<(Handler, bool)> {
    flags::lower(instruction)
        .or_else(|| segment::lower(instruction))
        .or_else(|| syscall::lower(instruction))
        .or_else(|| leave::lower(instruction))
        .or_else(|| interrupt::lower(instruction))
        .or_else(|| transfer::lower(instruction))
        .or_else(|| table::lower(instruction))
}

#[cfg(test)]
mod tests;
