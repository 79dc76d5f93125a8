//! MXCSR, FXSAVE and FXRSTOR, EMMS.

use iced_x86::{Code, Instruction, Mnemonic};

use crate::translate::core::{Flow, Machine};
use crate::translate::cpu::{cr0, cr4};
use crate::translate::exception::{Exception, vector};
use crate::translate::ops::op::{Handler, Op};
use crate::translate::x87::{FXSAVE_X87_BYTES, PointerFormat, X87State};

/// MXCSR bits that can be set.
pub(super) const MXCSR_MASK: u32 = 0xffff;

/// Size of an FXSAVE image that is written: what follows the XMM registers is left alone.
const IMAGE: usize = 416;
/// All of an image, which must be accessible.
const AREA: usize = 512;
const MXCSR: usize = 24;
const XMM: usize = 160;

fn ldmxcsr(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let place = m.place(op, 4, false)?;
    let value = m.load::<u32>(place)?;
    if value & !MXCSR_MASK != 0 {
        return Err(m.gp(0));
    }
    m.cpu.mxcsr = value;
    Ok(())
}

fn stmxcsr(m: &mut Machine<'_>, op: &Op) -> Flow {
    m.check_sse()?;
    let place = m.place(op, 4, true)?;
    let value = m.cpu.mxcsr;
    m.store(place, value)
}

pub(super) fn check_fxsave(m: &mut Machine<'_>) -> Flow {
    if m.cpu.cr0 & cr0::EM != 0 {
        return Err(m.ud());
    }
    if m.cpu.cr0 & cr0::TS != 0 {
        return Err(m.raise(Exception::new(vector::NM)));
    }
    Ok(())
}

fn pointer_format(instruction: &Instruction) -> PointerFormat {
    if matches!(instruction.code(), Code::Fxsave64_m512byte | Code::Fxrstor64_m512byte) {
        PointerFormat::Offsets
    } else {
        PointerFormat::Selectors
    }
}

/// How many XMM registers an image holds, none without CR4.OSFXSR.
fn registers(m: &Machine<'_>) -> u8 {
    match (m.cpu.cr4 & cr4::OSFXSR != 0, m.is_64()) {
        (false, _) => 0,
        (true, true) => 16,
        (true, false) => 8,
    }
}

fn fxsave(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    check_fxsave(m)?;
    let place = m.place(op, AREA, true)?;
    m.require_canonical(place)?;
    m.require_aligned(place, AREA)?;
    let place = m.aligned_place(op, 16, true)?;
    let mut image = [0; IMAGE];
    let mut x87 = [0; FXSAVE_X87_BYTES];
    m.cpu.x87.to_fxsave(&mut x87, pointer_format(&instruction));
    put(&mut image, 0, &x87);
    put(&mut image, MXCSR, &m.cpu.mxcsr.to_le_bytes());
    put(&mut image, MXCSR + 4, &MXCSR_MASK.to_le_bytes());
    let count = registers(m);
    for register in 0..count {
        put(&mut image, XMM + 16 * usize::from(register), &m.cpu.xmm(register).to_le_bytes());
    }
    let used = XMM + 16 * usize::from(count);
    m.probe_write(place, AREA as u64)?;
    m.write(place, image.get(..used).unwrap_or_default())
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = image.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

fn fxrstor(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    check_fxsave(m)?;
    let place = m.place(op, AREA, false)?;
    m.require_canonical(place)?;
    m.require_aligned(place, AREA)?;
    let place = m.aligned_place(op, 16, false)?;
    let mut image = [0; AREA];
    m.read(place, &mut image)?;
    let (x87, rest) = image.split_first_chunk::<FXSAVE_X87_BYTES>().unwrap_or((&[0; FXSAVE_X87_BYTES], &[]));
    let mxcsr = u32::from_le_bytes([at(&image, 24), at(&image, 25), at(&image, 26), at(&image, 27)]);
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(m.gp(0));
    }
    m.cpu.x87 = X87State::from_fxsave(x87, pointer_format(&instruction));
    let count = registers(m);
    if count > 0 {
        m.cpu.mxcsr = mxcsr;
    }
    for (register, value) in (0..count).zip(rest.as_chunks::<16>().0) {
        m.cpu.set_xmm(register, u128::from_le_bytes(*value));
    }
    Ok(())
}

fn at(image: &[u8], index: usize) -> u8 {
    image.get(index).copied().unwrap_or(0)
}

fn emms(m: &mut Machine<'_>, _: &Op) -> Flow {
    m.enter_mmx()?;
    m.cpu.x87.emms();
    Ok(())
}

/// The handler of an instruction of this family and whether it ends its block, `None` for others.
pub(super) fn lower(instruction: &Instruction) -> Option<(Handler, bool)> {
    use Mnemonic as M;
    Some(match instruction.mnemonic() {
        M::Ldmxcsr => (ldmxcsr, false),
        M::Stmxcsr => (stmxcsr, false),
        M::Fxsave | M::Fxsave64 => (fxsave, false),
        M::Fxrstor | M::Fxrstor64 => (fxrstor, false),
        M::Emms => (emms, false),
        _ => return None,
    })
}
