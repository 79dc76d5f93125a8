//! Rounding control and the exceptions of one instruction.

use super::SimdException;

// The exceptions have the same bits in MXCSR, the x87 status word and (as masks) the x87 control word.
/// Invalid operation.
pub(crate) const INVALID: u32 = 1;
/// Denormal operand.
pub(crate) const DENORMAL: u32 = 1 << 1;
/// Division of a finite number by zero.
pub(crate) const DIVIDE_BY_ZERO: u32 = 1 << 2;
/// Result too large.
pub(crate) const OVERFLOW: u32 = 1 << 3;
/// Result too small.
pub(crate) const UNDERFLOW: u32 = 1 << 4;
/// Inexact result.
pub(crate) const PRECISION: u32 = 1 << 5;
/// All six exceptions.
pub(crate) const ALL_EXCEPTIONS: u32 = 0x3f;

/// MXCSR: denormal operands are taken as zeros.
const MXCSR_DAZ: u32 = 1 << 6;
/// MXCSR: bit of the first exception mask.
const MXCSR_MASK_SHIFT: u32 = 7;
/// MXCSR: first bit of the rounding control.
const MXCSR_ROUNDING_SHIFT: u32 = 13;
/// MXCSR: tiny results become zero while underflow is masked.
const MXCSR_FTZ: u32 = 1 << 15;

/// Rounding control (Intel SDM 1 4.8.4.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rounding {
    /// To nearest, ties to even.
    Nearest,
    /// Toward negative infinity.
    Down,
    /// Toward positive infinity.
    Up,
    /// Toward zero.
    Zero,
}

impl Rounding {
    /// From the two bits of a rounding control field; higher bits are ignored.
    pub(crate) fn from_control(bits: u32) -> Self {
        match bits & 3 {
            0 => Self::Nearest,
            1 => Self::Down,
            2 => Self::Up,
            _ => Self::Zero,
        }
    }
}

/// The floating-point environment of one instruction.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Environment {
    pub(crate) rounding: Rounding,
    /// Tiny results become zero while underflow is masked.
    pub(crate) flush_to_zero: bool,
    /// Denormal operands are taken as zeros.
    pub(crate) denormals_are_zeros: bool,
    /// The exceptions that are not masked.
    unmasked: u32,
    /// Exceptions seen in the operands: invalid, denormal, divide by zero.
    pub(crate) pre: u32,
    /// Exceptions seen in results: overflow, underflow, precision.
    pub(crate) post: u32,
    /// The last rounding increased the magnitude.
    pub(crate) up: bool,
}

impl Environment {
    /// What MXCSR asks for; no exceptions yet.
    pub(crate) fn from_mxcsr(mxcsr: u32) -> Self {
        Self {
            rounding: Rounding::from_control(mxcsr >> MXCSR_ROUNDING_SHIFT),
            flush_to_zero: mxcsr & MXCSR_FTZ != 0,
            denormals_are_zeros: mxcsr & MXCSR_DAZ != 0,
            unmasked: !(mxcsr >> MXCSR_MASK_SHIFT) & ALL_EXCEPTIONS,
            pre: 0,
            post: 0,
            up: false,
        }
    }

    /// What an x87 control word asks for; no exceptions yet.
    pub(crate) fn from_x87_control(control: u16) -> Self {
        Self {
            rounding: Rounding::from_control(u32::from(control >> 10)),
            flush_to_zero: false,
            denormals_are_zeros: false,
            unmasked: !u32::from(control) & ALL_EXCEPTIONS,
            pre: 0,
            post: 0,
            up: false,
        }
    }

    /// Whether any of `exceptions` is not masked.
    pub(crate) fn is_unmasked(&self, exceptions: u32) -> bool {
        self.unmasked & exceptions != 0
    }

    /// Whether an exception seen in the operands keeps the instruction from computing.
    pub(crate) fn stops_before(&self) -> bool {
        self.is_unmasked(self.pre)
    }

    /// Sets the flags of an SSE instruction in MXCSR. All lanes' exceptions in operands come first; where
    /// one of them is unmasked, no lane computes, and those in results are not seen (Intel SDM 1 11.5.3).
    pub(crate) fn finish_sse(&self, mxcsr: &mut u32) -> Result<(), SimdException> {
        *mxcsr |= self.pre;
        if self.stops_before() {
            return Err(SimdException);
        }
        *mxcsr |= self.post;
        if self.is_unmasked(self.post) {
            return Err(SimdException);
        }
        Ok(())
    }
}
