//! Integer, logical, shuffle and cryptographic SIMD instructions as pure functions.
//!
//! The interpreter looks an operation up when it decodes a block and calls it with the values of the operands;
//! registers, memory, faults and feature bits are its affair. A look-up gives `None` for what is not here: plain
//! moves, and floating-point arithmetic and conversions.
//!
//! | module | holds |
//! |---|---|
//! | `lanes` | registers as lanes, and the shapes in which operations combine them |
//! | `arith` | arithmetic, comparison, logic |
//! | `shift` | shifts |
//! | `shuffle` | packs, unpacks, shuffles, blends, register merges |
//! | `scalar` | between vector and general registers, PTEST |
//! | `aes`, `sha`, `polynomial` | AES-NI, SHA, PCLMULQDQ and CRC32 |
//! | `strings` | PCMPESTRI, PCMPESTRM, PCMPISTRI, PCMPISTRM |
//! | `bits` | BMI1 and BMI2 |
//! | `host` | shortcuts on an x86-64 host: the only unsafe code |
//!
//! # Operands
//! `dst` is the first operand before the instruction, `src` the second whatever its kind, zero-extended: a
//! register, as many bytes of memory as the instruction reads, or the shift count of PSLLW's immediate form and of
//! PSLLDQ. `imm` is the immediate that follows two registers, 0 where there is none. The result is the whole first
//! operand after the instruction.
//!
//! The kernels take and give 128 bits, so an instruction of 256 bits that works within its 128-bit lanes is two
//! calls.
//!
//! Threat model: all values are the guest's. Every function is total: it neither fails nor panics, and takes a bounded
//! time.

mod aes;
mod arith;
mod bits;
#[cfg(all(target_arch = "x86_64", not(vmm_portable)))]
mod host;
mod lanes;
mod polynomial;
mod scalar;
mod sha;
mod shift;
mod shuffle;
mod strings;
#[cfg(test)]
mod tests;

use iced_x86::Mnemonic;

pub(crate) use bits::{
    Flagged, Width, andn, bextr, blsi, blsmsk, blsr, bzhi, mulx, pdep, pext, rorx, sarx, shlx, shrx,
};
pub(crate) use polynomial::crc32;
pub(crate) use scalar::{mmx_extract, mmx_insert, ptest, xmm_extract, xmm_insert};
pub(crate) use strings::{compare_explicit, compare_implicit};

/// Status flags in the places that they have in RFLAGS (Intel SDM 1, 3.4.3.1).
mod status {
    pub(super) const CF: u64 = 1 << 0;
    pub(super) const ZF: u64 = 1 << 6;
    pub(super) const SF: u64 = 1 << 7;
    pub(super) const OF: u64 = 1 << 11;

    /// The flag if it is on.
    pub(super) const fn flag(flag: u64, on: bool) -> u64 {
        if on { flag } else { 0 }
    }
}

/// An operation on registers of one size.
type Op<R> = fn(dst: R, src: R, imm: u8) -> R;

/// An operation on XMM registers.
pub(crate) type VectorOp = fn(dst: u128, src: u128, imm: u8) -> u128;

/// An operation on MM registers.
pub(crate) type MmxOp = fn(dst: u64, src: u64, imm: u8) -> u64;

/// An operation on XMM registers with XMM0 as an implicit third operand.
pub(crate) type MaskedOp = fn(dst: u128, src: u128, xmm0: u128) -> u128;

/// From an XMM register to a general register or memory, zero-extended.
pub(crate) type ExtractOp = fn(src: u128, imm: u8) -> u64;

/// From a general register or memory into an XMM register. Bits of `src` beyond the lane are ignored.
pub(crate) type InsertOp = fn(dst: u128, src: u64, imm: u8) -> u128;

/// From an MM register to a general register, zero-extended.
pub(crate) type MmxExtractOp = fn(src: u64, imm: u8) -> u64;

/// From a general register or memory into an MM register. Bits of `src` beyond the lane are ignored.
pub(crate) type MmxInsertOp = fn(dst: u64, src: u64, imm: u8) -> u64;

/// The operation of an instruction whose first operand is an XMM register and whose second is one, memory, or a
/// shift count.
///
/// MOVSS and MOVSD are here as the merge of two registers; from memory they are plain loads, and
/// [`Mnemonic::Movsd`] is the string instruction as well. MOVLPS, MOVLPD, MOVHPS and MOVHPD are here as loads.
/// For a source in memory see [`memory_immediate`].
pub(crate) fn xmm_op(mnemonic: Mnemonic) -> Option<VectorOp> {
    #[cfg(all(target_arch = "x86_64", not(vmm_portable)))]
    if let Some(op) = host::xmm_op(mnemonic) {
        return Some(op);
    }
    portable_xmm_op(mnemonic)
}

/// As [`xmm_op`], whatever the host is.
fn portable_xmm_op(mnemonic: Mnemonic) -> Option<VectorOp> {
    arith::op(mnemonic)
        .or_else(|| arith::xmm_op(mnemonic))
        .or_else(|| shift::op(mnemonic))
        .or_else(|| shift::xmm_op(mnemonic))
        .or_else(|| shuffle::op(mnemonic))
        .or_else(|| shuffle::xmm_op(mnemonic))
        .or_else(|| aes::xmm_op(mnemonic))
        .or_else(|| sha::xmm_op(mnemonic))
        .or_else(|| polynomial::xmm_op(mnemonic))
}

/// The operation of an instruction whose first operand is an MM register and whose second is one, memory, or a
/// shift count.
pub(crate) fn mmx_op(mnemonic: Mnemonic) -> Option<MmxOp> {
    arith::op(mnemonic)
        .or_else(|| shift::op(mnemonic))
        .or_else(|| shuffle::op(mnemonic))
        .or_else(|| shuffle::mmx_op(mnemonic))
}

/// The operation of an instruction that takes XMM0 as well: PBLENDVB, BLENDVPS, BLENDVPD, SHA256RNDS2.
pub(crate) fn masked_op(mnemonic: Mnemonic) -> Option<MaskedOp> {
    shuffle::masked_op(mnemonic).or_else(|| sha::masked_op(mnemonic))
}

/// The immediate of an [`xmm_op`] whose source is in memory: there INSERTPS reads one lane, whatever imm\[7:6\] says.
pub(crate) fn memory_immediate(mnemonic: Mnemonic, imm: u8) -> u8 {
    match mnemonic {
        Mnemonic::Insertps => imm & 0x3f,
        _ => imm,
    }
}
