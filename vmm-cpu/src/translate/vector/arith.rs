//! Integer arithmetic, comparison and logic on lanes (Intel SDM 2B and 2C, the entry of each instruction).
//!
//! The table is the definition: one line an instruction.

#![allow(clippy::cast_possible_truncation, reason = "the instructions keep the low part of each lane")]

use iced_x86::Mnemonic;

use super::lanes::{Register, compare, horizontal, join, map, pick, reduce, split, zip};
use super::{Op, VectorOp};

/// The operations that exist on MM and XMM registers.
pub(super) fn op<R: Register>(mnemonic: Mnemonic) -> Option<Op<R>> {
    let op: Op<R> = match mnemonic {
        Mnemonic::Paddb => |a, b, _| zip(a, b, u8::wrapping_add),
        Mnemonic::Paddw => |a, b, _| zip(a, b, u16::wrapping_add),
        Mnemonic::Paddd => |a, b, _| zip(a, b, u32::wrapping_add),
        Mnemonic::Paddq => |a, b, _| zip(a, b, u64::wrapping_add),
        Mnemonic::Paddsb => |a, b, _| zip(a, b, i8::saturating_add),
        Mnemonic::Paddsw => |a, b, _| zip(a, b, i16::saturating_add),
        Mnemonic::Paddusb => |a, b, _| zip(a, b, u8::saturating_add),
        Mnemonic::Paddusw => |a, b, _| zip(a, b, u16::saturating_add),
        Mnemonic::Psubb => |a, b, _| zip(a, b, u8::wrapping_sub),
        Mnemonic::Psubw => |a, b, _| zip(a, b, u16::wrapping_sub),
        Mnemonic::Psubd => |a, b, _| zip(a, b, u32::wrapping_sub),
        Mnemonic::Psubq => |a, b, _| zip(a, b, u64::wrapping_sub),
        Mnemonic::Psubsb => |a, b, _| zip(a, b, i8::saturating_sub),
        Mnemonic::Psubsw => |a, b, _| zip(a, b, i16::saturating_sub),
        Mnemonic::Psubusb => |a, b, _| zip(a, b, u8::saturating_sub),
        Mnemonic::Psubusw => |a, b, _| zip(a, b, u16::saturating_sub),

        Mnemonic::Pavgb => |a, b, _| zip(a, b, |x: u8, y| ((u16::from(x) + u16::from(y) + 1) >> 1) as u8),
        Mnemonic::Pavgw => |a, b, _| zip(a, b, |x: u16, y| ((u32::from(x) + u32::from(y) + 1) >> 1) as u16),
        Mnemonic::Pminub => |a, b, _| zip(a, b, u8::min),
        Mnemonic::Pmaxub => |a, b, _| zip(a, b, u8::max),
        Mnemonic::Pminsw => |a, b, _| zip(a, b, i16::min),
        Mnemonic::Pmaxsw => |a, b, _| zip(a, b, i16::max),
        Mnemonic::Pabsb => |_, b, _| map(b, i8::wrapping_abs),
        Mnemonic::Pabsw => |_, b, _| map(b, i16::wrapping_abs),
        Mnemonic::Pabsd => |_, b, _| map(b, i32::wrapping_abs),
        Mnemonic::Psignb => |a, b, _| zip(a, b, |x: i8, y| x.wrapping_mul(y.signum())),
        Mnemonic::Psignw => |a, b, _| zip(a, b, |x: i16, y| x.wrapping_mul(y.signum())),
        Mnemonic::Psignd => |a, b, _| zip(a, b, |x: i32, y| x.wrapping_mul(y.signum())),

        Mnemonic::Pmullw => |a, b, _| zip(a, b, u16::wrapping_mul),
        Mnemonic::Pmulhw => |a, b, _| zip(a, b, |x: i16, y| ((i32::from(x) * i32::from(y)) >> 16) as i16),
        Mnemonic::Pmulhuw => |a, b, _| zip(a, b, |x: u16, y| ((u32::from(x) * u32::from(y)) >> 16) as u16),
        Mnemonic::Pmulhrsw => {
            |a, b, _| zip(a, b, |x: i16, y| ((((i32::from(x) * i32::from(y)) >> 14) + 1) >> 1) as i16)
        }
        Mnemonic::Pmuludq => |a, b, _| zip(a, b, |x: u64, y: u64| u64::from(x as u32) * u64::from(y as u32)),
        Mnemonic::Pmaddwd => |a, b, _| reduce(a, b, multiply_add_words),
        Mnemonic::Pmaddubsw => |a, b, _| reduce(a, b, multiply_add_bytes),
        Mnemonic::Psadbw => |a, b, _| reduce::<8, u8, u64, R>(a, b, |x, y| u64::from(distance(x, y))),

        Mnemonic::Phaddw => |a, b, _| horizontal(a, b, u16::wrapping_add),
        Mnemonic::Phaddd => |a, b, _| horizontal(a, b, u32::wrapping_add),
        Mnemonic::Phaddsw => |a, b, _| horizontal(a, b, i16::saturating_add),
        Mnemonic::Phsubw => |a, b, _| horizontal(a, b, u16::wrapping_sub),
        Mnemonic::Phsubd => |a, b, _| horizontal(a, b, u32::wrapping_sub),
        Mnemonic::Phsubsw => |a, b, _| horizontal(a, b, i16::saturating_sub),

        Mnemonic::Pcmpeqb => |a, b, _| compare(a, b, |x: i8, y| x == y),
        Mnemonic::Pcmpeqw => |a, b, _| compare(a, b, |x: i16, y| x == y),
        Mnemonic::Pcmpeqd => |a, b, _| compare(a, b, |x: i32, y| x == y),
        Mnemonic::Pcmpgtb => |a, b, _| compare(a, b, |x: i8, y| x > y),
        Mnemonic::Pcmpgtw => |a, b, _| compare(a, b, |x: i16, y| x > y),
        Mnemonic::Pcmpgtd => |a, b, _| compare(a, b, |x: i32, y| x > y),

        Mnemonic::Pand => |a, b, _| zip(a, b, |x: u64, y: u64| x & y),
        Mnemonic::Pandn => |a, b, _| zip(a, b, |x: u64, y: u64| !x & y),
        Mnemonic::Por => |a, b, _| zip(a, b, |x: u64, y: u64| x | y),
        Mnemonic::Pxor => |a, b, _| zip(a, b, |x: u64, y: u64| x ^ y),
        _ => return None,
    };
    Some(op)
}

/// The operations that exist on XMM registers only.
pub(super) fn xmm_op(mnemonic: Mnemonic) -> Option<VectorOp> {
    let op: VectorOp = match mnemonic {
        Mnemonic::Pminsb => |a, b, _| zip(a, b, i8::min),
        Mnemonic::Pmaxsb => |a, b, _| zip(a, b, i8::max),
        Mnemonic::Pminuw => |a, b, _| zip(a, b, u16::min),
        Mnemonic::Pmaxuw => |a, b, _| zip(a, b, u16::max),
        Mnemonic::Pminsd => |a, b, _| zip(a, b, i32::min),
        Mnemonic::Pmaxsd => |a, b, _| zip(a, b, i32::max),
        Mnemonic::Pminud => |a, b, _| zip(a, b, u32::min),
        Mnemonic::Pmaxud => |a, b, _| zip(a, b, u32::max),
        Mnemonic::Phminposuw => |_, b, _| minimum_word(b),
        Mnemonic::Pmulld => |a, b, _| zip(a, b, u32::wrapping_mul),
        Mnemonic::Pmuldq => |a, b, _| zip(a, b, |x: i64, y: i64| i64::from(x as i32) * i64::from(y as i32)),
        Mnemonic::Mpsadbw => distances,
        Mnemonic::Pcmpeqq => |a, b, _| compare(a, b, |x: i64, y| x == y),
        Mnemonic::Pcmpgtq => |a, b, _| compare(a, b, |x: i64, y| x > y),
        Mnemonic::Andps | Mnemonic::Andpd => |a, b, _| a & b,
        Mnemonic::Andnps | Mnemonic::Andnpd => |a, b, _| !a & b,
        Mnemonic::Orps | Mnemonic::Orpd => |a, b, _| a | b,
        Mnemonic::Xorps | Mnemonic::Xorpd => |a, b, _| a ^ b,
        _ => return None,
    };
    Some(op)
}

/// PMADDWD: the one sum that does not fit, of four times -32768, wraps.
fn multiply_add_words(&[x0, x1]: &[i16; 2], &[y0, y1]: &[i16; 2]) -> i32 {
    (i32::from(x0) * i32::from(y0)).wrapping_add(i32::from(x1) * i32::from(y1))
}

/// PMADDUBSW: the destination's bytes are unsigned, the source's signed.
fn multiply_add_bytes(&[x0, x1]: &[u8; 2], &[y0, y1]: &[u8; 2]) -> i16 {
    let product = |x: u8, y: u8| i16::from(x) * i16::from(y.cast_signed());
    product(x0, y0).saturating_add(product(x1, y1))
}

/// The sum of absolute differences.
fn distance<const N: usize>(x: &[u8; N], y: &[u8; N]) -> u16 {
    x.iter().zip(y).map(|(x, y)| u16::from(x.abs_diff(*y))).sum()
}

/// MPSADBW: eight overlapping groups of four bytes of `a` against one group of `b`.
fn distances(a: u128, b: u128, imm: u8) -> u128 {
    let groups: [u32; 4] = split(b);
    let group = pick(&groups, imm & 3).to_le_bytes();
    let bytes: [u8; 16] = split(a);
    let mut lanes = [0u16; 8];
    for (lane, window) in lanes.iter_mut().zip(bytes.array_windows().skip(usize::from(imm & 4))) {
        *lane = distance(window, &group);
    }
    join(lanes)
}

/// PHMINPOSUW: the smallest word, above it the position of its first occurrence.
fn minimum_word(b: u128) -> u128 {
    let words: [u16; 8] = split(b);
    let keyed = words.into_iter().zip(0u32..).map(|(word, position)| u32::from(word) << 3 | position);
    keyed.min().map_or(0, |key| u128::from(key >> 3 | (key & 7) << 16))
}
