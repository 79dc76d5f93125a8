//! AVX and AVX-512 moves between a register and memory: what drivers use on device memory, and what tier 0, which offers no
//! AVX, does not have. Registers lie in the XSAVE area of the engine (Intel SDM 1 13.4, 13.5), the low quarters of the first
//! sixteen in the vCPU itself.

use iced_x86::{EncodingKind, Instruction, Mnemonic, OpKind, Register};

use crate::state::XsaveArea;
use crate::translate::core::{Core, Flow, Machine};
use crate::translate::cpu::{cr0, cr4};
use crate::translate::exception::{Exception, vector};
use crate::translate::ops::Op;
use crate::translate::segment::low8;

/// Bytes of the widest register.
const WIDEST: usize = 64;

/// XSTATE_BV in the area.
const XSTATE_BV: usize = 512;

/// State components: bit in XCR0 and XSTATE_BV, and subleaf of CPUID leaf 0xd.
const SSE: u32 = 1;
const AVX: u32 = 2;
const OPMASKS: u32 = 5;
const ZMM_HIGH: u32 = 6;
const ZMM_UPPER: u32 = 7;
const PKRU: u32 = 9;

/// What a move does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Move {
    register: Register,
    bytes: usize,
    loads: bool,
    /// Memory must be aligned to its size.
    aligned: bool,
    /// Encoded as AVX-512 is.
    evex: bool,
}

/// The move that an instruction is, if it is one.
fn plan(instruction: &Instruction) -> Option<Move> {
    use Mnemonic as M;
    let evex = match instruction.encoding() {
        EncodingKind::VEX => false,
        EncodingKind::EVEX => true,
        _ => return None,
    };
    if instruction.op_count() != 2 || instruction.has_op_mask() || instruction.is_broadcast() {
        return None;
    }
    let aligned = match instruction.mnemonic() {
        M::Vmovaps | M::Vmovapd | M::Vmovdqa | M::Vmovdqa32 | M::Vmovdqa64 => true,
        M::Vmovntdq | M::Vmovntdqa | M::Vmovntps | M::Vmovntpd => true,
        M::Vmovups | M::Vmovupd | M::Vmovdqu | M::Vmovdqu8 | M::Vmovdqu16 | M::Vmovdqu32 | M::Vmovdqu64 => {
            false
        }
        M::Vlddqu | M::Vmovd | M::Vmovq | M::Vmovss | M::Vmovsd => false,
        _ => return None,
    };
    let (register, loads) = match (instruction.op0_kind(), instruction.op1_kind()) {
        (OpKind::Register, OpKind::Memory) => (instruction.op0_register(), true),
        (OpKind::Memory, OpKind::Register) => (instruction.op1_register(), false),
        _ => return None,
    };
    let bytes = instruction.memory_size().size();
    (register.is_vector_register() && (1..=WIDEST).contains(&bytes)).then_some(Move {
        register,
        bytes,
        loads,
        aligned,
        evex,
    })
}

/// Whether [`run`] executes an instruction.
pub(super) fn is_wide(instruction: &Instruction) -> bool {
    plan(instruction).is_some()
}

/// Executes a move.
pub(super) fn run(m: &mut Machine<'_>, instruction: &Instruction, op: &Op, area: &mut XsaveArea) -> Flow {
    let Some(plan) = plan(instruction) else { return Err(m.ud()) };
    let mut needed = 1_u64 << SSE | 1 << AVX;
    if plan.evex {
        needed |= 1 << OPMASKS | 1 << ZMM_HIGH | 1 << ZMM_UPPER;
    }
    if m.cpu.cr4 & cr4::OSXSAVE == 0
        || m.cpu.xcr0 & needed != needed
        || m.cpu.virtual_8086()
        || !m.cpu.protected()
    {
        return Err(m.ud());
    }
    if m.cpu.cr0 & cr0::TS != 0 {
        return Err(m.raise(Exception::new(vector::NM)));
    }
    let place = m.place(op, plan.bytes, !plan.loads)?;
    if plan.aligned && !place.va.is_multiple_of(plan.bytes as u64) {
        return Err(m.gp(0));
    }
    let number = plan.register.number();
    let mut value = [0; WIDEST];
    if plan.loads {
        m.read(place, value.get_mut(..plan.bytes).unwrap_or_default())?;
        put(m, area, number, &value);
    } else {
        get(m, area, number, &mut value);
        m.write(place, value.get(..plan.bytes).unwrap_or_default())?;
    }
    Ok(())
}

/// Where a component lies in the area: offset and length.
fn component(core: &Core, number: u32) -> (usize, usize) {
    let entry = core.cpuid.get(0xd, number);
    let field = |value: Option<u32>| value.and_then(|value| usize::try_from(value).ok()).unwrap_or(0);
    (field(entry.as_ref().map(|entry| entry.ebx)), field(entry.as_ref().map(|entry| entry.eax)))
}

/// The pieces of a register that are in the area: component, offset in it, and which bytes of the register these are.
fn pieces(number: usize) -> [(u32, usize, std::ops::Range<usize>); 2] {
    match number.checked_sub(16) {
        None => [(AVX, number * 16, 16..32), (ZMM_HIGH, number * 32, 32..64)],
        Some(upper) => [(ZMM_UPPER, upper * 64, 0..64), (ZMM_UPPER, upper * 64, 0..0)],
    }
}

/// PKRU in an area.
pub(super) fn pkru(core: &Core, area: &XsaveArea) -> u32 {
    let start = component(core, PKRU).0;
    let held = area.bytes().get(start..).and_then(|bytes| bytes.first_chunk());
    if area.xstate_bv() >> PKRU & 1 == 0 { 0 } else { held.copied().map_or(0, u32::from_le_bytes) }
}

fn get(m: &Machine<'_>, area: &XsaveArea, number: usize, value: &mut [u8; WIDEST]) {
    if number < 16 {
        let low = m.cpu.xmm(low8(number as u64)).to_le_bytes();
        value.iter_mut().zip(low).for_each(|(to, from)| *to = from);
    }
    for (of, offset, range) in pieces(number) {
        if area.xstate_bv() >> of & 1 == 0 {
            // In its initial state: zero.
            continue;
        }
        let start = component(m, of).0 + offset;
        let held = area.bytes().get(start..start + range.len()).unwrap_or_default();
        value.iter_mut().skip(range.start).zip(held).for_each(|(to, from)| *to = *from);
    }
}

/// Loads a register, all of whose bytes that an instruction does not load become zero.
fn put(m: &mut Machine<'_>, area: &mut XsaveArea, number: usize, value: &[u8; WIDEST]) {
    if let (true, Some(low)) = (number < 16, value.first_chunk()) {
        m.cpu.set_xmm(low8(number as u64), u128::from_le_bytes(*low));
    }
    let mut in_use = area.xstate_bv();
    let mut bytes = area.bytes().to_vec();
    for (of, offset, range) in pieces(number) {
        if m.cpu.xcr0 >> of & 1 == 0 {
            continue;
        }
        let (start, len) = component(m, of);
        if in_use >> of & 1 == 0 {
            // What lies there means nothing so far.
            bytes.get_mut(start..start + len).unwrap_or_default().fill(0);
            in_use |= 1 << of;
        }
        let from = value.get(range).unwrap_or_default();
        let to = bytes.iter_mut().skip(start + offset);
        to.zip(from).for_each(|(to, from)| *to = *from);
    }
    bytes.iter_mut().skip(XSTATE_BV).zip(in_use.to_le_bytes()).for_each(|(to, from)| *to = from);
    if let Some(filled) = XsaveArea::from_bytes(bytes) {
        *area = filled;
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::Decoder;

    use super::*;

    fn planned(code: &[u8]) -> Option<Move> {
        plan(&Decoder::with_ip(64, code, 0, 0).decode())
    }

    #[test]
    fn moves_are_told_from_what_else_there_is() {
        // vmovdqu [rbx], ymm1; vmovaps ymm9, [rbx]; vmovntdq [rbx], xmm1; vmovss xmm1, [rbx]
        let store = planned(&[0xc5, 0xfe, 0x7f, 0x0b]).unwrap();
        assert_eq!(
            (store.register, store.bytes, store.loads, store.aligned),
            (Register::YMM1, 32, false, false)
        );
        let load = planned(&[0xc5, 0x7c, 0x28, 0x0b]).unwrap();
        assert_eq!((load.register, load.bytes, load.loads, load.aligned), (Register::YMM9, 32, true, true));
        assert!(planned(&[0xc5, 0xf9, 0xe7, 0x0b]).unwrap().aligned);
        assert_eq!(planned(&[0xc5, 0xfa, 0x10, 0x0b]).unwrap().bytes, 4);
        // vmovdqu64 [rbx], zmm17; the same under a mask; vpaddd ymm1, ymm2, [rbx]; movdqu xmm1, [rbx]; vmovss xmm1, xmm2, xmm3
        assert_eq!(planned(&[0x62, 0xe1, 0xfe, 0x48, 0x7f, 0x0b]).unwrap().register, Register::ZMM17);
        assert_eq!(planned(&[0x62, 0xe1, 0xfe, 0x49, 0x7f, 0x0b]), None);
        assert_eq!(planned(&[0xc5, 0xed, 0xfe, 0x0b]), None);
        assert_eq!(planned(&[0xf3, 0x0f, 0x6f, 0x0b]), None);
        assert_eq!(planned(&[0xc5, 0xea, 0x10, 0xcb]), None);
    }
}
