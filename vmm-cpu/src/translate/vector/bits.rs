//! Bit manipulation in general registers: BMI1 and BMI2 (Intel SDM 2A to 2C, the entry of each instruction).
//!
//! Operands wider than the operation are cut to it; results are zero-extended to 64 bits, as a write to a 32-bit
//! register is.

use super::status::{CF, SF, ZF, flag};

/// The operand size, VEX.W.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Width {
    /// 32 bits.
    Dword,
    /// 64 bits.
    Qword,
}

impl Width {
    const fn bits(self) -> u32 {
        match self {
            Self::Dword => 32,
            Self::Qword => 64,
        }
    }

    const fn cut(self, x: u64) -> u64 {
        x & u64::MAX >> (64 - self.bits())
    }

    const fn sign(self, x: u64) -> bool {
        x >> (self.bits() - 1) & 1 != 0
    }
}

/// A result and what the instruction does to the status flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Flagged {
    /// The destination's new value.
    pub(crate) value: u64,
    /// All six status flags, in their places in RFLAGS. Those that the instruction leaves undefined are clear: AF, PF,
    /// and for BEXTR SF.
    pub(crate) status: u64,
}

impl Flagged {
    const fn new(value: u64, carry: bool, width: Width) -> Self {
        let value = width.cut(value);
        let sign = width.sign(value);
        Self { value, status: flag(CF, carry) | flag(ZF, value == 0) | flag(SF, sign) }
    }
}

/// ANDN: the bits of `b` that are not set in `a`, the operand in VEX.vvvv.
pub(crate) const fn andn(a: u64, b: u64, width: Width) -> Flagged {
    Flagged::new(!a & b, false, width)
}

/// BEXTR: control\[15:8\] bits of `x`, from bit control\[7:0\] up.
pub(crate) const fn bextr(x: u64, control: u64, width: Width) -> Flagged {
    let [start, length, ..] = control.to_le_bytes();
    let shifted = match width.cut(x).checked_shr(start as u32) {
        Some(shifted) => shifted,
        None => 0,
    };
    let value = low_bits(shifted, length);
    Flagged { value, status: flag(ZF, value == 0) }
}

/// BLSI: the lowest set bit. CF: there is one.
pub(crate) const fn blsi(x: u64, width: Width) -> Flagged {
    Flagged::new(x & x.wrapping_neg(), width.cut(x) != 0, width)
}

/// BLSMSK: all bits up to the lowest set bit. CF: there is none; ZF is always clear.
pub(crate) const fn blsmsk(x: u64, width: Width) -> Flagged {
    Flagged::new(x ^ x.wrapping_sub(1), width.cut(x) == 0, width)
}

/// BLSR: without the lowest set bit. CF: there is none.
pub(crate) const fn blsr(x: u64, width: Width) -> Flagged {
    Flagged::new(x & x.wrapping_sub(1), width.cut(x) == 0, width)
}

/// BZHI: the bits below bit index\[7:0\]. CF: the index is beyond the operand, which then stays whole.
pub(crate) const fn bzhi(x: u64, index: u64, width: Width) -> Flagged {
    let [index, ..] = index.to_le_bytes();
    Flagged::new(low_bits(x, index), index as u32 >= width.bits(), width)
}

/// PDEP: the low bits of `x` to the places of the set bits of `mask`.
pub(crate) const fn pdep(mut x: u64, mask: u64, width: Width) -> u64 {
    let mut left = width.cut(mask);
    let mut result = 0;
    while left != 0 {
        if x & 1 != 0 {
            result |= left & left.wrapping_neg();
        }
        x >>= 1;
        left &= left - 1;
    }
    result
}

/// PEXT: the bits of `x` at the places of the set bits of `mask`, side by side.
pub(crate) const fn pext(x: u64, mask: u64, width: Width) -> u64 {
    let mut left = width.cut(mask);
    let mut result = 0;
    let mut place = 1u64;
    while left != 0 {
        if x & left & left.wrapping_neg() != 0 {
            result |= place;
        }
        place <<= 1;
        left &= left - 1;
    }
    result
}

/// RORX: a rotation to the right by `count` modulo the width.
pub(crate) const fn rorx(x: u64, count: u8, width: Width) -> u64 {
    let x = width.cut(x);
    let count = count as u32 % width.bits();
    match count {
        0 => x,
        _ => width.cut(x >> count | x << (width.bits() - count)),
    }
}

/// SARX: an arithmetic shift to the right by `count` modulo the width.
pub(crate) const fn sarx(x: u64, count: u64, width: Width) -> u64 {
    let above = 64 - width.bits();
    // At the top of 64 bits the operand's sign is that of the i64.
    let signed = (x << above).cast_signed() >> above;
    width.cut((signed >> modulo(count, width)).cast_unsigned())
}

/// SHLX: a shift to the left by `count` modulo the width.
pub(crate) const fn shlx(x: u64, count: u64, width: Width) -> u64 {
    width.cut(x << modulo(count, width))
}

/// SHRX: a logical shift to the right by `count` modulo the width.
pub(crate) const fn shrx(x: u64, count: u64, width: Width) -> u64 {
    width.cut(x) >> modulo(count, width)
}

/// MULX: the unsigned product as `(high, low)`. Where both go to the same register, the high half stays.
pub(crate) fn mulx(a: u64, b: u64, width: Width) -> (u64, u64) {
    let (low, high) = width.cut(a).carrying_mul(width.cut(b), 0);
    match width {
        Width::Dword => (low >> 32, width.cut(low)),
        Width::Qword => (high, low),
    }
}

const fn modulo(count: u64, width: Width) -> u64 {
    count & (width.bits() as u64 - 1)
}

const fn low_bits(x: u64, count: u8) -> u64 {
    if count < 64 { x & ((1 << count) - 1) } else { x }
}
