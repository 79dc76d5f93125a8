//! Lane kernels with the operands and the result in one format.
//!
//! Each takes bit patterns and notes its exceptions in the environment; a result is not to be used where
//! one of those is unmasked. Vector width, merging and MXCSR are the callers' affair.

use std::cmp::Ordering;

use super::environment::{DENORMAL, DIVIDE_BY_ZERO, Environment, INVALID, PRECISION, Rounding};
use super::exact::Exact;
use super::lane::{
    Lane, Value, is_denormal, is_nan, is_signalling, operands, pack, propagate, sign, unpack, with_daz,
};

/// Invalid operation: takes precedence over a denormal operand.
fn invalid<L: Lane>(environment: &mut Environment, before: u32) -> u64 {
    environment.pre = before | INVALID;
    L::INDEFINITE
}

fn signed<L: Lane>(negative: bool, magnitude: u64) -> u64 {
    magnitude | if negative { L::SIGN } else { 0 }
}

fn sum<L: Lane>(a: Value, b: Value, environment: &mut Environment, before: u32) -> u64 {
    match (a, b) {
        (Value::Infinity(a), Value::Infinity(b)) if a != b => invalid::<L>(environment, before),
        (Value::Infinity(a), _) | (_, Value::Infinity(a)) => signed::<L>(a, L::INFINITY),
        (Value::Zero(a), Value::Zero(b)) => zero_sum::<L>(a, b, environment),
        (Value::Finite(a), Value::Zero(_)) | (Value::Zero(_), Value::Finite(a)) => pack::<L>(a, environment),
        (Value::Finite(a), Value::Finite(b)) => match a.add(b) {
            Some(exact) => pack::<L>(exact, environment),
            None => zero_sum::<L>(a.sign, b.sign, environment),
        },
    }
}

fn zero_sum<L: Lane>(a: bool, b: bool, environment: &Environment) -> u64 {
    signed::<L>(if a == b { a } else { environment.rounding == Rounding::Down }, 0)
}

/// ADDPS and kin.
pub(crate) fn add<L: Lane>(a: u64, b: u64, environment: &mut Environment) -> u64 {
    let before = environment.pre;
    match operands::<L>(a, b, environment) {
        Err(nan) => nan,
        Ok((a, b)) => sum::<L>(a, b, environment, before),
    }
}

/// SUBPS and kin: `a - b`.
pub(crate) fn subtract<L: Lane>(a: u64, b: u64, environment: &mut Environment) -> u64 {
    let before = environment.pre;
    match operands::<L>(a, b, environment) {
        Err(nan) => nan,
        Ok((a, b)) => sum::<L>(a, b.negated(), environment, before),
    }
}

/// MULPS and kin.
pub(crate) fn multiply<L: Lane>(a: u64, b: u64, environment: &mut Environment) -> u64 {
    let before = environment.pre;
    let (a, b) = match operands::<L>(a, b, environment) {
        Err(nan) => return nan,
        Ok(values) => values,
    };
    let negative = a.sign() != b.sign();
    match (a, b) {
        (Value::Infinity(_), Value::Zero(_)) | (Value::Zero(_), Value::Infinity(_)) => {
            invalid::<L>(environment, before)
        }
        (Value::Infinity(_), _) | (_, Value::Infinity(_)) => signed::<L>(negative, L::INFINITY),
        (Value::Zero(_), _) | (_, Value::Zero(_)) => signed::<L>(negative, 0),
        (Value::Finite(a), Value::Finite(b)) => pack::<L>(a.multiply(b), environment),
    }
}

/// DIVPS and kin: `a / b`.
pub(crate) fn divide<L: Lane>(a: u64, b: u64, environment: &mut Environment) -> u64 {
    let before = environment.pre;
    let (a, b) = match operands::<L>(a, b, environment) {
        Err(nan) => return nan,
        Ok(values) => values,
    };
    let negative = a.sign() != b.sign();
    match (a, b) {
        (Value::Infinity(_), Value::Infinity(_)) | (Value::Zero(_), Value::Zero(_)) => {
            invalid::<L>(environment, before)
        }
        (Value::Infinity(_), _) => signed::<L>(negative, L::INFINITY),
        (_, Value::Infinity(_)) | (Value::Zero(_), _) => signed::<L>(negative, 0),
        (Value::Finite(_), Value::Zero(_)) => {
            environment.pre = before | DIVIDE_BY_ZERO;
            signed::<L>(negative, L::INFINITY)
        }
        (Value::Finite(a), Value::Finite(b)) => pack::<L>(a.divide(b), environment),
    }
}

/// SQRTPS and kin.
pub(crate) fn square_root<L: Lane>(a: u64, environment: &mut Environment) -> u64 {
    let a = with_daz::<L>(a, environment);
    if is_nan::<L>(a) {
        return propagate::<L>(a, environment);
    }
    match unpack::<L>(a) {
        Value::Zero(_) | Value::Infinity(false) => a,
        Value::Infinity(true) | Value::Finite(Exact { sign: true, .. }) => {
            environment.pre |= INVALID;
            L::INDEFINITE
        }
        Value::Finite(exact) => {
            if is_denormal::<L>(a) {
                environment.pre |= DENORMAL;
            }
            pack::<L>(exact.square_root(), environment)
        }
    }
}

/// How two operands compare; `None` if one is a NaN.
fn order<L: Lane>(a: u64, b: u64) -> Option<Ordering> {
    // Bit patterns as integers that ascend with the values; both zeros are 0.
    let key = |bits: u64| {
        let magnitude = (bits & (L::SIGN - 1)).cast_signed();
        if sign::<L>(bits) { -magnitude } else { magnitude }
    };
    (!is_nan::<L>(a) && !is_nan::<L>(b)).then(|| key(a).cmp(&key(b)))
}

/// Compares, as COMISS does where `quiet` is clear (any NaN is invalid) and UCOMISS does where it is set (a
/// signalling one is).
pub(crate) fn compare<L: Lane>(
    a: u64,
    b: u64,
    quiet: bool,
    environment: &mut Environment,
) -> Option<Ordering> {
    let (a, b) = (with_daz::<L>(a, environment), with_daz::<L>(b, environment));
    let ordering = order::<L>(a, b);
    if ordering.is_none() {
        if !quiet || is_signalling::<L>(a) || is_signalling::<L>(b) {
            environment.pre |= INVALID;
        }
    } else if is_denormal::<L>(a) || is_denormal::<L>(b) {
        environment.pre |= DENORMAL;
    }
    ordering
}

/// CMPPS and kin: all ones or zeros, by the predicate in the low five bits (Intel SDM 2 table 3-1).
pub(crate) fn compare_mask<L: Lane>(a: u64, b: u64, predicate: u8, environment: &mut Environment) -> u64 {
    // Equal, less, unordered; the higher predicates negate these or swap what is quiet.
    let quiet = matches!(predicate & 0xf, 0 | 3 | 4 | 7 | 8 | 11 | 12 | 15) != (predicate & 0x10 != 0);
    let ordering = compare::<L>(a, b, quiet, environment);
    let (less, equal, greater, unordered) = (
        ordering == Some(Ordering::Less),
        ordering == Some(Ordering::Equal),
        ordering == Some(Ordering::Greater),
        ordering.is_none(),
    );
    let holds = match predicate & 0xf {
        0 => equal,
        1 => less,
        2 => less || equal,
        3 => unordered,
        4 => !equal,
        5 => !less,
        6 => !(less || equal),
        7 => !unordered,
        8 => equal || unordered,
        9 => less || unordered,
        10 => !greater,
        11 => false,
        12 => less || greater,
        13 => greater || equal,
        14 => greater,
        _ => true,
    };
    if holds { L::MASK } else { 0 }
}

/// MINPS and kin: the second operand unless the first is less.
pub(crate) fn minimum<L: Lane>(a: u64, b: u64, environment: &mut Environment) -> u64 {
    let less = compare::<L>(a, b, false, environment) == Some(Ordering::Less);
    with_daz::<L>(if less { a } else { b }, environment)
}

/// MAXPS and kin: the second operand unless the first is greater.
pub(crate) fn maximum<L: Lane>(a: u64, b: u64, environment: &mut Environment) -> u64 {
    let greater = compare::<L>(a, b, false, environment) == Some(Ordering::Greater);
    with_daz::<L>(if greater { a } else { b }, environment)
}

/// ROUNDPS and kin: to an integer in the same format, as the immediate byte says (Intel SDM 2 ROUNDPD).
pub(crate) fn round_to_integral<L: Lane>(a: u64, control: u8, environment: &mut Environment) -> u64 {
    let a = with_daz::<L>(a, environment);
    if is_nan::<L>(a) {
        return propagate::<L>(a, environment);
    }
    let rounding =
        if control & 4 == 0 { Rounding::from_control(u32::from(control)) } else { environment.rounding };
    let Value::Finite(exact) = unpack::<L>(a) else { return a };
    if exact.exponent >= L::FRACTION.cast_signed() {
        return a;
    }
    let Some(integer) = exact.to_integer(rounding) else { return a };
    if integer.inexact && control & 8 == 0 {
        environment.post |= PRECISION;
    }
    // Fits the format: at most its precision, or a power of two.
    Exact::normalized(exact.sign, 127, integer.magnitude)
        .map_or(signed::<L>(exact.sign, 0), |exact| pack::<L>(exact, environment))
}

/// RCPPS: the reciprocal. The architecture bounds the relative error to 1.5 * 2^-12 and leaves the bits
/// to the processor; this one is correctly rounded. It raises no exceptions, and takes denormals for
/// zeros.
pub(crate) fn reciprocal<L: Lane>(a: u64) -> u64 {
    approximate::<L>(a, |a| match a {
        Value::Zero(negative) => signed::<L>(negative, L::INFINITY),
        Value::Infinity(negative) => signed::<L>(negative, 0),
        Value::Finite(a) => one().map_or(0, |one| pack::<L>(one.divide(a), &mut approximation())),
    })
}

/// RSQRTPS: the reciprocal of the square root, under the same terms as [`reciprocal`].
pub(crate) fn reciprocal_square_root<L: Lane>(a: u64) -> u64 {
    approximate::<L>(a, |a| match a {
        Value::Zero(negative) => signed::<L>(negative, L::INFINITY),
        Value::Infinity(true) | Value::Finite(Exact { sign: true, .. }) => L::INDEFINITE,
        Value::Infinity(false) => 0,
        Value::Finite(a) => {
            one().map_or(0, |one| pack::<L>(one.divide(a.square_root()), &mut approximation()))
        }
    })
}

fn one() -> Option<Exact> {
    Exact::from_integer(1)
}

/// MXCSR with everything masked, flush to zero and denormals as zeros.
fn approximation() -> Environment {
    Environment::from_mxcsr(0x9fc0)
}

fn approximate<L: Lane>(a: u64, compute: impl Fn(Value) -> u64) -> u64 {
    let a = with_daz::<L>(a, &approximation());
    if is_nan::<L>(a) { a | L::QUIET } else { compute(unpack::<L>(a)) }
}
