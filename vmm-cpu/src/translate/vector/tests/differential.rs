//! Every instruction against the host's processor, on special and random operands and with every immediate.

use iced_x86::{Code, Mnemonic};

use super::super::*;
use super::coverage::{BITS, Operation, STRINGS, encodings, operation};
use super::processor::{State, Subject, lacks};
use super::values::{Sequence, special};

/// CF, PF, AF, ZF, SF, OF.
const STATUS: u64 = 0x8d5;

/// The encodings that `wanted` picks, each with its operation and its forms: the subject, and whether it has an
/// operand in memory. Says what the host cannot execute.
fn subjects(
    wanted: impl Fn(Code, &Operation) -> bool,
) -> impl Iterator<Item = (Code, Operation, Subject, bool)> {
    let wanted = move |code: &Code| operation(*code).is_some_and(|operation| wanted(*code, &operation));
    encodings().filter(wanted).flat_map(|code| {
        let missing = lacks(code);
        if let Some(feature) = missing {
            println!("not executed: {code:?}, the host lacks {feature:?}");
        }
        let forms: &[bool] = if missing.is_some() { &[] } else { &[false, true] };
        forms.iter().filter_map(move |in_memory| {
            // From memory these two are plain loads.
            if *in_memory && matches!(code.mnemonic(), Mnemonic::Movss | Mnemonic::Movsd) {
                return None;
            }
            Some((code, operation(code)?, Subject::compile(code, *in_memory)?, *in_memory))
        })
    })
}

/// Pairs of registers: few for an instruction that is executed with 256 immediates, else many.
fn pairs(many: bool) -> Vec<(u128, u128)> {
    let special = special();
    let mut sequence = Sequence(1);
    let mut pairs = Vec::new();
    for (place, a) in special.iter().enumerate() {
        if many {
            pairs.extend(special.iter().map(|b| (*a, *b)));
        } else if place % 4 == 0 {
            pairs.push((*a, !*a));
        }
        pairs.push((*a, sequence.register()));
        if many {
            pairs.push((sequence.register(), *a));
        }
    }
    for _ in 0..if many { 200 } else { 12 } {
        pairs.push((sequence.register(), sequence.register()));
        pairs.push((sequence.text(), sequence.text()));
    }
    pairs
}

fn immediates(code: Code) -> std::ops::RangeInclusive<u8> {
    let with = code.op_code().op_kinds().contains(&iced_x86::OpCodeOperandKind::imm8);
    if with { 0..=u8::MAX } else { 0..=0 }
}

/// Whether the second operand is the immediate: the shifts by a constant.
fn immediate_is_source(code: Code) -> bool {
    code.op_code().op_kinds().get(1) == Some(&iced_x86::OpCodeOperandKind::imm8)
}

#[test]
fn xmm_and_mm_operations() {
    let is_wanted = |_, operation: &Operation| {
        matches!(operation, Operation::Xmm(_) | Operation::Mmx(_) | Operation::Masked(_))
    };
    let mut executed = 0;
    for (code, operation, subject, in_memory) in subjects(is_wanted) {
        let immediates = immediates(code);
        let mut sequence = Sequence(2);
        for (dst, src) in pairs(immediates.end() == &0) {
            for imm in immediates.clone() {
                let xmm0 = sequence.text();
                let mut state = State { xmm0, rflags: sequence.word() & STATUS, ..State::default() };
                state.xmm = [dst, if in_memory { !src } else { src }];
                state.mm = [dst as u64, if in_memory { !src as u64 } else { src as u64 }];
                state.memory = src;
                let mut expected = state;

                let (src, imm_operand) = if immediate_is_source(code) { (imm.into(), 0) } else { (src, imm) };
                let imm_operand =
                    if in_memory { memory_immediate(code.mnemonic(), imm_operand) } else { imm_operand };
                // Memory beyond what the instruction reads is zero to an operation.
                let bytes = code.op_code().memory_size().size();
                let src = if in_memory && bytes < 16 { src & ((1 << (8 * bytes)) - 1) } else { src };
                match operation {
                    Operation::Xmm(op) => {
                        expected.xmm[0] = op(dst, src, imm_operand);
                        let portable = portable_xmm_op(code.mnemonic()).unwrap();
                        assert_eq!(portable(dst, src, imm_operand), expected.xmm[0], "portable {code:?}");
                    }
                    Operation::Masked(op) => expected.xmm[0] = op(dst, src, xmm0),
                    Operation::Mmx(op) => expected.mm[0] = op(dst as u64, src as u64, imm_operand),
                    _ => unreachable!("not wanted"),
                }
                subject.run(imm, &mut state);
                expected.rflags = state.rflags;
                assert_eq!(state, expected, "{code:?}, {dst:#x}, {src:#x}, {imm:#x}");
            }
        }
        executed += 1;
    }
    println!("{executed} forms executed");
}

#[test]
fn between_vector_and_general_registers() {
    let is_wanted = |_, operation: &Operation| {
        matches!(
            operation,
            Operation::Extract(_) | Operation::Insert(_) | Operation::MmxExtract(_) | Operation::MmxInsert(_)
        )
    };
    for (code, operation, subject, in_memory) in subjects(is_wanted) {
        let bytes = code.op_code().memory_size().size();
        for (a, b) in pairs(false) {
            for imm in immediates(code) {
                let mut state =
                    State { memory: b, xmm: [a, b], mm: [a as u64, b as u64], ..State::default() };
                state.general = [!a as u64, b as u64, 0];
                let mut expected = state;
                let mut write = |value: u64| {
                    if in_memory {
                        let mask = (1u128 << (8 * bytes)) - 1;
                        expected.memory = b & !mask | u128::from(value) & mask;
                    } else {
                        expected.general[0] = value;
                    }
                };
                match operation {
                    Operation::Extract(op) => write(op(b, imm)),
                    Operation::MmxExtract(op) => write(op(b as u64, imm)),
                    Operation::Insert(op) => expected.xmm[0] = op(a, b as u64, imm),
                    Operation::MmxInsert(op) => expected.mm[0] = op(a as u64, b as u64, imm),
                    _ => unreachable!("not wanted"),
                }
                subject.run(imm, &mut state);
                expected.rflags = state.rflags;
                assert_eq!(state, expected, "{code:?}, {a:#x}, {b:#x}, {imm:#x}");
            }
        }
    }
}

/// The forms of the instructions with a function of their own that have one of these mnemonics.
fn named(mnemonics: &'static [Mnemonic]) -> impl Iterator<Item = (Code, Subject, bool)> {
    subjects(|code, operation| matches!(operation, Operation::Named) && mnemonics.contains(&code.mnemonic()))
        .map(|(code, _, subject, in_memory)| (code, subject, in_memory))
}

#[test]
fn ptest_flags() {
    for (code, subject, _) in named(&[Mnemonic::Ptest]) {
        for (a, b) in pairs(true) {
            let mut state = State { xmm: [a, b], memory: b, rflags: STATUS, ..State::default() };
            subject.run(0, &mut state);
            let (zero, carry) = ptest(a, b);
            assert_eq!(
                state.rflags & STATUS,
                u64::from(zero) << 6 | u64::from(carry),
                "{code:?} {a:#x} {b:#x}"
            );
        }
    }
}

#[test]
fn crc32_of_each_size() {
    for (code, subject, _) in named(&[Mnemonic::Crc32]) {
        let bytes = code.op_code().memory_size().size() as u8;
        for (a, b) in pairs(true) {
            let mut state = State { general: [a as u64, b as u64, 0], memory: b, ..State::default() };
            subject.run(0, &mut state);
            let data = b as u64 & (u64::MAX >> (64 - 8 * bytes));
            assert_eq!(state.general[0], u64::from(crc32(a as u32, data, bytes)), "{code:?} {a:#x} {b:#x}");
        }
    }
}

#[test]
fn string_comparisons() {
    const LENGTHS: [i64; 14] =
        [0, 1, 3, 7, 8, 9, 15, 16, -2, -9, i32::MIN as i64, i64::MIN, i64::MAX, 1 << 32 | 5];
    let mut sequence = Sequence(3);
    for (code, subject, _) in named(STRINGS) {
        let mnemonic = code.mnemonic();
        for _ in 0..40 {
            let mut length = || LENGTHS[sequence.word() as usize % LENGTHS.len()];
            let (rax, rdx) = (length(), length());
            let (a, b) = (sequence.text(), sequence.text());
            // Without zeros the implicit length is the register's.
            let fill = |string| string | u128::from_le_bytes([1; 16]);
            let (a, b) = match sequence.word() % 8 {
                0 => (fill(a), b),
                1 => (a, fill(b)),
                2 => (fill(a), fill(b)),
                _ => (a, b),
            };
            for imm in 0..=u8::MAX {
                let mut state = State { xmm: [a, b], memory: b, rflags: STATUS, ..State::default() };
                state.general[0] = rax as u64;
                state.rdx = rdx as u64;
                let mut expected = state;
                let compare = match mnemonic {
                    Mnemonic::Pcmpistri | Mnemonic::Pcmpistrm => compare_implicit(a, b, imm),
                    Mnemonic::Pcmpestri64 | Mnemonic::Pcmpestrm64 => compare_explicit(a, rax, b, rdx, imm),
                    _ => compare_explicit(a, (rax as i32).into(), b, (rdx as i32).into(), imm),
                };
                match mnemonic {
                    Mnemonic::Pcmpistrm | Mnemonic::Pcmpestrm | Mnemonic::Pcmpestrm64 => {
                        expected.xmm0 = compare.mask();
                    }
                    _ => expected.general[1] = compare.index().into(),
                }
                subject.run(imm, &mut state);
                expected.rflags = state.rflags & !STATUS | compare.status();
                assert_eq!(state, expected, "{code:?} {imm:#x}");
            }
        }
    }
}

#[test]
fn bit_manipulation() {
    const CF_ZF_SF_OF: u64 = 0x8c1;
    const CF_ZF_OF: u64 = 0x841;
    for (code, subject, in_memory) in named(BITS) {
        let width = if code.op_code().memory_size().size() == 8 { Width::Qword } else { Width::Dword };
        let operands = code.op_code().op_kinds();
        // The place of the operand that may be in memory: the second or the third. The other one is `y`.
        let source = operands.iter().position(|operand| format!("{operand:?}").ends_with("_or_mem")).unwrap();
        let immediates = immediates(code);
        for (a, b) in pairs(immediates.end() == &0) {
            for imm in immediates.clone() {
                let (x, y) = (a as u64, b as u64);
                let mut state = State { memory: a, rflags: y & STATUS, rdx: y, ..State::default() };
                state.general = [0x55; 3];
                if code.mnemonic() != Mnemonic::Mulx && operands.len() == 3 {
                    state.general[3 - source] = y;
                }
                if !in_memory {
                    state.general[source] = x;
                }
                let mut expected = state;
                let plain = |value| (value, None);
                let flagged = |result: Flagged, defined| (result.value, Some((defined, result.status)));
                let (value, status) = match code.mnemonic() {
                    Mnemonic::Andn => flagged(andn(y, x, width), CF_ZF_SF_OF),
                    Mnemonic::Bextr => flagged(bextr(x, y, width), CF_ZF_OF),
                    Mnemonic::Blsi => flagged(blsi(x, width), CF_ZF_SF_OF),
                    Mnemonic::Blsmsk => flagged(blsmsk(x, width), CF_ZF_SF_OF),
                    Mnemonic::Blsr => flagged(blsr(x, width), CF_ZF_SF_OF),
                    Mnemonic::Bzhi => flagged(bzhi(x, y, width), CF_ZF_SF_OF),
                    Mnemonic::Mulx => {
                        let (high, low) = mulx(x, y, width);
                        expected.general[1] = low;
                        plain(high)
                    }
                    Mnemonic::Pdep => plain(pdep(y, x, width)),
                    Mnemonic::Pext => plain(pext(y, x, width)),
                    Mnemonic::Rorx => plain(rorx(x, imm, width)),
                    Mnemonic::Sarx => plain(sarx(x, y, width)),
                    Mnemonic::Shlx => plain(shlx(x, y, width)),
                    Mnemonic::Shrx => plain(shrx(x, y, width)),
                    _ => unreachable!("not wanted"),
                };
                expected.general[0] = value;
                subject.run(imm, &mut state);
                expected.rflags = match status {
                    Some((defined, status)) => state.rflags & !defined | status & defined,
                    None => state.rflags & !STATUS | y & STATUS,
                };
                assert_eq!(state, expected, "{code:?} {x:#x} {y:#x} {imm:#x}");
            }
        }
    }
}
