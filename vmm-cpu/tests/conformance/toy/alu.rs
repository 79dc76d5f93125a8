//! Arithmetic with flags (Intel SDM 1 3.4.3.1).

use vmm_cpu::state::rflags;

const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;

/// The flags that arithmetic sets.
const STATUS: u64 = rflags::CF | PF | AF | rflags::ZF | SF | OF;

/// A result of `bits` width and the RFLAGS after it.
pub(super) struct Outcome {
    pub(super) value: u64,
    pub(super) flags: u64,
}

/// The low `bytes` bytes of `value`.
pub(super) fn truncate(value: u64, bytes: usize) -> u64 {
    if bytes >= 8 { value } else { value & ((1 << (bytes * 8)) - 1) }
}

/// `value` of `bytes` bytes, sign-extended.
pub(super) fn sign_extend(value: u64, bytes: usize) -> u64 {
    let unused = 64 - bytes.clamp(1, 8) * 8;
    ((value << unused).cast_signed() >> unused).cast_unsigned()
}

fn sign(value: u64, bytes: usize) -> bool {
    value >> (bytes * 8 - 1) & 1 != 0
}

fn outcome(value: u64, bytes: usize, old: u64, carry: bool, adjust: bool, overflow: bool) -> Outcome {
    let even_parity = (value & 0xff).count_ones().is_multiple_of(2);
    let bits = [
        (carry, rflags::CF),
        (even_parity, PF),
        (adjust, AF),
        (value == 0, rflags::ZF),
        (sign(value, bytes), SF),
        (overflow, OF),
    ];
    let set = bits.into_iter().filter(|(set, _)| *set).fold(0, |all, (_, bit)| all | bit);
    Outcome { value, flags: old & !STATUS | set }
}

pub(super) fn add(a: u64, b: u64, bytes: usize, old: u64) -> Outcome {
    let value = truncate(a.wrapping_add(b), bytes);
    let overflow = sign((a ^ value) & (b ^ value), bytes);
    outcome(value, bytes, old, value < a, (a ^ b ^ value) & 0x10 != 0, overflow)
}

pub(super) fn sub(a: u64, b: u64, bytes: usize, old: u64) -> Outcome {
    let value = truncate(a.wrapping_sub(b), bytes);
    let overflow = sign((a ^ b) & (a ^ value), bytes);
    outcome(value, bytes, old, a < b, (a ^ b ^ value) & 0x10 != 0, overflow)
}

pub(super) fn logic(value: u64, bytes: usize, old: u64) -> Outcome {
    outcome(value, bytes, old, false, false, false)
}

/// Signed multiplication; SF, ZF, AF and PF are undefined and left alone.
pub(super) fn imul(a: u64, b: u64, bytes: usize, old: u64) -> Outcome {
    let full =
        i128::from(sign_extend(a, bytes).cast_signed()) * i128::from(sign_extend(b, bytes).cast_signed());
    let value = truncate(a.wrapping_mul(b), bytes);
    let lost = i128::from(sign_extend(value, bytes).cast_signed()) != full;
    Outcome { value, flags: old & !(rflags::CF | OF) | if lost { rflags::CF | OF } else { 0 } }
}

/// INC and DEC leave CF alone.
pub(super) fn keep_carry(new: Outcome, old: u64) -> Outcome {
    Outcome { flags: new.flags & !rflags::CF | old & rflags::CF, ..new }
}

/// Whether condition `code` (0 to 15, as encoded in Jcc) holds (Intel SDM 1 appendix B).
pub(super) fn condition(code: u8, flags: u64) -> bool {
    let is = |bit: u64| flags & bit != 0;
    let holds = match code >> 1 {
        0 => is(OF),
        1 => is(rflags::CF),
        2 => is(rflags::ZF),
        3 => is(rflags::CF) || is(rflags::ZF),
        4 => is(SF),
        5 => is(PF),
        6 => is(SF) != is(OF),
        _ => is(rflags::ZF) || is(SF) != is(OF),
    };
    holds != (code & 1 != 0)
}
