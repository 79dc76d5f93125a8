//! Exact intermediate results, and the one place that rounds them.
//!
//! An operation on finite operands first yields an [`Exact`] value, which is exact but for a sticky
//! lowest bit. What an x86 processor does afterwards (rounding, tininess detected after rounding, gradual
//! underflow or flush to zero, the responses to masked and unmasked exceptions) depends on that value
//! only and happens in [`Exact::finish`]. SSE and x87 differ in the [`Range`] and the [`Environment`]
//! that they pass.

use std::cmp::Ordering;

use super::environment::{Environment, OVERFLOW, PRECISION, Rounding, UNDERFLOW};

/// What finite numbers a format holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Range {
    /// Significant bits, the integer bit included: 1 to 64.
    pub(crate) precision: u32,
    /// Exponent of the smallest normal number.
    pub(crate) min: i32,
    /// Exponent of the largest number.
    pub(crate) max: i32,
}

/// A finite nonzero number: `significand / 2^127 * 2^exponent`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exact {
    pub(crate) sign: bool,
    pub(crate) exponent: i32,
    /// The highest bit is set. The lowest also stands for all bits that did not fit.
    pub(crate) significand: u128,
}

/// What became of an [`Exact`] value in a format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Finished {
    /// `significand / 2^63 * 2^exponent`. The highest bit is clear for zero and denormal numbers only, whose
    /// exponent is the format's smallest. The exponent is out of the format's range after an unmasked
    /// overflow or underflow.
    Number { exponent: i32, significand: u64 },
    /// Masked overflow.
    Infinity,
}

/// An integer obtained by rounding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Integer {
    pub(crate) magnitude: u128,
    pub(crate) inexact: bool,
    /// The magnitude was increased.
    pub(crate) up: bool,
}

struct Rounded {
    significand: u64,
    carry: bool,
    inexact: bool,
    up: bool,
}

/// Shifts right; bits that fall out are kept as a set lowest bit.
fn shift_right_sticky(value: u128, by: u32) -> u128 {
    match by {
        0 => value,
        1..=127 => value >> by | u128::from(value << (128 - by) != 0),
        _ => u128::from(value != 0),
    }
}

/// The low half.
#[allow(clippy::cast_possible_truncation, reason = "the low half is what is asked for")]
pub(crate) fn low(value: u128) -> u64 {
    value as u64
}

/// Whether the magnitude grows, where `rest` relates the bits that go to one half of the last bit that stays.
fn rounds_up(rounding: Rounding, sign: bool, odd: bool, rest: Ordering) -> bool {
    match rounding {
        Rounding::Nearest => rest == Ordering::Greater || rest == Ordering::Equal && odd,
        Rounding::Down => sign,
        Rounding::Up => !sign,
        Rounding::Zero => false,
    }
}

/// Rounds to the `precision` (1 to 64) highest bits, whether or not the highest is set.
fn round(significand: u128, precision: u32, sign: bool, rounding: Rounding) -> Rounded {
    let unit = 1u64 << (64 - precision);
    let high = (significand >> 64) as u64;
    let kept = high & !(unit - 1);
    let rest = significand - (u128::from(kept) << 64);
    let half = u128::from(unit) << 63;
    let inexact = rest != 0;
    let up = inexact && rounds_up(rounding, sign, kept & unit != 0, rest.cmp(&half));
    let (significand, carry) = if up { kept.overflowing_add(unit) } else { (kept, false) };
    Rounded { significand: if carry { 1 << 63 } else { significand }, carry, inexact, up }
}

impl Exact {
    /// `significand / 2^127 * 2^exponent`, whichever bit is the highest; `None` for zero.
    pub(crate) fn normalized(sign: bool, exponent: i32, significand: u128) -> Option<Self> {
        let shift = significand.leading_zeros();
        (significand != 0).then(|| Self {
            sign,
            exponent: exponent - shift.cast_signed(),
            significand: significand << shift,
        })
    }

    /// `significand / 2^63 * 2^exponent`, whichever bit is the highest; `None` for zero.
    pub(crate) fn from_u64(sign: bool, exponent: i32, significand: u64) -> Option<Self> {
        Self::normalized(sign, exponent, u128::from(significand) << 64)
    }

    /// An integer; `None` for zero.
    pub(crate) fn from_integer(value: i64) -> Option<Self> {
        Self::from_u64(value < 0, 63, value.unsigned_abs())
    }

    pub(crate) fn negated(self) -> Self {
        Self { sign: !self.sign, ..self }
    }

    /// Compares absolute values.
    pub(crate) fn compare_magnitude(&self, other: &Self) -> Ordering {
        (self.exponent, self.significand).cmp(&(other.exponent, other.significand))
    }

    /// The sum of numbers of at most 126 bits; `None` if it is exactly zero.
    pub(crate) fn add(self, other: Self) -> Option<Self> {
        let (large, small) =
            if self.compare_magnitude(&other) == Ordering::Less { (other, self) } else { (self, other) };
        let by = large.exponent.abs_diff(small.exponent).saturating_add(1);
        let (a, b) = (large.significand >> 1, shift_right_sticky(small.significand, by));
        let significand = if large.sign == small.sign { a + b } else { a - b };
        Self::normalized(large.sign, large.exponent + 1, significand)
    }

    /// The product of numbers of at most 64 bits.
    pub(crate) fn multiply(self, other: Self) -> Self {
        let product = (self.significand >> 64) * (other.significand >> 64);
        let shift = product.leading_zeros();
        Self {
            sign: self.sign != other.sign,
            exponent: self.exponent + other.exponent + 1 - shift.cast_signed(),
            significand: product << shift,
        }
    }

    /// The quotient of numbers of at most 64 bits: 65 bits of it and a sticky bit.
    pub(crate) fn divide(self, other: Self) -> Self {
        let divisor = other.significand >> 64;
        let (mut quotient, mut rest) = (self.significand / divisor, self.significand % divisor);
        let mut exponent = self.exponent - other.exponent;
        if quotient >> 64 == 0 {
            rest <<= 1;
            let bit = rest >= divisor;
            rest -= if bit { divisor } else { 0 };
            quotient = quotient << 1 | u128::from(bit);
            exponent -= 1;
        }
        Self { sign: self.sign != other.sign, exponent, significand: quotient << 63 | u128::from(rest != 0) }
    }

    /// The square root of the absolute value of a number of at most 64 bits: 65 bits of it and a sticky bit.
    pub(crate) fn square_root(self) -> Self {
        let odd = self.exponent & 1 != 0;
        let radicand = if odd { self.significand } else { self.significand >> 1 };
        let root = radicand.isqrt();
        let rest = radicand - root * root;
        // One more binary digit of the root: (2r + 1)^2 <= 4n exactly if n - r^2 > r.
        let bit = rest > root;
        let exact = if bit { 4 * (rest - root) == 1 } else { rest == 0 };
        Self {
            sign: false,
            exponent: self.exponent.div_euclid(2),
            significand: root << 64 | u128::from(bit) << 63 | u128::from(!exact),
        }
    }

    /// Rounds to an integer; `None` if the magnitude is 2^64 or more already before.
    pub(crate) fn to_integer(self, rounding: Rounding) -> Option<Integer> {
        let by = u32::try_from(63 - self.exponent).ok()?;
        let fixed = shift_right_sticky(self.significand, by);
        let (magnitude, rest) = (fixed >> 64, low(fixed));
        let inexact = rest != 0;
        let up = inexact && rounds_up(rounding, self.sign, magnitude & 1 != 0, rest.cmp(&(1 << 63)));
        Some(Integer { magnitude: magnitude + u128::from(up), inexact, up })
    }

    /// Rounds into a format as the environment says, and notes there the exceptions and whether the
    /// magnitude was increased (Intel SDM 1 4.8.4 and 4.9.1, 8.5.4 to 8.5.6, 10.2.3.3).
    pub(crate) fn finish(self, range: &Range, environment: &mut Environment) -> Finished {
        let rounding = environment.rounding;
        let rounded = round(self.significand, range.precision, self.sign, rounding);
        let exponent = self.exponent + i32::from(rounded.carry);
        let number = Finished::Number { exponent, significand: rounded.significand };
        environment.up = rounded.up;
        environment.post |= if rounded.inexact { PRECISION } else { 0 };
        if exponent > range.max {
            environment.post |= OVERFLOW;
            if environment.is_unmasked(OVERFLOW) {
                return number;
            }
            environment.post |= PRECISION;
            environment.up = match rounding {
                Rounding::Nearest => true,
                Rounding::Down => self.sign,
                Rounding::Up => !self.sign,
                Rounding::Zero => false,
            };
            if environment.up {
                return Finished::Infinity;
            }
            return Finished::Number { exponent: range.max, significand: u64::MAX << (64 - range.precision) };
        }
        if exponent >= range.min {
            return number;
        }
        if environment.is_unmasked(UNDERFLOW) {
            environment.post |= UNDERFLOW;
            return number;
        }
        if environment.flush_to_zero {
            environment.post |= UNDERFLOW | PRECISION;
            environment.up = false;
            return Finished::Number { exponent: range.min, significand: 0 };
        }
        let by = range.min.abs_diff(self.exponent);
        let rounded = round(shift_right_sticky(self.significand, by), range.precision, self.sign, rounding);
        environment.up = rounded.up;
        environment.post |= if rounded.inexact { UNDERFLOW | PRECISION } else { 0 };
        Finished::Number { exponent: range.min, significand: rounded.significand }
    }
}
