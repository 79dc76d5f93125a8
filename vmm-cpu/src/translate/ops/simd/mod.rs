//! MMX and SSE: the operands. What is computed is the affair of [`vector`](crate::translate::vector) and
//! [`float`](crate::translate::float).

mod general;
mod moves;
mod state;
mod tables;
mod xsave;

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

pub(crate) use tables::Tables;

use super::op::{Handler, Op, operand_bytes};
use crate::translate::core::{Flow, Machine, Place};
use crate::translate::cpu::{cr0, cr4};
use crate::translate::exception::{Exception, vector};
use crate::translate::float::SimdException;
use crate::translate::memory::{PAGE, PAGE_MASK, Reach};
use crate::translate::segment::low8;
use crate::translate::word::halves;

impl Machine<'_> {
    /// #UD or #NM unless SSE instructions may run.
    #[inline(always)]
    fn check_sse(&mut self) -> Flow {
        if self.mode.sse { Ok(()) } else { Err(self.sse_unavailable()) }
    }

    #[cold]
    fn sse_unavailable(&mut self) -> crate::translate::core::Leave {
        if self.cpu.cr0 & cr0::EM != 0 || self.cpu.cr4 & cr4::OSFXSR == 0 {
            self.ud()
        } else {
            self.raise(Exception::new(vector::NM))
        }
    }

    /// #UD, #NM or #MF unless MMX instructions may run, which then own the x87 registers.
    fn enter_mmx(&mut self) -> Flow {
        if self.cpu.cr0 & cr0::EM != 0 {
            return Err(self.ud());
        }
        if self.cpu.cr0 & cr0::TS != 0 {
            return Err(self.raise(Exception::new(vector::NM)));
        }
        self.check_x87_pending()
    }

    /// #XM, or #UD where the system does not want it.
    #[cold]
    fn simd_exception(&mut self, _: SimdException) -> crate::translate::core::Leave {
        if self.cpu.cr4 & cr4::OSXMMEXCPT != 0 { self.raise(Exception::new(vector::XM)) } else { self.ud() }
    }

    /// Reads 16 bytes of any alignment.
    #[inline(always)]
    fn load_16(&mut self, place: Place) -> Flow<u128> {
        // Judged as one access where it shows.
        let crosses = place.va & !PAGE_MASK > PAGE - 16;
        if crosses || place.va & 15 != 0 && self.mode.reach == Reach::UserAligned {
            let mut bytes = [0; 16];
            self.read(place, &mut bytes)?;
            return Ok(u128::from_le_bytes(bytes));
        }
        let low = self.load::<u64>(place)?;
        let high = self.load::<u64>(place.plus(8))?;
        Ok(u128::from(high) << 64 | u128::from(low))
    }

    /// Writes 16 bytes of any alignment, all or nothing.
    #[inline(always)]
    fn store_16(&mut self, place: Place, value: u128) -> Flow {
        if place.va & 15 != 0 {
            return self.write(place, &value.to_le_bytes());
        }
        let [low, high] = halves(value);
        self.store(place, low)?;
        self.store(place.plus(8), high)
    }

    /// Reads up to 16 bytes, zero-extended.
    fn load_vector(&mut self, place: Place, bytes: usize) -> Flow<u128> {
        Ok(match bytes {
            16 => self.load_16(place)?,
            8 => self.load::<u64>(place)?.into(),
            4 => self.load::<u32>(place)?.into(),
            2 => self.load::<u16>(place)?.into(),
            _ => self.load::<u8>(place)?.into(),
        })
    }

    /// The memory operand of `bytes` bytes, which must be aligned if they are 16.
    #[inline(always)]
    fn aligned_place(&mut self, op: &Op, bytes: usize, write: bool) -> Flow<Place> {
        let place = self.place(op, bytes, write)?;
        if bytes == 16 && place.va & 15 != 0 {
            return Err(self.gp(0));
        }
        Ok(place)
    }
}

/// The immediate of an operation: mnemonic above, immediate byte below.
fn packed_immediate(mnemonic: Mnemonic, imm: u8) -> u64 {
    (mnemonic as u64) << 8 | u64::from(imm)
}

fn mnemonic_of(op: &Op) -> usize {
    usize::try_from(op.imm >> 8).unwrap_or(0)
}

fn integer_register(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let Some(operation) = m.tables.xmm(mnemonic_of(op)) else { return Err(m.ud()) };
    let value = operation(m.cpu.xmm(op.a), m.cpu.xmm(op.b), low8(op.imm));
    m.cpu.set_xmm(op.a, value);
    Ok(())
}

/// The source is memory of as many bytes as `b` says.
fn integer_memory(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let Some(operation) = m.tables.xmm(mnemonic_of(op)) else { return Err(m.ud()) };
    let place = m.aligned_place(op, op.b.into(), false)?;
    let source = m.load_vector(place, op.b.into())?;
    let value = operation(m.cpu.xmm(op.a), source, low8(op.imm));
    m.cpu.set_xmm(op.a, value);
    Ok(())
}

/// As [`integer_memory`], of an instruction that takes its 16 bytes from anywhere: see [`is_sha`].
fn integer_unaligned(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let Some(operation) = m.tables.xmm(mnemonic_of(op)) else { return Err(m.ud()) };
    let place = m.place(op, 16, false)?;
    let source = m.load_16(place)?;
    let value = operation(m.cpu.xmm(op.a), source, low8(op.imm));
    m.cpu.set_xmm(op.a, value);
    Ok(())
}

/// Whether this is one of the SHA instructions, which AMD's processors do not ask to be given aligned memory (Intel's do).
fn is_sha(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Sha1rnds4
            | M::Sha1nexte
            | M::Sha1msg1
            | M::Sha1msg2
            | M::Sha256rnds2
            | M::Sha256msg1
            | M::Sha256msg2
    )
}

/// A shift by an immediate.
fn integer_immediate(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let Some(operation) = m.tables.xmm(mnemonic_of(op)) else { return Err(m.ud()) };
    let value = operation(m.cpu.xmm(op.a), low8(op.imm).into(), 0);
    m.cpu.set_xmm(op.a, value);
    Ok(())
}

fn float(m: &mut Machine<'_>, op: &Op, source: u128) -> Flow {
    let Some(operation) = m.tables.float(mnemonic_of(op)) else { return Err(m.ud()) };
    let mut mxcsr = m.cpu.mxcsr;
    let result = operation(m.cpu.xmm(op.a), source, low8(op.imm), &mut mxcsr);
    m.cpu.mxcsr = mxcsr;
    match result {
        Ok(value) => {
            m.cpu.set_xmm(op.a, value);
            Ok(())
        }
        Err(exception) => Err(m.simd_exception(exception)),
    }
}

fn float_register(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    float(m, op, m.cpu.xmm(op.b))
}

fn float_memory(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let place = m.aligned_place(op, op.b.into(), false)?;
    let source = m.load_vector(place, op.b.into())?;
    float(m, op, source)
}

/// The immediate byte after two operands, 0 where there is none.
fn trailing_immediate(instruction: &Instruction) -> u8 {
    let last = instruction.op_count().saturating_sub(1);
    if last >= 2 && instruction.op_kind(last) == OpKind::Immediate8 { instruction.immediate8() } else { 0 }
}

fn is_xmm(instruction: &Instruction, n: u32) -> bool {
    instruction.op_kind(n) == OpKind::Register && instruction.op_register(n).is_xmm()
}

fn is_mmx(instruction: &Instruction, n: u32) -> bool {
    instruction.op_kind(n) == OpKind::Register && instruction.op_register(n).is_mm()
}

/// Number of an XMM or MM register.
fn number(register: Register) -> u8 {
    low8(register.number() as u64)
}

/// Whether the instruction has a VEX, EVEX or XOP prefix: none of those exist here.
fn is_extended(instruction: &Instruction) -> bool {
    instruction.code().encoding() != iced_x86::EncodingKind::Legacy
}

/// The handler of the common instructions of this family, `None` for others.
pub(super) fn lower(instruction: &Instruction, op: &mut Op) -> Option<Handler> {
    if is_extended(instruction) {
        return None;
    }
    if let Some(handler) = moves::lower(instruction, op) {
        return Some(handler);
    }
    if !is_xmm(instruction, 0) || instruction.op_count() < 2 {
        return None;
    }
    let mnemonic = instruction.mnemonic();
    let tables = Tables::get();
    let is_integer = tables.xmm(mnemonic as usize).is_some();
    if !is_integer && tables.float(mnemonic as usize).is_none() {
        return None;
    }
    op.a = number(instruction.op0_register());
    let imm = trailing_immediate(instruction);
    op.imm = packed_immediate(mnemonic, imm);
    match instruction.op1_kind() {
        OpKind::Register if instruction.op1_register().is_xmm() => {
            op.b = number(instruction.op1_register());
            Some(if is_integer { integer_register } else { float_register })
        }
        OpKind::Memory if is_integer || operand_bytes(instruction, 1) != 8 || !is_from_mmx(mnemonic) => {
            let imm = crate::translate::vector::memory_immediate(mnemonic, imm);
            op.imm = packed_immediate(mnemonic, imm);
            op.b = low8(operand_bytes(instruction, 1) as u64);
            Some(match is_integer {
                true if is_sha(mnemonic) => integer_unaligned,
                true => integer_memory,
                false => float_memory,
            })
        }
        OpKind::Immediate8 if is_integer => {
            op.imm = packed_immediate(mnemonic, instruction.immediate8());
            Some(integer_immediate)
        }
        _ => None,
    }
}

/// Conversions whose source is an MMX register or memory in its place.
fn is_from_mmx(mnemonic: Mnemonic) -> bool {
    matches!(mnemonic, Mnemonic::Cvtpi2ps | Mnemonic::Cvtpi2pd)
}

/// The handler of the other instructions of this family and whether it ends its block.
pub(super) fn lower_rare(instruction: &Instruction) -> Option<(Handler, bool)> {
    if is_extended(instruction) {
        return None;
    }
    state::lower(instruction).or_else(|| xsave::lower(instruction)).or_else(|| general::lower(instruction))
}

#[cfg(test)]
mod tests;
