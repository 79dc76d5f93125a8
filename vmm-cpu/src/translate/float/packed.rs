//! The vector operations on top of the lane kernels, in portable code.
//!
//! The `lanes` functions are what wider vectors are made of: they share one [`Environment`] until all
//! lanes are done.

use iced_x86::Mnemonic;

use super::arithmetic::{
    add, compare_mask, divide, maximum, minimum, multiply, reciprocal, reciprocal_square_root,
    round_to_integral, square_root, subtract,
};
use super::convert::{convert, from_integer, to_integer};
use super::environment::Environment;
use super::exact::low;
use super::lane::{Double, Lane, Single};
use super::{FloatOp, SimdException};

/// Bits `index * width` and up, as many as `width` says (32 or 64).
fn bits(vector: u128, index: u32, width: u32) -> u64 {
    low(vector >> (index * width)) & (u64::MAX >> (64 - width))
}

fn lane<L: Lane>(vector: u128, index: u32) -> u64 {
    bits(vector, index, L::WIDTH)
}

/// `vector` with a lane replaced.
fn with_lane<L: Lane>(vector: u128, index: u32, value: u64) -> u128 {
    let shift = index * L::WIDTH;
    vector & !(u128::from(L::MASK) << shift) | u128::from(value & L::MASK) << shift
}

/// `dst` with the lowest `count` lanes replaced by what `kernel` makes of those of `dst` and `src`.
pub(crate) fn lanes2<L: Lane>(
    dst: u128,
    src: u128,
    count: u32,
    environment: &mut Environment,
    kernel: impl Fn(u64, u64, &mut Environment) -> u64,
) -> u128 {
    (0..count).fold(dst, |result, i| {
        with_lane::<L>(result, i, kernel(lane::<L>(dst, i), lane::<L>(src, i), environment))
    })
}

/// As [`lanes2`] for kernels of one operand.
pub(crate) fn lanes1<L: Lane>(
    dst: u128,
    src: u128,
    count: u32,
    environment: &mut Environment,
    kernel: impl Fn(u64, &mut Environment) -> u64,
) -> u128 {
    lanes2::<L>(dst, src, count, environment, |_, b, environment| kernel(b, environment))
}

fn all<L: Lane>() -> u32 {
    128 / L::WIDTH
}

fn with_mxcsr(
    mxcsr: &mut u32,
    compute: impl FnOnce(&mut Environment) -> u128,
) -> Result<u128, SimdException> {
    let mut environment = Environment::from_mxcsr(*mxcsr);
    let result = compute(&mut environment);
    environment.finish_sse(mxcsr)?;
    Ok(result)
}

type Kernel1 = fn(u64, &mut Environment) -> u64;
type Kernel2 = fn(u64, u64, &mut Environment) -> u64;

fn packed2<L: Lane>(dst: u128, src: u128, mxcsr: &mut u32, kernel: Kernel2) -> Result<u128, SimdException> {
    with_mxcsr(mxcsr, |environment| lanes2::<L>(dst, src, all::<L>(), environment, kernel))
}

fn scalar2<L: Lane>(dst: u128, src: u128, mxcsr: &mut u32, kernel: Kernel2) -> Result<u128, SimdException> {
    with_mxcsr(mxcsr, |environment| lanes2::<L>(dst, src, 1, environment, kernel))
}

fn packed1<L: Lane>(src: u128, mxcsr: &mut u32, kernel: Kernel1) -> Result<u128, SimdException> {
    with_mxcsr(mxcsr, |environment| lanes1::<L>(0, src, all::<L>(), environment, kernel))
}

fn scalar1<L: Lane>(dst: u128, src: u128, mxcsr: &mut u32, kernel: Kernel1) -> Result<u128, SimdException> {
    with_mxcsr(mxcsr, |environment| lanes1::<L>(dst, src, 1, environment, kernel))
}

fn compare<L: Lane>(
    dst: u128,
    src: u128,
    count: u32,
    imm: u8,
    mxcsr: &mut u32,
) -> Result<u128, SimdException> {
    with_mxcsr(mxcsr, |environment| {
        lanes2::<L>(dst, src, count, environment, |a, b, environment| {
            compare_mask::<L>(a, b, imm & 7, environment)
        })
    })
}

fn round<L: Lane>(dst: u128, src: u128, count: u32, imm: u8, mxcsr: &mut u32) -> Result<u128, SimdException> {
    with_mxcsr(mxcsr, |environment| {
        lanes1::<L>(dst, src, count, environment, |a, environment| {
            round_to_integral::<L>(a, imm, environment)
        })
    })
}

/// HADDPS and kin: neighbours of `dst` in the low half of the result, those of `src` in the high half.
fn horizontal<L: Lane>(
    dst: u128,
    src: u128,
    mxcsr: &mut u32,
    kernel: Kernel2,
) -> Result<u128, SimdException> {
    let half = all::<L>() / 2;
    with_mxcsr(mxcsr, |environment| {
        (0..all::<L>()).fold(0, |result, i| {
            let (from, first) = if i < half { (dst, 2 * i) } else { (src, 2 * (i - half)) };
            let value = kernel(lane::<L>(from, first), lane::<L>(from, first + 1), environment);
            with_lane::<L>(result, i, value)
        })
    })
}

/// ADDSUBPS and ADDSUBPD: even lanes subtract, odd ones add.
fn add_subtract<L: Lane>(dst: u128, src: u128, mxcsr: &mut u32) -> Result<u128, SimdException> {
    with_mxcsr(mxcsr, |environment| {
        (0..all::<L>()).fold(0, |result, i| {
            let kernel = if i % 2 == 0 { subtract::<L> } else { add::<L> };
            with_lane::<L>(result, i, kernel(lane::<L>(dst, i), lane::<L>(src, i), environment))
        })
    })
}

/// DPPS and DPPD: the high half of `imm` says which products are summed, the low half which lanes get the
/// sum. The products, the sums of pairs and their sum are each rounded, and each step can raise
/// exceptions of its own.
fn dot_product<L: Lane>(dst: u128, src: u128, imm: u8, mxcsr: &mut u32) -> Result<u128, SimdException> {
    let selected = |bit: u32| imm >> bit & 1 != 0;
    let count = all::<L>();
    let products = with_mxcsr(mxcsr, |environment| {
        (0..count).filter(|i| selected(4 + i)).fold(0, |result, i| {
            let product = multiply::<L>(lane::<L>(dst, i), lane::<L>(src, i), environment);
            with_lane::<L>(result, i, product)
        })
    })?;
    let pairs = horizontal::<L>(products, products, mxcsr, add::<L>)?;
    let sum = if count == 4 { horizontal::<L>(pairs, pairs, mxcsr, add::<L>)? } else { pairs };
    Ok((0..count).filter(|&i| selected(i)).fold(0, |result, i| with_lane::<L>(result, i, lane::<L>(sum, 0))))
}

/// 32-bit integers, the lowest `count` of `src`, into the lowest lanes of `dst`.
fn from_integers<L: Lane>(dst: u128, src: u128, count: u32, mxcsr: &mut u32) -> Result<u128, SimdException> {
    with_mxcsr(mxcsr, |environment| {
        (0..count).fold(dst, |result, i| {
            // Sign extension of the low half.
            let value = (bits(src, i, 32) << 32).cast_signed() >> 32;
            with_lane::<L>(result, i, from_integer::<L>(value, environment))
        })
    })
}

/// The lowest `count` lanes of `src` to 32-bit integers; zeros above.
fn to_integers<L: Lane>(
    src: u128,
    count: u32,
    truncate: bool,
    mxcsr: &mut u32,
) -> Result<u128, SimdException> {
    with_mxcsr(mxcsr, |environment| {
        (0..count).fold(0, |result, i| {
            with_lane::<Single>(result, i, to_integer::<L>(lane::<L>(src, i), truncate, false, environment))
        })
    })
}

/// The lowest `count` lanes of `src` into the lowest of `dst`.
fn converts<From: Lane, To: Lane>(
    dst: u128,
    src: u128,
    count: u32,
    mxcsr: &mut u32,
) -> Result<u128, SimdException> {
    with_mxcsr(mxcsr, |environment| {
        (0..count).fold(dst, |result, i| {
            with_lane::<To>(result, i, convert::<From, To>(lane::<From>(src, i), environment))
        })
    })
}

/// The operation of a mnemonic in portable code.
pub(super) fn portable_op(mnemonic: Mnemonic) -> Option<FloatOp> {
    type S = Single;
    type D = Double;
    let op: FloatOp = match mnemonic {
        Mnemonic::Addps => |d, s, _, m| packed2::<S>(d, s, m, add::<S>),
        Mnemonic::Addpd => |d, s, _, m| packed2::<D>(d, s, m, add::<D>),
        Mnemonic::Addss => |d, s, _, m| scalar2::<S>(d, s, m, add::<S>),
        Mnemonic::Addsd => |d, s, _, m| scalar2::<D>(d, s, m, add::<D>),
        Mnemonic::Subps => |d, s, _, m| packed2::<S>(d, s, m, subtract::<S>),
        Mnemonic::Subpd => |d, s, _, m| packed2::<D>(d, s, m, subtract::<D>),
        Mnemonic::Subss => |d, s, _, m| scalar2::<S>(d, s, m, subtract::<S>),
        Mnemonic::Subsd => |d, s, _, m| scalar2::<D>(d, s, m, subtract::<D>),
        Mnemonic::Mulps => |d, s, _, m| packed2::<S>(d, s, m, multiply::<S>),
        Mnemonic::Mulpd => |d, s, _, m| packed2::<D>(d, s, m, multiply::<D>),
        Mnemonic::Mulss => |d, s, _, m| scalar2::<S>(d, s, m, multiply::<S>),
        Mnemonic::Mulsd => |d, s, _, m| scalar2::<D>(d, s, m, multiply::<D>),
        Mnemonic::Divps => |d, s, _, m| packed2::<S>(d, s, m, divide::<S>),
        Mnemonic::Divpd => |d, s, _, m| packed2::<D>(d, s, m, divide::<D>),
        Mnemonic::Divss => |d, s, _, m| scalar2::<S>(d, s, m, divide::<S>),
        Mnemonic::Divsd => |d, s, _, m| scalar2::<D>(d, s, m, divide::<D>),
        Mnemonic::Minps => |d, s, _, m| packed2::<S>(d, s, m, minimum::<S>),
        Mnemonic::Minpd => |d, s, _, m| packed2::<D>(d, s, m, minimum::<D>),
        Mnemonic::Minss => |d, s, _, m| scalar2::<S>(d, s, m, minimum::<S>),
        Mnemonic::Minsd => |d, s, _, m| scalar2::<D>(d, s, m, minimum::<D>),
        Mnemonic::Maxps => |d, s, _, m| packed2::<S>(d, s, m, maximum::<S>),
        Mnemonic::Maxpd => |d, s, _, m| packed2::<D>(d, s, m, maximum::<D>),
        Mnemonic::Maxss => |d, s, _, m| scalar2::<S>(d, s, m, maximum::<S>),
        Mnemonic::Maxsd => |d, s, _, m| scalar2::<D>(d, s, m, maximum::<D>),
        Mnemonic::Sqrtps => |_, s, _, m| packed1::<S>(s, m, square_root::<S>),
        Mnemonic::Sqrtpd => |_, s, _, m| packed1::<D>(s, m, square_root::<D>),
        Mnemonic::Sqrtss => |d, s, _, m| scalar1::<S>(d, s, m, square_root::<S>),
        Mnemonic::Sqrtsd => |d, s, _, m| scalar1::<D>(d, s, m, square_root::<D>),
        Mnemonic::Rcpps => |_, s, _, m| packed1::<S>(s, m, |a, _| reciprocal::<S>(a)),
        Mnemonic::Rcpss => |d, s, _, m| scalar1::<S>(d, s, m, |a, _| reciprocal::<S>(a)),
        Mnemonic::Rsqrtps => |_, s, _, m| packed1::<S>(s, m, |a, _| reciprocal_square_root::<S>(a)),
        Mnemonic::Rsqrtss => |d, s, _, m| scalar1::<S>(d, s, m, |a, _| reciprocal_square_root::<S>(a)),
        Mnemonic::Cmpps => |d, s, i, m| compare::<S>(d, s, 4, i, m),
        Mnemonic::Cmppd => |d, s, i, m| compare::<D>(d, s, 2, i, m),
        Mnemonic::Cmpss => |d, s, i, m| compare::<S>(d, s, 1, i, m),
        Mnemonic::Cmpsd => |d, s, i, m| compare::<D>(d, s, 1, i, m),
        Mnemonic::Roundps => |d, s, i, m| round::<S>(d, s, 4, i, m),
        Mnemonic::Roundpd => |d, s, i, m| round::<D>(d, s, 2, i, m),
        Mnemonic::Roundss => |d, s, i, m| round::<S>(d, s, 1, i, m),
        Mnemonic::Roundsd => |d, s, i, m| round::<D>(d, s, 1, i, m),
        Mnemonic::Haddps => |d, s, _, m| horizontal::<S>(d, s, m, add::<S>),
        Mnemonic::Haddpd => |d, s, _, m| horizontal::<D>(d, s, m, add::<D>),
        Mnemonic::Hsubps => |d, s, _, m| horizontal::<S>(d, s, m, subtract::<S>),
        Mnemonic::Hsubpd => |d, s, _, m| horizontal::<D>(d, s, m, subtract::<D>),
        Mnemonic::Addsubps => |d, s, _, m| add_subtract::<S>(d, s, m),
        Mnemonic::Addsubpd => |d, s, _, m| add_subtract::<D>(d, s, m),
        Mnemonic::Dpps => |d, s, i, m| dot_product::<S>(d, s, i, m),
        Mnemonic::Dppd => |d, s, i, m| dot_product::<D>(d, s, i, m),
        Mnemonic::Cvtps2pd => |_, s, _, m| converts::<S, D>(0, s, 2, m),
        Mnemonic::Cvtpd2ps => |_, s, _, m| converts::<D, S>(0, s, 2, m),
        Mnemonic::Cvtss2sd => |d, s, _, m| converts::<S, D>(d, s, 1, m),
        Mnemonic::Cvtsd2ss => |d, s, _, m| converts::<D, S>(d, s, 1, m),
        Mnemonic::Cvtdq2ps => |_, s, _, m| from_integers::<S>(0, s, 4, m),
        Mnemonic::Cvtdq2pd | Mnemonic::Cvtpi2pd => |_, s, _, m| from_integers::<D>(0, s, 2, m),
        Mnemonic::Cvtpi2ps => |d, s, _, m| from_integers::<S>(d, s, 2, m),
        Mnemonic::Cvtps2dq => |_, s, _, m| to_integers::<S>(s, 4, false, m),
        Mnemonic::Cvttps2dq => |_, s, _, m| to_integers::<S>(s, 4, true, m),
        Mnemonic::Cvtps2pi => |_, s, _, m| to_integers::<S>(s, 2, false, m),
        Mnemonic::Cvttps2pi => |_, s, _, m| to_integers::<S>(s, 2, true, m),
        Mnemonic::Cvtpd2dq | Mnemonic::Cvtpd2pi => |_, s, _, m| to_integers::<D>(s, 2, false, m),
        Mnemonic::Cvttpd2dq | Mnemonic::Cvttpd2pi => |_, s, _, m| to_integers::<D>(s, 2, true, m),
        _ => return None,
    };
    Some(op)
}
