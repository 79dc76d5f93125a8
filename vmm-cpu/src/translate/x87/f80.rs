//! The double extended format: taking apart, putting together, NaNs.

use super::super::float::environment::{DENORMAL, Environment, INVALID, OVERFLOW, PRECISION, UNDERFLOW};
use super::super::float::exact::{Exact, Finished, Range};
use super::super::float::lane::{Lane, Value, is_denormal, is_nan, unpack};

/// The exponent field of infinities and NaNs.
const EXPONENT_MAX: u16 = 0x7fff;
/// The exponent field of one.
const BIAS: i32 = 16383;
const INTEGER_BIT: u64 = 1 << 63;
/// The fraction bit that makes a NaN quiet.
const QUIET: u64 = 1 << 62;
const SIGN: u16 = 1 << 15;
/// What the exponent of an unmasked overflow or underflow moves by (Intel SDM 1 8.5.4).
const EXCEPTION_BIAS: i32 = 24576;

/// All numbers of the format.
pub(super) const FULL_RANGE: Range = Range { precision: 64, min: 1 - BIAS, max: BIAS };

/// A register: double extended precision (Intel SDM 1 4.2.2). Any bits are possible.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct F80 {
    pub(crate) significand: u64,
    pub(crate) sign_exponent: u16,
}

/// An operand, and whether it is a denormal in the format it came from.
#[derive(Clone, Copy, Debug)]
pub(super) struct Operand {
    pub(super) value: F80,
    pub(super) denormal: bool,
}

impl From<F80> for Operand {
    fn from(value: F80) -> Self {
        Self { value, denormal: value.is_denormal() }
    }
}

impl F80 {
    /// The quiet NaN of a masked invalid operation.
    pub(super) const INDEFINITE: Self =
        Self { significand: INTEGER_BIT | QUIET, sign_exponent: SIGN | EXPONENT_MAX };
    pub(super) const ONE: Self = Self { significand: INTEGER_BIT, sign_exponent: 0x3fff };

    pub(super) fn zero(negative: bool) -> Self {
        Self { significand: 0, sign_exponent: if negative { SIGN } else { 0 } }
    }

    pub(super) fn infinity(negative: bool) -> Self {
        Self { significand: INTEGER_BIT, sign_exponent: EXPONENT_MAX | if negative { SIGN } else { 0 } }
    }

    pub(super) fn sign(self) -> bool {
        self.sign_exponent & SIGN != 0
    }

    pub(super) fn exponent_field(self) -> u16 {
        self.sign_exponent & EXPONENT_MAX
    }

    pub(super) fn absolute(self) -> Self {
        Self { sign_exponent: self.sign_exponent & !SIGN, ..self }
    }

    pub(super) fn negated(self) -> Self {
        Self { sign_exponent: self.sign_exponent ^ SIGN, ..self }
    }

    pub(super) fn is_zero(self) -> bool {
        self.significand == 0 && self.exponent_field() == 0
    }

    /// Denormals and pseudo-denormals.
    pub(super) fn is_denormal(self) -> bool {
        self.exponent_field() == 0 && self.significand != 0
    }

    pub(super) fn is_infinity(self) -> bool {
        self.exponent_field() == EXPONENT_MAX && self.significand == INTEGER_BIT
    }

    pub(super) fn is_nan(self) -> bool {
        self.exponent_field() == EXPONENT_MAX && self.significand > INTEGER_BIT
    }

    pub(super) fn is_signalling(self) -> bool {
        self.is_nan() && self.significand & QUIET == 0
    }

    /// Encodings that the 8087 knew and later processors reject (Intel SDM 1 8.2.2).
    pub(super) fn is_unsupported(self) -> bool {
        self.exponent_field() != 0 && self.significand & INTEGER_BIT == 0
    }

    pub(super) fn quieted(self) -> Self {
        Self { significand: self.significand | QUIET, ..self }
    }

    /// The value of what is neither a NaN nor unsupported.
    pub(super) fn unpack(self) -> Value {
        let negative = self.sign();
        if self.exponent_field() == EXPONENT_MAX {
            return Value::Infinity(negative);
        }
        let exponent = i32::from(self.exponent_field().max(1)) - BIAS;
        Exact::from_u64(negative, exponent, self.significand).map_or(Value::Zero(negative), Value::Finite)
    }

    fn from_parts(negative: bool, exponent: i32, significand: u64) -> Self {
        let normal = significand & INTEGER_BIT != 0;
        let field = if normal { u16::try_from(exponent + BIAS).unwrap_or(0) & EXPONENT_MAX } else { 0 };
        Self { significand, sign_exponent: field | if negative { SIGN } else { 0 } }
    }

    /// Rounds into `range`, noting exceptions. After an unmasked overflow or underflow the exponent is
    /// off by [`EXCEPTION_BIAS`], or, where even that does not bring it into the format, the result is an
    /// infinity or a zero (Intel SDM 1 8.5.4 and 8.5.5).
    pub(super) fn pack(exact: Exact, range: &Range, environment: &mut Environment) -> Self {
        match exact.finish(range, environment) {
            Finished::Infinity => Self::infinity(exact.sign),
            Finished::Number { exponent, significand } => {
                let exponent = if environment.post & OVERFLOW != 0 && exponent > range.max {
                    exponent - EXCEPTION_BIAS
                } else if environment.post & UNDERFLOW != 0
                    && significand & INTEGER_BIT != 0
                    && exponent < range.min
                {
                    exponent + EXCEPTION_BIAS
                } else {
                    exponent
                };
                if exponent > range.max {
                    environment.post |= PRECISION;
                    environment.up = true;
                    Self::infinity(exact.sign)
                } else if exponent < range.min {
                    environment.post |= PRECISION;
                    environment.up = false;
                    Self::zero(exact.sign)
                } else {
                    Self::from_parts(exact.sign, exponent, significand)
                }
            }
        }
    }

    /// A value that the format holds exactly.
    pub(super) fn from_exact(exact: Exact) -> Self {
        let mut environment = Environment::from_x87_control(0x037f);
        Self::pack(exact, &FULL_RANGE, &mut environment)
    }

    pub(super) fn from_value(value: Value) -> Self {
        match value {
            Value::Zero(negative) => Self::zero(negative),
            Value::Infinity(negative) => Self::infinity(negative),
            Value::Finite(exact) => Self::from_exact(exact),
        }
    }

    pub(super) fn from_integer(value: i64) -> Self {
        Exact::from_integer(value).map_or(Self::zero(false), Self::from_exact)
    }

    /// A single or double precision operand. A signalling NaN stays one.
    pub(super) fn widen<L: Lane>(bits: u64) -> Operand {
        let negative = bits & L::SIGN != 0;
        let value = if is_nan::<L>(bits) {
            let fraction = bits << (63 - L::FRACTION) & (INTEGER_BIT - 1);
            Self { significand: INTEGER_BIT | fraction, ..Self::infinity(negative) }
        } else {
            Self::from_value(unpack::<L>(bits))
        };
        Operand { value, denormal: is_denormal::<L>(bits) }
    }

    /// A NaN in single or double precision: quiet, the highest fraction bits kept.
    pub(super) fn narrow_nan<L: Lane>(self) -> u64 {
        let sign = if self.sign() { L::SIGN } else { 0 };
        let fraction = (self.significand & (INTEGER_BIT - 1)) >> (63 - L::FRACTION);
        sign | L::INFINITY | L::QUIET | fraction
    }

    pub(super) fn from_bytes(bytes: [u8; 10]) -> Self {
        let [s0, s1, s2, s3, s4, s5, s6, s7, e0, e1] = bytes;
        Self {
            significand: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
            sign_exponent: u16::from_le_bytes([e0, e1]),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; 10] {
        let [s0, s1, s2, s3, s4, s5, s6, s7] = self.significand.to_le_bytes();
        let [e0, e1] = self.sign_exponent.to_le_bytes();
        [s0, s1, s2, s3, s4, s5, s6, s7, e0, e1]
    }
}

/// The value of one operand, or the result if it is a NaN or unsupported. Exceptions are noted.
pub(super) fn operand(a: Operand, environment: &mut Environment) -> Result<Value, F80> {
    if a.value.is_unsupported() {
        environment.pre |= INVALID;
        return Err(F80::INDEFINITE);
    }
    if a.value.is_nan() {
        if a.value.is_signalling() {
            environment.pre |= INVALID;
        }
        return Err(a.value.quieted());
    }
    if a.denormal {
        environment.pre |= DENORMAL;
    }
    Ok(a.value.unpack())
}

/// The values of two operands, or the result if one is a NaN or unsupported (Intel SDM 1 table 4-7).
/// Exceptions are noted.
pub(super) fn operands(a: Operand, b: Operand, environment: &mut Environment) -> Result<(Value, Value), F80> {
    if a.value.is_unsupported() || b.value.is_unsupported() {
        environment.pre |= INVALID;
        return Err(F80::INDEFINITE);
    }
    if a.value.is_nan() || b.value.is_nan() {
        if a.value.is_signalling() || b.value.is_signalling() {
            environment.pre |= INVALID;
        }
        return Err(select_nan(a.value, b.value).quieted());
    }
    if a.denormal || b.denormal {
        environment.pre |= DENORMAL;
    }
    Ok((a.value.unpack(), b.value.unpack()))
}

/// The operand that makes the result where one or both are NaNs: a quiet one before a signalling one,
/// then the one with the larger significand, then the positive one.
fn select_nan(a: F80, b: F80) -> F80 {
    if !b.is_nan() {
        return a;
    }
    if !a.is_nan() {
        return b;
    }
    match (a.is_signalling(), b.is_signalling()) {
        (true, false) => b,
        (false, true) => a,
        _ if a.significand == b.significand => {
            if a.sign() {
                b
            } else {
                a
            }
        }
        _ if a.significand < b.significand => b,
        _ => a,
    }
}
