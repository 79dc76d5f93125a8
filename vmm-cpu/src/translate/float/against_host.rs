//! The portable code against the host's instructions: every pair of awkward operands and many random
//! ones, under every rounding mode, with and without flush to zero and denormals as zeros.
#![allow(clippy::cast_possible_truncation, reason = "random bits are cut to size")]
#![allow(unsafe_code, reason = "the host's own instructions are what is compared with")]

use std::arch::asm;
use std::arch::x86_64::__m128i;
use std::mem::transmute;

use iced_x86::Mnemonic;

use super::fast::fast_op;
use super::host::host_op;
use super::packed::portable_op;
use super::tests::{DOUBLES, OPERATIONS, Random, SINGLES, Source, controls, vector};
use super::*;

use Source::{Doubles as D, Integers as I, Singles as S};

fn check(mnemonic: Mnemonic, op: FloatOp, dst: u128, src: u128, imm: u8, control: u32) {
    let host = host_op(mnemonic).or_else(|| native_dot_product(mnemonic, imm));
    let Some(host) = host else { return };
    let mut expected_mxcsr = control;
    let expected = host(dst, src, imm, &mut expected_mxcsr);
    if let Some(fast) = fast_op(mnemonic) {
        let mut mxcsr = control;
        assert_eq!(
            (fast(dst, src, imm, &mut mxcsr), mxcsr),
            (expected, expected_mxcsr),
            "{mnemonic:?} {dst:#034x}, {src:#034x} under {control:#x}, short cut"
        );
    }
    let mut mxcsr = control;
    let result = op(dst, src, imm, &mut mxcsr);
    assert_eq!(
        (result, mxcsr),
        (expected, expected_mxcsr),
        "{mnemonic:?} {dst:#034x}, {src:#034x}, {imm} under {control:#x}: {:#034x} {mxcsr:#x} for {:#034x} {expected_mxcsr:#x}",
        result.unwrap_or_default(),
        expected.unwrap_or_default(),
    );
}

fn pairs(source: Source) -> Vec<(u128, u128)> {
    let values: Vec<u64> = match source {
        S => SINGLES.iter().map(|&bits| u64::from(bits)).collect(),
        D => DOUBLES.to_vec(),
        I => vec![0, 1, 0xffff_ffff, 0x8000_0000, 0x7fff_ffff, 0x100_0001, 0x101_0101, 0xfeff_ffff],
    };
    let sign = if source == D { 1 << 63 } else { 1 << 31 };
    let mut pairs = Vec::new();
    for &a in &values {
        for &b in &values {
            // The other lanes hold zeros: flags are those of the pair.
            pairs.push((u128::from(a), u128::from(b)));
            pairs.push((u128::from(a), u128::from(b | sign)));
            pairs.push((u128::from(a | sign), u128::from(b)));
        }
    }
    pairs
}

fn all_pairs(controls: &[u32]) {
    for (mnemonic, source) in OPERATIONS {
        let op = portable_op(mnemonic).expect("in the table");
        for (i, (a, b)) in pairs(source).into_iter().enumerate() {
            for &control in controls {
                check(mnemonic, op, a, b, (i % 16) as u8, control);
            }
        }
    }
}

fn random(rounds: u32, seed: u64) {
    let mut random = Random(seed);
    for (mnemonic, source) in OPERATIONS {
        let op = portable_op(mnemonic).expect("in the table");
        for _ in 0..rounds {
            let (dst, src) = (vector(&mut random, source == S), vector(&mut random, source == S));
            let src =
                if source == I { u128::from(random.next()) << 64 | u128::from(random.next()) } else { src };
            let control = 0x1f80 | (random.next() & 0xe07f) as u32;
            check(mnemonic, op, dst, src, random.next() as u8, control);
        }
    }
}

#[test]
fn awkward_pairs() {
    // Every fifth keeps the time down, and still meets each bit set and clear; then those of the short cut.
    all_pairs(&controls().step_by(5).chain([0x1fa0, 0x9fe0]).collect::<Vec<_>>());
}

#[test]
fn random_operands() {
    random(2_000, 0x1234_5678_9abc_def1);
}

#[test]
#[ignore = "minutes"]
fn awkward_pairs_under_every_control() {
    all_pairs(&controls().collect::<Vec<_>>());
}

#[test]
#[ignore = "minutes"]
fn many_random_operands() {
    random(500_000, 0xfeed_beef_0bad_cafe);
}

/// Runs `$instruction` on XMM operands `$x` and `$y` and a general register `$r` under `$mxcsr`.
macro_rules! native {
    ($instruction:expr, $x:expr, $y:expr, $r:expr, $mxcsr:expr) => {{
        // SAFETY: both types are 128 bits of which any value is valid.
        let mut x = unsafe { transmute::<u128, __m128i>($x) };
        // SAFETY: as above.
        let y = unsafe { transmute::<u128, __m128i>($y) };
        let mut r: u64 = $r;
        let mut registers = [0u32, *$mxcsr];
        // SAFETY: the instruction touches the named registers and flags only, all exceptions are masked, and
        // the host's MXCSR is put back.
        unsafe {
            asm!(
                "stmxcsr [{m}]",
                "ldmxcsr [{m} + 4]",
                $instruction,
                "stmxcsr [{m} + 4]",
                "ldmxcsr [{m}]",
                m = in(reg) registers.as_mut_ptr(),
                x = inout(xmm_reg) x,
                y = in(xmm_reg) y,
                r = inout(reg) r,
            );
        }
        *$mxcsr = registers[1];
        // SAFETY: both types are 128 bits of which any value is valid.
        (unsafe { transmute::<__m128i, u128>(x) }, r)
    }};
}

/// DPPS and DPPD, of which the host path has none, for some immediate bytes.
fn native_dot_product(mnemonic: Mnemonic, imm: u8) -> Option<FloatOp> {
    macro_rules! dot {
        ($instruction:literal, $($imm:literal)*) => {
            match imm {
                $($imm => |x, y, _, mxcsr| {
                    Ok(native!(concat!($instruction, " {x}, {y}, ", $imm, " # {r}"), x, y, 0, mxcsr).0)
                },)*
                _ => return None,
            }
        };
    }
    if !std::arch::is_x86_feature_detected!("sse4.1") {
        return None;
    }
    let op: FloatOp = match mnemonic {
        Mnemonic::Dpps => dot!("dpps", 0xff 0x71 0xa5 0x3f 0xd2 0x11 0 1 2 3 4 5 6 7 8 9),
        Mnemonic::Dppd => dot!("dppd", 0xff 0x33 0x31 0x12 0x23 0 1 2 3 4 5 6 7 8 9),
        _ => return None,
    };
    Some(op)
}

fn scalars(rounds: u32, seed: u64) {
    let mut random = Random(seed);
    for _ in 0..rounds {
        let control = 0x1f80 | (random.next() & 0xe07f) as u32;
        let (s, t) = (vector(&mut random, true), vector(&mut random, true));
        let (d, e) = (vector(&mut random, false), vector(&mut random, false));
        let integer = (random.next().cast_signed()) >> (random.next() % 64);
        // What the native instruction and the function yield: a vector, a register, MXCSR.
        let same =
            |what: &str, native: &dyn Fn(&mut u32) -> (u128, u64), ours: &dyn Fn(&mut u32) -> (u128, u64)| {
                let (mut expected_mxcsr, mut mxcsr) = (control, control);
                let expected = native(&mut expected_mxcsr);
                let result = ours(&mut mxcsr);
                assert_eq!(
                    (result, mxcsr),
                    (expected, expected_mxcsr),
                    "{what} {s:#x} {t:#x} {d:#x} {e:#x} {integer} under {control:#x}"
                );
            };
        macro_rules! to_integer {
            ($instruction:literal, $x:expr, $function:ident, $truncate:literal, $wide:literal) => {
                same($instruction, &|m| (0, native!(concat!($instruction, " # {y}"), $x, 0, 0, m).1), &|m| {
                    (0, $function($x, $truncate, $wide, m).expect("masked"))
                })
            };
        }
        to_integer!("cvtss2si {r:e}, {x}", s, cvtss2si, false, false);
        to_integer!("cvtss2si {r}, {x}", s, cvtss2si, false, true);
        to_integer!("cvttss2si {r:e}, {x}", s, cvtss2si, true, false);
        to_integer!("cvttss2si {r}, {x}", s, cvtss2si, true, true);
        to_integer!("cvtsd2si {r:e}, {x}", d, cvtsd2si, false, false);
        to_integer!("cvtsd2si {r}, {x}", d, cvtsd2si, false, true);
        to_integer!("cvttsd2si {r:e}, {x}", d, cvtsd2si, true, false);
        to_integer!("cvttsd2si {r}, {x}", d, cvtsd2si, true, true);
        macro_rules! from_integer {
            ($instruction:literal, $x:expr, $function:ident, $value:expr) => {
                same(
                    $instruction,
                    &|m| (native!(concat!($instruction, " # {y}"), $x, 0, $value.cast_unsigned(), m).0, 0),
                    &|m| ($function($x, $value, m).expect("masked"), 0),
                )
            };
        }
        let narrow = integer << 32 >> 32;
        from_integer!("cvtsi2ss {x}, {r}", s, cvtsi2ss, integer);
        from_integer!("cvtsi2ss {x}, {r:e}", s, cvtsi2ss, narrow);
        from_integer!("cvtsi2sd {x}, {r}", d, cvtsi2sd, integer);
        from_integer!("cvtsi2sd {x}, {r:e}", d, cvtsi2sd, narrow);
        macro_rules! compare {
            ($instruction:literal, $x:expr, $y:expr, $function:ident) => {
                same(
                    $instruction,
                    &|m| {
                        let flags =
                            native!(concat!($instruction, " {x}, {y}\npushfq\npop {r}"), $x, $y, 0, m).1;
                        (0, flags & 0x45)
                    },
                    &|m| (0, $function($x, $y, m).expect("masked")),
                )
            };
        }
        compare!("comiss", s, t, comiss);
        compare!("ucomiss", s, t, ucomiss);
        compare!("comisd", d, e, comisd);
        compare!("ucomisd", d, e, ucomisd);
        compare!("ucomisd", d, d, ucomisd);
    }
}

#[test]
fn scalar_operations() {
    scalars(10_000, 0x0dd_ba11);
}

#[test]
#[ignore = "a minute"]
fn many_scalar_operations() {
    scalars(3_000_000, 0x7777_1111);
}

/// The host's RCPPS and RSQRTPS keep the bound that the portable ones keep.
#[test]
fn host_approximations() {
    super::tests::approximations(|mnemonic| host_op(mnemonic).expect("every x86-64 has it"));
}
