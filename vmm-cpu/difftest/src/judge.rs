//! Whether what came of a case is the same on both sides, and which of it need not be.

use std::fmt;

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, InstructionInfoFactory, OpAccess, Register};

use crate::case::{Case, Ending, Mode, Outcome};
use crate::{forms, undefined};

/// RFLAGS.RF.
const RF: u64 = 1 << 16;
/// Bit 0 of a page fault's error code: the page is there.
const PROTECTION: u32 = 1;
/// Where the kernel's half of the address space begins.
const KERNEL_HALF: u64 = 1 << 63;
/// Where FXSAVE has MXCSR_MASK, which says what a processor is and not what it did.
const MXCSR_MASK: std::ops::Range<usize> = 28..32;

const UD: u8 = 6;
const GP: u8 = 13;

/// Something that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Difference {
    /// How the case ended.
    Ending,
    /// RIP.
    Rip,
    /// A general register, by number.
    General(usize),
    /// These bits of RFLAGS.
    Flags(u64),
    /// The base of FS or GS.
    Base,
    /// A segment register, by its place in [`Outcome::selectors`].
    Selector(usize),
    /// x87 or SSE state, by the first byte of its FXSAVE image that differs.
    Extended(usize),
    /// Memory.
    Stores,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ending => f.write_str("ending"),
            Self::Rip => f.write_str("RIP"),
            Self::General(number) => f.write_str(general_name(*number)),
            Self::Flags(bits) => write!(f, "RFLAGS bits {bits:#x}"),
            Self::Base => f.write_str("FS or GS base"),
            Self::Selector(number) => f.write_str(selector_name(*number)),
            Self::Extended(at) => match at {
                0..2 => f.write_str("FCW"),
                2..4 => f.write_str("FSW"),
                4..6 => f.write_str("FTW"),
                6..8 => f.write_str("FOP"),
                8..16 => f.write_str("FIP"),
                16..24 => f.write_str("FDP"),
                24..32 => f.write_str("MXCSR"),
                32..160 => write!(f, "ST{}", (at - 32) / 16),
                _ => write!(f, "XMM{}", (at - 160) / 16),
            },
            Self::Stores => f.write_str("stores"),
        }
    }
}

/// Name of a general register.
pub(crate) fn general_name(number: usize) -> &'static str {
    const NAMES: [&str; 16] = [
        "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13", "R14",
        "R15",
    ];
    NAMES.get(number).copied().unwrap_or("?")
}

/// Name of a segment register by its place in [`Outcome::selectors`].
pub(crate) fn selector_name(number: usize) -> &'static str {
    ["ES", "CS", "SS", "DS", "FS", "GS"].get(number).copied().unwrap_or("?")
}

/// The instructions of a case, decoded.
pub(crate) fn decode(case: &Case) -> impl Iterator<Item = (Code, Instruction)> {
    let bits = if case.mode == Mode::Long { 64 } else { 32 };
    case.instructions.iter().map(move |(code, offset)| {
        let bytes = case.code.get(usize::from(*offset)..).unwrap_or_default();
        let rip = case.address + u64::from(*offset);
        (*code, Decoder::with_ip(bits, bytes, rip, DecoderOptions::AMD).decode())
    })
}

/// Whether a form is judged by a rule, without the processor: [`by_rule`].
pub(crate) fn has_rule(code: Code) -> bool {
    forms::is_beyond(code) || is_emulated(code)
}

/// Whether the kernel of the host answers in place of the processor, which faults (UMIP): Linux,
/// arch/x86/kernel/umip.c.
fn is_emulated(code: Code) -> bool {
    matches!(
        code,
        Code::Sgdt_m1632
            | Code::Sgdt_m1664
            | Code::Sidt_m1632
            | Code::Sidt_m1664
            | Code::Sldt_rm16
            | Code::Sldt_r32m16
            | Code::Sldt_r64m16
            | Code::Smsw_rm16
            | Code::Smsw_r32m16
            | Code::Smsw_r64m16
            | Code::Str_rm16
            | Code::Str_r32m16
            | Code::Str_r64m16
    )
}

/// What the interpreter has to make of a case that holds such a form: #UD, or #GP where UMIP forbids the form. Instructions
/// before it are the interpreter's word alone, as is an exception that comes earlier.
pub(crate) fn by_rule(case: &Case, ours: &Outcome) -> Vec<Difference> {
    let Some((code, offset)) = case.instructions.iter().find(|(code, _)| has_rule(*code)) else {
        return vec![Difference::Ending];
    };
    let here = ours.rip == case.address + u64::from(*offset);
    let expected = if forms::is_beyond(*code) { UD } else { GP };
    match ours.ending {
        Ending::Exception { vector, error_code: 0, .. } if here && vector == expected => Vec::new(),
        // What the form itself does not get to.
        Ending::Exception { vector, .. } if !here && vector != UD => Vec::new(),
        // A memory operand that cannot be accessed, or code that cannot be fetched.
        Ending::Exception { vector: GP | 12 | 14, .. } if here => Vec::new(),
        _ => vec![Difference::Ending],
    }
}

/// What differs between the processor's outcome and the interpreter's, without what may.
pub(crate) fn differences(case: &Case, native: &Outcome, ours: &Outcome) -> Vec<Difference> {
    if native == ours {
        return Vec::new();
    }
    let mut list = Vec::new();
    if !same_ending(&native.ending, &ours.ending) {
        list.push(Difference::Ending);
    }
    let breakpoint = case.instructions.iter().any(|(code, _)| *code == Code::Int1);
    // A hypervisor that intercepts INT1 may not have told the processor how long it is.
    if native.rip != ours.rip && !(breakpoint && native.rip.wrapping_add(1) == ours.rip) {
        list.push(Difference::Rip);
    }
    let (left, right) = (&native.registers, &ours.registers);
    let free = free(case);
    for (number, (left, right)) in left.general.iter().zip(&right.general).enumerate() {
        if left != right && free.general >> number & 1 == 0 {
            list.push(Difference::General(number));
        }
    }
    let flags = (left.rflags ^ right.rflags) & !free.flags;
    if flags != 0 {
        list.push(Difference::Flags(flags));
    }
    if (left.fs_base, left.gs_base) != (right.fs_base, right.gs_base) {
        list.push(Difference::Base);
    }
    for (number, (left, right)) in native.selectors.iter().zip(&ours.selectors).enumerate() {
        if left != right {
            list.push(Difference::Selector(number));
        }
    }
    let mut last = None;
    for (at, (left, right)) in left.fxsave.iter().zip(&right.fxsave).enumerate() {
        if left != right && !MXCSR_MASK.contains(&at) {
            let field = Difference::Extended(at);
            let name = field.to_string();
            if last.as_ref() != Some(&name) {
                list.push(field);
                last = Some(name);
            }
        }
    }
    if native.stores != ours.stores && !free.memory {
        list.push(Difference::Stores);
    }
    list
}

fn same_ending(native: &Ending, ours: &Ending) -> bool {
    match (*native, *ours) {
        (
            Ending::Exception { vector: 14, error_code: left, address },
            Ending::Exception { vector: 14, error_code: right, address: other },
        ) => {
            // Linux tells nobody what of its own half is mapped.
            let told = if address >= KERNEL_HALF { !PROTECTION } else { !0 };
            address == other && left & told == right & told
        }
        (left, right) => left == right,
    }
}

/// What of a case's outcome the manuals, or the nature of its instructions, leave open.
#[derive(Default)]
struct Free {
    flags: u64,
    general: u16,
    memory: bool,
}

const RAX: u16 = 1;
const RCX: u16 = 1 << 1;
const RDX: u16 = 1 << 2;
const RBX: u16 = 1 << 3;

fn free(case: &Case) -> Free {
    let mut free = Free::default();
    let mut info = InstructionInfoFactory::new();
    let mut count_is_known = true;
    for (code, instruction) in decode(case) {
        if count_is_known {
            free.flags = undefined::flags(&instruction, &case.registers).carry(free.flags);
        } else {
            let written = undefined::always_written(&instruction);
            free.flags = free.flags & !written | undefined::possible(&instruction);
        }
        if undefined::is_result_undefined(&instruction, &case.registers)
            || !count_is_known && undefined::may_leave_result(&instruction)
        {
            match instruction.op0_register() {
                Register::None => free.memory = true,
                register => free.general |= 1 << register.full_register().number(),
            }
        }
        free.general |= match code {
            Code::Rdtsc => RAX | RDX,
            Code::Rdtscp => RAX | RCX | RDX,
            Code::Cpuid => RAX | RBX | RCX | RDX,
            _ => 0,
        };
        count_is_known &= !writes_rcx(&mut info, &instruction);
    }
    free
}

fn writes_rcx(info: &mut InstructionInfoFactory, instruction: &Instruction) -> bool {
    info.info(instruction).used_registers().iter().any(|used| {
        used.register().full_register() == Register::RCX
            && matches!(
                used.access(),
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            )
    })
}

/// Whether a difference of RF alone; see [`RF`].
pub(crate) fn is_resume_flag_only(list: &[Difference]) -> bool {
    matches!(list, [Difference::Flags(RF)])
}
