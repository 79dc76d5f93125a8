//! MMX, and SSE instructions that touch general registers or flags.

use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{is_from_mmx, is_mmx, is_sha, is_xmm, number, trailing_immediate};
use crate::translate::core::{Flow, Machine};
use crate::translate::cpu::{RAX, RCX, RDI, RDX};
use crate::translate::flags::bits;
use crate::translate::float;
use crate::translate::memory::Access;
use crate::translate::ops::op::{Handler, Op, operand_bytes, register_slot};
use crate::translate::segment::low32;
use crate::translate::vector;
use crate::translate::word::{halves, sign_extend};

/// Operand `n`, zero-extended: a register of any kind, memory, or an immediate.
fn operand(m: &mut Machine<'_>, op: &Op, instruction: &Instruction, n: u32) -> Flow<u128> {
    let bytes = operand_bytes(instruction, n);
    Ok(match instruction.op_kind(n) {
        OpKind::Register => {
            let register = instruction.op_register(n);
            if register.is_xmm() {
                m.cpu.xmm(number(register))
            } else if register.is_mm() {
                m.cpu.x87.mm(number(register)).into()
            } else {
                let value = m.cpu.get::<u64>(register_slot(register) & 31);
                match bytes {
                    8 => value.into(),
                    4 => u64::from(low32(value)).into(),
                    2 => (value & 0xffff).into(),
                    _ => m.cpu.get::<u8>(register_slot(register)).into(),
                }
            }
        }
        OpKind::Memory => {
            let place = m.place(op, bytes, false)?;
            let mnemonic = instruction.mnemonic();
            let must_align = bytes == 16 && !is_string_compare(mnemonic) && !is_sha(mnemonic);
            if must_align && place.va & 15 != 0 {
                return Err(m.gp(0));
            }
            m.load_vector(place, bytes)?
        }
        _ => instruction.immediate8().into(),
    })
}

fn is_string_compare(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Pcmpestri | M::Pcmpestrm | M::Pcmpistri | M::Pcmpistrm | M::Pcmpestri64 | M::Pcmpestrm64
    )
}

/// Writes operand 0, a general register or memory.
fn set_general(m: &mut Machine<'_>, op: &Op, instruction: &Instruction, value: u64) -> Flow {
    let bytes = operand_bytes(instruction, 0);
    if instruction.op0_kind() == OpKind::Register {
        let register = register_slot(instruction.op0_register());
        if bytes == 8 {
            m.cpu.set::<u64>(register, value)
        } else {
            m.cpu.set::<u32>(register, value)
        }
        return Ok(());
    }
    let place = m.place(op, bytes, true)?;
    match bytes {
        8 => m.store::<u64>(place, value),
        4 => m.store::<u32>(place, low32(value)),
        2 => m.store::<u16>(place, crate::translate::segment::low16(value)),
        _ => m.store::<u8>(place, crate::translate::segment::low8(value)),
    }
}

/// An operation with an MMX destination and source.
fn mmx(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    m.enter_mmx()?;
    let Some(operation) = vector::mmx_op(instruction.mnemonic()) else { return Err(m.ud()) };
    let [source, _] = halves(operand(m, op, &instruction, 1)?);
    let register = number(instruction.op0_register());
    let value = operation(m.cpu.x87.mm(register), source, trailing_immediate(&instruction));
    m.cpu.x87.enter_mmx();
    m.cpu.x87.set_mm(register, value);
    Ok(())
}

/// MOVD, MOVQ, MOVNTQ, MOVDQ2Q and MOVQ2DQ with an MMX register.
fn mmx_move(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    m.enter_mmx()?;
    let [value, _] = halves(operand(m, op, &instruction, 1)?);
    if is_mmx(&instruction, 0) {
        m.cpu.x87.enter_mmx();
        m.cpu.x87.set_mm(number(instruction.op0_register()), value);
    } else if is_xmm(&instruction, 0) {
        m.cpu.set_xmm(number(instruction.op0_register()), value.into());
        m.cpu.x87.enter_mmx();
    } else {
        set_general(m, op, &instruction, value)?;
        m.cpu.x87.enter_mmx();
    }
    Ok(())
}

/// Conversions between floating point and the integers of an MMX register.
fn convert_mmx(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    m.check_sse()?;
    // From memory, CVTPI2PD leaves the x87 state alone, and on AMD's processors CVTPI2PS does too.
    let uses_mmx = is_mmx(&instruction, 0) || is_mmx(&instruction, 1);
    if uses_mmx {
        m.enter_mmx()?;
    }
    let Some(operation) = float::float_op(instruction.mnemonic()) else { return Err(m.ud()) };
    let source = operand(m, op, &instruction, 1)?;
    let destination = if is_xmm(&instruction, 0) { m.cpu.xmm(number(instruction.op0_register())) } else { 0 };
    if uses_mmx {
        // Also where the conversion ends in an exception.
        m.cpu.x87.enter_mmx();
    }
    let mut mxcsr = m.cpu.mxcsr;
    let result = operation(destination, source, 0, &mut mxcsr);
    m.cpu.mxcsr = mxcsr;
    let value = match result {
        Ok(value) => value,
        Err(exception) => return Err(m.simd_exception(exception)),
    };
    let register = number(instruction.op0_register());
    if is_xmm(&instruction, 0) {
        m.cpu.set_xmm(register, value);
    } else {
        let [low, _] = halves(value);
        m.cpu.x87.set_mm(register, low);
    }
    Ok(())
}

/// PBLENDVB and the like, with XMM0.
fn masked(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    m.check_sse()?;
    let Some(operation) = vector::masked_op(instruction.mnemonic()) else { return Err(m.ud()) };
    let source = operand(m, op, &instruction, 1)?;
    let register = number(instruction.op0_register());
    let value = operation(m.cpu.xmm(register), source, m.cpu.xmm(0));
    m.cpu.set_xmm(register, value);
    Ok(())
}

fn extract(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    let mnemonic = instruction.mnemonic();
    let imm = trailing_immediate(&instruction);
    let value = if is_mmx(&instruction, 1) {
        m.enter_mmx()?;
        let Some(operation) = vector::mmx_extract(mnemonic) else { return Err(m.ud()) };
        let value = operation(m.cpu.x87.mm(number(instruction.op1_register())), imm);
        m.cpu.x87.enter_mmx();
        value
    } else {
        m.check_sse()?;
        let Some(operation) = vector::xmm_extract(mnemonic) else { return Err(m.ud()) };
        operation(m.cpu.xmm(number(instruction.op1_register())), imm)
    };
    set_general(m, op, &instruction, value)
}

fn insert(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    let mnemonic = instruction.mnemonic();
    let (imm, register) = (trailing_immediate(&instruction), number(instruction.op0_register()));
    if is_mmx(&instruction, 0) {
        m.enter_mmx()?;
        let Some(operation) = vector::mmx_insert(mnemonic) else { return Err(m.ud()) };
        let [source, _] = halves(operand(m, op, &instruction, 1)?);
        let value = operation(m.cpu.x87.mm(register), source, imm);
        m.cpu.x87.enter_mmx();
        m.cpu.x87.set_mm(register, value);
    } else {
        m.check_sse()?;
        let Some(operation) = vector::xmm_insert(mnemonic) else { return Err(m.ud()) };
        let [source, _] = halves(operand(m, op, &instruction, 1)?);
        let value = operation(m.cpu.xmm(register), source, imm);
        m.cpu.set_xmm(register, value);
    }
    Ok(())
}

fn from_integer(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    m.check_sse()?;
    let [source, _] = halves(operand(m, op, &instruction, 1)?);
    let wide = operand_bytes(&instruction, 1) == 8;
    let source = if wide { source } else { sign_extend::<u32>(source) }.cast_signed();
    let register = number(instruction.op0_register());
    let mut mxcsr = m.cpu.mxcsr;
    let destination = m.cpu.xmm(register);
    let result = if instruction.mnemonic() == Mnemonic::Cvtsi2ss {
        float::cvtsi2ss(destination, source, &mut mxcsr)
    } else {
        float::cvtsi2sd(destination, source, &mut mxcsr)
    };
    m.cpu.mxcsr = mxcsr;
    match result {
        Ok(value) => {
            m.cpu.set_xmm(register, value);
            Ok(())
        }
        Err(exception) => Err(m.simd_exception(exception)),
    }
}

fn to_integer(m: &mut Machine<'_>, op: &Op) -> Flow {
    use Mnemonic as M;
    let instruction = m.rare(op);
    m.check_sse()?;
    let source = operand(m, op, &instruction, 1)?;
    let wide = operand_bytes(&instruction, 0) == 8;
    let mnemonic = instruction.mnemonic();
    let truncate = matches!(mnemonic, M::Cvttss2si | M::Cvttsd2si);
    let mut mxcsr = m.cpu.mxcsr;
    let result = if matches!(mnemonic, M::Cvtss2si | M::Cvttss2si) {
        float::cvtss2si(source, truncate, wide, &mut mxcsr)
    } else {
        float::cvtsd2si(source, truncate, wide, &mut mxcsr)
    };
    m.cpu.mxcsr = mxcsr;
    match result {
        Ok(value) => set_general(m, op, &instruction, value),
        Err(exception) => Err(m.simd_exception(exception)),
    }
}

fn compare(m: &mut Machine<'_>, op: &Op) -> Flow {
    use Mnemonic as M;
    let instruction = m.rare(op);
    m.check_sse()?;
    let (a, b) = (operand(m, op, &instruction, 0)?, operand(m, op, &instruction, 1)?);
    let mut mxcsr = m.cpu.mxcsr;
    let result = match instruction.mnemonic() {
        M::Comiss => float::comiss(a, b, &mut mxcsr),
        M::Ucomiss => float::ucomiss(a, b, &mut mxcsr),
        M::Comisd => float::comisd(a, b, &mut mxcsr),
        _ => float::ucomisd(a, b, &mut mxcsr),
    };
    m.cpu.mxcsr = mxcsr;
    match result {
        Ok(status) => {
            m.cpu.flags.replace_status(bits::STATUS, status);
            Ok(())
        }
        Err(exception) => Err(m.simd_exception(exception)),
    }
}

fn test(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    m.check_sse()?;
    let (a, b) = (operand(m, op, &instruction, 0)?, operand(m, op, &instruction, 1)?);
    let (zf, cf) = vector::ptest(a, b);
    let status = bits::of(zf, bits::ZF) | bits::of(cf, bits::CF);
    m.cpu.flags.replace_status(bits::STATUS, status);
    Ok(())
}

fn compare_strings(m: &mut Machine<'_>, op: &Op) -> Flow {
    use Mnemonic as M;
    let instruction = m.rare(op);
    m.check_sse()?;
    let (a, b) = (operand(m, op, &instruction, 0)?, operand(m, op, &instruction, 1)?);
    let imm = trailing_immediate(&instruction);
    let mnemonic = instruction.mnemonic();
    let wide = matches!(mnemonic, M::Pcmpestri64 | M::Pcmpestrm64);
    let length = |register| {
        let value = m.cpu.r(register);
        if wide { value } else { sign_extend::<u32>(u64::from(low32(value))) }.cast_signed()
    };
    let result = match mnemonic {
        M::Pcmpistri | M::Pcmpistrm => vector::compare_implicit(a, b, imm),
        _ => vector::compare_explicit(a, length(RAX), b, length(RDX), imm),
    };
    if matches!(mnemonic, M::Pcmpistri | M::Pcmpestri | M::Pcmpestri64) {
        m.cpu.set_r(RCX, result.index().into());
    } else {
        m.cpu.set_xmm(0, result.mask());
    }
    m.cpu.flags.replace_status(bits::STATUS, result.status());
    Ok(())
}

fn crc32(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    let bytes = operand_bytes(&instruction, 1);
    let [source, _] = halves(operand(m, op, &instruction, 1)?);
    let register = register_slot(instruction.op0_register());
    let value =
        vector::crc32(low32(m.cpu.r(register)), source, crate::translate::segment::low8(bytes as u64));
    m.cpu.set::<u32>(register, value.into());
    Ok(())
}

/// MASKMOVQ and MASKMOVDQU: bytes whose mask has its top bit set, to DS:RDI.
fn masked_store(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    let is_mm = is_mmx(&instruction, 1);
    if is_mm {
        m.enter_mmx()?;
    } else {
        m.check_sse()?;
    }
    let (data, mask) = (operand(m, op, &instruction, 1)?, operand(m, op, &instruction, 2)?);
    if is_mm {
        // Also where the store faults.
        m.cpu.x87.enter_mmx();
    }
    let bytes = if is_mm { 8 } else { 16 };
    let address_mask = match instruction.op0_kind() {
        OpKind::MemorySegDI => 0xffff,
        OpKind::MemorySegEDI => 0xffff_ffff,
        _ => u64::MAX,
    };
    let offset = m.cpu.r(RDI) & address_mask;
    let segment = crate::translate::ops::implicit_segment(&instruction, m.is_64());
    let place = m.place_in(segment, offset, bytes, true)?;
    let selected = |n: usize| mask >> (8 * n + 7) & 1 != 0;
    m.require_aligned(place, 8)?;
    m.probe_piece(place, 8, Access::Write)?;
    // Whatever the mask selects, even if that is nothing (Intel SDM 2B leaves it open, AMD's processors do so).
    m.probe_write(place, bytes as u64)?;
    for (n, byte) in data.to_le_bytes().into_iter().enumerate().take(bytes) {
        if selected(n) {
            m.store(place.plus(n as u64), byte)?;
        }
    }
    Ok(())
}

/// The handler of an instruction of this family and whether it ends its block, `None` for others.
pub(super) fn lower(instruction: &Instruction) -> Option<(Handler, bool)> {
    use Mnemonic as M;
    let mnemonic = instruction.mnemonic();
    let any_mmx = is_mmx(instruction, 0) || is_mmx(instruction, 1);
    let handler: Handler = match mnemonic {
        M::Cvtpi2ps | M::Cvtpi2pd | M::Cvtps2pi | M::Cvtpd2pi | M::Cvttps2pi | M::Cvttpd2pi => convert_mmx,
        M::Movd | M::Movq | M::Movntq | M::Movdq2q | M::Movq2dq if any_mmx => mmx_move,
        M::Cvtsi2ss | M::Cvtsi2sd => from_integer,
        M::Cvtss2si | M::Cvttss2si | M::Cvtsd2si | M::Cvttsd2si => to_integer,
        M::Comiss | M::Ucomiss | M::Comisd | M::Ucomisd => compare,
        M::Ptest => test,
        M::Crc32 => crc32,
        M::Maskmovq | M::Maskmovdqu => masked_store,
        _ if is_string_compare(mnemonic) => compare_strings,
        _ if vector::masked_op(mnemonic).is_some() => masked,
        _ if vector::xmm_extract(mnemonic).is_some() || vector::mmx_extract(mnemonic).is_some() => extract,
        _ if vector::xmm_insert(mnemonic).is_some() || vector::mmx_insert(mnemonic).is_some() => insert,
        _ if is_mmx(instruction, 0) && vector::mmx_op(mnemonic).is_some() => mmx,
        _ => return None,
    };
    debug_assert!(!is_from_mmx(mnemonic) || handler as usize == convert_mmx as Handler as usize);
    Some((handler, false))
}
