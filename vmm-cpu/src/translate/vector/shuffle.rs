//! Operations that move lanes about: packs, unpacks, shuffles, blends, widening and register merges (Intel SDM 2A
//! to 2C, the entry of each instruction).

#![allow(clippy::cast_possible_truncation, reason = "a pack has clamped the lane to what the cast keeps")]

use iced_x86::Mnemonic;

use super::lanes::{
    Packed, Register, blend, halves, high, interleave, join, low, map, narrow, pick, split, widen,
};
use super::{MaskedOp, MmxOp, Op, VectorOp};

/// The operations that exist on MM and XMM registers.
pub(super) fn op<R: Register>(mnemonic: Mnemonic) -> Option<Op<R>> {
    let op: Op<R> = match mnemonic {
        Mnemonic::Packsswb => |a, b, _| narrow(a, b, |x: i16| x.clamp(-0x80, 0x7f) as i8),
        Mnemonic::Packuswb => |a, b, _| narrow(a, b, |x: i16| x.clamp(0, 0xff) as u8),
        Mnemonic::Packssdw => |a, b, _| narrow(a, b, |x: i32| x.clamp(-0x8000, 0x7fff) as i16),
        Mnemonic::Punpcklbw => |a, b, _| interleave::<u8, R>(a, b, false),
        Mnemonic::Punpcklwd => |a, b, _| interleave::<u16, R>(a, b, false),
        Mnemonic::Punpckldq => |a, b, _| interleave::<u32, R>(a, b, false),
        Mnemonic::Punpckhbw => |a, b, _| interleave::<u8, R>(a, b, true),
        Mnemonic::Punpckhwd => |a, b, _| interleave::<u16, R>(a, b, true),
        Mnemonic::Punpckhdq => |a, b, _| interleave::<u32, R>(a, b, true),
        Mnemonic::Pshufb => |a, b, _| shuffle_bytes(a, b),
        _ => return None,
    };
    Some(op)
}

/// The operations that exist on MM registers only, or differently.
pub(super) fn mmx_op(mnemonic: Mnemonic) -> Option<MmxOp> {
    let op: MmxOp = match mnemonic {
        Mnemonic::Pshufw => |_, b, imm| select_words(b, imm),
        Mnemonic::Palignr => |a, b, imm| low(halves(b, a).checked_shr(u32::from(imm) * 8).unwrap_or(0)),
        _ => return None,
    };
    Some(op)
}

/// The operations that exist on XMM registers only, or differently.
pub(super) fn xmm_op(mnemonic: Mnemonic) -> Option<VectorOp> {
    let op: VectorOp = match mnemonic {
        Mnemonic::Packusdw => |a, b, _| narrow(a, b, |x: i32| x.clamp(0, 0xffff) as u16),
        Mnemonic::Punpcklqdq | Mnemonic::Unpcklpd => |a, b, _| halves(low(a), low(b)),
        Mnemonic::Punpckhqdq | Mnemonic::Unpckhpd => |a, b, _| halves(high(a), high(b)),
        Mnemonic::Unpcklps => |a, b, _| interleave::<u32, _>(a, b, false),
        Mnemonic::Unpckhps => |a, b, _| interleave::<u32, _>(a, b, true),
        Mnemonic::Palignr => align_right,

        Mnemonic::Pshufd => |_, b, imm| shuffle_dwords(b, b, imm),
        Mnemonic::Shufps => shuffle_dwords,
        Mnemonic::Pshuflw => |_, b, imm| halves(select_words(low(b), imm), high(b)),
        Mnemonic::Pshufhw => |_, b, imm| halves(low(b), select_words(high(b), imm)),
        Mnemonic::Shufpd => |a, b, imm| {
            let (x, y): ([u64; 2], [u64; 2]) = (split(a), split(b));
            join([pick(&x, imm), pick(&y, imm >> 1)])
        },
        Mnemonic::Movsldup => |_, b, _| shuffle_dwords(b, b, 0b10_10_00_00),
        Mnemonic::Movshdup => |_, b, _| shuffle_dwords(b, b, 0b11_11_01_01),
        Mnemonic::Movddup => |_, b, _| halves(low(b), low(b)),

        Mnemonic::Movhlps => |a, b, _| halves(high(b), high(a)),
        Mnemonic::Movlhps | Mnemonic::Movhps | Mnemonic::Movhpd => |a, b, _| halves(low(a), low(b)),
        Mnemonic::Movlps | Mnemonic::Movlpd | Mnemonic::Movsd => |a, b, _| halves(low(b), high(a)),
        Mnemonic::Movss => |a, b, _| blend::<u32, _>(a, b, 1),

        Mnemonic::Pblendw => blend::<u16, _>,
        Mnemonic::Blendps => blend::<u32, _>,
        Mnemonic::Blendpd => blend::<u64, _>,
        Mnemonic::Insertps => insert_single,

        Mnemonic::Pmovsxbw => |_, b, _| widen::<i8, i16, _>(b),
        Mnemonic::Pmovsxbd => |_, b, _| widen::<i8, i32, _>(b),
        Mnemonic::Pmovsxbq => |_, b, _| widen::<i8, i64, _>(b),
        Mnemonic::Pmovsxwd => |_, b, _| widen::<i16, i32, _>(b),
        Mnemonic::Pmovsxwq => |_, b, _| widen::<i16, i64, _>(b),
        Mnemonic::Pmovsxdq => |_, b, _| widen::<i32, i64, _>(b),
        Mnemonic::Pmovzxbw => |_, b, _| widen::<u8, u16, _>(b),
        Mnemonic::Pmovzxbd => |_, b, _| widen::<u8, u32, _>(b),
        Mnemonic::Pmovzxbq => |_, b, _| widen::<u8, u64, _>(b),
        Mnemonic::Pmovzxwd => |_, b, _| widen::<u16, u32, _>(b),
        Mnemonic::Pmovzxwq => |_, b, _| widen::<u16, u64, _>(b),
        Mnemonic::Pmovzxdq => |_, b, _| widen::<u32, u64, _>(b),
        _ => return None,
    };
    Some(op)
}

/// The blends that choose each lane by the top bit of the same lane of XMM0.
pub(super) fn masked_op(mnemonic: Mnemonic) -> Option<MaskedOp> {
    let op: MaskedOp = match mnemonic {
        Mnemonic::Pblendvb => |a, b, mask| merge(a, b, map(mask, |x: i8| x >> 7)),
        Mnemonic::Blendvps => |a, b, mask| merge(a, b, map(mask, |x: i32| x >> 31)),
        Mnemonic::Blendvpd => |a, b, mask| merge(a, b, map(mask, |x: i64| x >> 63)),
        _ => return None,
    };
    Some(op)
}

/// Each bit from `b` where it is set in `mask`, else from `a`.
const fn merge(a: u128, b: u128, mask: u128) -> u128 {
    b & mask | a & !mask
}

/// PSHUFB: a control byte with its top bit set gives zero.
fn shuffle_bytes<R: Packed<u8>>(a: R, control: R) -> R {
    let bytes = a.lanes();
    map(control, |index: u8| if index & 0x80 == 0 { pick(bytes.as_ref(), index) } else { 0 })
}

/// SHUFPS: the lower lanes from `a`, the upper from `b`, each chosen by two bits of `imm`.
fn shuffle_dwords(a: u128, b: u128, imm: u8) -> u128 {
    let (x, y): ([u32; 4], [u32; 4]) = (split(a), split(b));
    join([pick(&x, imm), pick(&x, imm >> 2), pick(&y, imm >> 4), pick(&y, imm >> 6)])
}

/// PSHUFW: each word chosen by two bits of `imm`.
fn select_words(b: u64, imm: u8) -> u64 {
    let words: [u16; 4] = split(b);
    join([0, 2, 4, 6].map(|shift| pick(&words, imm >> shift)))
}

/// PALIGNR: sixteen bytes of the pair `a`:`b`, from byte `imm`; zeros lie above the pair.
fn align_right(a: u128, b: u128, imm: u8) -> u128 {
    let bits = u32::from(imm) * 8;
    let from_b = b.checked_shr(bits).unwrap_or(0);
    let from_a = match 128u32.checked_sub(bits) {
        Some(bits) => a.checked_shl(bits),
        None => a.checked_shr(bits.saturating_sub(128)),
    };
    from_b | from_a.unwrap_or(0)
}

/// INSERTPS: lane imm\[7:6\] of `b` into lane imm\[5:4\] of `a`, then the lanes of imm\[3:0\] become zero.
fn insert_single(a: u128, b: u128, imm: u8) -> u128 {
    let lanes: [u32; 4] = split(b);
    let single = pick(&lanes, imm >> 6);
    let inserted = blend::<u32, _>(a, join([single; 4]), 1 << (imm >> 4 & 3));
    blend::<u32, _>(inserted, 0, imm)
}
