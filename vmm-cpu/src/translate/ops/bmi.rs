//! BMI1 and BMI2: VEX-coded, but on general registers.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::op::{Handler, Op, operand_bytes, register_slot};
use crate::translate::core::{Flow, Machine};
use crate::translate::cpu::RDX;
use crate::translate::flags::bits;
use crate::translate::segment::{low8, low32};
use crate::translate::vector::{
    Flagged, Width, andn, bextr, blsi, blsmsk, blsr, bzhi, mulx, pdep, pext, rorx, sarx, shlx, shrx,
};

/// Operand `n`, zero-extended.
fn operand(m: &mut Machine<'_>, op: &Op, instruction: &Instruction, n: u32) -> Flow<u64> {
    match instruction.op_kind(n) {
        OpKind::Register => {
            let value = m.cpu.r(register_slot(instruction.op_register(n)));
            Ok(if operand_bytes(instruction, n) == 8 { value } else { u64::from(low32(value)) })
        }
        OpKind::Memory => {
            let bytes = operand_bytes(instruction, n);
            let place = m.place(op, bytes, false)?;
            if bytes == 8 { m.load::<u64>(place) } else { Ok(m.load::<u32>(place)?.into()) }
        }
        _ => Ok(instruction.immediate(n)),
    }
}

fn run(m: &mut Machine<'_>, op: &Op) -> Flow {
    use Mnemonic as M;
    let instruction = m.rare(op);
    if !m.cpu.protected() || m.cpu.virtual_8086() {
        return Err(m.ud());
    }
    let width = if operand_bytes(&instruction, 0) == 8 { Width::Qword } else { Width::Dword };
    let a = operand(m, op, &instruction, 1)?;
    let b = if instruction.op_count() > 2 { operand(m, op, &instruction, 2)? } else { 0 };
    let flagged = |Flagged { value, status }| (value, Some(status));
    let (value, status) = match instruction.mnemonic() {
        M::Andn => flagged(andn(a, b, width)),
        M::Bextr => flagged(bextr(a, b, width)),
        M::Blsi => flagged(blsi(a, width)),
        M::Blsmsk => flagged(blsmsk(a, width)),
        M::Blsr => flagged(blsr(a, width)),
        M::Bzhi => flagged(bzhi(a, b, width)),
        M::Pdep => (pdep(a, b, width), None),
        M::Pext => (pext(a, b, width), None),
        M::Rorx => (rorx(a, low8(b), width), None),
        M::Sarx => (sarx(a, b, width), None),
        M::Shlx => (shlx(a, b, width), None),
        M::Shrx => (shrx(a, b, width), None),
        _ => {
            let (high, low) = mulx(m.cpu.r(RDX), b, width);
            // If both are one register, it holds the high half.
            m.cpu.set_r(register_slot(instruction.op1_register()), low);
            (high, None)
        }
    };
    m.cpu.set_r(register_slot(instruction.op0_register()), value);
    if let Some(status) = status {
        // Those that are undefined are as on AMD's Zen 5.
        let parity = bits::of(value.to_le_bytes()[0].count_ones().is_multiple_of(2), bits::PF);
        let adjust = bits::of(instruction.mnemonic() == M::Bextr, bits::AF);
        m.cpu.flags.replace_status(bits::STATUS, status & !(bits::PF | bits::AF) | parity | adjust);
    }
    Ok(())
}

/// The handler of an instruction of this family and whether it ends its block, `None` for others.
pub(super) fn lower(instruction: &Instruction) -> Option<(Handler, bool)> {
    use Mnemonic as M;
    let is_general = instruction.op0_kind() == OpKind::Register && instruction.op0_register().is_gpr();
    let known = matches!(
        instruction.mnemonic(),
        M::Andn
            | M::Bextr
            | M::Blsi
            | M::Blsmsk
            | M::Blsr
            | M::Bzhi
            | M::Mulx
            | M::Pdep
            | M::Pext
            | M::Rorx
            | M::Sarx
            | M::Shlx
            | M::Shrx
    );
    let is_vex = instruction.code().encoding() == iced_x86::EncodingKind::VEX;
    (known && is_general && is_vex).then_some((run as Handler, false))
}
