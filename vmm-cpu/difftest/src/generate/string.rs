//! String instructions: addresses, counts and directions.

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::builder::{Builder, RCX};
use super::implicit::STRING;
use super::values::Element;

/// Decides on REP, RCX, RSI and RDI.
pub(super) fn arrange(builder: &mut Builder<'_>, instruction: &mut Instruction) {
    let size = element(instruction);
    let compares = matches!(
        instruction.mnemonic(),
        Mnemonic::Cmpsb
            | Mnemonic::Cmpsw
            | Mnemonic::Cmpsd
            | Mnemonic::Cmpsq
            | Mnemonic::Scasb
            | Mnemonic::Scasw
            | Mnemonic::Scasd
            | Mnemonic::Scasq
    );
    match builder.random.u8(..16) {
        0..=6 => instruction.set_has_rep_prefix(true),
        7..=9 if compares => instruction.set_has_repne_prefix(true),
        7 => instruction.set_has_repne_prefix(true),
        _ => {}
    }
    let is_repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
    let count = match builder.random.u8(..16) {
        _ if !is_repeated => 1,
        0 => 0,
        1 => builder.random.u64(0x200..0x1000),
        2..=4 => builder.random.u64(9..80),
        _ => builder.random.u64(1..9),
    };
    if is_repeated {
        // An address size of 32 bits counts in ECX alone.
        let is_narrow = matches!(
            (instruction.op0_kind(), instruction.op1_kind()),
            (OpKind::MemoryESEDI | OpKind::MemorySegESI, _) | (_, OpKind::MemoryESEDI | OpKind::MemorySegESI)
        );
        let above = if is_narrow { builder.random.u64(..) << 32 } else { 0 };
        builder.fix(RCX, count | above);
    }

    let span = (size * count.max(1)).min(0x1800);
    let mut first = None;
    for (place, register) in operands(instruction) {
        let base = if place == 0 { segment(builder, instruction) } else { 0 };
        let mut address = builder.aim(span, 1);
        if let Some(other) = first.filter(|_| builder.one_in(5)) {
            address = builder.random.u64(..2 * span + 8).wrapping_add(other).wrapping_sub(span + 4);
        }
        first = Some(address);
        if compares && builder.random.bool() {
            // Equal in places.
            let bytes = Element::Text.vector(builder.random);
            let byte = builder.pick(&bytes, 0);
            let bytes = if builder.random.bool() { bytes.to_vec() } else { vec![byte; 16] };
            builder.put(address, bytes);
        }
        let start = if builder.backward { address.wrapping_add(span - size) } else { address };
        builder.fix(register, start.wrapping_sub(base));
    }
}

/// RSI and RDI as far as they are used, by place in [`STRING`].
fn operands(instruction: &Instruction) -> Vec<(usize, usize)> {
    let [source, destination] = STRING;
    let mut operands = Vec::new();
    for kind in [instruction.op0_kind(), instruction.op1_kind()] {
        match kind {
            OpKind::MemorySegRSI | OpKind::MemorySegESI | OpKind::MemorySegSI => operands.push((0, source)),
            OpKind::MemoryESRDI | OpKind::MemoryESEDI | OpKind::MemoryESDI => operands.push((1, destination)),
            _ => {}
        }
    }
    operands
}

fn element(instruction: &Instruction) -> u64 {
    u64::try_from(instruction.memory_size().size()).unwrap_or(1).max(1)
}

/// A segment prefix for the source.
fn segment(builder: &mut Builder<'_>, instruction: &mut Instruction) -> u64 {
    let [fs, gs] = builder.bases;
    let (prefix, base) = match builder.random.u8(..24) {
        0 => (Register::FS, fs),
        1 => (Register::GS, gs),
        2 => (Register::ES, 0),
        _ => return 0,
    };
    instruction.set_segment_prefix(prefix);
    base
}
