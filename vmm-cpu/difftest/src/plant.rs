//! Errors that are put into what the interpreter made of a case, to see that they are found.

use iced_x86::{Code, InstructionInfoFactory, OpAccess, Register};

use crate::case::{Case, Ending, Outcome};
use crate::{judge, undefined};

/// An output of an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Output {
    General(usize),
    Vector(usize),
    X87,
    Flag(u64),
    Memory,
    Rip,
    Exception,
}

fn is_write(access: OpAccess) -> bool {
    matches!(access, OpAccess::Write | OpAccess::ReadWrite)
}

/// The outputs of the last instruction of a case, which completed. RIP, which all have, comes last.
fn outputs(case: &Case, outcome: &Outcome) -> Vec<Output> {
    let Some((_, instruction)) = judge::decode(case).last() else { return Vec::new() };
    let mut list = Vec::new();
    let mut info = InstructionInfoFactory::new();
    let info = info.info(&instruction);
    let is_free = undefined::is_result_undefined(&instruction, &case.registers)
        || undefined::may_leave_result(&instruction)
        || matches!(instruction.code(), Code::Rdtsc | Code::Rdtscp | Code::Cpuid);
    for used in info.used_registers().iter().filter(|used| is_write(used.access()) && !is_free) {
        let register = used.register();
        if register.is_gpr() {
            list.push(Output::General(register.full_register().number()));
        } else if register.is_xmm() && register.number() < 16 {
            list.push(Output::Vector(register.number()));
        } else if register.is_st() || register.is_mm() || register == Register::ST0 {
            list.push(Output::X87);
        }
    }
    if !outcome.stores.is_empty() && !is_free {
        list.push(Output::Memory);
    }
    let defined = undefined::always_written(&instruction);
    if defined != 0 {
        list.push(Output::Flag(defined & defined.wrapping_neg()));
    }
    list.push(Output::Rip);
    list
}

fn flip<const N: usize>(bytes: &mut [u8; N], at: usize) {
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= 1;
    }
}

/// Corrupts one bit of an output of the last instruction, if that is of form `code` and was reached. Which output it is
/// depends on the form alone as far as its instructions have the same.
pub(crate) fn corrupt(case: &Case, outcome: &mut Outcome, code: Code) {
    let Some((last, offset)) = case.instructions.last() else { return };
    if *last != code {
        return;
    }
    let output = match outcome.ending {
        Ending::Completed => {
            let outputs = outputs(case, outcome);
            outputs.get(code as usize % outputs.len().max(1)).copied()
        }
        Ending::Exception { .. } if outcome.rip == case.address + u64::from(*offset) => {
            Some(Output::Exception)
        }
        Ending::SystemCall => Some(Output::Rip),
        _ => None,
    };
    match output {
        Some(Output::General(number)) => {
            if let Some(register) = outcome.registers.general.get_mut(number) {
                *register ^= 1;
            }
        }
        Some(Output::Vector(number)) => flip(&mut outcome.registers.fxsave, 160 + 16 * number + 7),
        Some(Output::X87) => flip(&mut outcome.registers.fxsave, 32),
        Some(Output::Flag(flag)) => outcome.registers.rflags ^= flag,
        Some(Output::Memory) => {
            if let Some(byte) = outcome.stores.first_mut().and_then(|(_, data)| data.first_mut()) {
                *byte ^= 1;
            }
        }
        Some(Output::Rip) => outcome.rip ^= 1,
        Some(Output::Exception) => {
            if let Ending::Exception { vector, .. } = &mut outcome.ending {
                *vector ^= 1;
            }
        }
        None => {}
    }
}
