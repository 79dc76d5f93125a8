//! Where Xen enters the kernel: at the start, for traps, system calls and events. Frames go to `traps::on_entry`, and by
//! the IRET hypercall back to where they came from.

use core::arch::global_asm;

global_asm!(
    r#"
    .text
    .global start
start:
    cld
    mov %rsi, %rdi
    lea stack_end(%rip), %rsp
    call kernel_main
    ud2

    // Xen pushes RCX and R11 last. What has no error code gets one, and a number that says what it is.
    .macro enter name:req, number:req, has_error=0
    .global \name
\name:
    pop %rcx
    pop %r11
    .if !\has_error
    push $0
    .endif
    push $\number
    jmp enter_common
    .endm
    enter divide_error, 0
    enter breakpoint, 3
    enter general_protection, 13, 1
    enter page_fault, 14, 1
    enter interrupt_80, 0x80
    enter system_call, 0x100
    enter event_0, 0x101
    enter event_1, 0x102
    enter failsafe, 0x103

enter_common:
    push %rax
    push %rcx
    push %rdx
    push %rbx
    push %rbp
    push %rsi
    push %rdi
    push %r8
    push %r9
    push %r10
    push %r11
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, %rbp
    sub $512, %rsp
    and $-16, %rsp
    fxsave (%rsp)
    mov %rbp, %rdi
    cld
    call on_entry
    fxrstor (%rsp)
    mov %rbp, %rsp
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %r11
    pop %r10
    pop %r9
    pop %r8
    pop %rdi
    pop %rsi
    pop %rbp
    pop %rbx
    pop %rdx
    pop %rcx
    pop %rax
    add $16, %rsp
    push $0                         // flags: RCX and R11 are wanted
    jmp hypercall_page + 23 * 32

    // enter_user(rip, rsp): comes back when on_entry lets it, with the stack pointer that is kept here.
    .global enter_user
enter_user:
    push %rbx
    push %rbp
    push %r12
    push %r13
    push %r14
    push %r15
    mov %rsp, kernel_stack_pointer(%rip)
    push $0xe02b
    push %rsi
    push $0x202
    push $0xe033
    push %rdi
    push $0
    jmp hypercall_page + 23 * 32
    .global user_returns
user_returns:
    pop %r15
    pop %r14
    pop %r13
    pop %r12
    pop %rbp
    pop %rbx
    ret

    .section .bss.stacks, "aw", @nobits
    .global kernel_stack_pointer
    .balign 16
kernel_stack_pointer:
    .skip 16
    .skip 32768
stack_end:
    .global trap_stack_end
    .skip 16384
trap_stack_end:
    .global second_stack_end
    .skip 16384
second_stack_end:
"#,
    options(att_syntax)
);

/// What the stack holds when `on_entry` is called.
#[repr(C)]
#[derive(Debug)]
pub(crate) struct Frame {
    /// R15 to R8, RDI, RSI, RBP, RBX, RDX, RCX.
    pub(crate) others: [u64; 14],
    pub(crate) rax: u64,
    pub(crate) number: u64,
    pub(crate) error_code: u64,
    pub(crate) rip: u64,
    pub(crate) cs: u64,
    pub(crate) rflags: u64,
    pub(crate) rsp: u64,
    pub(crate) ss: u64,
}

unsafe extern "C" {
    pub(crate) fn divide_error();
    pub(crate) fn breakpoint();
    pub(crate) fn general_protection();
    pub(crate) fn page_fault();
    pub(crate) fn interrupt_80();
    pub(crate) fn system_call();
    pub(crate) fn event_0();
    pub(crate) fn event_1();
    pub(crate) fn failsafe();
    pub(crate) fn enter_user(rip: u64, rsp: u64);
    pub(crate) fn user_returns();
    pub(crate) static kernel_stack_pointer: u64;
    pub(crate) static trap_stack_end: [u8; 0];
    pub(crate) static second_stack_end: [u8; 0];
}
