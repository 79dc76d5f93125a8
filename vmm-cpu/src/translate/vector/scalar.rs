//! Between vector and general registers: extracts, inserts, sign masks and PTEST.

use iced_x86::Mnemonic;

use super::lanes::{Lanes, Packed, high, low, pick, split};
use super::{ExtractOp, InsertOp, MmxExtractOp, MmxInsertOp};

/// The operations from an XMM register.
pub(crate) fn xmm_extract(mnemonic: Mnemonic) -> Option<ExtractOp> {
    let op: ExtractOp = match mnemonic {
        Mnemonic::Pextrb => extract::<u8, _>,
        Mnemonic::Pextrw => extract::<u16, _>,
        Mnemonic::Pextrd | Mnemonic::Extractps => extract::<u32, _>,
        Mnemonic::Pextrq => extract::<u64, _>,
        Mnemonic::Pmovmskb => |a, _| byte_signs(low(a)) | byte_signs(high(a)) << 8,
        Mnemonic::Movmskps => |a, _| {
            let [x, y, z, w]: [u32; 4] = split(a);
            u64::from(x >> 31 | y >> 31 << 1 | z >> 31 << 2 | w >> 31 << 3)
        },
        Mnemonic::Movmskpd => |a, _| low(a) >> 63 | high(a) >> 63 << 1,
        _ => return None,
    };
    Some(op)
}

/// The operations from an MM register.
pub(crate) fn mmx_extract(mnemonic: Mnemonic) -> Option<MmxExtractOp> {
    let op: MmxExtractOp = match mnemonic {
        Mnemonic::Pextrw => extract::<u16, _>,
        Mnemonic::Pmovmskb => |a, _| byte_signs(a),
        _ => return None,
    };
    Some(op)
}

/// The operations from a general register or memory into an XMM register.
pub(crate) fn xmm_insert(mnemonic: Mnemonic) -> Option<InsertOp> {
    let op: InsertOp = match mnemonic {
        Mnemonic::Pinsrb => insert::<u8, _>,
        Mnemonic::Pinsrw => insert::<u16, _>,
        Mnemonic::Pinsrd => insert::<u32, _>,
        Mnemonic::Pinsrq => insert::<u64, _>,
        _ => return None,
    };
    Some(op)
}

/// The operations from a general register or memory into an MM register.
pub(crate) fn mmx_insert(mnemonic: Mnemonic) -> Option<MmxInsertOp> {
    let op: MmxInsertOp = match mnemonic {
        Mnemonic::Pinsrw => insert::<u16, _>,
        _ => return None,
    };
    Some(op)
}

/// PTEST: the flags `(ZF, CF)`; the instruction clears the other four arithmetic flags.
pub(crate) const fn ptest(dst: u128, src: u128) -> (bool, bool) {
    (src & dst == 0, src & !dst == 0)
}

/// The lane of `a` that the low bits of `imm` name, zero-extended.
fn extract<T: Copy + Default + Into<u64>, R: Packed<T>>(a: R, imm: u8) -> u64 {
    pick(a.lanes().as_ref(), imm).into()
}

/// `a` with the low bits of `value` in the lane that the low bits of `imm` name.
fn insert<T: Copy + Default, R: Packed<T>>(a: R, value: u64, imm: u8) -> R
where
    u64: Packed<T>,
{
    let mut lanes = a.lanes();
    let index = usize::from(imm) & lanes.as_ref().len().wrapping_sub(1);
    for (place, lane) in lanes.as_mut().iter_mut().enumerate() {
        if place == index {
            *lane = pick(value.lanes().as_ref(), 0);
        }
    }
    lanes.join()
}

/// The top bit of each of eight bytes. The product brings them together in its top byte without a carry.
const fn byte_signs(x: u64) -> u64 {
    (x >> 7 & 0x0101_0101_0101_0101).wrapping_mul(0x0102_0408_1020_4080) >> 56
}
