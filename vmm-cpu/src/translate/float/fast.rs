//! The common case of the basic operations, without a look at exceptions.
//!
//! Nearly always a guest rounds to nearest with all exceptions masked, and its first inexact result has
//! set the precision flag for good. Under such an MXCSR, an operation on ordinary operands with an
//! ordinary result changes no flag, and the compiler's own arithmetic, which is IEEE 754's, computes it.
//! Everything else goes to the host path or the portable code.

use iced_x86::Mnemonic;

use super::exact::low;
use super::lane::{Double, Lane, Single};
use super::{FloatOp, SimdException, full_op};

/// MXCSR: rounding control, all exception masks, the precision flag ...
const ORDINARY_MASK: u32 = 0x7fa0;
/// ... with rounding to nearest, everything masked, and the flag set.
const ORDINARY: u32 = 0x1fa0;

/// Whether rounding to nearest needs no flags set.
pub(super) fn is_ordinary(mxcsr: u32) -> bool {
    mxcsr & ORDINARY_MASK == ORDINARY
}

/// A lane that the compiler computes in.
trait Native: Lane {
    type Number: Copy;

    fn number(bits: u64) -> Self::Number;
    fn bits(number: Self::Number) -> u64;
}

impl Native for Single {
    type Number = f32;

    fn number(bits: u64) -> f32 {
        f32::from_bits((bits & 0xffff_ffff) as u32)
    }

    fn bits(number: f32) -> u64 {
        u64::from(number.to_bits())
    }
}

impl Native for Double {
    type Number = f64;

    fn number(bits: u64) -> f64 {
        f64::from_bits(bits)
    }

    fn bits(number: f64) -> u64 {
        number.to_bits()
    }
}

/// Zero or a normal number.
fn is_ordinary_operand<L: Lane>(bits: u64) -> bool {
    let exponent = bits & L::INFINITY;
    exponent != L::INFINITY && (exponent != 0 || bits & (L::SIGN - 1) == 0)
}

/// A normal number that was not tiny before it was rounded.
fn is_ordinary_result<L: Lane>(bits: u64) -> bool {
    let exponent = bits & L::INFINITY;
    exponent != L::INFINITY && exponent > L::QUIET << 1
}

/// The lowest `count` lanes, if they are all of the common case. A result of zero is where `zero`, told
/// which operands are zeros, says that it is exact.
fn lanes<L: Native>(
    dst: u128,
    src: u128,
    count: u32,
    zero: impl Fn(bool, bool) -> bool,
    kernel: impl Fn(L::Number, L::Number) -> L::Number,
) -> Option<u128> {
    let mut result = dst;
    for shift in (0..count).map(|lane| lane * L::WIDTH) {
        let (a, b) = (low(dst >> shift) & L::MASK, low(src >> shift) & L::MASK);
        let c = L::bits(kernel(L::number(a), L::number(b)));
        let is_zero = |bits: u64| bits & (L::SIGN - 1) == 0;
        let ordinary = is_ordinary_operand::<L>(a)
            && is_ordinary_operand::<L>(b)
            && (is_ordinary_result::<L>(c) || is_zero(c) && zero(is_zero(a), is_zero(b)));
        if !ordinary {
            return None;
        }
        result = result & !(u128::from(L::MASK) << shift) | u128::from(c) << shift;
    }
    Some(result)
}

#[cold]
fn full(mnemonic: Mnemonic, dst: u128, src: u128, imm: u8, mxcsr: &mut u32) -> Result<u128, SimdException> {
    full_op(mnemonic).map_or(Ok(dst), |op| op(dst, src, imm, mxcsr))
}

/// The closure of an operation on `$count` lanes. A sum that is zero is so exactly; a product or quotient
/// may have underflowed.
macro_rules! operation {
    ($mnemonic:ident, $lane:ident, $count:literal, $zero:expr, $kernel:expr) => {
        |dst, src, imm, mxcsr| {
            let common =
                is_ordinary(*mxcsr).then(|| lanes::<$lane>(dst, src, $count, $zero, $kernel)).flatten();
            match common {
                Some(result) => Ok(result),
                None => full(Mnemonic::$mnemonic, dst, src, imm, mxcsr),
            }
        }
    };
}

/// The operation of a mnemonic that has such a common case.
pub(super) fn fast_op(mnemonic: Mnemonic) -> Option<FloatOp> {
    let op: FloatOp = match mnemonic {
        Mnemonic::Addss => operation!(Addss, Single, 1, |_, _| true, |a, b| a + b),
        Mnemonic::Addsd => operation!(Addsd, Double, 1, |_, _| true, |a, b| a + b),
        Mnemonic::Addps => operation!(Addps, Single, 4, |_, _| true, |a, b| a + b),
        Mnemonic::Addpd => operation!(Addpd, Double, 2, |_, _| true, |a, b| a + b),
        Mnemonic::Subss => operation!(Subss, Single, 1, |_, _| true, |a, b| a - b),
        Mnemonic::Subsd => operation!(Subsd, Double, 1, |_, _| true, |a, b| a - b),
        Mnemonic::Subps => operation!(Subps, Single, 4, |_, _| true, |a, b| a - b),
        Mnemonic::Subpd => operation!(Subpd, Double, 2, |_, _| true, |a, b| a - b),
        Mnemonic::Mulss => operation!(Mulss, Single, 1, |a, b| a || b, |a, b| a * b),
        Mnemonic::Mulsd => operation!(Mulsd, Double, 1, |a, b| a || b, |a, b| a * b),
        Mnemonic::Mulps => operation!(Mulps, Single, 4, |a, b| a || b, |a, b| a * b),
        Mnemonic::Mulpd => operation!(Mulpd, Double, 2, |a, b| a || b, |a, b| a * b),
        Mnemonic::Divss => operation!(Divss, Single, 1, |a, _| a, |a, b| a / b),
        Mnemonic::Divsd => operation!(Divsd, Double, 1, |a, _| a, |a, b| a / b),
        Mnemonic::Divps => operation!(Divps, Single, 4, |a, _| a, |a, b| a / b),
        Mnemonic::Divpd => operation!(Divpd, Double, 2, |a, _| a, |a, b| a / b),
        Mnemonic::Sqrtsd => |dst, src, imm, mxcsr| {
            let bits = low(src);
            let root = f64::from_bits(bits).sqrt().to_bits();
            if is_ordinary(*mxcsr)
                && is_ordinary_operand::<Double>(bits)
                && is_ordinary_result::<Double>(root)
            {
                return Ok(dst & !u128::from(u64::MAX) | u128::from(root));
            }
            full(Mnemonic::Sqrtsd, dst, src, imm, mxcsr)
        },
        // Exact.
        Mnemonic::Cvtss2sd => |dst, src, imm, mxcsr| {
            let bits = low(src) & Single::MASK;
            if is_ordinary_operand::<Single>(bits) {
                let wide = f64::from(Single::number(bits)).to_bits();
                return Ok(dst & !u128::from(u64::MAX) | u128::from(wide));
            }
            full(Mnemonic::Cvtss2sd, dst, src, imm, mxcsr)
        },
        Mnemonic::Cvtsd2ss => |dst, src, imm, mxcsr| {
            let bits = low(src);
            #[allow(
                clippy::cast_possible_truncation,
                reason = "the conversion that rounds is what is wanted"
            )]
            let narrow = Single::bits(f64::from_bits(bits) as f32);
            let ordinary = is_ordinary_operand::<Double>(bits)
                && (is_ordinary_result::<Single>(narrow) || bits & (Double::SIGN - 1) == 0);
            if is_ordinary(*mxcsr) && ordinary {
                return Ok(dst & !u128::from(Single::MASK) | u128::from(narrow));
            }
            full(Mnemonic::Cvtsd2ss, dst, src, imm, mxcsr)
        },
        _ => return None,
    };
    Some(op)
}
