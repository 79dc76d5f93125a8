//! The basic operations on double extended values.
//!
//! Each notes its exceptions in the environment; a result is not to be used where one seen in the
//! operands is unmasked.

use std::cmp::Ordering;

use super::super::float::environment::{DENORMAL, DIVIDE_BY_ZERO, Environment, INVALID, PRECISION, Rounding};
use super::super::float::exact::{Exact, Range};
use super::super::float::lane::Value;
use super::f80::{F80, FULL_RANGE, Operand, operand, operands};

/// A basic operation: the range that the control word's precision gives, both operands.
pub(super) type Kernel = fn(Operand, Operand, &Range, &mut Environment) -> F80;

/// The numbers that results of the basic operations are rounded to: precision control shortens the
/// significand and leaves the exponent alone (Intel SDM 1 8.1.5.2).
pub(super) fn range(control: u16) -> Range {
    let precision = match control >> 8 & 3 {
        0 => 24,
        2 => 53,
        _ => 64,
    };
    Range { precision, ..FULL_RANGE }
}

/// Invalid operation: takes precedence over a denormal operand.
fn invalid(environment: &mut Environment) -> F80 {
    environment.pre = environment.pre & !DENORMAL | INVALID;
    F80::INDEFINITE
}

fn sum(a: Value, b: Value, range: &Range, environment: &mut Environment) -> F80 {
    let zero = |a: bool, b: bool, environment: &Environment| {
        F80::zero(if a == b { a } else { environment.rounding == Rounding::Down })
    };
    match (a, b) {
        (Value::Infinity(a), Value::Infinity(b)) if a != b => invalid(environment),
        (Value::Infinity(a), _) | (_, Value::Infinity(a)) => F80::infinity(a),
        (Value::Zero(a), Value::Zero(b)) => zero(a, b, environment),
        (Value::Finite(a), Value::Zero(_)) | (Value::Zero(_), Value::Finite(a)) => {
            F80::pack(a, range, environment)
        }
        (Value::Finite(a), Value::Finite(b)) => match a.add(b) {
            Some(exact) => F80::pack(exact, range, environment),
            None => zero(a.sign, b.sign, environment),
        },
    }
}

/// FADD.
pub(super) fn add(a: Operand, b: Operand, range: &Range, environment: &mut Environment) -> F80 {
    match operands(a, b, environment) {
        Err(nan) => nan,
        Ok((a, b)) => sum(a, b, range, environment),
    }
}

/// FSUB: `a - b`.
pub(super) fn subtract(a: Operand, b: Operand, range: &Range, environment: &mut Environment) -> F80 {
    match operands(a, b, environment) {
        Err(nan) => nan,
        Ok((a, b)) => sum(a, b.negated(), range, environment),
    }
}

/// FSUBR: `b - a`.
pub(super) fn subtract_reversed(a: Operand, b: Operand, range: &Range, environment: &mut Environment) -> F80 {
    subtract(b, a, range, environment)
}

/// FMUL.
pub(super) fn multiply(a: Operand, b: Operand, range: &Range, environment: &mut Environment) -> F80 {
    let (a, b) = match operands(a, b, environment) {
        Err(nan) => return nan,
        Ok(values) => values,
    };
    let negative = a.sign() != b.sign();
    match (a, b) {
        (Value::Infinity(_), Value::Zero(_)) | (Value::Zero(_), Value::Infinity(_)) => invalid(environment),
        (Value::Infinity(_), _) | (_, Value::Infinity(_)) => F80::infinity(negative),
        (Value::Zero(_), _) | (_, Value::Zero(_)) => F80::zero(negative),
        (Value::Finite(a), Value::Finite(b)) => F80::pack(a.multiply(b), range, environment),
    }
}

/// FDIV: `a / b`.
pub(super) fn divide(a: Operand, b: Operand, range: &Range, environment: &mut Environment) -> F80 {
    let (a, b) = match operands(a, b, environment) {
        Err(nan) => return nan,
        Ok(values) => values,
    };
    let negative = a.sign() != b.sign();
    match (a, b) {
        (Value::Infinity(_), Value::Infinity(_)) | (Value::Zero(_), Value::Zero(_)) => invalid(environment),
        (Value::Infinity(_), _) => F80::infinity(negative),
        (_, Value::Infinity(_)) | (Value::Zero(_), _) => F80::zero(negative),
        (Value::Finite(_), Value::Zero(_)) => {
            environment.pre = environment.pre & !DENORMAL | DIVIDE_BY_ZERO;
            F80::infinity(negative)
        }
        (Value::Finite(a), Value::Finite(b)) => F80::pack(a.divide(b), range, environment),
    }
}

/// FDIVR: `b / a`.
pub(super) fn divide_reversed(a: Operand, b: Operand, range: &Range, environment: &mut Environment) -> F80 {
    divide(b, a, range, environment)
}

/// FSQRT.
pub(super) fn square_root(a: Operand, range: &Range, environment: &mut Environment) -> F80 {
    match operand(a, environment) {
        Err(nan) => nan,
        Ok(Value::Zero(_) | Value::Infinity(false)) => a.value,
        Ok(Value::Infinity(true) | Value::Finite(Exact { sign: true, .. })) => invalid(environment),
        Ok(Value::Finite(exact)) => F80::pack(exact.square_root(), range, environment),
    }
}

/// FRNDINT.
pub(super) fn round_to_integer(a: Operand, environment: &mut Environment) -> F80 {
    let exact = match operand(a, environment) {
        Err(nan) => return nan,
        Ok(Value::Finite(exact)) => exact,
        Ok(_) => return a.value,
    };
    if exact.exponent >= 63 {
        return a.value;
    }
    let Some(integer) = exact.to_integer(environment.rounding) else { return a.value };
    if integer.inexact {
        environment.post |= PRECISION;
        environment.up = integer.up;
    }
    Exact::normalized(exact.sign, 127, integer.magnitude).map_or(F80::zero(exact.sign), F80::from_exact)
}

/// FSCALE: `a` times two to the power of `b`, which is truncated.
pub(super) fn scale(a: Operand, b: Operand, environment: &mut Environment) -> F80 {
    // Out of reach of every exponent, but not of an i32.
    const LIMIT: i64 = 1 << 17;
    let (value, by) = match operands(a, b, environment) {
        Err(nan) => return nan,
        Ok(values) => values,
    };
    match (value, by) {
        (Value::Zero(_), Value::Infinity(false)) | (Value::Infinity(_), Value::Infinity(true)) => {
            invalid(environment)
        }
        (Value::Zero(_) | Value::Infinity(_), _) => a.value,
        (Value::Finite(exact), Value::Infinity(true)) => F80::zero(exact.sign),
        (Value::Finite(exact), Value::Infinity(false)) => F80::infinity(exact.sign),
        (Value::Finite(exact), Value::Zero(_)) => F80::pack(exact, &FULL_RANGE, environment),
        (Value::Finite(exact), Value::Finite(by)) => {
            let magnitude = by
                .to_integer(Rounding::Zero)
                .and_then(|integer| i64::try_from(integer.magnitude).ok())
                .unwrap_or(LIMIT)
                .min(LIMIT);
            let power = i32::try_from(if by.sign { -magnitude } else { magnitude }).unwrap_or(0);
            let scaled = Exact { exponent: exact.exponent + power, ..exact };
            F80::pack(scaled, &FULL_RANGE, environment)
        }
    }
}

/// FXTRACT: exponent and significand.
pub(super) fn extract(a: Operand, environment: &mut Environment) -> (F80, F80) {
    match operand(a, environment) {
        Err(nan) => (nan, nan),
        Ok(Value::Infinity(_)) => (F80::infinity(false), a.value),
        Ok(Value::Zero(_)) => {
            environment.pre |= DIVIDE_BY_ZERO;
            (F80::infinity(true), a.value)
        }
        Ok(Value::Finite(exact)) => {
            (F80::from_integer(i64::from(exact.exponent)), F80::from_exact(Exact { exponent: 0, ..exact }))
        }
    }
}

/// FCOM, or FUCOM where `quiet` is set: quiet NaNs are not invalid then. `None`: unordered.
pub(super) fn compare(
    a: Operand,
    b: Operand,
    quiet: bool,
    environment: &mut Environment,
) -> Option<Ordering> {
    match operands(a, b, environment) {
        Err(_) => {
            if !quiet {
                environment.pre |= INVALID;
            }
            None
        }
        Ok((a, b)) => Some(order(a, b)),
    }
}

fn order(a: Value, b: Value) -> Ordering {
    // Classes in the order of magnitude.
    let magnitude = |value: Value| match value {
        Value::Zero(_) => (0, 0, 0),
        Value::Finite(exact) => (1, exact.exponent, exact.significand),
        Value::Infinity(_) => (2, 0, 0),
    };
    match (a, b) {
        (Value::Zero(_), Value::Zero(_)) => Ordering::Equal,
        _ if a.sign() != b.sign() => {
            if a.sign() {
                Ordering::Less
            } else {
                Ordering::Greater
            }
        }
        _ if a.sign() => magnitude(b).cmp(&magnitude(a)),
        _ => magnitude(a).cmp(&magnitude(b)),
    }
}

/// What FPREM and FPREM1 tell about the quotient.
#[derive(Clone, Copy, Debug)]
pub(super) enum Quotient {
    /// The operands have none.
    Undefined,
    /// The reduction is not complete.
    Incomplete,
    /// Its three lowest bits.
    Low(u8),
}

/// What FPREM and FPREM1 leave.
#[derive(Clone, Copy, Debug)]
pub(super) struct Remainder {
    pub(super) value: F80,
    pub(super) quotient: Quotient,
}

/// FPREM, or FPREM1 where `nearest` is set: the quotient is truncated, or rounded to nearest.
pub(super) fn remainder(a: Operand, b: Operand, nearest: bool, environment: &mut Environment) -> Remainder {
    let undefined = |value| Remainder { value, quotient: Quotient::Undefined };
    let complete = |value| Remainder { value, quotient: Quotient::Low(0) };
    let (dividend, divisor) = match operands(a, b, environment) {
        Err(nan) => return undefined(nan),
        Ok(values) => values,
    };
    match (dividend, divisor) {
        (Value::Infinity(_), _) | (_, Value::Zero(_)) => undefined(invalid(environment)),
        (Value::Zero(_), _) => complete(a.value),
        (Value::Finite(exact), Value::Infinity(_)) => complete(F80::pack(exact, &FULL_RANGE, environment)),
        (Value::Finite(a), Value::Finite(b)) => reduce(a, b, nearest, environment),
    }
}

fn reduce(a: Exact, b: Exact, nearest: bool, environment: &mut Environment) -> Remainder {
    let difference = a.exponent - b.exponent;
    let (dividend, divisor) = (a.significand >> 64, b.significand >> 64);
    if difference < -1 || difference < 0 && !nearest {
        return Remainder { value: F80::pack(a, &FULL_RANGE, environment), quotient: Quotient::Low(0) };
    }
    let partial = difference >= 64;
    // How far a partial reduction goes is the implementation's choice, from 32 to 63.
    let by = if partial { 32 + difference % 32 } else { difference };
    let (mut quotient, mut rest, divisor) = if by < 0 {
        (0, dividend, divisor << 1)
    } else {
        let dividend = dividend << by;
        (dividend / divisor, dividend % divisor, divisor)
    };
    let mut sign = a.sign;
    if nearest && !partial && (2 * rest > divisor || 2 * rest == divisor && quotient & 1 != 0) {
        quotient += 1;
        rest = divisor - rest;
        sign = !sign;
    }
    // `rest` is scaled as the dividend was: its lowest bit weighs 2^(a.exponent - by - 63).
    let exponent = a.exponent - by.max(0) + 64;
    let value = Exact::normalized(sign, exponent, rest)
        .map_or(F80::zero(a.sign), |exact| F80::pack(exact, &FULL_RANGE, environment));
    Remainder {
        value,
        quotient: if partial { Quotient::Incomplete } else { Quotient::Low((quotient & 7) as u8) },
    }
}
