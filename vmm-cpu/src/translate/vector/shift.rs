//! Shifts of lanes and of whole registers (Intel SDM 2B, PSLLW/PSLLD/PSLLQ to PSRLDQ).
//!
//! The count is the low 64 bits of `src`, all of which matter: a count as large as the lane shifts everything
//! out, and an arithmetic shift leaves copies of the sign.

use iced_x86::Mnemonic;

use super::lanes::{Packed, Register, map, pick};
use super::{Op, VectorOp};

/// The operations that exist on MM and XMM registers.
pub(super) fn op<R: Register>(mnemonic: Mnemonic) -> Option<Op<R>> {
    let op: Op<R> = match mnemonic {
        Mnemonic::Psllw => |a, src, _| logical(a, src, u16::checked_shl),
        Mnemonic::Pslld => |a, src, _| logical(a, src, u32::checked_shl),
        Mnemonic::Psllq => |a, src, _| logical(a, src, u64::checked_shl),
        Mnemonic::Psrlw => |a, src, _| logical(a, src, u16::checked_shr),
        Mnemonic::Psrld => |a, src, _| logical(a, src, u32::checked_shr),
        Mnemonic::Psrlq => |a, src, _| logical(a, src, u64::checked_shr),
        Mnemonic::Psraw => |a, src, _| {
            let count = count(src).min(15);
            map(a, |x: i16| x >> count)
        },
        Mnemonic::Psrad => |a, src, _| {
            let count = count(src).min(31);
            map(a, |x: i32| x >> count)
        },
        _ => return None,
    };
    Some(op)
}

/// The operations that exist on XMM registers only.
pub(super) fn xmm_op(mnemonic: Mnemonic) -> Option<VectorOp> {
    let op: VectorOp = match mnemonic {
        Mnemonic::Pslldq => |a, src, _| a.checked_shl(count(src).saturating_mul(8)).unwrap_or(0),
        Mnemonic::Psrldq => |a, src, _| a.checked_shr(count(src).saturating_mul(8)).unwrap_or(0),
        _ => return None,
    };
    Some(op)
}

/// A shift that leaves nothing when the count is as large as the lane.
#[inline(always)]
fn logical<T: Copy + Default, R: Register + Packed<T>>(
    a: R,
    src: R,
    shift: impl Fn(T, u32) -> Option<T>,
) -> R {
    let count = count(src);
    map(a, |x| shift(x, count).unwrap_or_default())
}

/// The shift count, saturated.
#[inline(always)]
fn count<R: Packed<u64>>(src: R) -> u32 {
    u32::try_from(pick(src.lanes().as_ref(), 0)).unwrap_or(u32::MAX)
}
