//! SSE instructions executed by the x86-64 host itself.
//!
//! The host runs the instruction under the guest's MXCSR with all exceptions masked, so that no signal
//! can come of it. Where the guest unmasks one, which hardly any does, the portable code takes over: the
//! flags that an unmasked exception leaves behind are not the ones of a masked run.
#![allow(unsafe_code, reason = "inline assembly: the host's own floating-point instructions")]

use std::arch::asm;
use std::arch::x86_64::__m128i;
use std::mem::transmute;

use iced_x86::Mnemonic;

use super::exact::low;
use super::packed::portable_op;
use super::{FloatOp, SimdException};

/// The exception flags of MXCSR.
const FLAGS: u32 = 0x3f;
/// The exception masks of MXCSR.
const MASKS: u32 = 0x1f80;
/// The bits of MXCSR that exist: LDMXCSR faults on others.
const DEFINED: u32 = 0xffff;
/// The rounding control of MXCSR.
const ROUNDING: u32 = 0x6000;
const PRECISION: u32 = 0x20;

fn high(value: u128) -> u64 {
    (value >> 64) as u64
}

fn to_vector(value: u128) -> __m128i {
    // SAFETY: both types are 128 bits of which any value is valid.
    unsafe { transmute::<u128, __m128i>(value) }
}

fn from_vector(vector: __m128i) -> u128 {
    // SAFETY: both types are 128 bits of which any value is valid.
    unsafe { transmute::<__m128i, u128>(vector) }
}

#[cold]
fn unmasked(
    mnemonic: Mnemonic,
    dst: u128,
    src: u128,
    imm: u8,
    mxcsr: &mut u32,
) -> Result<u128, SimdException> {
    portable_op(mnemonic).map_or(Ok(dst), |op| op(dst, src, imm, mxcsr))
}

/// Runs `$instruction dst, src $immediate` under `$control` and yields the result and the flags. The
/// control value's masks must be set and undefined bits clear.
macro_rules! run {
    ($instruction:literal $immediate:literal, $dst:expr, $src:expr, $control:expr $(, $name:ident = const $value:expr)?) => {{
        let mut vector = to_vector($dst);
        // The host's own MXCSR, then the guest's.
        let mut registers = [0u32, $control];
        // SAFETY: the pointer is to two writable words, which LDMXCSR and STMXCSR read and write. The value
        // loaded has all exceptions masked and no undefined bit, so that nothing faults, and the block puts
        // the host's value back.
        unsafe {
            asm!(
                "stmxcsr [{registers}]",
                "ldmxcsr [{registers} + 4]",
                concat!($instruction, " {vector}, {src}", $immediate),
                "stmxcsr [{registers} + 4]",
                "ldmxcsr [{registers}]",
                registers = in(reg) registers.as_mut_ptr(),
                vector = inout(xmm_reg) vector,
                src = in(xmm_reg) to_vector($src),
                $($name = const $value,)?
                options(nostack),
            );
        }
        (from_vector(vector), registers[1] & FLAGS)
    }};
}

/// The closures of instructions without immediate byte.
macro_rules! plain {
    ($mnemonic:ident, $instruction:literal) => {
        plain!($mnemonic, $instruction, |_dst, src| src, |_dst, result| result)
    };
    ($mnemonic:ident, $instruction:literal, $before:expr, $after:expr) => {
        |dst, src, imm, mxcsr| {
            if *mxcsr & MASKS != MASKS {
                return unmasked(Mnemonic::$mnemonic, dst, src, imm, mxcsr);
            }
            let before: fn(u128, u128) -> u128 = $before;
            let after: fn(u128, u128) -> u128 = $after;
            let (result, flags) = run!($instruction "", dst, before(dst, src), *mxcsr & DEFINED & !FLAGS);
            *mxcsr |= flags;
            Ok(after(dst, result))
        }
    };
}

/// The closures of CMPPS and kin.
macro_rules! compare {
    ($mnemonic:ident, $instruction:literal) => {
        |dst, src, imm, mxcsr| {
            if *mxcsr & MASKS != MASKS {
                return unmasked(Mnemonic::$mnemonic, dst, src, imm, mxcsr);
            }
            let control = *mxcsr & DEFINED & !FLAGS;
            let (result, flags) = match imm & 7 {
                0 => run!($instruction ", {imm}", dst, src, control, imm = const 0),
                1 => run!($instruction ", {imm}", dst, src, control, imm = const 1),
                2 => run!($instruction ", {imm}", dst, src, control, imm = const 2),
                3 => run!($instruction ", {imm}", dst, src, control, imm = const 3),
                4 => run!($instruction ", {imm}", dst, src, control, imm = const 4),
                5 => run!($instruction ", {imm}", dst, src, control, imm = const 5),
                6 => run!($instruction ", {imm}", dst, src, control, imm = const 6),
                _ => run!($instruction ", {imm}", dst, src, control, imm = const 7),
            };
            *mxcsr |= flags;
            Ok(result)
        }
    };
}

/// The closures of ROUNDPS and kin: the rounding control of the immediate byte moves to MXCSR.
macro_rules! round {
    ($mnemonic:ident, $instruction:literal) => {
        |dst, src, imm, mxcsr| {
            if *mxcsr & MASKS != MASKS {
                return unmasked(Mnemonic::$mnemonic, dst, src, imm, mxcsr);
            }
            let control = *mxcsr & DEFINED & !FLAGS;
            let control =
                if imm & 4 == 0 { control & !ROUNDING | u32::from(imm & 3) << 13 } else { control };
            let (result, flags) = run!($instruction ", 4", dst, src, control);
            *mxcsr |= if imm & 8 == 0 { flags } else { flags & !PRECISION };
            Ok(result)
        }
    };
}

/// The operation of a mnemonic on this host; `None` where the host lacks the instruction, or it is not
/// worth having here.
pub(super) fn host_op(mnemonic: Mnemonic) -> Option<FloatOp> {
    let op: FloatOp = match mnemonic {
        Mnemonic::Addps => plain!(Addps, "addps"),
        Mnemonic::Addpd => plain!(Addpd, "addpd"),
        Mnemonic::Addss => plain!(Addss, "addss"),
        Mnemonic::Addsd => plain!(Addsd, "addsd"),
        Mnemonic::Subps => plain!(Subps, "subps"),
        Mnemonic::Subpd => plain!(Subpd, "subpd"),
        Mnemonic::Subss => plain!(Subss, "subss"),
        Mnemonic::Subsd => plain!(Subsd, "subsd"),
        Mnemonic::Mulps => plain!(Mulps, "mulps"),
        Mnemonic::Mulpd => plain!(Mulpd, "mulpd"),
        Mnemonic::Mulss => plain!(Mulss, "mulss"),
        Mnemonic::Mulsd => plain!(Mulsd, "mulsd"),
        Mnemonic::Divps => plain!(Divps, "divps"),
        Mnemonic::Divpd => plain!(Divpd, "divpd"),
        Mnemonic::Divss => plain!(Divss, "divss"),
        Mnemonic::Divsd => plain!(Divsd, "divsd"),
        Mnemonic::Minps => plain!(Minps, "minps"),
        Mnemonic::Minpd => plain!(Minpd, "minpd"),
        Mnemonic::Minss => plain!(Minss, "minss"),
        Mnemonic::Minsd => plain!(Minsd, "minsd"),
        Mnemonic::Maxps => plain!(Maxps, "maxps"),
        Mnemonic::Maxpd => plain!(Maxpd, "maxpd"),
        Mnemonic::Maxss => plain!(Maxss, "maxss"),
        Mnemonic::Maxsd => plain!(Maxsd, "maxsd"),
        Mnemonic::Sqrtps => plain!(Sqrtps, "sqrtps"),
        Mnemonic::Sqrtpd => plain!(Sqrtpd, "sqrtpd"),
        Mnemonic::Sqrtss => plain!(Sqrtss, "sqrtss"),
        Mnemonic::Sqrtsd => plain!(Sqrtsd, "sqrtsd"),
        Mnemonic::Rcpps => plain!(Rcpps, "rcpps"),
        Mnemonic::Rcpss => plain!(Rcpss, "rcpss"),
        Mnemonic::Rsqrtps => plain!(Rsqrtps, "rsqrtps"),
        Mnemonic::Rsqrtss => plain!(Rsqrtss, "rsqrtss"),
        Mnemonic::Cmpps => compare!(Cmpps, "cmpps"),
        Mnemonic::Cmppd => compare!(Cmppd, "cmppd"),
        Mnemonic::Cmpss => compare!(Cmpss, "cmpss"),
        Mnemonic::Cmpsd => compare!(Cmpsd, "cmpsd"),
        Mnemonic::Cvtps2pd => plain!(Cvtps2pd, "cvtps2pd"),
        Mnemonic::Cvtpd2ps => plain!(Cvtpd2ps, "cvtpd2ps"),
        Mnemonic::Cvtss2sd => plain!(Cvtss2sd, "cvtss2sd"),
        Mnemonic::Cvtsd2ss => plain!(Cvtsd2ss, "cvtsd2ss"),
        Mnemonic::Cvtdq2ps => plain!(Cvtdq2ps, "cvtdq2ps"),
        Mnemonic::Cvtdq2pd => plain!(Cvtdq2pd, "cvtdq2pd"),
        Mnemonic::Cvtps2dq => plain!(Cvtps2dq, "cvtps2dq"),
        Mnemonic::Cvttps2dq => plain!(Cvttps2dq, "cvttps2dq"),
        Mnemonic::Cvtpd2dq => plain!(Cvtpd2dq, "cvtpd2dq"),
        Mnemonic::Cvttpd2dq => plain!(Cvttpd2dq, "cvttpd2dq"),
        // The MMX forms, by the SSE2 instruction that computes the same in the low half.
        Mnemonic::Cvtpi2pd => plain!(Cvtpi2pd, "cvtdq2pd"),
        Mnemonic::Cvtpi2ps => {
            plain!(Cvtpi2ps, "cvtdq2ps", |_, src| u128::from(low(src)), |dst, result| u128::from(high(dst))
                << 64
                | u128::from(low(result)))
        }
        Mnemonic::Cvtps2pi => {
            plain!(Cvtps2pi, "cvtps2dq", |_, src| u128::from(low(src)), |_, result| result)
        }
        Mnemonic::Cvttps2pi => {
            plain!(Cvttps2pi, "cvttps2dq", |_, src| u128::from(low(src)), |_, result| result)
        }
        Mnemonic::Cvtpd2pi => plain!(Cvtpd2pi, "cvtpd2dq"),
        Mnemonic::Cvttpd2pi => plain!(Cvttpd2pi, "cvttpd2dq"),
        _ => return later_op(mnemonic),
    };
    Some(op)
}

/// Instructions that not every x86-64 host has. DPPS and DPPD, which take their selection as an immediate
/// byte only, stay with the portable code.
fn later_op(mnemonic: Mnemonic) -> Option<FloatOp> {
    let has_sse3 = std::arch::is_x86_feature_detected!("sse3");
    let has_sse41 = std::arch::is_x86_feature_detected!("sse4.1");
    let op: FloatOp = match mnemonic {
        Mnemonic::Haddps if has_sse3 => plain!(Haddps, "haddps"),
        Mnemonic::Haddpd if has_sse3 => plain!(Haddpd, "haddpd"),
        Mnemonic::Hsubps if has_sse3 => plain!(Hsubps, "hsubps"),
        Mnemonic::Hsubpd if has_sse3 => plain!(Hsubpd, "hsubpd"),
        Mnemonic::Addsubps if has_sse3 => plain!(Addsubps, "addsubps"),
        Mnemonic::Addsubpd if has_sse3 => plain!(Addsubpd, "addsubpd"),
        Mnemonic::Roundps if has_sse41 => round!(Roundps, "roundps"),
        Mnemonic::Roundpd if has_sse41 => round!(Roundpd, "roundpd"),
        Mnemonic::Roundss if has_sse41 => round!(Roundss, "roundss"),
        Mnemonic::Roundsd if has_sse41 => round!(Roundsd, "roundsd"),
        _ => return None,
    };
    Some(op)
}
