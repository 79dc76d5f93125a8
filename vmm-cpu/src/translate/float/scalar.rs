//! The scalar operations between an XMM register and the general registers or RFLAGS.
//!
//! The common cases (exact conversions, ordinary operands) raise no exception under any MXCSR and need no
//! soft float: those use the compiler's own conversions.

use std::cmp::Ordering;

use super::SimdException;
use super::arithmetic::compare;
use super::convert::{from_integer, to_integer};
use super::environment::Environment;
use super::exact::low;
use super::fast::is_ordinary;
use super::lane::{Double, Lane, Single};

const CF: u64 = 1;
const PF: u64 = 1 << 2;
const ZF: u64 = 1 << 6;

/// Integers up to this magnitude are exact in double precision.
const EXACT_IN_DOUBLE: u64 = 1 << 53;
/// Integers up to this magnitude are exact in single precision.
const EXACT_IN_SINGLE: u64 = 1 << 24;

fn low_single(vector: u128) -> u32 {
    (low(vector) & 0xffff_ffff) as u32
}

fn merge<L: Lane>(dst: u128, value: u64) -> u128 {
    dst & !u128::from(L::MASK) | u128::from(value)
}

/// CVTSI2SS: `value` is the 32- or 64-bit operand, sign-extended.
pub(crate) fn cvtsi2ss(dst: u128, value: i64, mxcsr: &mut u32) -> Result<u128, SimdException> {
    if value.unsigned_abs() <= EXACT_IN_SINGLE {
        return Ok(merge::<Single>(dst, u64::from((value as f32).to_bits())));
    }
    inexact_from_integer::<Single>(dst, value, mxcsr)
}

/// CVTSI2SD: `value` is the 32- or 64-bit operand, sign-extended.
pub(crate) fn cvtsi2sd(dst: u128, value: i64, mxcsr: &mut u32) -> Result<u128, SimdException> {
    if value.unsigned_abs() <= EXACT_IN_DOUBLE {
        return Ok(merge::<Double>(dst, (value as f64).to_bits()));
    }
    inexact_from_integer::<Double>(dst, value, mxcsr)
}

fn inexact_from_integer<L: Lane>(dst: u128, value: i64, mxcsr: &mut u32) -> Result<u128, SimdException> {
    let mut environment = Environment::from_mxcsr(*mxcsr);
    let result = from_integer::<L>(value, &mut environment);
    environment.finish_sse(mxcsr)?;
    Ok(merge::<L>(dst, result))
}

/// CVTSS2SI, or CVTTSS2SI where `truncate` is set: a 64-bit integer where `wide` is set, else a
/// zero-extended 32-bit one.
pub(crate) fn cvtss2si(src: u128, truncate: bool, wide: bool, mxcsr: &mut u32) -> Result<u64, SimdException> {
    let bits = low_single(src);
    match plain_integer(f64::from(f32::from_bits(bits)), truncate, wide, *mxcsr) {
        Some(integer) => Ok(integer),
        None => inexact_to_integer::<Single>(u64::from(bits), truncate, wide, mxcsr),
    }
}

/// CVTSD2SI, or CVTTSD2SI where `truncate` is set; see [`cvtss2si`].
pub(crate) fn cvtsd2si(src: u128, truncate: bool, wide: bool, mxcsr: &mut u32) -> Result<u64, SimdException> {
    let bits = low(src);
    match plain_integer(f64::from_bits(bits), truncate, wide, *mxcsr) {
        Some(integer) => Ok(integer),
        None => inexact_to_integer::<Double>(bits, truncate, wide, mxcsr),
    }
}

/// The integer that `value` is or, where an inexact result changes no flag, is rounded to. `None` if that
/// takes a closer look, near the limits of the range too.
fn plain_integer(value: f64, truncate: bool, wide: bool, mxcsr: u32) -> Option<u64> {
    let limit = if wide { 9e18 } else { 2e9 };
    // A NaN compares with nothing.
    if value.abs().partial_cmp(&limit) != Some(Ordering::Less) {
        return None;
    }
    #[allow(clippy::cast_possible_truncation, reason = "truncation is what is wanted; the range is checked")]
    let truncated = value as i64;
    let integer = if truncated as f64 == value || truncate && is_ordinary(mxcsr) {
        truncated
    } else if is_ordinary(mxcsr) {
        #[allow(clippy::cast_possible_truncation, reason = "an integer already; the range is checked")]
        let nearest = value.round_ties_even() as i64;
        nearest
    } else {
        return None;
    };
    let mask = if wide { u64::MAX } else { u64::from(u32::MAX) };
    Some(integer.cast_unsigned() & mask)
}

fn inexact_to_integer<L: Lane>(
    bits: u64,
    truncate: bool,
    wide: bool,
    mxcsr: &mut u32,
) -> Result<u64, SimdException> {
    let mut environment = Environment::from_mxcsr(*mxcsr);
    let result = to_integer::<L>(bits, truncate, wide, &mut environment);
    environment.finish_sse(mxcsr)?;
    Ok(result)
}

/// COMISS: the ZF, PF and CF bits of RFLAGS (OF, SF and AF become 0).
pub(crate) fn comiss(a: u128, b: u128, mxcsr: &mut u32) -> Result<u64, SimdException> {
    compare_flags::<Single>(u64::from(low_single(a)), u64::from(low_single(b)), false, mxcsr)
}

/// UCOMISS: as [`comiss`], but quiet NaNs raise nothing.
pub(crate) fn ucomiss(a: u128, b: u128, mxcsr: &mut u32) -> Result<u64, SimdException> {
    compare_flags::<Single>(u64::from(low_single(a)), u64::from(low_single(b)), true, mxcsr)
}

/// COMISD: as [`comiss`].
pub(crate) fn comisd(a: u128, b: u128, mxcsr: &mut u32) -> Result<u64, SimdException> {
    compare_flags::<Double>(low(a), low(b), false, mxcsr)
}

/// UCOMISD: as [`ucomiss`].
pub(crate) fn ucomisd(a: u128, b: u128, mxcsr: &mut u32) -> Result<u64, SimdException> {
    compare_flags::<Double>(low(a), low(b), true, mxcsr)
}

fn compare_flags<L: Lane>(a: u64, b: u64, quiet: bool, mxcsr: &mut u32) -> Result<u64, SimdException> {
    let mut environment = Environment::from_mxcsr(*mxcsr);
    let ordering = compare::<L>(a, b, quiet, &mut environment);
    environment.finish_sse(mxcsr)?;
    Ok(match ordering {
        Some(Ordering::Less) => CF,
        Some(Ordering::Equal) => ZF,
        Some(Ordering::Greater) => 0,
        None => ZF | PF | CF,
    })
}
