//! F2XM1, FYL2X, FYL2XP1, FPTAN, FPATAN, FSIN, FCOS and FSINCOS in portable code.
//!
//! Special operands and exceptions are the architecture's (Intel SDM 1 8.3.8 and 8.3.10, SDM 2); finite
//! results are accurate to about double precision, where a processor's are to its 64 bits.
// Without `--cfg vmm_portable`, an x86-64 host executes these itself.
#![cfg_attr(
    all(target_arch = "x86_64", not(vmm_portable), not(test)),
    allow(dead_code, reason = "the host's instructions are used instead")
)]

use std::f64::consts::{FRAC_PI_2, LN_2, LOG2_E, PI};

use iced_x86::Mnemonic;

use super::super::float::environment::{DIVIDE_BY_ZERO, Environment, INVALID, PRECISION, UNDERFLOW};
use super::super::float::exact::Exact;
use super::super::float::lane::{Double, Value, pack, unpack};
use super::f80::{F80, FULL_RANGE, Operand, operand, operands};
use super::state::{C1, C2, X87State};

/// Below this exponent the first term of the series is the result to 64 bits.
const TINY: i32 = -40;
/// From this exponent on FSIN and kin leave their operand alone and set C2.
const REDUCTION_LIMIT: i32 = 63;
/// Exponents that differ by more than this make one of two operands vanish.
const FAR: i32 = 70;

/// Executes F2XM1 to FSINCOS on a state in which no exception is pending. Other mnemonics do nothing.
pub(super) fn transcendental(state: &mut X87State, mnemonic: Mnemonic) {
    match mnemonic {
        Mnemonic::F2xm1 => replace_top(state, power_minus_one),
        Mnemonic::Fsin => trigonometric(state, |sine, _| (sine, None)),
        Mnemonic::Fcos => trigonometric(state, |_, cosine| (cosine, None)),
        Mnemonic::Fsincos => trigonometric(state, |sine, cosine| (sine, Some(cosine))),
        Mnemonic::Fptan => tangent(state),
        Mnemonic::Fpatan => combine(state, arctangent),
        Mnemonic::Fyl2x => combine(state, logarithm),
        Mnemonic::Fyl2xp1 => combine(state, logarithm_plus_one),
        _ => {}
    }
}

fn environment(state: &X87State) -> Environment {
    Environment::from_x87_control(state.control())
}

fn replace_top(state: &mut X87State, kernel: impl FnOnce(Operand, &mut Environment) -> F80) {
    let result = if state.is_empty(0) {
        state.stack_fault(false).then_some(F80::INDEFINITE)
    } else {
        let mut environment = environment(state);
        let result = kernel(state.st(0).into(), &mut environment);
        state.complete(&environment).then_some(result)
    };
    if let Some(result) = result {
        state.set_st(0, result);
    }
}

/// ST(1) becomes a function of ST(1) and ST(0), in this order, and is the new top.
fn combine(state: &mut X87State, kernel: fn(Operand, Operand, &mut Environment) -> F80) {
    let result = if state.is_empty(0) || state.is_empty(1) {
        state.stack_fault(false).then_some(F80::INDEFINITE)
    } else {
        let mut environment = environment(state);
        let result = kernel(state.st(1).into(), state.st(0).into(), &mut environment);
        state.complete(&environment).then_some(result)
    };
    if let Some(result) = result {
        state.set_st(1, result);
        state.pop();
    }
}

/// The nearest double, whose exponent `exact` must not exceed.
fn to_double(exact: Exact) -> f64 {
    f64::from_bits(pack::<Double>(exact, &mut Environment::from_mxcsr(0x1f80)))
}

/// A double as an exact value; `None` for zero, infinities and NaNs.
fn from_double(value: f64) -> Option<Exact> {
    match unpack::<Double>(value.to_bits()) {
        Value::Finite(exact) if value.is_finite() => Some(exact),
        _ => None,
    }
}

/// A finite result that is not exact.
fn inexact(value: f64, environment: &mut Environment) -> F80 {
    environment.post |= PRECISION;
    from_double(value).map_or(F80::zero(value.is_sign_negative()), F80::from_exact)
}

/// `exact` times `factor`, as a result that is not exact.
fn product(exact: Exact, factor: f64, environment: &mut Environment) -> F80 {
    environment.post |= PRECISION;
    from_double(factor)
        .map_or(F80::zero(exact.sign), |factor| F80::pack(exact.multiply(factor), &FULL_RANGE, environment))
}

/// An operand too small to differ from the result in 64 bits.
fn same(exact: Exact, environment: &mut Environment) -> F80 {
    environment.post |= PRECISION | if exact.exponent < FULL_RANGE.min { UNDERFLOW } else { 0 };
    F80::pack(exact, &FULL_RANGE, environment)
}

fn invalid(environment: &mut Environment) -> F80 {
    environment.pre = INVALID;
    F80::INDEFINITE
}

fn power_minus_one(a: Operand, environment: &mut Environment) -> F80 {
    match operand(a, environment) {
        Err(nan) => nan,
        Ok(Value::Infinity(true)) => F80::ONE.negated(),
        Ok(Value::Zero(_) | Value::Infinity(false)) => a.value,
        Ok(Value::Finite(exact)) if exact.exponent < TINY => product(exact, LN_2, environment),
        // The architecture leaves open what becomes of larger operands.
        Ok(Value::Finite(exact)) if exact.exponent > 0 => a.value,
        Ok(Value::Finite(exact)) => {
            let power = to_double(exact);
            if power.abs() == 1.0 {
                // One, or minus one half.
                return F80::from_value(unpack::<Double>((power.exp2() - 1.0).to_bits()));
            }
            inexact((power * LN_2).exp_m1(), environment)
        }
    }
}

/// Sine and cosine of a number below 2^63. As in a processor, pi has 66 bits in the reduction to the
/// first half quadrant, which makes results for large operands differ from the mathematical ones (Intel
/// SDM 1 8.3.8).
fn sine_cosine(exact: Exact) -> (f64, f64) {
    const HALF_PI: u128 = 0x3_243f_6a88_85a3_08d3;
    /// The exponent of the lowest bit of [`HALF_PI`].
    const UNIT: i32 = -65;
    let absolute = Exact { sign: false, ..exact };
    let (sine, cosine) = match u32::try_from(exact.exponent - 63 - UNIT) {
        Err(_) => to_double(absolute).sin_cos(),
        Ok(shift) => {
            // At most 64 bits and 64 of shift.
            let scaled = (exact.significand >> 64) << shift.min(64);
            let (quadrant, rest) = (scaled / HALF_PI % 4, scaled % HALF_PI);
            let angle =
                |units: u128| Exact::normalized(false, 127 + UNIT, units).map_or(0.0, to_double).sin_cos();
            let (sine, cosine) = if rest > HALF_PI / 2 {
                let (sine, cosine) = angle(HALF_PI - rest);
                (cosine, sine)
            } else {
                angle(rest)
            };
            match quadrant {
                0 => (sine, cosine),
                1 => (cosine, -sine),
                2 => (-sine, -cosine),
                _ => (-cosine, sine),
            }
        }
    };
    (if exact.sign { -sine } else { sine }, cosine)
}

/// FSIN, FCOS, FSINCOS: `select` makes of sine and cosine what replaces the top and what is then pushed.
fn trigonometric(state: &mut X87State, select: fn(F80, F80) -> (F80, Option<F80>)) {
    periodic(
        state,
        |a, environment| {
            let both = match operand(a, environment) {
                Err(nan) => (nan, nan),
                Ok(Value::Infinity(_)) => (invalid(environment), F80::INDEFINITE),
                Ok(Value::Zero(_)) => (a.value, F80::ONE),
                Ok(Value::Finite(exact)) if exact.exponent < TINY => (same(exact, environment), F80::ONE),
                Ok(Value::Finite(exact)) => {
                    let (sine, cosine) = sine_cosine(exact);
                    (inexact(sine, environment), inexact(cosine, environment))
                }
            };
            select(both.0, both.1)
        },
        select(F80::ONE, F80::ONE).1.is_some(),
    );
}

/// FPTAN: the tangent, then a one is pushed (or the same NaN).
fn tangent(state: &mut X87State) {
    periodic(
        state,
        |a, environment| {
            let tangent = match operand(a, environment) {
                Err(nan) => return (nan, Some(nan)),
                Ok(Value::Infinity(_)) => return (invalid(environment), Some(F80::INDEFINITE)),
                Ok(Value::Zero(_)) => a.value,
                Ok(Value::Finite(exact)) if exact.exponent < TINY => same(exact, environment),
                Ok(Value::Finite(exact)) => {
                    let (sine, cosine) = sine_cosine(exact);
                    inexact(sine / cosine, environment)
                }
            };
            (tangent, Some(F80::ONE))
        },
        true,
    );
}

/// Stack and range checks of the trigonometric instructions, then `kernel`, whose results replace the top
/// and are pushed.
fn periodic(
    state: &mut X87State,
    kernel: impl FnOnce(Operand, &mut Environment) -> (F80, Option<F80>),
    pushes: bool,
) {
    state.set_condition(C2, 0);
    let empty = state.is_empty(0);
    let results = if empty || pushes && !state.is_empty(7) {
        state.stack_fault(!empty).then_some((F80::INDEFINITE, pushes.then_some(F80::INDEFINITE)))
    } else {
        let value = state.st(0);
        let number = !value.is_unsupported() && !value.is_nan();
        let out_of_range =
            number && matches!(value.unpack(), Value::Finite(exact) if exact.exponent >= REDUCTION_LIMIT);
        if out_of_range {
            state.set_condition(C1 | C2, C2);
            return;
        }
        let mut environment = environment(state);
        let results = kernel(value.into(), &mut environment);
        state.complete(&environment).then_some(results)
    };
    if let Some((replaced, pushed)) = results {
        state.set_st(0, replaced);
        if let Some(pushed) = pushed {
            state.push(pushed);
        }
    }
}

/// FPATAN: the angle of (x, y).
fn arctangent(y: Operand, x: Operand, environment: &mut Environment) -> F80 {
    let values = match operands(y, x, environment) {
        Err(nan) => return nan,
        Ok(values) => values,
    };
    let (y, x) = match values {
        (Value::Zero(_), x) if !x.sign() => return y.value,
        (Value::Finite(y), Value::Finite(x)) => {
            let difference = y.exponent - x.exponent;
            if difference < TINY && !x.sign {
                environment.post |= PRECISION;
                return F80::pack(y.divide(x), &FULL_RANGE, environment);
            }
            if difference.abs() > FAR {
                // Toward the positive or negative half of an axis.
                let angle = if difference > 0 { FRAC_PI_2 } else { PI };
                return inexact(if y.sign { -angle } else { angle }, environment);
            }
            (to_double(Exact { exponent: difference, ..y }), to_double(Exact { exponent: 0, ..x }))
        }
        (y, x) => (representative(y), representative(x)),
    };
    inexact(y.atan2(x), environment)
}

/// A double of the same class and sign.
fn representative(value: Value) -> f64 {
    let magnitude = match value {
        Value::Zero(_) => 0.0,
        Value::Finite(_) => 1.0,
        Value::Infinity(_) => f64::INFINITY,
    };
    if value.sign() { -magnitude } else { magnitude }
}

/// FYL2X: `y` times the binary logarithm of `x`.
fn logarithm(y: Operand, x: Operand, environment: &mut Environment) -> F80 {
    let (factor, x) = match operands(y, x, environment) {
        Err(nan) => return nan,
        Ok(values) => values,
    };
    match (factor, x) {
        (_, Value::Infinity(true) | Value::Finite(Exact { sign: true, .. })) => invalid(environment),
        (Value::Zero(_), Value::Zero(_) | Value::Infinity(_)) => invalid(environment),
        (Value::Finite(y), Value::Zero(_)) => {
            environment.pre = DIVIDE_BY_ZERO;
            F80::infinity(!y.sign)
        }
        (Value::Infinity(sign), Value::Zero(_)) => F80::infinity(!sign),
        (factor, Value::Infinity(_)) => F80::infinity(factor.sign()),
        (factor, Value::Finite(x)) => {
            let mantissa = to_double(Exact { exponent: 0, ..x });
            let near_one = x.exponent == 0 || x.exponent == -1 && mantissa > 1.5;
            let logarithm = if near_one {
                minus_one(x).ln_1p() * LOG2_E
            } else {
                f64::from(x.exponent) + mantissa.log2()
            };
            let exact = x.significand << 1 == 0;
            scaled(factor, logarithm, exact, environment)
        }
    }
}

/// `x - 1`, rounded once.
fn minus_one(x: Exact) -> f64 {
    Exact::from_integer(-1).and_then(|minus_one| x.add(minus_one)).map_or(0.0, to_double)
}

/// FYL2XP1: `y` times the binary logarithm of `x + 1`. The architecture leaves open what becomes of `x`
/// below sqrt(2)/2 - 1 and above sqrt(2) - 1.
fn logarithm_plus_one(y: Operand, x: Operand, environment: &mut Environment) -> F80 {
    let (factor, x) = match operands(y, x, environment) {
        Err(nan) => return nan,
        Ok(values) => values,
    };
    match (factor, x) {
        (Value::Infinity(_), Value::Zero(_))
        | (Value::Zero(_), Value::Infinity(_))
        | (_, Value::Infinity(true)) => invalid(environment),
        (factor, Value::Infinity(false)) => F80::infinity(factor.sign()),
        (factor, Value::Zero(sign)) => F80::zero(factor.sign() != sign),
        (Value::Infinity(sign), Value::Finite(x)) => F80::infinity(sign != x.sign),
        (Value::Zero(sign), Value::Finite(x)) => F80::zero(sign != x.sign),
        (_, Value::Finite(x)) if x.sign && x.exponent >= 0 => invalid(environment),
        (Value::Finite(y), Value::Finite(x)) if x.exponent < TINY => {
            let Some(log2_e) = from_double(LOG2_E) else { return F80::zero(false) };
            environment.post |= PRECISION;
            // Each product is of at most 64 bits: the low ones are below the accuracy.
            let first = x.multiply(log2_e);
            let first = Exact { significand: first.significand >> 64 << 64, ..first };
            F80::pack(first.multiply(y), &FULL_RANGE, environment)
        }
        (factor, Value::Finite(x)) => scaled(
            factor,
            to_double(Exact { exponent: x.exponent.min(1000), ..x }).ln_1p() * LOG2_E,
            false,
            environment,
        ),
    }
}

/// `factor` times a finite logarithm.
fn scaled(factor: Value, logarithm: f64, exact: bool, environment: &mut Environment) -> F80 {
    let sign = factor.sign() != logarithm.is_sign_negative();
    match factor {
        Value::Infinity(_) if logarithm == 0.0 => invalid(environment),
        Value::Infinity(_) => F80::infinity(sign),
        Value::Zero(_) => F80::zero(sign),
        Value::Finite(_) if logarithm == 0.0 => F80::zero(sign),
        Value::Finite(y) if exact => from_double(logarithm)
            .map_or(F80::zero(sign), |logarithm| F80::pack(y.multiply(logarithm), &FULL_RANGE, environment)),
        Value::Finite(y) => product(y, logarithm, environment),
    }
}
