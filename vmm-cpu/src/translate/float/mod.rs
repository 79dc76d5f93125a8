//! SSE floating point, bit for bit as an x86 processor computes it.
//!
//! | file | is |
//! |---|---|
//! | `exact` | exact results of the basic operations, and their rounding: shared with x87 |
//! | `environment` | rounding control and the exceptions of one instruction: shared with x87 |
//! | `lane` | single and double precision: taking apart, putting together, NaNs |
//! | `arithmetic`, `convert` | kernels of one lane |
//! | `packed` | the vector instructions on top of the kernels |
//! | `scalar` | conversions from and to general registers, compares into RFLAGS |
//! | `fast` | short cut for the common case of the basic operations |
//! | `host` | the same vector instructions executed by an x86-64 host, several times faster |
//!
//! [`float_op`] is asked once, when an instruction is decoded. The portable code is complete and the
//! reference; it serves what the short cut and, on an x86-64 host, the host path leave to it, and the
//! tests compare them. The host path is compiled out with `--cfg vmm_portable`.
//!
//! Everything here is a function of its arguments; operands come from a guest and may be any bits.

#[cfg(test)]
#[cfg(target_arch = "x86_64")]
mod against_host;
mod arithmetic;
mod convert;
pub(crate) mod environment;
pub(crate) mod exact;
mod fast;
#[cfg(all(target_arch = "x86_64", any(test, not(vmm_portable))))]
mod host;
pub(crate) mod lane;
mod packed;
mod scalar;
#[cfg(test)]
pub(in crate::translate) mod tests;

use iced_x86::Mnemonic;

pub(crate) use scalar::{comisd, comiss, cvtsd2si, cvtsi2sd, cvtsi2ss, cvtss2si, ucomisd, ucomiss};

/// An unmasked SSE exception is to be raised (#XM). The flags in MXCSR are set, the destination is to
/// stay as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SimdException;

/// An instruction with an XMM (or MMX) destination: from the destination's old value, the source (a
/// memory operand or MMX register zero-extended) and the immediate byte to the destination's new value.
/// MMX results are in the low 64 bits.
pub(crate) type FloatOp = fn(dst: u128, src: u128, imm: u8, mxcsr: &mut u32) -> Result<u128, SimdException>;

/// The operation of a legacy SSE to SSE4.1 mnemonic that computes in floating point (bitwise operations,
/// moves and shuffles do not); `None` for every other mnemonic.
pub(crate) fn float_op(mnemonic: Mnemonic) -> Option<FloatOp> {
    fast::fast_op(mnemonic).or_else(|| full_op(mnemonic))
}

/// The operation without a short cut for the common case.
fn full_op(mnemonic: Mnemonic) -> Option<FloatOp> {
    #[cfg(all(target_arch = "x86_64", not(vmm_portable)))]
    if let Some(op) = host::host_op(mnemonic) {
        return Some(op);
    }
    packed::portable_op(mnemonic)
}
