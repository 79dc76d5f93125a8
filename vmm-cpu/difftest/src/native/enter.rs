//! The assembler of a child: how it begins a case, how signals come in, and its system calls.
#![allow(unsafe_code, reason = "assembler")]

use std::arch::{global_asm, naked_asm};

use crate::start::{Start, at};

/// Loads all registers of a case and goes to it.
///
/// # Safety
/// The process must be prepared for whatever the case does.
#[unsafe(naked)]
pub(super) unsafe extern "C" fn enter(start: *const Start) -> ! {
    // IRETQ loads RIP, RFLAGS and the stack at once, so that neither a trap flag nor the alignment check flag hits
    // anything but the case. A null selector in FS or GS may clear the base: the bases come later.
    naked_asm!(
        "mov eax, [rdi + {selector}]",
        "mov ds, eax",
        "mov es, eax",
        "mov fs, eax",
        "mov gs, eax",
        "test eax, eax",
        "jnz 2f",
        "mov rax, [rdi + {fs_base}]",
        "wrfsbase rax",
        "mov rax, [rdi + {gs_base}]",
        "wrgsbase rax",
        "2:",
        "fxrstor64 [rdi + {fxsave}]",
        "lea rsp, [rdi + {rip}]",
        "mov rax, [rdi]",
        "mov rcx, [rdi + 8]",
        "mov rdx, [rdi + 16]",
        "mov rbx, [rdi + 24]",
        "mov rbp, [rdi + 40]",
        "mov rsi, [rdi + 48]",
        "mov r8, [rdi + 64]",
        "mov r9, [rdi + 72]",
        "mov r10, [rdi + 80]",
        "mov r11, [rdi + 88]",
        "mov r12, [rdi + 96]",
        "mov r13, [rdi + 104]",
        "mov r14, [rdi + 112]",
        "mov r15, [rdi + 120]",
        "mov rdi, [rdi + 56]",
        "iretq",
        selector = const at::DATA_SELECTOR,
        fs_base = const at::FS_BASE,
        gs_base = const at::GS_BASE,
        fxsave = const at::FXSAVE,
        rip = const at::RIP,
    )
}

/// What the kernel calls for a signal, on the alternate stack. A case may have left NT or AC set, which the kernel hands
/// on.
#[unsafe(naked)]
pub(super) unsafe extern "C" fn signal_entry() {
    naked_asm!(
        "push 0x202",
        "popfq",
        "jmp {handle}",
        handle = sym super::child::handle_signal,
    )
}

// The only system calls that the filter lets through are made here.
global_asm!(
    ".p2align 6",
    ".globl vmm_difftest_call",
    "vmm_difftest_call:",
    "mov rax, rdi",
    "mov rdi, rsi",
    "mov rsi, rdx",
    "mov rdx, rcx",
    "mov r10, r8",
    "xor r8d, r8d",
    "xor r9d, r9d",
    "syscall",
    ".globl vmm_difftest_after_call",
    "vmm_difftest_after_call:",
    "ret",
    ".globl vmm_difftest_return",
    "vmm_difftest_return:",
    "mov eax, 15",
    "syscall",
    ".globl vmm_difftest_after_return",
    "vmm_difftest_after_return:",
    "ud2",
);

unsafe extern "C" {
    fn vmm_difftest_call(number: i64, a: usize, b: usize, c: usize, d: usize) -> i64;
    fn vmm_difftest_after_call();
    fn vmm_difftest_return();
    fn vmm_difftest_after_return();
}

/// A system call with up to four arguments.
///
/// # Safety
/// As that of the call.
pub(super) unsafe fn system_call(number: i64, [a, b, c, d]: [usize; 4]) -> i64 {
    // SAFETY: the caller's business.
    unsafe { vmm_difftest_call(number, a, b, c, d) }
}

/// What signal handlers return to.
pub(super) fn restorer() -> usize {
    vmm_difftest_return as *const () as usize
}

/// Where RIP is after the SYSCALL of [`system_call`] and that of the return from signals.
pub(super) fn call_sites() -> [u64; 2] {
    [vmm_difftest_after_call as *const () as u64, vmm_difftest_after_return as *const () as u64]
}
