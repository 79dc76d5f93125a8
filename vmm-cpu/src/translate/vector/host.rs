//! Shortcuts through the host's own vector instructions, where the portable operation takes several times as long.
//!
//! A guest uses these much: bytes are what string functions compare, and AES and PCLMULQDQ are slow without tables.
//! AES rounds also take the same time for every key here.

#![allow(
    unsafe_code,
    reason = "a function for a processor feature is safe to call only where the feature is"
)]

use std::arch::x86_64::*;

use iced_x86::Mnemonic;

use super::VectorOp;
use super::lanes::{halves, high, low};

/// An operation by a host instruction of two registers, `None` where the host lacks the feature.
macro_rules! instruction {
    ($feature:tt, $intrinsic:expr) => {{
        #[target_feature(enable = $feature)]
        fn with_feature(dst: u128, src: u128, imm: u8) -> u128 {
            from_host($intrinsic(to_host(dst), to_host(src), imm))
        }

        fn operation(dst: u128, src: u128, imm: u8) -> u128 {
            // SAFETY: a pointer to this function is given out only where the feature has been detected.
            unsafe { with_feature(dst, src, imm) }
        }

        let operation: VectorOp = operation;
        std::is_x86_feature_detected!($feature).then_some(operation)
    }};
}

/// The operation of the instruction, if there is a shortcut and the host has it.
pub(super) fn xmm_op(mnemonic: Mnemonic) -> Option<VectorOp> {
    match mnemonic {
        Mnemonic::Paddb => instruction!("sse2", |a, b, _| _mm_add_epi8(a, b)),
        Mnemonic::Paddsb => instruction!("sse2", |a, b, _| _mm_adds_epi8(a, b)),
        Mnemonic::Paddsw => instruction!("sse2", |a, b, _| _mm_adds_epi16(a, b)),
        Mnemonic::Paddusb => instruction!("sse2", |a, b, _| _mm_adds_epu8(a, b)),
        Mnemonic::Paddusw => instruction!("sse2", |a, b, _| _mm_adds_epu16(a, b)),
        Mnemonic::Psubb => instruction!("sse2", |a, b, _| _mm_sub_epi8(a, b)),
        Mnemonic::Psubsb => instruction!("sse2", |a, b, _| _mm_subs_epi8(a, b)),
        Mnemonic::Psubsw => instruction!("sse2", |a, b, _| _mm_subs_epi16(a, b)),
        Mnemonic::Psubusb => instruction!("sse2", |a, b, _| _mm_subs_epu8(a, b)),
        Mnemonic::Psubusw => instruction!("sse2", |a, b, _| _mm_subs_epu16(a, b)),
        Mnemonic::Pavgb => instruction!("sse2", |a, b, _| _mm_avg_epu8(a, b)),
        Mnemonic::Pavgw => instruction!("sse2", |a, b, _| _mm_avg_epu16(a, b)),
        Mnemonic::Pminub => instruction!("sse2", |a, b, _| _mm_min_epu8(a, b)),
        Mnemonic::Pmaxub => instruction!("sse2", |a, b, _| _mm_max_epu8(a, b)),
        Mnemonic::Pcmpeqb => instruction!("sse2", |a, b, _| _mm_cmpeq_epi8(a, b)),
        Mnemonic::Pcmpgtb => instruction!("sse2", |a, b, _| _mm_cmpgt_epi8(a, b)),
        Mnemonic::Psadbw => instruction!("sse2", |a, b, _| _mm_sad_epu8(a, b)),
        Mnemonic::Packsswb => instruction!("sse2", |a, b, _| _mm_packs_epi16(a, b)),
        Mnemonic::Packuswb => instruction!("sse2", |a, b, _| _mm_packus_epi16(a, b)),
        Mnemonic::Pshufb => instruction!("ssse3", |a, b, _| _mm_shuffle_epi8(a, b)),
        Mnemonic::Pabsb => instruction!("ssse3", |_, b, _| _mm_abs_epi8(b)),
        Mnemonic::Psignb => instruction!("ssse3", |a, b, _| _mm_sign_epi8(a, b)),
        Mnemonic::Pmaddubsw => instruction!("ssse3", |a, b, _| _mm_maddubs_epi16(a, b)),
        Mnemonic::Aesenc => instruction!("aes", |a, b, _| _mm_aesenc_si128(a, b)),
        Mnemonic::Aesenclast => instruction!("aes", |a, b, _| _mm_aesenclast_si128(a, b)),
        Mnemonic::Aesdec => instruction!("aes", |a, b, _| _mm_aesdec_si128(a, b)),
        Mnemonic::Aesdeclast => instruction!("aes", |a, b, _| _mm_aesdeclast_si128(a, b)),
        Mnemonic::Aesimc => instruction!("aes", |_, b, _| _mm_aesimc_si128(b)),
        Mnemonic::Pclmulqdq => instruction!("pclmulqdq", |a, b, imm: u8| match imm & 0x11 {
            0x00 => _mm_clmulepi64_si128::<0x00>(a, b),
            0x01 => _mm_clmulepi64_si128::<0x01>(a, b),
            0x10 => _mm_clmulepi64_si128::<0x10>(a, b),
            _ => _mm_clmulepi64_si128::<0x11>(a, b),
        }),
        _ => None,
    }
}

#[inline]
#[target_feature(enable = "sse2")]
fn to_host(x: u128) -> __m128i {
    _mm_set_epi64x(high(x).cast_signed(), low(x).cast_signed())
}

#[inline]
#[target_feature(enable = "sse2")]
fn from_host(x: __m128i) -> u128 {
    let upper = _mm_unpackhi_epi64(x, x);
    halves(_mm_cvtsi128_si64(x).cast_unsigned(), _mm_cvtsi128_si64(upper).cast_unsigned())
}
