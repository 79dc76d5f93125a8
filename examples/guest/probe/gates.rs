//! Every way that leads from a program into the kernel or into another segment.

use std::arch::x86_64::__cpuid;
use std::ffi::c_int;

use crate::catch::{
    Outcome, Registers, SIGILL, SIGSEGV, SIGTRAP, attempt, attempt_redirected, attempt_with_fs,
    normal_selectors,
};
use crate::code::Code;
use crate::memory::{ENTRY_PAGE, entry_pages};
use crate::report::Report;
use crate::system;

const ENOSYS: u64 = 38;
const GETPID: u64 = 39;
const UNAME: u64 = 63;
const GETPID_32: u64 = 20;

/// Entries of the descriptor table that programs may load: Linux's (arch/x86/include/asm/segment.h), to those of its kernel
/// Xen gives privilege level 3 too, and Xen's own (xen/include/public/arch-x86/xen-x86_64.h).
const DATA: [u16; 7] = [1, 2, 3, 4, 5, 6, 15];
const XENS: [u16; 3] = [0xe023 >> 3, 0xe02b >> 3, 0xe033 >> 3];

fn may_load(selector: u16) -> bool {
    let index = selector >> 3;
    selector & 4 == 0 && (DATA.contains(&index) || XENS.contains(&index))
}

fn may_run(selector: u16) -> bool {
    may_load(selector) && ![3, 5, 15, 0xe02b >> 3].contains(&(selector >> 3))
}

/// Selectors to try: all, or those that something may be behind and some more.
fn selectors(density: u64) -> impl Iterator<Item = u16> {
    (0..=u16::MAX).filter(move |selector| {
        let index = selector >> 3;
        density == 1 || index < 24 || (7160..7200).contains(&index) || index % 97 == 0
    })
}

/// Linux's signals for whatever the processor refuses a program.
fn is_refusal(outcome: Outcome) -> bool {
    matches!(outcome.kind(), "SIGSEGV" | "SIGBUS" | "SIGILL" | "SIGFPE" | "SIGTRAP")
}

/// The same at a certain instruction.
fn is_refusal_at(outcome: Outcome, rip: u64) -> bool {
    is_refusal(outcome) && matches!(outcome, Outcome::Signal(caught) if caught.rip == rip)
}

fn landed(outcome: Outcome, landing: u64) -> bool {
    matches!(outcome, Outcome::Signal(caught) if caught.signal == SIGILL && caught.rip == landing)
}

pub(crate) fn interrupts(report: &mut Report, code: &mut Code) {
    report.subject("INT n");
    let own = u64::from(std::process::id());
    for number in 0..=255_u8 {
        let stub = code.add(&[0xcd, number, 0xc3]);
        let outcome = attempt(stub, &Registers { rax: GETPID_32, ..Registers::default() });
        let expected = match (number, outcome) {
            // Linux offers these two, and the old system call, which does not tell what it does not know apart.
            (3, Outcome::Signal(caught)) => caught.signal == SIGTRAP,
            (4, Outcome::Signal(caught)) => caught.signal == SIGSEGV,
            // One kind of KVM without hardware assistance has CPUID behind this.
            (26, Outcome::Returned(value)) => value == u64::from(__cpuid(GETPID_32 as u32).eax),
            (0x80, Outcome::Returned(value)) => {
                value == own || value as u32 == (ENOSYS as u32).wrapping_neg()
            }
            (_, outcome) => is_refusal(outcome),
        };
        report.record(expected, outcome.kind(), format_args!("INT {number}"), outcome);
    }
    let breakpoint = code.add(&[0xcc, 0xc3]);
    let outcome = attempt(breakpoint, &Registers::default());
    report.record(is_refusal(outcome), outcome.kind(), "INT3", outcome);
}

/// INT1, by which a processor of some hypervisors never comes back.
pub(crate) fn int1(report: &mut Report, code: &mut Code) {
    report.subject("INT1");
    let outcome = attempt(code.add(&[0xf1, 0xc3]), &Registers::default());
    report.record(is_refusal(outcome), outcome.kind(), "INT1", outcome);
}

/// What the system calls 0 to 63 of Linux answer if all arguments are -1: the error, or 0 for those of [`special`].
const ERRORS: [u64; 64] = [
    9, 9, 14, 9, 14, 9, 14, 22, 9, 22, 22, 22, 0, 22, 22, 0, 9, 22, 22, 9, 9, 22, 14, 0, 0, 22, 22, 22, 22,
    22, 22, 22, 9, 9, 0, 14, 22, 0, 14, 0, 14, 22, 9, 9, 14, 14, 22, 22, 9, 9, 9, 9, 9, 22, 9, 9, 22, 0, 0,
    14, 0, 22, 22, 14,
];

/// Calls whose answer is another, or that cannot be tried so.
fn special(number: u64) -> Option<&'static str> {
    Some(match number {
        12 => "brk",
        15 => "rt_sigreturn",
        23 => "select",
        24 => "sched_yield",
        34 => "pause",
        37 => "alarm",
        39 => "getpid",
        // Kernels differ in what they look at first.
        54 => "setsockopt",
        57 => "fork",
        58 => "vfork",
        60 => "exit",
        _ => return None,
    })
}

pub(crate) fn system_calls(report: &mut Report) {
    report.subject("SYSCALL");
    // Linux looks at the lower half of the number.
    let numbers = (0..64).chain([1 << 12, 0x4000_0000, 0x4000_0011, 0xffff_ffff, 1 << 32, 1 << 63, u64::MAX]);
    for number in numbers {
        if matches!(special(number), Some("rt_sigreturn" | "pause" | "fork" | "vfork" | "exit")) {
            continue;
        }
        // Status 0: as expected. A child may end in another way by what it calls.
        let status = system::in_child(|| {
            let result = system::call(number, u64::MAX);
            let error = result.wrapping_neg();
            let expected = match special(number) {
                Some("getpid") => result == u64::from(std::process::id()),
                Some("brk") => error > 4095,
                Some("sched_yield" | "alarm") => result == 0,
                Some(_) => (1..=4095).contains(&error),
                None => error == ERRORS.get(number as u32 as usize).copied().unwrap_or(ENOSYS),
            };
            if expected { 0 } else { c_int::try_from(error).unwrap_or(255).clamp(1, 255) }
        });
        let expected = status == 0;
        let kind = if expected { "as Linux answers" } else { "other" };
        report.record(expected, kind, format_args!("number {number:#x}"), format_args!("status {status:#x}"));
    }
}

/// SYSENTER, and SYSCALL under conditions that have broken kernels.
pub(crate) fn odd_entries(report: &mut Report, code: &mut Code) {
    report.subject("odd entries");
    let landing = code.landing();
    let [_, ss] = normal_selectors();
    let after = landing.to_le_bytes();
    let low = [after[0], after[1], after[2], after[3]];
    // JMP landing, as PUSH imm32; RET.
    let leave = [0x68, low[0], low[1], low[2], low[3], 0xc3];
    // PUSHF; OR [RSP], imm32; POPF
    let with_flags = |flags: u32| {
        let mut code = vec![0x9c, 0x81, 0x0c, 0x24];
        code.extend(flags.to_le_bytes());
        code.push(0x9d);
        code
    };
    const TRAP: u32 = 0x100;
    const SYSCALL: [u8; 2] = [0x0f, 0x05];
    const MOV_SS_DX: [u8; 2] = [0x8e, 0xd2];
    let joined = |parts: &[&[u8]]| parts.concat();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("SYSENTER", joined(&[&[0x0f, 0x34], &leave])),
        ("SYSEXIT", joined(&[&[0x0f, 0x35], &leave])),
        ("SYSEXIT, 64-bit", joined(&[&[0x48, 0x0f, 0x35], &leave])),
        ("SYSRET", joined(&[&[0x0f, 0x07], &leave])),
        ("SYSRET, 64-bit", joined(&[&[0x48, 0x0f, 0x07], &leave])),
        ("SYSCALL with TF", joined(&[&with_flags(TRAP), &SYSCALL, &leave])),
        ("SYSCALL with NT", joined(&[&with_flags(0x4000), &SYSCALL, &leave])),
        ("SYSCALL with AC and DF", joined(&[&with_flags(0x4_0400), &SYSCALL, &leave])),
        ("SYSENTER with TF and NT", joined(&[&with_flags(TRAP | 0x4000), &[0x0f, 0x34], &leave])),
        ("SYSCALL after MOV SS", joined(&[&MOV_SS_DX, &SYSCALL, &leave])),
        ("SYSCALL after MOV SS, with TF", joined(&[&with_flags(TRAP), &MOV_SS_DX, &SYSCALL, &leave])),
        ("INT3 after MOV SS", joined(&[&MOV_SS_DX, &[0xcc], &leave])),
        ("INT 3 after MOV SS, with TF", joined(&[&with_flags(TRAP), &MOV_SS_DX, &[0xcd, 3], &leave])),
        ("INT 128 after MOV SS, with TF", joined(&[&with_flags(TRAP), &MOV_SS_DX, &[0xcd, 0x80], &leave])),
        ("TF", joined(&[&with_flags(TRAP), &[0x90], &leave])),
        ("SYSCALL with a stack in the kernel", joined(&[&[0x4c, 0x89, 0xc4], &SYSCALL, &[0x0f, 0x0b]])),
        ("INT 3 with a stack in the kernel", joined(&[&[0x4c, 0x89, 0xc4], &[0xcd, 3]])),
        (
            "SYSCALL with a stack that is not canonical",
            joined(&[&[0x4c, 0x89, 0xcc], &SYSCALL, &[0x0f, 0x0b]]),
        ),
        ("#UD with a stack that is not canonical", joined(&[&[0x4c, 0x89, 0xcc], &[0x0f, 0x0b]])),
    ];
    for (name, bytes) in cases {
        let stub = code.add(&bytes);
        let registers = Registers {
            rax: GETPID,
            rdx: ss.into(),
            r8: 0xffff_8880_0010_0000,
            r9: 1 << 62,
            ..Registers::default()
        };
        let outcome = attempt(stub, &registers);
        report.record(is_refusal(outcome), outcome.kind(), name, outcome);
    }
    // A kernel that is entered with DF set copies backwards, over its own stack.
    let buffer = code.add(&[0; 512]);
    let stub = code.add(&[0xfd, 0x0f, 0x05, 0xfc, 0xc3]);
    let outcome = attempt(stub, &Registers { rax: UNAME, rdi: buffer, ..Registers::default() });
    // SAFETY: the place is so long, and nobody writes to it now.
    let system = unsafe { (buffer as *const [u8; 6]).read() };
    let expected = outcome == Outcome::Returned(0) && system == *b"Linux\0";
    report.record(expected, outcome.kind(), "uname with DF", outcome);
}

/// Far CALL, JMP, RET and IRET, and a signal's return, to every selector.
pub(crate) fn far_transfers(report: &mut Report, code: &mut Code, density: u64) {
    let landing = code.landing();
    let pointer = code.add(&[0; 16]) as *mut u8;
    let [_, ss] = normal_selectors();
    // CALL, JMP [RDI]: 32-bit offsets, with REX.W 64-bit ones where the processor has them.
    // R8 holds the selector, R9 the landing. PUSH R8; PUSH R9; RETF. PUSH SS, RSP, flags, R8, R9; IRETQ.
    let ways: [(&'static str, &[u8], &[u8]); 6] = [
        ("far CALL", &[], &[0xff, 0x1f]),
        ("far CALL, 64-bit", &[], &[0x48, 0xff, 0x1f]),
        ("far JMP", &[], &[0xff, 0x2f]),
        ("far JMP, 64-bit", &[], &[0x48, 0xff, 0x2f]),
        ("far RET", &[0x41, 0x50, 0x41, 0x51], &[0x48, 0xcb]),
        ("IRET", &[0x52, 0x56, 0x53, 0x41, 0x50, 0x41, 0x51], &[0x48, 0xcf]),
    ];
    for (name, before, transfer) in ways {
        report.subject(name);
        let stub = code.add(&[before, transfer].concat());
        let refused_at = stub + before.len() as u64;
        let stack = code.add(&[0; 64]) + 64;
        for selector in selectors(density) {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&landing.to_le_bytes());
            let at = if name.ends_with("64-bit") { 8 } else { 4 };
            bytes[at..at + 2].copy_from_slice(&selector.to_le_bytes());
            // SAFETY: the place is so long and nobody else's.
            unsafe { pointer.copy_from(bytes.as_ptr(), 16) };
            let registers = Registers {
                rdi: pointer as u64,
                r8: selector.into(),
                r9: landing,
                // For IRET: every flag.
                rbx: 0x003f_7ed7 & !0x100,
                rdx: ss.into(),
                rsi: stack,
                ..Registers::default()
            };
            let outcome = attempt(stub, &registers);
            let arrived = landed(outcome, landing);
            // Where KVM carries out IRET itself, it takes segments of data for CS. They lead no further.
            let allowed = may_run(selector) || name == "IRET" && may_load(selector);
            let expected = if arrived { allowed } else { is_refusal_at(outcome, refused_at) };
            let kind = if arrived { "arrived" } else { outcome.kind() };
            report.record(expected, kind, format_args!("selector {selector:#x}"), outcome);
        }
    }
    let trap = code.add(&[0xcc, 0xc3]);
    let [cs, ss] = normal_selectors();
    report.subject("return from a signal");
    for rip in [
        1 << 62,
        0x7fff_ffff_f000,
        0xffff_ffff_8100_0000,
        0xffff_8880_0010_0000,
        u64::MAX,
        ENTRY_PAGE + 0x100,
    ] {
        let outcome = attempt_redirected(trap, &Registers::default(), [cs, ss], rip);
        report.record(is_refusal(outcome), outcome.kind(), format_args!("rip {rip:#x}"), outcome);
    }
    for selector in selectors(density) {
        for (selectors, allowed) in
            [([selector, ss], may_run(selector)), ([cs, selector], may_load(selector))]
        {
            let outcome = attempt_redirected(trap, &Registers::default(), selectors, landing);
            let arrived = landed(outcome, landing);
            // A kernel may put the selectors right that it cannot load.
            let refused = matches!(outcome.kind(), "SIGSEGV" | "SIGBUS");
            let expected = refused || arrived && (allowed || selectors[0] == cs);
            let kind = if arrived { "arrived" } else { outcome.kind() };
            report.record(expected, kind, format_args!("CS, SS {selectors:#x?}"), outcome);
        }
    }
}

/// MOV to segment registers, LAR, LSL, VERR, VERW with every selector.
pub(crate) fn segments(report: &mut Report, code: &mut Code, density: u64) {
    for (name, bytes) in [
        ("MOV to DS", vec![0x8e, 0xd8, 0xc3]),
        ("MOV to ES", vec![0x8e, 0xc0, 0xc3]),
        ("MOV to FS", vec![0x8e, 0xe0, 0xc3]),
        ("MOV to GS", vec![0x8e, 0xe8, 0xc3]),
        ("MOV to SS", vec![0x8e, 0xd0, 0x8e, 0xd2, 0xc3]),
    ] {
        report.subject(name);
        let stub = code.add(&bytes);
        let [_, ss] = normal_selectors();
        for selector in selectors(density) {
            let registers = Registers { rax: selector.into(), rdx: ss.into(), ..Registers::default() };
            let outcome = attempt_with_fs(stub, &registers);
            let expected = match outcome {
                Outcome::Returned(_) => may_load(selector) || selector < 4 && name != "MOV to SS",
                outcome => matches!(outcome.kind(), "SIGSEGV" | "SIGBUS"),
            };
            report.record(expected, outcome.kind(), format_args!("selector {selector:#x}"), outcome);
        }
    }
    for (name, bytes) in [
        ("LAR", vec![0x31, 0xc0, 0x0f, 0x02, 0xd1, 0x0f, 0x94, 0xc0, 0xc3]),
        ("LSL", vec![0x31, 0xc0, 0x0f, 0x03, 0xd1, 0x0f, 0x94, 0xc0, 0xc3]),
        ("VERR", vec![0x31, 0xc0, 0x0f, 0x00, 0xe1, 0x0f, 0x94, 0xc0, 0xc3]),
        ("VERW", vec![0x31, 0xc0, 0x0f, 0x00, 0xe9, 0x0f, 0x94, 0xc0, 0xc3]),
    ] {
        report.subject(name);
        let stub = code.add(&bytes);
        for selector in selectors(density) {
            let outcome = attempt(stub, &Registers { rcx: selector.into(), ..Registers::default() });
            let known = matches!(outcome, Outcome::Returned(1));
            let expected = matches!(outcome, Outcome::Returned(_)) && (!known || may_load(selector));
            let kind = if known { "told" } else { "not told" };
            report.record(expected, kind, format_args!("selector {selector:#x}"), outcome);
        }
    }
}

/// Jumps to every byte of the pages by which the engine enters and leaves. That is a signal, or a system call of the number
/// that is in RAX, which goes on where RCX says. The fast path's page also has code that goes on there at once.
pub(crate) fn entry_page(report: &mut Report, code: &mut Code, density: u64) {
    report.subject("entry pages");
    let landing = code.landing();
    let scratch = code.add(&[0; 64]);
    let own = u64::from(std::process::id());
    // A stub of an exception among them.
    let somewhere = [landing, 0xffff_ffff_8100_0000, 1 << 62, ENTRY_PAGE + 0x100, 0];
    let flags = [0x202, u64::MAX, 0];
    for page in entry_pages() {
        let is_first = page == ENTRY_PAGE;
        // The stubs are in the first half of the first one.
        let step = if density == 1 { 1 } else { 13 };
        let offsets = (0..4096).filter(|offset| is_first && *offset < 0x140 || offset % step == 0);
        let combinations = if density == 1 || is_first { somewhere.len() } else { 2 };
        for offset in offsets {
            for rcx in somewhere.into_iter().take(combinations) {
                for r11 in flags {
                    for rax in [GETPID, scratch] {
                        let registers = Registers { rax, rbx: 0, rcx, r11, ..Registers::default() };
                        let outcome = attempt(page + offset, &registers);
                        let expected = match outcome {
                            Outcome::Signal(caught) if caught.rip == landing => {
                                let called = if rax == GETPID { own } else { ENOSYS.wrapping_neg() };
                                caught.rax == called || !is_first && [rax, r11].contains(&caught.rax)
                            }
                            // By what lies on the stack, as IRET elsewhere.
                            Outcome::Returned(_) if is_iret(page, offset) => true,
                            outcome => is_refusal(outcome),
                        };
                        let kind = if landed(outcome, landing) { "went on" } else { outcome.kind() };
                        let tried =
                            format_args!("{:#x}, rax {rax:#x}, rcx {rcx:#x}, r11 {r11:#x}", page + offset);
                        report.record(expected, kind, tried, outcome);
                    }
                }
            }
        }
    }
}

/// Whether IRET lies there, in a page that can be read.
fn is_iret(page: u64, offset: u64) -> bool {
    // SAFETY: the entry page was executed there, and what may be executed may be read.
    let byte = |offset: u64| unsafe { ((page + offset) as *const u8).read_volatile() };
    byte(offset) == 0xcf || offset < 4095 && byte(offset) == 0x48 && byte(offset + 1) == 0xcf
}

/// SYSCALL, SYSENTER and INT 128 from 32-bit code.
pub(crate) fn compatibility_mode(report: &mut Report, code: &mut Code) {
    report.subject("32-bit code");
    // MOV RSP, RBX: a stack that 32-bit code has too. JMP [RDI].
    let jump = code.add(&[0x48, 0x89, 0xdc, 0xff, 0x2f]);
    let stack = code.add(&[0; 256]) + 128;
    let far = |target: u64, selector: u16| {
        let mut pointer = [0; 6];
        pointer[..4].copy_from_slice(&target.to_le_bytes()[..4]);
        pointer[4..].copy_from_slice(&selector.to_le_bytes());
        pointer
    };
    let entries: [(&str, &[u8]); 5] = [
        ("SYSCALL", &[0x0f, 0x05]),
        ("SYSENTER", &[0x0f, 0x34]),
        ("INT 128", &[0xcd, 0x80]),
        // PUSHF; OR [ESP], TF and DF; POPF
        ("SYSCALL with TF and DF", &[0x9c, 0x81, 0x0c, 0x24, 0, 5, 0, 0, 0x9d, 0x0f, 0x05]),
        ("SYSENTER with TF and DF", &[0x9c, 0x81, 0x0c, 0x24, 0, 5, 0, 0, 0x9d, 0x0f, 0x34]),
    ];
    for selector in [0x23, 0xe023] {
        for (name, entry) in entries {
            let target = code.add(&[entry, &[0x0f, 0x0b]].concat());
            let pointer = code.add(&far(target, selector));
            let registers = Registers { rax: GETPID_32, rbx: stack, rdi: pointer, ..Registers::default() };
            let outcome = attempt(jump, &registers);
            report.record(
                is_refusal(outcome),
                outcome.kind(),
                format_args!("{name}, CS {selector:#x}"),
                outcome,
            );
        }
    }
}
