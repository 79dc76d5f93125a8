//! Flags and the state of x87 and SSE at the beginning of a case.

use iced_x86::{Code, MemorySize};

use super::Random;
use super::values::{self, Element};

const CF: u64 = 1;
const RESERVED_ONE: u64 = 2;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const TF: u64 = 1 << 8;
const IF: u64 = 1 << 9;
pub(super) const DF: u64 = 1 << 10;
const OF: u64 = 1 << 11;
const NT: u64 = 1 << 14;
const AC: u64 = 1 << 18;
const ID: u64 = 1 << 21;

/// RFLAGS without DF.
pub(super) fn rflags(random: &mut Random) -> u64 {
    let mut flags = random.u64(..) & (CF | PF | AF | ZF | SF | OF);
    for (flag, one_in) in [(ID, 10), (NT, 32), (AC, 64), (TF, 200)] {
        if random.u32(..one_in) == 0 {
            flags |= flag;
        }
    }
    flags | RESERVED_ONE | IF
}

/// An image of x87 and SSE. The vectors are mostly of `element`.
pub(super) fn fxsave(random: &mut Random, element: Option<Element>) -> [u8; 512] {
    let control = values::control_word(random);
    let status = values::status_word(random, control);
    let tags = match random.u8(..8) {
        0..=2 => 0xff,
        3 => 0,
        _ => random.u8(..),
    };
    let mut image = Vec::with_capacity(512);
    image.extend(control.to_le_bytes());
    image.extend(status.to_le_bytes());
    image.extend([tags, 0]);
    // No last instruction: opcode and pointers.
    image.extend([0; 18]);
    image.extend(values::mxcsr(random).to_le_bytes());
    image.extend([0; 4]);
    for _ in 0..8 {
        let register = match random.u8(..8) {
            // MMX.
            0 => {
                let [low @ .., _, _, _, _, _, _] = Element::any(random).vector(random);
                low
            }
            _ => values::float80(random),
        };
        image.extend(register);
        image.extend([0; 6]);
    }
    for _ in 0..16 {
        let element = element.filter(|_| random.u8(..4) != 0).unwrap_or_else(|| Element::any(random));
        image.extend(element.vector(random));
    }
    let mut bytes = [0; 512];
    bytes.iter_mut().zip(image).for_each(|(byte, from)| *byte = from);
    bytes
}

/// Sets what FXRSTOR does not take, or what it ignores.
pub(super) fn spoil(random: &mut Random, image: &mut [u8; 512]) {
    let place = if random.bool() { 24 + random.usize(..8) } else { random.usize(..512) };
    if let Some(byte) = image.get_mut(place) {
        *byte = random.u8(..);
    }
}

/// What FLDENV and FRSTOR load.
pub(super) fn environment(random: &mut Random, code: Code) -> Vec<u8> {
    let size = code.op_code().memory_size();
    let word = if matches!(size, MemorySize::FpuEnv14 | MemorySize::FpuState94) { 2 } else { 4 };
    let control = values::control_word(random);
    let status = values::status_word(random, control);
    let mut bytes = Vec::new();
    for value in [control, status, random.u16(..)] {
        bytes.extend(value.to_le_bytes());
        bytes.resize(bytes.len() + word - 2, 0xff);
    }
    // Pointers and opcode.
    bytes.resize(7 * word, 0);
    while bytes.len() < size.size() {
        bytes.extend(values::float80(random));
    }
    bytes
}
