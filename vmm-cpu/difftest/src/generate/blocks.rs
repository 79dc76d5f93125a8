//! Which instructions a case has: the one it is for, others that depend on it, and others that it depends on.

use std::sync::LazyLock;

use iced_x86::{Code, CpuidFeature, FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::builder::{Builder, Pointer, RSP};
use super::layout::{Destination, Step};
use super::{Shape, operands};
use crate::case::Mode;
use crate::forms::is_beyond;
use crate::undefined;

/// What may stand beside the instruction that a case is for.
struct Companions {
    /// On general registers alone.
    integer: Vec<Code>,
    /// Of these, such as depend on flags.
    consumers: Vec<Code>,
    x87: Vec<Code>,
    vector: Vec<Code>,
}

impl Companions {
    fn new(mode: Mode) -> Self {
        let mut companions =
            Self { integer: Vec::new(), consumers: Vec::new(), x87: Vec::new(), vector: Vec::new() };
        for code in Code::values().filter(|code| is_companion(*code, mode)) {
            match family(code) {
                Family::X87 => companions.x87.push(code),
                Family::Vector => companions.vector.push(code),
                Family::Integer => {
                    let mut instruction = Instruction::new();
                    instruction.set_code(code);
                    if instruction.rflags_read() != 0 && !instruction.is_string_instruction() {
                        companions.consumers.push(code);
                    }
                    companions.integer.push(code);
                }
            }
        }
        companions
    }

    fn of(mode: Mode) -> &'static Self {
        static LONG: LazyLock<Companions> = LazyLock::new(|| Companions::new(Mode::Long));
        static COMPATIBILITY: LazyLock<Companions> = LazyLock::new(|| Companions::new(Mode::Compatibility));
        match mode {
            Mode::Long => &LONG,
            Mode::Compatibility => &COMPATIBILITY,
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Family {
    Integer,
    X87,
    Vector,
}

fn family(code: Code) -> Family {
    use CpuidFeature as F;
    let has = |wanted: fn(&F) -> bool| code.cpuid_features().iter().any(wanted);
    if has(|feature| matches!(feature, F::FPU | F::FPU287 | F::FPU387 | F::MMX)) {
        Family::X87
    } else if has(|feature| {
        matches!(
            feature,
            F::SSE | F::SSE2 | F::SSE3 | F::SSSE3 | F::SSE4_1 | F::SSE4_2 | F::AES | F::PCLMULQDQ | F::SHA
        )
    }) {
        Family::Vector
    } else {
        Family::Integer
    }
}

/// Whether it runs on to the next instruction in ring 3, and all that it does follows from what the case says.
fn is_companion(code: Code, mode: Mode) -> bool {
    let op_code = code.op_code();
    let is_there = match mode {
        Mode::Long => op_code.mode64(),
        Mode::Compatibility => op_code.mode32(),
    };
    let mut instruction = Instruction::new();
    instruction.set_code(code);
    let is_special = matches!(
        code.mnemonic(),
        Mnemonic::Cpuid
            | Mnemonic::Rdtsc
            | Mnemonic::Rdtscp
            | Mnemonic::Rdpid
            | Mnemonic::Lar
            | Mnemonic::Lsl
            | Mnemonic::Verr
            | Mnemonic::Verw
            | Mnemonic::Wrfsbase
            | Mnemonic::Wrgsbase
            // Where it faults midway, some registers are loaded.
            | Mnemonic::Popa
            | Mnemonic::Popad
            | Mnemonic::Popf
            | Mnemonic::Popfd
            | Mnemonic::Popfq
            | Mnemonic::Leave
            | Mnemonic::Enter
            | Mnemonic::Bound
            | Mnemonic::Into
            | Mnemonic::Arpl
            | Mnemonic::Fxsave
            | Mnemonic::Fxsave64
            | Mnemonic::Fxrstor
            | Mnemonic::Fxrstor64
            | Mnemonic::Smsw
            | Mnemonic::Sgdt
            | Mnemonic::Sidt
            | Mnemonic::Sldt
            | Mnemonic::Str
            | Mnemonic::Lds
            | Mnemonic::Les
            | Mnemonic::Lss
            | Mnemonic::Lfs
            | Mnemonic::Lgs
            | Mnemonic::Sti
            | Mnemonic::Cli
            | Mnemonic::Clac
            | Mnemonic::Stac
            | Mnemonic::Rdpmc
            | Mnemonic::Monitor
            | Mnemonic::Mwait
    );
    let has_segment = op_code.op_kinds().iter().any(|kind| {
        use iced_x86::OpCodeOperandKind as Kind;
        matches!(kind, Kind::seg_reg | Kind::es | Kind::cs | Kind::ss | Kind::ds | Kind::fs | Kind::gs)
    });
    op_code.is_instruction()
        && is_there
        && !is_beyond(code)
        && op_code.cpl3()
        && !op_code.is_privileged()
        && !op_code.is_input_output()
        && code.flow_control() == FlowControl::Next
        && !is_special
        && !has_segment
        // Old processors had others, which decode only when asked for.
        && op_code.decoder_option() == 0
}

/// Whether two processors rarely give the same: time, what they are, approximations, and what images have besides
/// values.
fn differs_by_nature(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Cpuid
            | M::Rdtsc
            | M::Rdtscp
            | M::Rcpps
            | M::Rcpss
            | M::Rsqrtps
            | M::Rsqrtss
            | M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Fxsave
            | M::Fxsave64
            | M::Fnsave
            | M::Fnstenv
    )
}

fn companion(builder: &mut Builder<'_>, target: Code) -> Code {
    let companions = Companions::of(builder.mode);
    let family = family(target);
    let from = match builder.random.u8(..16) {
        0..=5 => match family {
            Family::Integer => &companions.integer,
            Family::X87 => &companions.x87,
            Family::Vector => &companions.vector,
        },
        6 => &companions.vector,
        7 => &companions.x87,
        _ => &companions.integer,
    };
    builder.pick(from, Code::Nopd)
}

/// The instructions of a case.
pub(super) fn steps(builder: &mut Builder<'_>, target: Code, shape: Shape) -> Option<Vec<Step>> {
    let instruction = operands::instruction(builder, target)?;
    let mut step = Step::new(builder, instruction);
    if builder.one_in(32) {
        step.distort(builder);
        return Some(vec![step]);
    }
    step.decorate(builder);
    let others = match builder.random.u8(..16) {
        _ if shape == Shape::Sequence => builder.random.usize(1..12),
        0..=6 => 0,
        7..=12 => builder.random.usize(1..4),
        _ => builder.random.usize(4..12),
    };
    if others > 0 && is_near_branch(&step) && builder.one_in(4) {
        return Some(backward(builder, step, others));
    }
    let before = if builder.one_in(3) { 0 } else { builder.random.usize(..=others) };

    let needs_stack = instruction.is_stack_instruction()
        || instruction.memory_base().full_register() == Register::RSP
        || builder.written(&instruction) >> RSP & 1 != 0;
    let mut needed = builder.needed();
    if !needs_stack {
        needed &= !(1 << RSP);
    }
    let mut steps = Vec::new();
    let mut changed = 0;
    for _ in 0..before {
        let Some((step, written)) = other(builder, target, shape, changed) else { continue };
        // What the target needs stays as it is, mostly.
        if written & needed == 0 || builder.one_in(24) {
            changed |= written;
            steps.push(step);
        }
    }
    changed |= builder.written(&step.instruction);
    let place = steps.len();
    steps.push(step);
    for n in before..others {
        let consumer = n == before && builder.one_in(3);
        let code = match consumer {
            true => builder.pick(&Companions::of(builder.mode).consumers, Code::Nopd),
            false => target,
        };
        let made =
            if consumer { made(builder, code, changed) } else { other(builder, target, shape, changed) };
        if let Some((step, written)) = made {
            changed |= written;
            steps.push(step);
        }
    }
    Some(defined(steps, place))
}

fn other(builder: &mut Builder<'_>, target: Code, shape: Shape, changed: u16) -> Option<(Step, u16)> {
    if shape == Shape::Sequence && builder.one_in(6) {
        return Some((forward(builder), 0));
    }
    let code = companion(builder, target);
    made(builder, code, changed)
}

/// A branch over some of what follows, if there is so much.
fn forward(builder: &mut Builder<'_>) -> Step {
    let number = builder.random.u8(..16);
    let code = match builder.mode {
        Mode::Long => FORWARD_64.get(usize::from(number)),
        Mode::Compatibility => FORWARD_32.get(usize::from(number)),
    };
    let code = code.copied().unwrap_or(Code::Nopd);
    branch(builder, code, Destination::Later)
}

const FORWARD_64: [Code; 16] = [
    Code::Jo_rel8_64,
    Code::Jno_rel8_64,
    Code::Jb_rel8_64,
    Code::Jae_rel8_64,
    Code::Je_rel8_64,
    Code::Jne_rel8_64,
    Code::Jbe_rel8_64,
    Code::Ja_rel32_64,
    Code::Js_rel8_64,
    Code::Jns_rel32_64,
    Code::Jp_rel8_64,
    Code::Jge_rel8_64,
    Code::Jle_rel8_64,
    Code::Jrcxz_rel8_64,
    Code::Jmp_rel8_64,
    Code::Jmp_rel32_64,
];
const FORWARD_32: [Code; 16] = [
    Code::Jo_rel8_32,
    Code::Jno_rel8_32,
    Code::Jb_rel8_32,
    Code::Jae_rel8_32,
    Code::Je_rel8_32,
    Code::Jne_rel8_32,
    Code::Jbe_rel8_32,
    Code::Ja_rel32_32,
    Code::Js_rel8_32,
    Code::Jns_rel32_32,
    Code::Jp_rel8_32,
    Code::Jge_rel8_32,
    Code::Jle_rel8_32,
    Code::Jecxz_rel8_32,
    Code::Jmp_rel8_32,
    Code::Jmp_rel32_32,
];

/// A near branch of form `code`.
fn branch(builder: &mut Builder<'_>, code: Code, to: Destination) -> Step {
    let kind = match builder.mode {
        Mode::Long => OpKind::NearBranch64,
        Mode::Compatibility => OpKind::NearBranch32,
    };
    let mut instruction = Instruction::new();
    instruction.set_code(code);
    instruction.set_op0_kind(kind);
    builder.pointers.clear();
    builder.pointers.push((Pointer::Operand, to));
    Step::new(builder, instruction)
}

/// An instruction of form `code` behind others that have written `changed`, and the registers that it writes.
fn made(builder: &mut Builder<'_>, code: Code, changed: u16) -> Option<(Step, u16)> {
    builder.set_changed(changed);
    let instruction = operands::instruction(builder, code);
    let mut step = Step::new(builder, instruction?);
    step.decorate(builder);
    let written = builder.written(&step.instruction);
    Some((step, written))
}

fn is_near_branch(step: &Step) -> bool {
    matches!(step.instruction.op0_kind(), OpKind::NearBranch32 | OpKind::NearBranch64)
        && step
            .pointers
            .iter()
            .all(|(pointer, to)| matches!((pointer, to), (Pointer::Operand, Destination::Later)))
}

/// The branch comes last and leads back to others, behind which the case ends.
fn backward(builder: &mut Builder<'_>, mut last_branch: Step, others: usize) -> Vec<Step> {
    let jump = |builder: &mut Builder<'_>, to: usize| {
        let code = match builder.mode {
            Mode::Long => Code::Jmp_rel32_64,
            Mode::Compatibility => Code::Jmp_rel32_32,
        };
        branch(builder, code, Destination::Instruction(to))
    };
    let mut body = Vec::new();
    let mut changed = builder.written(&last_branch.instruction);
    for _ in 0..others.min(5) {
        if let Some((step, written)) = other(builder, Code::Nopd, Shape::Plain, changed) {
            changed |= written;
            body.push(step);
        }
    }
    let body = defined(body, usize::MAX);
    let last = body.len() + 2;
    let mut steps = vec![jump(builder, last)];
    steps.extend(body);
    steps.push(jump(builder, last + 1));
    last_branch.pointers = vec![(Pointer::Operand, Destination::Instruction(1))];
    steps.push(last_branch);
    steps
}

/// `steps` without those that depend on flags which others leave undefined. That at `target` stays, and those before
/// it go instead.
fn defined(steps: Vec<Step>, target: usize) -> Vec<Step> {
    let branches =
        steps.iter().any(|step| step.instruction.is_jcc_short_or_near() || !step.pointers.is_empty());
    let mut kept: Vec<Step> = Vec::new();
    let mut undefined = 0;
    for (place, step) in steps.into_iter().enumerate() {
        let reads = undefined::read(&step.instruction);
        if undefined & reads != 0 {
            if place != target {
                continue;
            }
            kept.clear();
            undefined = 0;
        }
        if !branches {
            undefined &= !undefined::always_written(&step.instruction);
        }
        undefined |= undefined::possible(&step.instruction);
        // Nor does any come after such as even its result may be anything.
        let is_last =
            undefined::may_leave_result(&step.instruction) || differs_by_nature(step.instruction.mnemonic());
        if is_last && place != target {
            continue;
        }
        kept.push(step);
        if is_last {
            break;
        }
    }
    kept
}
