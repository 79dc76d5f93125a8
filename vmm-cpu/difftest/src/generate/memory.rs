//! Operands in memory: an address is chosen first, then a form of addressing, then what its registers must be.

use iced_x86::{Instruction, Register};

use super::builder::{Builder, RSP, general};
use crate::case::{CODE, Mode};

/// Makes the memory operand of `instruction` lie at `address`, as often as that can be.
pub(super) fn address(builder: &mut Builder<'_>, instruction: &mut Instruction, address: u64) {
    let base = segment(builder, instruction);
    let offset = address.wrapping_sub(base);
    match builder.mode {
        Mode::Long => long(builder, instruction, offset),
        Mode::Compatibility => compatible(builder, instruction, offset),
    }
}

/// Decides on a segment prefix and returns the base of what it stands for.
fn segment(builder: &mut Builder<'_>, instruction: &mut Instruction) -> u64 {
    let [fs, gs] = builder.bases;
    let is_long = builder.mode == Mode::Long;
    let (prefix, base) = match builder.random.u8(..64) {
        0..=2 if is_long => (Register::FS, fs),
        3..=5 if is_long => (Register::GS, gs),
        // No segment is loaded there.
        0 => (Register::FS, 0),
        6 => (Register::ES, 0),
        7 => (Register::DS, 0),
        8 => (Register::SS, 0),
        9 if is_long => (Register::CS, 0),
        _ => return 0,
    };
    instruction.set_segment_prefix(prefix);
    base
}

fn long(builder: &mut Builder<'_>, instruction: &mut Instruction, offset: u64) {
    let near = |from: u64| i32::try_from(offset.wrapping_sub(from).cast_signed()).is_ok();
    match builder.random.u8(..100) {
        0..=9 if near(CODE.start) && near(CODE.start + CODE.size) => {
            instruction.set_memory_base(Register::RIP);
            instruction.set_memory_displ_size(8);
            instruction.set_memory_displacement64(offset);
        }
        10 if offset >> 32 == 0 => {
            instruction.set_memory_base(Register::EIP);
            instruction.set_memory_displ_size(4);
            instruction.set_memory_displacement64(offset);
        }
        11..=15 if near(0) => absolute(instruction, offset, 8),
        16..=21 if offset >> 32 == 0 => registers(builder, instruction, offset, false),
        _ => registers(builder, instruction, offset, true),
    }
}

fn compatible(builder: &mut Builder<'_>, instruction: &mut Instruction, offset: u64) {
    match builder.random.u8(..100) {
        0..=9 => absolute(instruction, offset & 0xffff_ffff, 4),
        10 => {
            // Nothing is there, but the address is what it is.
            let (base, index) = builder.pick(
                &[
                    (Register::BX, Register::SI),
                    (Register::BX, Register::DI),
                    (Register::BP, Register::SI),
                    (Register::BP, Register::DI),
                    (Register::SI, Register::None),
                    (Register::DI, Register::None),
                    (Register::BP, Register::None),
                    (Register::BX, Register::None),
                ],
                (Register::BX, Register::None),
            );
            instruction.set_memory_base(base);
            instruction.set_memory_index(index);
            instruction.set_memory_displ_size(2);
            instruction.set_memory_displacement64(offset & 0xffff);
        }
        _ => registers(builder, instruction, offset, false),
    }
}

fn absolute(instruction: &mut Instruction, offset: u64, size: u32) {
    instruction.set_memory_displ_size(size);
    instruction.set_memory_displacement64(offset);
}

/// Base and index in registers of 64 bits or of 32.
fn registers(builder: &mut Builder<'_>, instruction: &mut Instruction, offset: u64, wide: bool) {
    for _ in 0..6 {
        if try_registers(builder, instruction, offset, wide) {
            return;
        }
    }
    // Somewhere, then.
    let base = any_register(builder, wide);
    instruction.set_memory_base(base);
    instruction.set_memory_index(Register::None);
    instruction.set_memory_displ_size(1);
    instruction.set_memory_displacement64(0);
}

fn any_register(builder: &mut Builder<'_>, wide: bool) -> Register {
    let count = if builder.mode == Mode::Long { 16 } else { 8 };
    let first = if wide { Register::RAX } else { Register::EAX };
    first + builder.random.u32(..count)
}

fn try_registers(builder: &mut Builder<'_>, instruction: &mut Instruction, offset: u64, wide: bool) -> bool {
    let mask = if wide { u64::MAX } else { 0xffff_ffff };
    let scale = 1 << builder.random.u32(..4);
    let factor = u64::from(scale);
    let mut base = any_register(builder, wide);
    let mut index = any_register(builder, wide);
    match builder.random.u8(..16) {
        0..=6 => index = Register::None,
        7 => base = Register::None,
        _ => {}
    }
    if general(index) == Some(RSP) {
        index = Register::None;
    }
    let (base_number, index_number) = (general(base), general(index));
    let is_usable = |number: Option<usize>| number.is_none_or(|number| !builder.is_changed(number));
    if !is_usable(base_number) || !is_usable(index_number) {
        return false;
    }

    let mut displacement: i32 = match builder.random.u8(..8) {
        0 | 1 => 0,
        2..=4 => i32::from(builder.random.i8(..)),
        5 | 6 => builder.random.i32(-0x1000..0x1000),
        _ => builder.random.i32(..),
    };
    // What base and index must come to.
    let rest = |displacement: i32| offset.wrapping_sub(i64::from(displacement).cast_unsigned());
    let fit = |value: u64| {
        let shift = if wide { 0 } else { 32 };
        i32::try_from((value << shift).cast_signed() >> shift).ok()
    };
    let scaled = |value: u64| value.wrapping_mul(factor);
    // A value of 32 bits has anything above them.
    let spread = |builder: &mut Builder<'_>, value: u64| match wide {
        true => value,
        false => {
            value & mask | builder.random.u64(..) & u64::from(builder.random.bool()).wrapping_neg() & !mask
        }
    };
    let known = |number: Option<usize>| number.map(|number| builder.fixed(number));
    match (known(base_number), known(index_number)) {
        (None | Some(Some(_)), None | Some(Some(_))) => {
            let base = known(base_number).flatten().unwrap_or(0);
            let index = known(index_number).flatten().unwrap_or(0);
            match fit(offset.wrapping_sub(base).wrapping_sub(scaled(index))) {
                Some(fitting) => displacement = fitting,
                None => return false,
            }
        }
        (Some(None), Some(None)) if base_number == index_number => {
            // base * (scale + 1) = rest
            let by = factor + 1;
            displacement = displacement.wrapping_add(i32::try_from(rest(displacement) % by).unwrap_or(0));
            let value = spread(builder, rest(displacement) / by);
            builder.fix(base_number.unwrap_or(0), value);
        }
        (Some(None), index) => {
            let index = match (index, index_number) {
                (Some(None), Some(number)) => {
                    let value = match builder.random.u8(..4) {
                        0 => builder.random.u64(..),
                        _ => builder.random.u64(..64),
                    };
                    builder.fix(number, value);
                    value
                }
                (value, _) => value.flatten().unwrap_or(0),
            };
            let value = spread(builder, rest(displacement).wrapping_sub(scaled(index)));
            builder.fix(base_number.unwrap_or(0), value);
        }
        (base, Some(None)) => {
            let base = base.flatten().unwrap_or(0);
            let wanted = |displacement| rest(displacement).wrapping_sub(base) & mask;
            displacement =
                displacement.wrapping_add(i32::try_from(wanted(displacement) % factor).unwrap_or(0));
            let value = spread(builder, wanted(displacement) / factor);
            builder.fix(index_number.unwrap_or(0), value);
        }
    }
    instruction.set_memory_base(base);
    instruction.set_memory_index(index);
    instruction.set_memory_index_scale(if index == Register::None { 1 } else { scale });
    let full = if wide { 8 } else { 4 };
    let size = match displacement {
        // Also where less would do.
        _ if base == Register::None || builder.one_in(16) => full,
        0 if !builder.one_in(16) => 0,
        -128..=127 => 1,
        _ => full,
    };
    instruction.set_memory_displ_size(size);
    let displacement = i64::from(displacement).cast_unsigned();
    instruction.set_memory_displacement64(if wide { displacement } else { displacement & mask });
    true
}
