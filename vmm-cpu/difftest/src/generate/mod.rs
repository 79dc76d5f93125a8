//! Cases from a random generator: for any form of instruction, with others around it.

mod blocks;
mod builder;
mod implicit;
mod layout;
mod memory;
mod operands;
mod state;
mod string;
#[cfg(test)]
mod tests;
mod values;

use iced_x86::{Code, Instruction};

use crate::case::{Case, DATA, HIGH, Mode, READ_ONLY, Registers, STACK};
use crate::judge::has_rule;
use builder::Builder;
use values::Element;

/// The generator: the same seed gives the same case.
pub(crate) type Random = fastrand::Rng;

/// What stands around the instruction that a case is for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Nothing, or others that it depends on and that depend on it.
    #[default]
    Plain,
    /// Others in any case, up to 12 in all, with branches forwards among them.
    Sequence,
}

/// A case with an instruction of form `target`, which depends on `random` alone. None where there is no such instruction
/// in code of ring 3.
pub(crate) fn generate(random: &mut Random, target: Code, shape: Shape) -> Option<Case> {
    (0..20).find_map(|_| attempt(random, target, shape))
}

fn attempt(random: &mut Random, target: Code, shape: Shape) -> Option<Case> {
    let op_code = target.op_code();
    let mode = match (op_code.mode64(), op_code.mode32()) {
        // From 32-bit code it has Linux return to where the kernel's own system calls are.
        (true, _) if target == Code::Syscall => Mode::Long,
        (true, true) if shape == Shape::Plain && random.u8(..6) == 0 => Mode::Compatibility,
        (true, _) => Mode::Long,
        (false, true) => Mode::Compatibility,
        (false, false) => return None,
    };
    let mut builder = Builder::new(random, mode);
    builder.backward = builder.one_in(if is_string(target) { 3 } else { 10 });
    // The processor's side has something else in their place.
    builder.reads_code = !has_rule(target);
    let mut steps = blocks::steps(&mut builder, target, shape)?;
    let layout = layout::place(&mut builder, &mut steps)?;

    let mut general = builder.general();
    for (register, value) in layout.registers {
        if let Some(register) = general.get_mut(register) {
            *register = value;
        }
    }
    let element = Element::of(op_code.memory_size());
    let down = if builder.backward { state::DF } else { 0 };
    let [fs_base, gs_base] = builder.bases;
    let registers = Registers {
        general,
        rflags: state::rflags(builder.random) | down,
        fs_base,
        gs_base,
        fxsave: state::fxsave(builder.random, element),
    };
    Some(Case {
        mode,
        instructions: layout.instructions,
        code: layout.code,
        address: layout.address,
        registers,
        memory: visible(builder.memory),
    })
}

fn is_string(code: Code) -> bool {
    let mut instruction = Instruction::new();
    instruction.set_code(code);
    instruction.is_string_instruction()
}

/// The parts of `memory` that lie in areas with data.
fn visible(memory: Vec<(u64, Vec<u8>)>) -> Vec<(u64, Vec<u8>)> {
    let mut visible = Vec::with_capacity(memory.len());
    for (address, bytes) in memory {
        for area in [DATA, READ_ONLY, STACK, HIGH] {
            let Ok(length) = u64::try_from(bytes.len()) else { continue };
            let first = address.max(area.start);
            let end = address.saturating_add(length).min(area.start + area.size);
            let inside = |at: u64| usize::try_from(at - address).ok();
            let range = if first < end { inside(first).zip(inside(end)) } else { None };
            if let Some(part) = range.and_then(|(from, to)| bytes.get(from..to)) {
                visible.push((first, part.to_vec()));
            }
        }
    }
    visible
}
