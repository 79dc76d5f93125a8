//! The two formats of an SSE lane: taking them apart, putting them together, NaNs.

use super::environment::{DENORMAL, Environment, INVALID};
use super::exact::{Exact, Finished, Range};

/// A binary format that fits 64 bits (IEEE 754). Bit patterns are in the low bits of a `u64`.
pub(crate) trait Lane {
    /// Bits of the format: 32 or 64.
    const WIDTH: u32;
    /// Its numbers.
    const RANGE: Range;

    /// Bits after the integer bit, which is not stored.
    const FRACTION: u32 = Self::RANGE.precision - 1;
    /// All bits.
    const MASK: u64 = u64::MAX >> (64 - Self::WIDTH);
    /// The sign bit.
    const SIGN: u64 = 1 << (Self::WIDTH - 1);
    /// Positive infinity.
    const INFINITY: u64 = Self::MASK >> 1 & !(Self::QUIET | (Self::QUIET - 1));
    /// The highest fraction bit, which makes a NaN quiet.
    const QUIET: u64 = 1 << (Self::FRACTION - 1);
    /// The quiet NaN of a masked invalid operation.
    const INDEFINITE: u64 = Self::SIGN | Self::INFINITY | Self::QUIET;
}

/// Single precision: 32 bits.
#[derive(Debug)]
pub(crate) struct Single;

/// Double precision: 64 bits.
#[derive(Debug)]
pub(crate) struct Double;

impl Lane for Single {
    const WIDTH: u32 = 32;
    const RANGE: Range = Range { precision: 24, min: -126, max: 127 };
}

impl Lane for Double {
    const WIDTH: u32 = 64;
    const RANGE: Range = Range { precision: 53, min: -1022, max: 1023 };
}

/// An operand that is no NaN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    /// A zero and its sign.
    Zero(bool),
    /// Any other finite number.
    Finite(Exact),
    /// An infinity and its sign.
    Infinity(bool),
}

impl Value {
    pub(crate) fn sign(self) -> bool {
        match self {
            Self::Zero(sign) | Self::Infinity(sign) => sign,
            Self::Finite(exact) => exact.sign,
        }
    }

    pub(crate) fn negated(self) -> Self {
        match self {
            Self::Zero(sign) => Self::Zero(!sign),
            Self::Infinity(sign) => Self::Infinity(!sign),
            Self::Finite(exact) => Self::Finite(exact.negated()),
        }
    }
}

pub(crate) fn sign<L: Lane>(bits: u64) -> bool {
    bits & L::SIGN != 0
}

pub(crate) fn is_nan<L: Lane>(bits: u64) -> bool {
    bits & (L::SIGN - 1) > L::INFINITY
}

pub(crate) fn is_signalling<L: Lane>(bits: u64) -> bool {
    is_nan::<L>(bits) && bits & L::QUIET == 0
}

pub(crate) fn is_denormal<L: Lane>(bits: u64) -> bool {
    bits & L::INFINITY == 0 && bits & (L::SIGN - 1) != 0
}

/// The operand as the instruction sees it: a denormal is a zero where MXCSR.DAZ says so.
pub(crate) fn with_daz<L: Lane>(bits: u64, environment: &Environment) -> u64 {
    if environment.denormals_are_zeros && is_denormal::<L>(bits) { bits & L::SIGN } else { bits }
}

/// The value of `bits`, which is no NaN.
pub(crate) fn unpack<L: Lane>(bits: u64) -> Value {
    let (negative, magnitude) = (sign::<L>(bits), bits & (L::SIGN - 1));
    if magnitude >= L::INFINITY {
        return Value::Infinity(negative);
    }
    let fraction = magnitude & ((1 << L::FRACTION) - 1);
    // At most eleven bits.
    let biased = ((magnitude >> L::FRACTION) & 0x7ff) as i32;
    let integer = u64::from(biased != 0) << L::FRACTION;
    let exponent = biased.max(1) - 1 + L::RANGE.min;
    Exact::from_u64(negative, exponent, (integer | fraction) << (63 - L::FRACTION))
        .map_or(Value::Zero(negative), Value::Finite)
}

/// Rounds into the format, noting exceptions. The result means nothing after an unmasked overflow or
/// underflow.
pub(crate) fn pack<L: Lane>(exact: Exact, environment: &mut Environment) -> u64 {
    let sign = if exact.sign { L::SIGN } else { 0 };
    sign | match exact.finish(&L::RANGE, environment) {
        Finished::Infinity => L::INFINITY,
        Finished::Number { exponent, significand } => {
            let stored = significand >> (63 - L::FRACTION);
            // The integer bit of a normal number adds one to the exponent field.
            let field = u64::try_from(exponent - L::RANGE.min).unwrap_or(0);
            (field << L::FRACTION).wrapping_add(stored) & (L::SIGN - 1)
        }
    }
}

/// The result for one NaN operand, noting a signalling one.
pub(crate) fn propagate<L: Lane>(nan: u64, environment: &mut Environment) -> u64 {
    if is_signalling::<L>(nan) {
        environment.pre |= INVALID;
    }
    nan | L::QUIET
}

/// Two operands, or the result if one is a NaN: the first operand's if that is one (Intel SDM 1 table 4-7).
/// Denormal operands are noted in the absence of NaNs only.
pub(crate) fn operands<L: Lane>(
    a: u64,
    b: u64,
    environment: &mut Environment,
) -> Result<(Value, Value), u64> {
    let (a, b) = (with_daz::<L>(a, environment), with_daz::<L>(b, environment));
    if is_nan::<L>(a) || is_nan::<L>(b) {
        if is_signalling::<L>(a) || is_signalling::<L>(b) {
            environment.pre |= INVALID;
        }
        return Err(L::QUIET | if is_nan::<L>(a) { a } else { b });
    }
    if is_denormal::<L>(a) || is_denormal::<L>(b) {
        environment.pre |= DENORMAL;
    }
    Ok((unpack::<L>(a), unpack::<L>(b)))
}
