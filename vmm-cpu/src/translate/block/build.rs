//! Decodes a block.

use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction, InstructionInfoFactory, OpAccess};

use super::length::{MAX_INSTRUCTION, is_cut_off, is_too_long, is_ud1};
use super::{Block, MAX_OPS};
use crate::translate::code_stores::Watch;
use crate::translate::core::{Flow, Machine, Place};
use crate::translate::memory::{Access, PAGE, PAGE_MASK};
use crate::translate::ops::{self, Lowered, Op};

/// How this processor decodes, which CPUID says is AMD's: with an operand size of 16 bits for near branches of 64-bit code,
/// and none of 64 bits for far pointers in memory. The prefix that makes WBINVD another instruction is ignored where that
/// is not offered.
pub(crate) const DECODING: u32 = DecoderOptions::AMD | DecoderOptions::NO_WBNOINVD;

/// Decodes the block at linear address `va`, whose first byte lies at `gpa`, in a page that is watched like that.
///
/// # Errors
/// If the first instruction crosses into a page that cannot be fetched, is too long, or lies in no memory.
pub(crate) fn build(m: &mut Machine<'_>, va: u64, gpa: u64, watch: Watch) -> Flow<Block> {
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
    let checked = watch == Watch::Checked;
    let mut info = checked.then(InstructionInfoFactory::new);
    let mut list = Vec::with_capacity(8);
    let mut decoder = Decoder::with_ip(code_bits, bytes, 0, DECODING);
    let mut length = 0;
    while decoder.can_decode() && list.len() < MAX_OPS {
        let start = decoder.position();
        let instruction = decoder.decode();
        let rest = bytes.get(start..).unwrap_or_default();
        let incomplete = match decoder.last_error() {
            DecoderError::NoMoreBytes => !is_ud1(rest, code_bits),
            _ => instruction.is_invalid() && is_cut_off(rest, code_bits),
        };
        if incomplete && list.is_empty() {
            if bytes.len() >= MAX_INSTRUCTION {
                // As many bytes as an instruction can have, and it is longer.
                return Err(m.gp(0));
            }
            return crossing(m, va, gpa, bytes, watch);
        }
        if incomplete {
            break;
        }
        let lowered = lower(m, &instruction, rest, u16::try_from(start).unwrap_or(u16::MAX));
        if lowered.is_far && !list.is_empty() {
            break;
        }
        list.push(lowered.op);
        length = decoder.position();
        if lowered.ends_block || info.as_mut().is_some_and(|info| may_store(info, &instruction)) {
            break;
        }
    }
    let code = bytes.get(..length).unwrap_or_default();
    Ok(Block { ops: list.into(), bytes: code.into(), gpa, second_page: None, code_bits, checked, runs: 0 })
}

/// Whether an instruction may store something.
fn may_store(info: &mut InstructionInfoFactory, instruction: &Instruction) -> bool {
    let reads = |access| matches!(access, OpAccess::Read | OpAccess::CondRead | OpAccess::NoMemAccess);
    info.info(instruction).used_memory().iter().any(|used| !reads(used.access()))
}

/// What becomes of an instruction, with which `rest` begins.
fn lower(m: &mut Machine<'_>, instruction: &Instruction, rest: &[u8], start: u16) -> Lowered {
    let code = rest.get(..instruction.len()).unwrap_or_default();
    if instruction.is_invalid() && rest.len() >= MAX_INSTRUCTION && is_too_long(rest, m.mode.code_bits) {
        return Lowered { op: Op::new(too_long, start), is_far: false, ends_block: true };
    }
    let code_bits = m.mode.code_bits;
    match exchange(instruction, code, code_bits) {
        Some(exchange) => ops::lower(m, &exchange, code, start, code_bits),
        None => ops::lower(m, instruction, code, start, code_bits),
    }
}

/// What PAUSE is with REX.B: an exchange of the accumulator with R8 of which the F3 prefix is ignored.
fn exchange(instruction: &Instruction, code: &[u8], code_bits: u32) -> Option<Instruction> {
    let [.., 0x41 | 0x43 | 0x45 | 0x47 | 0x49 | 0x4b | 0x4d | 0x4f, 0x90] = code else { return None };
    if instruction.code() != Code::Pause || code_bits != 64 {
        return None;
    }
    let plain: Vec<u8> =
        code.iter().map(|byte| if matches!(byte, 0xf2 | 0xf3) { 0x3e } else { *byte }).collect();
    Some(Decoder::with_ip(code_bits, &plain, 0, DECODING).decode())
}

/// #GP(0) of an instruction of more than 15 bytes.
fn too_long(m: &mut Machine<'_>, _: &Op) -> Flow {
    Err(m.gp(0))
}

/// A block of one instruction that continues in the next page.
fn crossing(m: &mut Machine<'_>, va: u64, gpa: u64, first: &[u8], watch: Watch) -> Flow<Block> {
    let code_bits = m.mode.code_bits;
    let next = va.wrapping_add(first.len() as u64) & if code_bits == 64 { u64::MAX } else { 0xffff_ffff };
    let second_page = m.translate(Place::data(next), Access::Execute)?.gpa;
    // Before its bytes are looked at, as the first page.
    let watch = watch.max(m.watch_code(second_page));
    let mut bytes = [0; MAX_INSTRUCTION];
    let (here, there) = bytes.split_at_mut(first.len().min(MAX_INSTRUCTION));
    here.copy_from_slice(first);
    if !m.map().read(second_page, there) {
        return Err(m.unhandled(format!("code at guest-physical {second_page:#x}, where there is no memory")));
    }
    let mut decoder = Decoder::with_ip(code_bits, &bytes, 0, DECODING);
    let instruction = decoder.decode();
    let code = bytes.get(..instruction.len()).unwrap_or_default();
    let lowered = lower(m, &instruction, &bytes, 0);
    Ok(Block {
        ops: [lowered.op].into(),
        bytes: code.into(),
        gpa,
        second_page: Some(second_page),
        code_bits,
        checked: watch == Watch::Checked,
        runs: 0,
    })
}
