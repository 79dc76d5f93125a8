//! What can be checked on every host: unmasked exceptions, approximations, the table of operations.
//! `against_host` draws its operands from here.
#![cfg_attr(
    not(target_arch = "x86_64"),
    allow(dead_code, reason = "operands for the comparison with an x86-64 host")
)]
#![allow(clippy::cast_possible_truncation, reason = "random bits are cut to size")]

use iced_x86::Mnemonic;

use super::packed::portable_op;
use super::*;

/// A small generator (xorshift64*); the seed is the test's, and not zero.
pub(in crate::translate) struct Random(pub(in crate::translate) u64);

impl Random {
    pub(in crate::translate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub(in crate::translate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[(self.next() % from.len() as u64) as usize]
    }
}

pub(super) const SINGLES: [u32; 26] = [
    0x0000_0000, // zero
    0x0000_0001, // smallest denormal
    0x007f_ffff, // largest denormal
    0x0040_0000,
    0x0080_0000, // smallest normal
    0x0080_0001,
    0x00ff_ffff,
    0x1f80_0000, // products of these are tiny
    0x2000_0001,
    0x3f80_0000, // 1
    0x3f80_0001,
    0x3f7f_ffff, // just below 1
    0x3f00_0000, // 0.5
    0x3fc0_0000, // 1.5
    0x4b00_0001, // 2^23 + 1
    0x4effffff,  // just below 2^31
    0x4f00_0000, // 2^31
    0x5f00_0000, // 2^63
    0x5eff_ffff,
    0x7f7f_ffff, // largest
    0x7f00_0000,
    0x7f80_0000, // infinity
    0x7fc0_0000, // quiet NaN
    0x7fd2_3456,
    0x7f80_0001, // signalling NaN
    0x7fb4_5678,
];

pub(super) const DOUBLES: [u64; 28] = [
    0x0000_0000_0000_0000,
    0x0000_0000_0000_0001,
    0x000f_ffff_ffff_ffff,
    0x0008_0000_0000_0000,
    0x0010_0000_0000_0000,
    0x0010_0000_0000_0001,
    0x001f_ffff_ffff_ffff,
    0x1ff0_0000_0000_0001,
    0x2000_0000_0000_0001,
    0x3690_0000_0000_0000, // half the smallest single denormal
    0x3810_0000_0000_0000, // smallest normal single
    0x380f_ffff_ffff_ffff,
    0x47ef_ffff_efff_ffff, // rounds to the largest single
    0x3ff0_0000_0000_0000,
    0x3ff0_0000_0000_0001,
    0x3fef_ffff_ffff_ffff,
    0x3fe0_0000_0000_0000,
    0x3ff8_0000_0000_0000,
    0x41df_ffff_ffe0_0000, // 2^31 - 0.5
    0x41e0_0000_0000_0000, // 2^31
    0x43e0_0000_0000_0000, // 2^63
    0x43df_ffff_ffff_ffff,
    0x7fef_ffff_ffff_ffff,
    0x7ff0_0000_0000_0000,
    0x7ff8_0000_0000_0000,
    0x7ffd_2345_6789_abcd,
    0x7ff0_0000_0000_0001,
    0x7ff4_5678_9abc_def0,
];

fn single(random: &mut Random) -> u64 {
    let bits = random.next();
    let awkward = u64::from(random.pick(&SINGLES)) ^ (bits & 0x8000_0000);
    match bits >> 32 & 3 {
        0 => bits & 0xffff_ffff,
        // Exponents near one, so that sums and quotients are inexact and not absorbed.
        1 => bits & 0x83ff_ffff | 0x3c00_0000,
        2 => awkward,
        _ => awkward.wrapping_add(bits >> 40 & 7) & 0xffff_ffff,
    }
}

fn double(random: &mut Random) -> u64 {
    let bits = random.next();
    let awkward = random.pick(&DOUBLES) ^ (bits & 1 << 63);
    match random.next() & 3 {
        0 => bits,
        1 => bits & 0x803f_ffff_ffff_ffff | 0x3fc0_0000_0000_0000,
        2 => awkward,
        _ => awkward.wrapping_add(bits & 7),
    }
}

pub(super) fn vector(random: &mut Random, singles: bool) -> u128 {
    let mut half = || if singles { single(random) | single(random) << 32 } else { double(random) };
    u128::from(half()) | u128::from(half()) << 64
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Source {
    Singles,
    Doubles,
    Integers,
}

use Source::{Doubles as D, Integers as I, Singles as S};

/// Every mnemonic whose result the architecture fixes, and what its source holds.
pub(super) const OPERATIONS: [(Mnemonic, Source); 60] = [
    (Mnemonic::Addps, S),
    (Mnemonic::Addpd, D),
    (Mnemonic::Addss, S),
    (Mnemonic::Addsd, D),
    (Mnemonic::Subps, S),
    (Mnemonic::Subpd, D),
    (Mnemonic::Subss, S),
    (Mnemonic::Subsd, D),
    (Mnemonic::Mulps, S),
    (Mnemonic::Mulpd, D),
    (Mnemonic::Mulss, S),
    (Mnemonic::Mulsd, D),
    (Mnemonic::Divps, S),
    (Mnemonic::Divpd, D),
    (Mnemonic::Divss, S),
    (Mnemonic::Divsd, D),
    (Mnemonic::Minps, S),
    (Mnemonic::Minpd, D),
    (Mnemonic::Minss, S),
    (Mnemonic::Minsd, D),
    (Mnemonic::Maxps, S),
    (Mnemonic::Maxpd, D),
    (Mnemonic::Maxss, S),
    (Mnemonic::Maxsd, D),
    (Mnemonic::Sqrtps, S),
    (Mnemonic::Sqrtpd, D),
    (Mnemonic::Sqrtss, S),
    (Mnemonic::Sqrtsd, D),
    (Mnemonic::Cmpps, S),
    (Mnemonic::Cmppd, D),
    (Mnemonic::Cmpss, S),
    (Mnemonic::Cmpsd, D),
    (Mnemonic::Roundps, S),
    (Mnemonic::Roundpd, D),
    (Mnemonic::Roundss, S),
    (Mnemonic::Roundsd, D),
    (Mnemonic::Haddps, S),
    (Mnemonic::Haddpd, D),
    (Mnemonic::Hsubps, S),
    (Mnemonic::Hsubpd, D),
    (Mnemonic::Addsubps, S),
    (Mnemonic::Addsubpd, D),
    (Mnemonic::Cvtps2pd, S),
    (Mnemonic::Cvtpd2ps, D),
    (Mnemonic::Cvtss2sd, S),
    (Mnemonic::Cvtsd2ss, D),
    (Mnemonic::Cvtdq2ps, I),
    (Mnemonic::Cvtdq2pd, I),
    (Mnemonic::Cvtpi2ps, I),
    (Mnemonic::Cvtpi2pd, I),
    (Mnemonic::Cvtps2dq, S),
    (Mnemonic::Cvttps2dq, S),
    (Mnemonic::Cvtps2pi, S),
    (Mnemonic::Cvttps2pi, S),
    (Mnemonic::Cvtpd2dq, D),
    (Mnemonic::Cvttpd2dq, D),
    (Mnemonic::Cvtpd2pi, D),
    (Mnemonic::Cvttpd2pi, D),
    (Mnemonic::Dpps, S),
    (Mnemonic::Dppd, D),
];

/// All exceptions masked; every rounding mode, flush to zero, denormals as zeros.
pub(super) fn controls() -> impl Iterator<Item = u32> {
    (0..16).map(|i| 0x1f80 | (i & 3) << 13 | (i & 4) << 13 | (i & 8) << 3)
}

const SNAN: u128 = 0x7f80_0001;
const ONE: u128 = 0x3f80_0000;
const THIRD: u128 = 0x3eaa_aaab;
const TINY: u128 = 0x0080_0000;
const HALF: u128 = 0x3f00_0000;

fn unmasking(exceptions: u32) -> u32 {
    0x1f80 & !(exceptions << 7)
}

/// The flags as processors set them.
#[test]
fn unmasked_exceptions() {
    let run = |mnemonic, dst: u128, src: u128, mut mxcsr: u32| {
        let op = portable_op(mnemonic).expect("in the table");
        (op(dst, src, 0, &mut mxcsr), mxcsr & 0x3f)
    };
    let (inexact, denormal) = (ONE << 32, 1u128);
    // An unmasked exception in the operands of one lane keeps the others from computing...
    let operands = (SNAN | inexact, ONE | THIRD << 32);
    assert_eq!(run(Mnemonic::Addps, operands.0, operands.1, unmasking(1)), (Err(SimdException), 0x01));
    // ... but not from having their operands looked at,
    let operands = (SNAN | denormal << 32, ONE | ONE << 32);
    assert_eq!(run(Mnemonic::Mulps, operands.0, operands.1, unmasking(1)), (Err(SimdException), 0x03));
    // and a masked one leaves the results their say.
    let operands = (SNAN | inexact, ONE | THIRD << 32);
    assert_eq!(run(Mnemonic::Addps, operands.0, operands.1, unmasking(0x20)), (Err(SimdException), 0x21));
    // A tiny exact result underflows where that is unmasked only; flush to zero then does nothing.
    assert_eq!(run(Mnemonic::Mulss, TINY, HALF, unmasking(0)), (Ok(TINY >> 1), 0));
    assert_eq!(run(Mnemonic::Mulss, TINY, HALF, unmasking(0x10)), (Err(SimdException), 0x10));
    assert_eq!(run(Mnemonic::Mulss, TINY, HALF, unmasking(0) | 1 << 15), (Ok(0), 0x30));
    assert_eq!(run(Mnemonic::Mulss, TINY, HALF, unmasking(0x10) | 1 << 15), (Err(SimdException), 0x10));
    assert_eq!(run(Mnemonic::Mulss, TINY | 1, THIRD, unmasking(0x10)), (Err(SimdException), 0x30));
    assert_eq!(run(Mnemonic::Divss, ONE, 0, unmasking(4)), (Err(SimdException), 0x04));
    assert_eq!(run(Mnemonic::Divss, ONE, 0, unmasking(0)), (Ok(0x7f80_0000), 0x04));
    let mut mxcsr = unmasking(0x20);
    assert_eq!(cvtsi2ss(0, 0x0100_0001, &mut mxcsr), Err(SimdException));
    assert_eq!(mxcsr & 0x3f, 0x20);
    let mut mxcsr = unmasking(1);
    assert_eq!(cvtsd2si(u128::from(f64::NAN.to_bits()), true, true, &mut mxcsr), Err(SimdException));
    assert_eq!(comiss(SNAN, ONE, &mut mxcsr), Err(SimdException));
}

/// Checks RCPPS and RSQRTPS against their bound on the relative error.
pub(super) fn approximations(op: impl Fn(Mnemonic) -> FloatOp) {
    const BOUND: f64 = 1.5 / 4096.0;
    let (reciprocal, root) = (op(Mnemonic::Rcpps), op(Mnemonic::Rsqrtss));
    let mut random = Random(99);
    for _ in 0..5_000 {
        let bits = (random.next() & 0x3fff_ffff | 0x2000_0000) as u32;
        let (src, value) =
            (u128::from(bits) * 0x1_0000_0001_0000_0001_0000_0001, f64::from(f32::from_bits(bits)));
        let mut mxcsr = 0x1f80;
        let result = reciprocal(0, src, 0, &mut mxcsr).expect("raises nothing");
        let lane = f64::from(f32::from_bits((result >> 96 & 0xffff_ffff) as u32));
        assert!((lane * value - 1.0).abs() <= BOUND, "1 / {value}: {lane}");
        let result = root(ONE << 64, src, 0, &mut mxcsr).expect("raises nothing");
        let lane = f64::from(f32::from_bits((result & 0xffff_ffff) as u32));
        assert!((lane * value.sqrt() - 1.0).abs() <= BOUND, "1 / sqrt({value}): {lane}");
        assert_eq!(result >> 32, ONE << 32, "the upper lanes stay");
        assert_eq!(mxcsr, 0x1f80);
    }
    // Denormals, zeros, infinities, negative roots, NaNs.
    for (src, expected) in
        [(1, 0x7f80_0000), (0x8000_0001, 0xff80_0000), (0xff80_0000, 0x8000_0000), (SNAN, 0x7fc0_0001)]
    {
        assert_eq!(reciprocal(0, src, 0, &mut 0x1f80).map(|result| result & 0xffff_ffff), Ok(expected));
    }
    for (src, expected) in [(0x8000_0000, 0xff80_0000), (0xbf80_0000, 0xffc0_0000), (0x7f80_0000, 0)] {
        assert_eq!(root(0, src, 0, &mut 0x1f80).map(|result| result & 0xffff_ffff), Ok(expected));
    }
}

#[test]
fn portable_approximations() {
    approximations(|mnemonic| portable_op(mnemonic).expect("in the table"));
}

#[test]
fn exactly_the_floating_point_mnemonics() {
    for (mnemonic, _) in OPERATIONS {
        assert!(float_op(mnemonic).is_some() && portable_op(mnemonic).is_some(), "{mnemonic:?}");
    }
    for mnemonic in [Mnemonic::Andps, Mnemonic::Movaps, Mnemonic::Shufps, Mnemonic::Vaddps, Mnemonic::Paddb] {
        assert!(float_op(mnemonic).is_none(), "{mnemonic:?}");
    }
}
