//! XSAVE and XRSTOR, in the standard format (Intel SDM 1 13.7, 13.8).
//!
//! x87 and SSE are the interpreter's own. What lies beyond exists only where another engine runs the guest's programs, which
//! use it: the guest's kernel saves and restores it here.

use iced_x86::{Code, Instruction, Mnemonic};

use super::state::{MXCSR_MASK, check_fxsave};
use crate::state::{XSAVE_HEADER_END, XsaveArea};
use crate::translate::core::{Core, Flow, Machine};
use crate::translate::cpu::{RAX, RDX, cr4};
use crate::translate::ops::op::{Handler, Op};
use crate::translate::segment::low32;
use crate::translate::x87::{FXSAVE_X87_BYTES, PointerFormat, X87State};

/// Components.
const X87: u32 = 0;
const SSE: u32 = 1;
const AVX: u32 = 2;
/// Those with a place of their own in the area are from here to 62.
const FIRST_EXTENDED: u32 = 2;
const LAST: u32 = 62;

/// Where they are in the area, and the fields of its header.
const MXCSR: usize = 24;
const XMM: usize = 160;
const XMM_END: usize = 416;
const XSTATE_BV: usize = 512;
const XCOMP_BV: usize = 520;
const ALIGNMENT: u64 = 64;

impl Core {
    /// Offset and length of a component in the area (CPUID leaf 0xd).
    fn component(&self, number: u32) -> Option<(usize, usize)> {
        let entry = self.cpuid.get(0xd, number)?;
        let (offset, len) = (usize::try_from(entry.ebx).ok()?, usize::try_from(entry.eax).ok()?);
        (offset >= XSAVE_HEADER_END && len > 0).then_some((offset, len))
    }

    /// The components of a mask beyond SSE.
    fn extended_components(&self, mask: u64) -> Vec<(u32, usize, usize)> {
        let has = |number: &u32| mask >> number & 1 != 0;
        (FIRST_EXTENDED..=LAST)
            .filter(has)
            .filter_map(|number| self.component(number).map(|(offset, len)| (number, offset, len)))
            .collect()
    }
}

/// What both check first; the components that are asked for, and the last byte's end.
fn begin(m: &mut Machine<'_>) -> Flow<(u64, usize)> {
    if m.cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(m.ud());
    }
    check_fxsave(m)?;
    let asked = m.cpu.r(RDX) << 32 | u64::from(low32(m.cpu.r(RAX)));
    let mask = asked & m.cpu.xcr0;
    let ends = m.extended_components(mask).into_iter().map(|(_, offset, len)| offset + len);
    Ok((mask, ends.max().unwrap_or(0).max(XSAVE_HEADER_END)))
}

fn format(instruction: &Instruction) -> PointerFormat {
    match instruction.code() {
        Code::Xsave64_mem | Code::Xrstor64_mem => PointerFormat::Offsets,
        _ => PointerFormat::Selectors,
    }
}

fn registers(m: &Machine<'_>) -> u8 {
    if m.is_64() { 16 } else { 8 }
}

fn xsave(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    let (mask, end) = begin(m)?;
    let place = m.place(op, end, true)?;
    m.require_canonical(place)?;
    if !place.va.is_multiple_of(ALIGNMENT) {
        return Err(m.gp(0));
    }
    for piece in (0..end as u64).step_by(4096) {
        m.probe_write(place.plus(piece), (end as u64 - piece).min(4096))?;
    }
    let mut header = [0; 8];
    m.read(place.plus(XSTATE_BV as u64), &mut header)?;
    // x87 and SSE always count as in use.
    let mut in_use = mask & 3;
    if mask >> X87 & 1 != 0 {
        let mut x87 = [0; FXSAVE_X87_BYTES];
        m.cpu.x87.to_fxsave(&mut x87, format(&instruction));
        let (before, behind) = (x87.get(..MXCSR), x87.get(MXCSR + 8..));
        m.write(place, before.unwrap_or_default())?;
        m.write(place.plus(MXCSR as u64 + 8), behind.unwrap_or_default())?;
    }
    if mask & (1 << SSE | 1 << AVX) != 0 {
        let control = u64::from(m.cpu.mxcsr) | u64::from(MXCSR_MASK) << 32;
        m.write(place.plus(MXCSR as u64), &control.to_le_bytes())?;
    }
    if mask >> SSE & 1 != 0 {
        for register in 0..registers(m) {
            let value = m.cpu.xmm(register).to_le_bytes();
            m.write(place.plus(XMM as u64 + 16 * u64::from(register)), &value)?;
        }
    }
    for (number, offset, len) in m.extended_components(mask) {
        let mut bytes = vec![0; len];
        if let Some(extended) = &m.extended
            && extended.xstate_bv() >> number & 1 != 0
        {
            let held = extended.bytes().get(offset..offset + len).unwrap_or_default();
            bytes.iter_mut().zip(held).for_each(|(to, from)| *to = *from);
            in_use |= 1 << number;
        }
        m.write(place.plus(offset as u64), &bytes)?;
    }
    let state = u64::from_le_bytes(header) & !mask | in_use;
    m.write(place.plus(XSTATE_BV as u64), &state.to_le_bytes())
}

fn xrstor(m: &mut Machine<'_>, op: &Op) -> Flow {
    let instruction = m.rare(op);
    let (mask, end) = begin(m)?;
    let place = m.place(op, end, false)?;
    m.require_canonical(place)?;
    if !place.va.is_multiple_of(ALIGNMENT) {
        return Err(m.gp(0));
    }
    let mut area = vec![0; end];
    m.read(place, &mut area)?;
    let word = |at: usize| {
        let bytes = area.get(at..at + 8).and_then(|bytes| bytes.first_chunk()).copied();
        bytes.map_or(0, u64::from_le_bytes)
    };
    let state = word(XSTATE_BV);
    // The compacted format is not offered, and what follows is reserved.
    if state & !m.cpu.xcr0 != 0 || word(XCOMP_BV) != 0 || word(XCOMP_BV + 8) != 0 {
        return Err(m.gp(0));
    }
    let restores_control = mask & (1 << SSE | 1 << AVX) != 0;
    let control = low32(word(MXCSR));
    if restores_control && control & !MXCSR_MASK != 0 {
        return Err(m.gp(0));
    }
    if mask >> X87 & 1 != 0 {
        let image = area.first_chunk::<FXSAVE_X87_BYTES>().filter(|_| state >> X87 & 1 != 0);
        let format = format(&instruction);
        m.cpu.x87 = image.map_or_else(X87State::default, |image| X87State::from_fxsave(image, format));
    }
    if restores_control {
        m.cpu.mxcsr = control;
    }
    if mask >> SSE & 1 != 0 {
        let is_held = state >> SSE & 1 != 0;
        let held = area.get(XMM..XMM_END).filter(|_| is_held).unwrap_or_default();
        let mut values = held.as_chunks::<16>().0.iter();
        for register in 0..registers(m) {
            let value = values.next().map_or(0, |bytes| u128::from_le_bytes(*bytes));
            m.cpu.set_xmm(register, value);
        }
    }
    restore_extended(m, mask, state, &area);
    Ok(())
}

fn restore_extended(m: &mut Machine<'_>, mask: u64, state: u64, area: &[u8]) {
    let components = m.extended_components(mask);
    let Some(extended) = m.extended.take() else { return };
    let mut in_use = extended.xstate_bv();
    let mut bytes = extended.bytes().to_vec();
    for (number, offset, len) in components {
        in_use &= !(1 << number);
        if state >> number & 1 != 0
            && let (Some(to), Some(from)) =
                (bytes.get_mut(offset..offset + len), area.get(offset..offset + len))
        {
            to.copy_from_slice(from);
            in_use |= 1 << number;
        }
    }
    bytes.iter_mut().skip(XSTATE_BV).zip(in_use.to_le_bytes()).for_each(|(to, from)| *to = from);
    m.extended = XsaveArea::from_bytes(bytes);
}

/// The handler of an instruction of this family and whether it ends its block, `None` for others.
pub(super) fn lower(instruction: &Instruction) -> Option<(Handler, bool)> {
    use Mnemonic as M;
    Some(match instruction.mnemonic() {
        M::Xsave | M::Xsave64 => (xsave, false),
        M::Xrstor | M::Xrstor64 => (xrstor, false),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpuid::CpuidEntry;
    use crate::translate::core::Reason;
    use crate::translate::ops::misc::bench::{Bench, HOLE};

    const AREA: u64 = 0x8_0000;
    /// XSAVE64 [RDI] and XRSTOR64 [RDI].
    const XSAVE: [u8; 4] = [0x48, 0x0f, 0xae, 0x27];
    const XRSTOR: [u8; 4] = [0x48, 0x0f, 0xae, 0x2f];
    const RDI: u8 = 7;

    /// A processor with AVX state, all of whose bytes are `upper`.
    fn bench(upper: u8) -> Bench {
        let mut bench = Bench::new(64);
        let core = &mut bench.core;
        core.cpuid.set(CpuidEntry::new(0xd, Some(0), [7, 832, 832, 0]));
        core.cpuid.set(CpuidEntry::new(0xd, Some(2), [256, 576, 0, 0]));
        core.cpu.cr4 |= cr4::OSXSAVE | cr4::OSFXSR;
        core.cpu.xcr0 = 7;
        let mut bytes = XsaveArea::at_reset().bytes().to_vec();
        bytes.resize(832, upper);
        bytes[XSTATE_BV] = 7;
        core.extended = XsaveArea::from_bytes(bytes);
        core.update_mode();
        core.cpu.set_xmm(3, 0x1234);
        core.cpu.mxcsr = 0x1fa0;
        bench.set(&[(RAX, 7), (RDX, 0), (RDI, AREA)]);
        bench
    }

    fn vector_of(result: Result<(), Reason>) -> u8 {
        match result {
            Err(Reason::Exception(exception)) => exception.vector,
            other => panic!("{other:?} in place of an exception"),
        }
    }

    #[test]
    fn what_is_saved_is_restored() {
        let mut bench = bench(0x5a);
        bench.run(&XSAVE).unwrap();
        assert_eq!(bench.peek(AREA + 576, 256), [0x5a; 256]);
        assert_eq!(bench.peek(AREA + 512, 8), [7, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bench.peek(AREA + 160 + 48, 2), [0x34, 0x12]);
        bench.core.cpu.set_xmm(3, 0);
        bench.core.cpu.mxcsr = 0x1f80;
        bench.core.extended = XsaveArea::from_bytes(vec![0; 832]);
        bench.run(&XRSTOR).unwrap();
        assert_eq!((bench.core.cpu.xmm(3), bench.core.cpu.mxcsr), (0x1234, 0x1fa0));
        let extended = bench.core.extended.clone().unwrap();
        assert_eq!((extended.xstate_bv() & 4, &extended.bytes()[576..]), (4, &[0x5a; 256][..]));
    }

    #[test]
    fn components_that_are_not_asked_for_stay() {
        let mut bench = bench(0x5a);
        bench.poke(AREA + 512, &[2]);
        bench.set(&[(RAX, 4)]);
        bench.run(&XSAVE).unwrap();
        assert_eq!(bench.peek(AREA + 512, 1), [6]);
        assert_eq!(bench.peek(AREA + 160, 256), [0; 256]);
        // SSE in its initial state, AVX not asked for.
        bench.set(&[(RAX, 2)]);
        bench.poke(AREA + 512, &[4]);
        bench.poke(AREA + 24, &0x1f80_u32.to_le_bytes());
        bench.run(&XRSTOR).unwrap();
        assert_eq!(bench.core.cpu.xmm(3), 0);
        assert_eq!(bench.core.extended.as_ref().unwrap().bytes()[576..], [0x5a; 256]);
    }

    #[test]
    fn areas_that_are_none_fault() {
        let mut bench = bench(0);
        bench.run(&XSAVE).unwrap();
        for (offset, byte) in [(512, 8), (520, 1), (527, 0x80), (528, 1), (26, 1)] {
            let held = bench.peek(AREA + offset, 1);
            bench.poke(AREA + offset, &[byte]);
            assert_eq!(vector_of(bench.run(&XRSTOR)), 13, "{offset}");
            bench.poke(AREA + offset, &held);
        }
        bench.run(&XRSTOR).unwrap();
        bench.set(&[(RDI, AREA + 16)]);
        assert_eq!(vector_of(bench.run(&XSAVE)), 13);
        assert_eq!(vector_of(bench.run(&XRSTOR)), 13);
        bench.set(&[(RDI, HOLE - 64)]);
        assert_eq!(vector_of(bench.run(&XSAVE)), 14);
        bench.core.cpu.cr4 &= !cr4::OSXSAVE;
        assert_eq!(vector_of(bench.run(&XSAVE)), 6);
    }
}
