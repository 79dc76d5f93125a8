//! Whether what came of a case is the same on both sides, and which of it need not be.

use std::collections::BTreeMap;
use std::fmt;

use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpAccess,
    Register,
};

use crate::case::{CODE, Case, Ending, Mode, Outcome, Registers};
use crate::memory::FILLER;
use crate::{forms, undefined};

/// Bit 0 of a page fault's error code: the page is there.
const PROTECTION: u32 = 1;
/// Longest instruction in bytes.
const MAX_LENGTH: u64 = 15;
/// Where addresses begin that Linux keeps from programs.
const NOT_USER: u64 = 0x7fff_ffff_f000;
/// FSW.ES: an unmasked exception is pending.
const PENDING: u8 = 1 << 7;
/// Where FXSAVE has the x87 opcode and pointers. Some processors keep them current, some set them for unmasked exceptions
/// alone (CPUID.(7,0):EBX bit 6), and those of AMD's save them for those alone (APM 2, 11.4.4.3).
const POINTERS: std::ops::Range<usize> = 6..24;
/// Of them, the bits above those of 48-bit addresses: FXRSTOR makes canonical addresses of what it loads, as wide as the
/// processor's own addresses are.
const POINTERS_TOP: [std::ops::Range<usize>; 2] = [14..16, 22..24];
/// Where FXSAVE has XMM0.
const XMM: usize = 160;
/// Where FXSAVE has MXCSR_MASK, which says what a processor is and not what it did.
const MXCSR_MASK: std::ops::Range<usize> = 28..32;

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
        "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8", "R9", "R10", "R11", "R12", "R13",
        "R14", "R15",
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

/// What the bytes of a case are, one instruction after the other. With unusual prefixes that may be others than were meant.
fn sweep(case: &Case) -> impl Iterator<Item = Instruction> {
    let mut next = case.address;
    std::iter::from_fn(move || {
        let instruction = instruction_at(case, next).filter(|_| case.owns(next))?;
        next += instruction.len().max(1) as u64;
        Some(instruction)
    })
}

/// Whether an instruction of the case begins at an address.
fn is_listed(case: &Case, address: u64) -> bool {
    case.instructions.iter().any(|(_, offset)| case.address + u64::from(*offset) == address)
}

/// Whether a form is judged by a rule, whatever the processor makes of it: see [`code_with_rules`].
pub(crate) fn has_rule(code: Code) -> bool {
    forms::is_beyond(code) || is_emulated(code)
}

/// Whether the kernel of the host answers in place of the processor, which faults (UMIP): Linux,
/// arch/x86/kernel/umip.c.
fn is_emulated(code: Code) -> bool {
    matches!(
        code,
        Code::Sgdt_m1632_16
            | Code::Sidt_m1632_16
            | Code::Sgdt_m1632
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

/// The code that the processor gets in place of a case's own, if that holds a form with a rule: the exception that it must
/// end in is raised there by UD2, or by HLT where it is #GP. Everything else is compared as ever.
pub(crate) fn code_with_rules(case: &Case) -> Option<Vec<u8>> {
    let mut code: Option<Vec<u8>> = None;
    for ((form, instruction), (_, offset)) in decode(case).zip(&case.instructions) {
        // One that is too long, or is not all there, does not get so far; one that has LOCK, say, is undefined anyway.
        let is_other = instruction.is_invalid()
            && (is_emulated(form)
                || is_too_long(case, instruction.ip())
                || case.owns(CODE.start + CODE.size - 1));
        if !has_rule(form) || is_other {
            continue;
        }
        let raised: &[u8] = if forms::is_beyond(form) { &[0x0f, 0x0b] } else { &[0xf4] };
        let code = code.get_or_insert_with(|| case.code.clone());
        if let Some(place) =
            code.get_mut(usize::from(*offset)..).and_then(|rest| rest.get_mut(..raised.len()))
        {
            place.copy_from_slice(raised);
        }
    }
    code
}

/// What differs between the processor's outcome and the interpreter's, without what may.
pub(crate) fn differences(case: &Case, native: &Outcome, ours: &Outcome) -> Vec<Difference> {
    if native == ours {
        return Vec::new();
    }
    let mut list = Vec::new();
    if !same_ending(&native.ending, &ours.ending)
        && !is_wide_fault(case, native, ours)
        && !is_other_string(case, native, ours)
        && !is_doubly_wrong(case, native, ours)
        && !is_doubly_misplaced(case, native, ours)
    {
        list.push(Difference::Ending);
    }
    let breakpoint = instruction_at(case, native.rip).filter(|instruction| instruction.code() == Code::Int1);
    // A hypervisor that intercepts INT1 may not have told the processor how long it is.
    let told_late = breakpoint.is_some_and(|instruction| instruction.next_ip() == ours.rip);
    if native.rip != ours.rip && !told_late {
        list.push(Difference::Rip);
    }
    let (left, right) = (&native.registers, &ours.registers);
    let free = free(case, native);
    let pending = left.fxsave.get(2).is_some_and(|status| status & PENDING != 0);
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
        // IRET to ring 3 makes all null selectors 0, and the kernel may use one at any time.
        let is_null = *left < 4 && *right < 4;
        if left != right && !is_null {
            list.push(Difference::Selector(number));
        }
    }
    let approximate = |at: usize| {
        let register = (at >> 4).wrapping_sub(XMM >> 4);
        let range = at & !15..(at & !15) + 16;
        register < 16
            && free.approximate >> register & 1 != 0
            && are_near(
                left.fxsave.get(range.clone()).unwrap_or_default(),
                right.fxsave.get(range).unwrap_or_default(),
            )
    };
    let mut last = None;
    for (at, (left, right)) in left.fxsave.iter().zip(&right.fxsave).enumerate() {
        if left != right
            && !MXCSR_MASK.contains(&at)
            && (pending && POINTERS_TOP.iter().all(|top| !top.contains(&at)) || !POINTERS.contains(&at))
            && !approximate(at)
        {
            let field = Difference::Extended(at);
            let name = field.to_string();
            if last.as_ref() != Some(&name) {
                list.push(field);
                last = Some(name);
            }
        }
    }
    if native.stores != ours.stores && !free.memory && !same_stores(native, ours, &free.bytes) {
        list.push(Difference::Stores);
    }
    list
}

/// Whether stores are the same but for some bytes.
fn same_stores(native: &Outcome, ours: &Outcome, free: &[(u64, u64)]) -> bool {
    if free.is_empty() {
        return false;
    }
    let bytes = |outcome: &Outcome| -> BTreeMap<u64, u8> {
        let bytes = outcome.stores.iter().flat_map(|(at, data)| (*at..).zip(data.iter().copied()));
        let is_free = |at: u64| free.iter().any(|(first, end)| (*first..*end).contains(&at));
        bytes.filter(|(at, _)| !is_free(*at)).collect()
    };
    let (left, right) = (bytes(native), bytes(ours));
    // A word that only one side changed, by free bytes alone, is listed with what it held before.
    let both = |(at, byte): (&u64, &u8), other: &BTreeMap<u64, u8>| other.get(at).is_none_or(|it| it == byte);
    let is_listed = |outcome: &Outcome, at: u64| {
        let inside = |(first, data): &(u64, Vec<u8>)| at.wrapping_sub(*first) < data.len() as u64;
        outcome.stores.iter().any(inside)
    };
    let has_free = |at: u64| free.iter().any(|(first, end)| *first < (at | 7) + 1 && at & !7 < *end);
    left.iter().all(|entry| both(entry, &right) && (is_listed(ours, *entry.0) || has_free(*entry.0)))
        && right.iter().all(|entry| both(entry, &left) && (is_listed(native, *entry.0) || has_free(*entry.0)))
}

fn same_ending(native: &Ending, ours: &Ending) -> bool {
    match (*native, *ours) {
        (
            Ending::Exception { vector: 14, error_code: left, address },
            Ending::Exception { vector: 14, error_code: right, address: other },
        ) => {
            // Linux does not tell what is mapped there.
            let told = if address >= NOT_USER { !PROTECTION } else { !0 };
            address == other && left & told == right & told
        }
        (left, right) => left == right,
    }
}

/// Whether the instruction is both too long and undefined: no manual says which of #GP and #UD it is.
fn is_doubly_wrong(case: &Case, native: &Outcome, ours: &Outcome) -> bool {
    let is_either = |ending| matches!(ending, Ending::Exception { vector: 6 | 13, error_code: 0, .. });
    native.rip == ours.rip
        && is_either(native.ending)
        && is_either(ours.ending)
        && instruction_at(case, native.rip)
            .is_some_and(|instruction| instruction.is_invalid() && is_too_long(case, native.rip))
}

/// Whether the instruction at an address was made with more bytes than there can be.
fn is_too_long(case: &Case, rip: u64) -> bool {
    let Some(start) = rip.checked_sub(case.address) else { return false };
    let offsets = case.instructions.iter().map(|(_, offset)| u64::from(*offset));
    let next = offsets.filter(|offset| *offset > start).min().unwrap_or(case.code.len() as u64);
    next.saturating_sub(start) > MAX_LENGTH
}

/// Whether a vector of 16 bytes or an image lies neither at a multiple of 16 nor at an address that there can be: #GP or #AC
/// of the one, #SS or #GP of the other.
fn is_doubly_misplaced(case: &Case, native: &Outcome, ours: &Outcome) -> bool {
    let is_either = |ending| matches!(ending, Ending::Exception { vector: 12 | 13 | 17, error_code: 0, .. });
    native.rip == ours.rip
        && is_either(native.ending)
        && is_either(ours.ending)
        && instruction_at(case, native.rip).is_some_and(|instruction| instruction.memory_size().size() >= 16)
}

/// Whether both ended in a fault of memory at the same instruction, of those with operands of several parts: which of the
/// parts is accessed first is for the processor to choose, and so which one the exception speaks of.
fn is_wide_fault(case: &Case, native: &Outcome, ours: &Outcome) -> bool {
    const WIDEST: u64 = 512;
    let (
        Ending::Exception { vector: first, address: left, .. },
        Ending::Exception { vector: second, address: right, .. },
    ) = (native.ending, ours.ending)
    else {
        return false;
    };
    let are_of_memory = matches!(first, 12..=14) && matches!(second, 12..=14) && first.max(second) == 14;
    let is_near = first != second || left.wrapping_sub(right).min(right.wrapping_sub(left)) < WIDEST;
    let Some(instruction) = instruction_at(case, native.rip) else { return false };
    native.rip == ours.rip
        && are_of_memory
        && is_near
        && matches!(
            instruction.mnemonic(),
            Mnemonic::Fxsave
                | Mnemonic::Fxsave64
                | Mnemonic::Fxrstor
                | Mnemonic::Fxrstor64
                | Mnemonic::Fnstenv
                | Mnemonic::Fldenv
                | Mnemonic::Fnsave
                | Mnemonic::Frstor
                | Mnemonic::Iret
                | Mnemonic::Iretd
                | Mnemonic::Iretq
                | Mnemonic::Retf
                | Mnemonic::Fbld
                | Mnemonic::Fbstp
                | Mnemonic::Fld
                | Mnemonic::Fstp
                | Mnemonic::Maskmovdqu
        )
}

/// Whether CMPS reaches neither of its strings, and each side says so of another one: which is looked at first is each processor's own.
/// AMD's Zen 4 begins with the one at RDI, Zen 5 with that at RSI, as the interpreter does.
fn is_other_string(case: &Case, native: &Outcome, ours: &Outcome) -> bool {
    let is_compare = |instruction: &Instruction| {
        let code = instruction.code();
        matches!(code, Code::Cmpsb_m8_m8 | Code::Cmpsw_m16_m16 | Code::Cmpsd_m32_m32 | Code::Cmpsq_m64_m64)
    };
    let Some(instruction) = instruction_at(case, native.rip).filter(is_compare) else { return false };
    let strings = [0, 1].map(|operand| {
        linear(case, &native.registers, &instruction, operand, |_| true).map(|start| {
            // An element that crosses into another page may be missing there.
            start..start.saturating_add(instruction.memory_size().size() as u64)
        })
    });
    let is_of = |ending, string: &Option<std::ops::Range<u64>>| match ending {
        Ending::Exception { vector: 14, address, .. } => {
            string.as_ref().is_some_and(|string| string.contains(&address))
        }
        // At an address that there cannot be.
        Ending::Exception { vector: 12 | 13, error_code: 0, .. } => string.as_ref().is_some_and(|string| {
            let is_user = |address: u64| address < NOT_USER;
            case.mode == Mode::Long && !(is_user(string.start) && is_user(string.end - 1))
        }),
        _ => false,
    };
    let [at_rsi, at_rdi] = &strings;
    native.rip == ours.rip
        && (is_of(native.ending, at_rdi) && is_of(ours.ending, at_rsi)
            || is_of(native.ending, at_rsi) && is_of(ours.ending, at_rdi))
}

/// RCPPS and kin: an approximation with a relative error of up to 1.5 * 2^-12 (SDM 2, APM 4), which both may have.
fn is_approximate(mnemonic: Mnemonic) -> bool {
    matches!(mnemonic, Mnemonic::Rcpps | Mnemonic::Rcpss | Mnemonic::Rsqrtps | Mnemonic::Rsqrtss)
}

/// Whether the lanes of two vectors are near enough to each other.
fn are_near(left: &[u8], right: &[u8]) -> bool {
    const BOUND: f64 = 3.0 / 4096.0;
    let lanes = |bytes: &[u8]| -> Vec<u32> {
        bytes.as_chunks::<4>().0.iter().map(|lane| u32::from_le_bytes(*lane)).collect()
    };
    lanes(left).into_iter().zip(lanes(right)).all(|(left, right)| {
        let (a, b) = (f64::from(f32::from_bits(left)), f64::from(f32::from_bits(right)));
        left == right || (a - b).abs() <= BOUND * b.abs()
    })
}

/// What of a case's outcome the manuals, or the nature of its instructions, leave open.
#[derive(Default)]
struct Free {
    flags: u64,
    general: u16,
    /// All of it.
    memory: bool,
    /// From one address to below another.
    bytes: Vec<(u64, u64)>,
    /// XMM registers whose values are approximations.
    approximate: u16,
}

impl Free {
    /// What an instruction that stores an image of the FPU leaves open there, `written` being the registers that others before it
    /// may have changed.
    fn note_image(&mut self, case: &Case, instruction: &Instruction, written: &RegisterSet) {
        let image = pointers_in_image(instruction);
        if image.is_empty() {
            return;
        }
        match address(case, instruction, written) {
            Some(start) => self.bytes.extend(image.iter().map(|(from, to)| (start + from, start + to))),
            None => self.memory = true,
        }
    }
}

const RAX: u16 = 1;
const RCX: u16 = 1 << 1;
const RDX: u16 = 1 << 2;
const RBX: u16 = 1 << 3;

fn free(case: &Case, native: &Outcome) -> Free {
    let mut free =
        Free { general: partly_loaded(case, native), memory: partly_stored(case, native), ..Free::default() };
    let mut info = InstructionInfoFactory::new();
    let (mut count_is_known, mut branches) = (true, false);
    let mut written = RegisterSet::default();
    for instruction in sweep(case) {
        if case.owns(native.rip) && instruction.ip() >= native.rip && !branches {
            // Not reached; or it faulted, and has changed nothing but, perhaps, a part of a string.
            break;
        }
        branches |= instruction.flow_control() != FlowControl::Next;
        free.flags = if branches {
            free.flags | undefined::possible(&instruction)
        } else if count_is_known {
            undefined::flags(&instruction, &case.registers).carry(free.flags)
        } else {
            free.flags & !undefined::always_written(&instruction) | undefined::possible(&instruction)
        };
        if undefined::is_result_undefined(&instruction, &case.registers)
            || !count_is_known && undefined::may_leave_result(&instruction)
        {
            match instruction.op0_register() {
                Register::None => free.memory = true,
                register => free.general |= 1 << register.full_register().number(),
            }
        }
        free.general |= free_results(&instruction);
        free.approximate |= approximated(&instruction);
        free.note_image(case, &instruction, &written);
        written.note(&mut info, &instruction);
        count_is_known = !written.has(Register::RCX);
    }
    if branches {
        // The instructions that were meant may be others than those that follow one another.
        for (_, instruction) in decode(case) {
            free.flags |= undefined::possible(&instruction);
            free.general |= free_results(&instruction);
            free.approximate |= approximated(&instruction);
            free.note_image(case, &instruction, &written);
            written.note(&mut info, &instruction);
        }
    }
    free
}

/// XMM registers with results that are approximations.
fn approximated(instruction: &Instruction) -> u16 {
    if is_approximate(instruction.mnemonic()) { 1 << instruction.op0_register().number() } else { 0 }
}

/// General registers with results that are each processor's own.
fn free_results(instruction: &Instruction) -> u16 {
    match instruction.code() {
        Code::Rdtsc => RAX | RDX,
        Code::Rdtscp => RAX | RCX | RDX,
        Code::Cpuid => RAX | RBX | RCX | RDX,
        _ => 0,
    }
}

/// The instruction at an address.
fn instruction_at(case: &Case, rip: u64) -> Option<Instruction> {
    let bits = if case.mode == Mode::Long { 64 } else { 32 };
    let code = case.code.get(usize::try_from(rip.checked_sub(case.address)?).ok()?..)?;
    // It may go on in what surrounds the code.
    let bytes: Vec<u8> = code.iter().copied().chain([FILLER; 15]).take(15).collect();
    Some(Decoder::with_ip(bits, &bytes, rip, DecoderOptions::AMD).decode())
}

/// Registers that a POPA may have loaded which then faulted: all but ESP, from which it starts anew.
fn partly_loaded(case: &Case, native: &Outcome) -> u16 {
    let popped = matches!(native.ending, Ending::Exception { .. })
        && instruction_at(case, native.rip)
            .is_some_and(|instruction| matches!(instruction.mnemonic(), Mnemonic::Popa | Mnemonic::Popad));
    if popped { 0xef } else { 0 }
}

/// Whether a PUSHA faulted, which may have stored some registers before.
fn partly_stored(case: &Case, native: &Outcome) -> bool {
    matches!(native.ending, Ending::Exception { .. })
        && instruction_at(case, native.rip)
            .is_some_and(|instruction| matches!(instruction.mnemonic(), Mnemonic::Pusha | Mnemonic::Pushad))
}

/// Whether the interpreter stopped at an instruction for which the kernel of the host answers, and which is none of the
/// case's: a branch has led into the middle of another, say.
pub(crate) fn is_answered(case: &Case, ours: &Outcome) -> bool {
    matches!(ours.ending, Ending::Exception { vector: 13, error_code: 0, .. })
        && instruction_at(case, ours.rip).is_some_and(|instruction| is_emulated(instruction.code()))
}

/// Whether the interpreter stopped at an instruction that is undefined there, and that is none of the case's.
pub(crate) fn is_beyond_by_accident(case: &Case, ours: &Outcome) -> bool {
    matches!(ours.ending, Ending::Exception { vector: 6, .. })
        && !is_listed(case, ours.rip)
        && instruction_at(case, ours.rip).is_some_and(|instruction| forms::is_beyond(instruction.code()))
}

/// Whether nothing but status flags differs after a branch into the middle of an instruction: what was executed there is not
/// known, and may leave them undefined.
pub(crate) fn went_astray(case: &Case, native: &Outcome, list: &[Difference]) -> bool {
    const STATUS: u64 = 0x8d5;
    let only_flags = matches!(list, [Difference::Flags(flags)] if flags & !STATUS == 0);
    only_flags && case.owns(native.rip) && !is_listed(case, native.rip)
}

/// Whether outcomes that differ would be the same if the processor's code were the interpreter's: `other` is what comes of
/// the processor's there.
pub(crate) fn reads_own_code(case: &Case, native: &Outcome, ours: &Outcome, other: &Outcome) -> bool {
    let is_elsewhere = !is_listed(case, ours.rip) && ours.ending != Ending::Completed;
    (is_elsewhere || (other.ending, other.rip) == (ours.ending, ours.rip))
        && differences(case, native, other).is_empty()
}

/// Whether an instruction behind one that stores an image with fields that are left open may have loaded those.
pub(crate) fn may_load_image(case: &Case) -> bool {
    let mut rest = sweep(case).skip_while(|instruction| pointers_in_image(instruction).is_empty());
    rest.next().is_some() && rest.any(|instruction| instruction.memory_size().size() != 0)
}

/// Whether this is one of the system calls that Linux lets pass every filter (kernel/seccomp.c): uretprobe and uprobe.
pub(crate) fn is_unfiltered(ours: &Outcome) -> bool {
    // The kernel looks at EAX alone.
    let number = ours.registers.general.first().map(|rax| rax & 0xffff_ffff);
    ours.ending == Ending::SystemCall && matches!(number, Some(335 | 336))
}

/// Whether this is SYSCALL of 32-bit code, which Linux takes for a system call of its own vDSO: it changes registers and
/// reads the stack before a filter sees it.
pub(crate) fn is_rewritten(case: &Case, ours: &Outcome) -> bool {
    case.mode == Mode::Compatibility
        && ours.ending == Ending::SystemCall
        && instruction_at(case, ours.rip.wrapping_sub(2))
            .is_some_and(|instruction| instruction.mnemonic() == Mnemonic::Syscall)
}

/// Whether the processor went on where the interpreter, which does not offer MXCSR.MM (CPUID 0x8000_0001 ECX bit 7), must
/// not: at an instruction that loads MXCSR with that bit.
pub(crate) fn loads_misaligned_mode(case: &Case, native: &Outcome, ours: &Outcome) -> bool {
    matches!(ours.ending, Ending::Exception { vector: 13, error_code: 0, .. })
        && native.rip != ours.rip
        && instruction_at(case, ours.rip).is_some_and(|instruction| {
            matches!(instruction.mnemonic(), Mnemonic::Ldmxcsr | Mnemonic::Fxrstor | Mnemonic::Fxrstor64)
        })
}

/// Where the images that an instruction stores have the x87 pointers, and MXCSR_MASK.
fn pointers_in_image(instruction: &Instruction) -> &'static [(u64, u64)] {
    match instruction.mnemonic() {
        Mnemonic::Fxsave | Mnemonic::Fxsave64 => &[(6, 24), (28, 32)],
        Mnemonic::Fnstenv | Mnemonic::Fstenv | Mnemonic::Fnsave | Mnemonic::Fsave => {
            if matches!(instruction.memory_size().size(), 14 | 94) { &[(6, 14)] } else { &[(12, 28)] }
        }
        _ => &[],
    }
}

/// Registers that earlier instructions may have written.
#[derive(Default)]
struct RegisterSet(Vec<Register>);

impl RegisterSet {
    fn has(&self, register: Register) -> bool {
        self.0.contains(&register.full_register())
    }

    fn note(&mut self, info: &mut InstructionInfoFactory, instruction: &Instruction) {
        let used = info.info(instruction).used_registers().iter();
        let writes = |access| {
            matches!(
                access,
                OpAccess::Write | OpAccess::CondWrite | OpAccess::ReadWrite | OpAccess::ReadCondWrite
            )
        };
        self.0.extend(used.filter(|used| writes(used.access())).map(|used| used.register().full_register()));
    }
}

/// The linear address of an instruction's memory operand, if the registers in it are those of the start.
fn address(case: &Case, instruction: &Instruction, written: &RegisterSet) -> Option<u64> {
    linear(case, &case.registers, instruction, 0, |register| !written.has(register))
}

/// The linear address of a memory operand with these registers, if they are known.
fn linear(
    case: &Case,
    registers: &Registers,
    instruction: &Instruction,
    operand: u32,
    is_known: impl Fn(Register) -> bool,
) -> Option<u64> {
    let is_long = case.mode == Mode::Long;
    let address = instruction.virtual_address(operand, 0, |register, _, _| match register {
        Register::FS if is_long => Some(registers.fs_base),
        Register::GS if is_long => Some(registers.gs_base),
        _ if register.is_segment_register() => Some(0),
        _ if !is_known(register) => None,
        _ => {
            let value = registers.general.get(register.full_register().number())?;
            Some(match register.size() {
                2 => value & 0xffff,
                4 => value & 0xffff_ffff,
                _ => *value,
            })
        }
    })?;
    Some(if is_long { address } else { address & 0xffff_ffff })
}
