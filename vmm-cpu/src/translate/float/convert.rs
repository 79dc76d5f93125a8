//! Lane kernels that change the format: between the two precisions, from and to integers.

use super::environment::{DENORMAL, Environment, INVALID, PRECISION, Rounding};
use super::exact::{Exact, low};
use super::lane::{Lane, Value, is_denormal, is_nan, pack, propagate, sign, unpack, with_daz};

/// The integer that stands for an invalid conversion to 32 bits.
const INDEFINITE_32: u64 = 1 << 31;
/// The integer that stands for an invalid conversion to 64 bits.
const INDEFINITE_64: u64 = 1 << 63;

/// CVTPS2PD, CVTPD2PS and kin.
pub(crate) fn convert<From: Lane, To: Lane>(a: u64, environment: &mut Environment) -> u64 {
    let a = with_daz::<From>(a, environment);
    let negative = if sign::<From>(a) { To::SIGN } else { 0 };
    if is_nan::<From>(a) {
        // The highest fraction bits are kept.
        let fraction = propagate::<From>(a, environment) << (64 - From::FRACTION);
        return negative | To::INFINITY | fraction >> (64 - To::FRACTION);
    }
    if is_denormal::<From>(a) {
        environment.pre |= DENORMAL;
    }
    match unpack::<From>(a) {
        Value::Zero(_) => negative,
        Value::Infinity(_) => negative | To::INFINITY,
        Value::Finite(exact) => pack::<To>(exact, environment),
    }
}

/// CVTDQ2PS and kin: from an integer of at most 64 bits, sign-extended.
pub(crate) fn from_integer<To: Lane>(value: i64, environment: &mut Environment) -> u64 {
    Exact::from_integer(value).map_or(0, |exact| pack::<To>(exact, environment))
}

/// CVTPS2DQ and kin: to an integer of 32 bits, or 64 where `wide` is set; toward zero where `truncate` is
/// set.
pub(crate) fn to_integer<From: Lane>(
    a: u64,
    truncate: bool,
    wide: bool,
    environment: &mut Environment,
) -> u64 {
    let a = with_daz::<From>(a, environment);
    let rounding = if truncate { Rounding::Zero } else { environment.rounding };
    let (indefinite, mask) =
        if wide { (INDEFINITE_64, u64::MAX) } else { (INDEFINITE_32, u64::from(u32::MAX)) };
    let integer = if is_nan::<From>(a) {
        None
    } else {
        match unpack::<From>(a) {
            Value::Zero(_) => return 0,
            Value::Infinity(_) => None,
            Value::Finite(exact) => exact.to_integer(rounding),
        }
    };
    let limit = if sign::<From>(a) { indefinite } else { indefinite - 1 };
    match integer {
        Some(integer) if integer.magnitude <= u128::from(limit) => {
            if integer.inexact {
                environment.post |= PRECISION;
            }
            let magnitude = low(integer.magnitude);
            (if sign::<From>(a) { magnitude.wrapping_neg() } else { magnitude }) & mask
        }
        _ => {
            environment.pre |= INVALID;
            indefinite
        }
    }
}
