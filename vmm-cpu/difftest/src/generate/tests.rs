use iced_x86::{Decoder, DecoderOptions, Instruction, OpKind, Register};

use super::builder::general;
use super::*;
use crate::case::{AREAS, CODE};
use crate::forms::forms;

fn cases(code: Code, count: u64) -> impl Iterator<Item = Case> {
    (0..count).map(move |n| {
        let mut random = Random::with_seed(n.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        generate(&mut random, code, Shape::Plain).unwrap_or_else(|| panic!("{code:?} {n}"))
    })
}

fn decoded(case: &Case) -> Vec<Instruction> {
    let bits = if case.mode == Mode::Long { 64 } else { 32 };
    Decoder::with_ip(bits, &case.code, case.address, DecoderOptions::AMD).into_iter().collect()
}

/// Address of the memory operand when the case begins.
fn address(case: &Case, instruction: &Instruction) -> Option<u64> {
    let value = |register: Register, _, _| match register {
        Register::FS => Some(case.registers.fs_base),
        Register::GS => Some(case.registers.gs_base),
        register if register.is_segment_register() => Some(0),
        register => {
            let value = case.registers.general[general(register)?];
            Some(if register.size() == 4 { value & 0xffff_ffff } else { value })
        }
    };
    let operand = (0..instruction.op_count()).find(|place| instruction.op_kind(*place) == OpKind::Memory)?;
    instruction.virtual_address(operand, 0, value)
}

#[test]
fn every_form_has_cases() {
    for code in forms() {
        let mut found = 0;
        for case in cases(*code, 40) {
            let is_labelled = case.instructions.iter().any(|(form, _)| form == code);
            found += usize::from(
                is_labelled && decoded(&case).iter().any(|instruction| instruction.code() == *code),
            );
            assert!(
                CODE.start <= case.address && case.address < CODE.start + CODE.size,
                "{:#x}",
                case.address
            );
            for (address, bytes) in &case.memory {
                let end = address + u64::try_from(bytes.len()).unwrap();
                assert!(AREAS.iter().any(|area| area.start <= *address && end <= area.start + area.size));
            }
        }
        assert!(found >= 24, "{code:?} is in {found} of 40 cases");
    }
}

#[test]
fn a_seed_is_a_case() {
    for code in forms().iter().step_by(7) {
        for (one, other) in cases(*code, 5).zip(cases(*code, 5)) {
            assert!(one.code == other.code && one.registers == other.registers && one.memory == other.memory);
            assert_eq!((one.address, one.mode), (other.address, other.mode));
        }
    }
}

#[test]
fn operands_in_memory_are_mostly_there() {
    let (mut there, mut all) = (0_u32, 0_u32);
    for code in forms() {
        for case in cases(*code, 40) {
            let instructions = decoded(&case);
            let [instruction] = instructions.as_slice() else { continue };
            let Some(address) = address(&case, instruction) else { continue };
            all += 1;
            there +=
                u32::from(AREAS.iter().any(|area| (area.start..area.start + area.size).contains(&address)));
        }
    }
    assert!(all > 1000, "{all} in memory");
    assert!(there * 100 > all * 85 && there * 100 < all * 98, "{there} of {all} are there");
}

#[test]
fn sequences_are_sequences() {
    let (mut instructions, mut branches, mut count) = (0, 0, 0);
    for code in forms().iter().step_by(3) {
        for n in 0..4 {
            let mut random = Random::with_seed(n);
            let Some(case) = generate(&mut random, *code, Shape::Sequence) else { continue };
            assert!(case.instructions.len() <= 12, "{code:?}");
            instructions += case.instructions.len();
            let all = decoded(&case);
            branches += all.iter().filter(|instruction| instruction.near_branch_target() != 0).count();
            count += 1;
        }
    }
    assert!(instructions > 3 * count, "{instructions} instructions in {count} sequences");
    assert!(branches * 3 > count, "{branches} branches in {count} sequences");
}
