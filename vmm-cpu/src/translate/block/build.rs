//! Decodes a block.

use iced_x86::{Decoder, DecoderOptions, Instruction};

use super::{Block, MAX_OPS};
use crate::translate::core::{Flow, Machine, Place};
use crate::translate::memory::{Access, PAGE, PAGE_MASK};
use crate::translate::ops::{self, Lowered, Op};

/// Longest instruction in bytes (Intel SDM 2A 2.3.11).
const MAX_INSTRUCTION: usize = 15;

/// How this processor decodes, which CPUID says is AMD's: with an operand size of 16 bits for near branches of 64-bit code,
/// and none of 64 bits for far pointers in memory.
pub(crate) const DECODING: u32 = DecoderOptions::AMD;

/// Decodes the block at linear address `va`, whose first byte lies at `gpa`.
///
/// # Errors
/// If the first instruction crosses into a page that cannot be fetched, is too long, or lies in no memory.
pub(crate) fn build(m: &mut Machine<'_>, va: u64, gpa: u64) -> Flow<Block> {
    let code_bits = m.mode.code_bits;
    // Whole quadwords, since another vCPU may change the instructions in one of them by one store (AMD APM 2, 7.6.1).
    let skipped = gpa % 8;
    let first = gpa - skipped;
    let room = usize::try_from(PAGE - (first & !PAGE_MASK)).unwrap_or(0);
    let mut page = [0; MAX_OPS * MAX_INSTRUCTION + 8];
    let (bytes, _) = page.split_at_mut(room.min(MAX_OPS * MAX_INSTRUCTION + 8));
    if !m.map().read(first, bytes) {
        return Err(m.unhandled(format!("code at guest-physical {gpa:#x}, where there is no memory")));
    }
    let bytes = bytes.get(usize::try_from(skipped).unwrap_or(0)..).unwrap_or_default();
    let mut list = Vec::with_capacity(8);
    let mut decoder = Decoder::with_ip(code_bits, bytes, 0, DECODING);
    let mut length = 0;
    while decoder.can_decode() && list.len() < MAX_OPS {
        let start = decoder.position();
        let instruction = decoder.decode();
        let incomplete = decoder.last_error() == iced_x86::DecoderError::NoMoreBytes;
        if incomplete && list.is_empty() {
            if bytes.len() >= MAX_INSTRUCTION {
                // As many bytes as an instruction can have, and it is longer.
                return Err(m.gp(0));
            }
            return crossing(m, va, gpa, bytes);
        }
        if incomplete {
            break;
        }
        let code = bytes.get(start..decoder.position()).unwrap_or_default();
        let lowered = lower(m, &instruction, code, u16::try_from(start).unwrap_or(u16::MAX));
        if lowered.is_far && !list.is_empty() {
            break;
        }
        list.push(lowered.op);
        length = decoder.position();
        if lowered.ends_block {
            break;
        }
    }
    let code = bytes.get(..length).unwrap_or_default();
    Ok(Block { ops: list.into(), bytes: code.into(), gpa, second_page: None, code_bits })
}

/// What becomes of an instruction. The decoder says of a longer one than there can be that it is invalid and has as many
/// bytes as there can be.
fn lower(m: &mut Machine<'_>, instruction: &Instruction, code: &[u8], start: u16) -> Lowered {
    if instruction.is_invalid() && instruction.len() >= MAX_INSTRUCTION {
        return Lowered { op: Op::new(too_long, start), is_far: false, ends_block: true };
    }
    let code_bits = m.mode.code_bits;
    ops::lower(m, instruction, code, start, code_bits)
}

/// #GP(0) of an instruction of more than 15 bytes.
fn too_long(m: &mut Machine<'_>, _: &Op) -> Flow {
    Err(m.gp(0))
}

/// A block of one instruction that continues in the next page.
fn crossing(m: &mut Machine<'_>, va: u64, gpa: u64, first: &[u8]) -> Flow<Block> {
    let code_bits = m.mode.code_bits;
    let next = va.wrapping_add(first.len() as u64) & if code_bits == 64 { u64::MAX } else { 0xffff_ffff };
    let second_page = m.translate(Place::data(next), Access::Execute)?.gpa;
    // Before its bytes are looked at, as the first page.
    m.watch_code(second_page);
    let mut bytes = [0; MAX_INSTRUCTION];
    let (here, there) = bytes.split_at_mut(first.len().min(MAX_INSTRUCTION));
    here.copy_from_slice(first);
    if !m.map().read(second_page, there) {
        return Err(m.unhandled(format!("code at guest-physical {second_page:#x}, where there is no memory")));
    }
    let mut decoder = Decoder::with_ip(code_bits, &bytes, 0, DECODING);
    let instruction = decoder.decode();
    let code = bytes.get(..instruction.len()).unwrap_or_default();
    let lowered = lower(m, &instruction, code, 0);
    Ok(Block { ops: [lowered.op].into(), bytes: code.into(), gpa, second_page: Some(second_page), code_bits })
}
