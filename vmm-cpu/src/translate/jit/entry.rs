//! The way into translated code and out of it.
//!
//! GS holds the address of the vCPU's [`Frame`] while [`Frame`] is in use; Rust code does not use it. The host's stack
//! pointer stays that of the entry. Of the guest's registers most are in the host's of the same number; RAX, RCX and RSP,
//! whose places translated code needs, are in R10, R11 and R15, and the guest's R10, R11 and R15 on the host's stack, as the
//! saved status flags are.
#![allow(unsafe_code, reason = "the host's registers are the guest's")]

use std::arch::{asm, naked_asm};
use std::mem::offset_of;

use crate::translate::memory::frame::{Frame, State};

macro_rules! at {
    ($field:ident) => {
        offset_of!(Frame, state) + offset_of!(State, $field)
    };
}

/// Distance of the saved status flags from the stack pointer.
pub(super) const FLAGS: i32 = 0x18;
/// That of two quadwords for single instructions.
pub(super) const SCRATCH: i32 = 0x20;
/// Bytes on the stack.
const STACK: i32 = 0x38;

/// The distance of the guest's R10, R11 and R15 from the stack pointer.
pub(super) const fn stack_place(register: u8) -> i32 {
    match register {
        10 => 0,
        11 => 8,
        _ => 16,
    }
}

/// Whether user code may set GS by an instruction (Linux's HWCAP2_FSGSBASE).
fn has_fsgsbase() -> bool {
    const HWCAP2_FSGSBASE: libc::c_ulong = 1 << 1;
    // SAFETY: the call has no pointer.
    let capabilities = unsafe { libc::getauxval(libc::AT_HWCAP2) };
    capabilities & HWCAP2_FSGSBASE != 0
}

/// The thread's GS base is that of a frame, until dropped.
#[derive(Debug)]
pub(crate) struct Gs {
    before: u64,
    fast: bool,
}

impl Gs {
    /// Makes `frame` what GS refers to.
    pub(super) fn set(frame: &mut Frame) -> Self {
        let fast = has_fsgsbase();
        let before = if fast { read_fast() } else { read_slow() };
        let this = Self { before, fast };
        this.write((&raw mut *frame).expose_provenance() as u64);
        this
    }

    fn write(&self, base: u64) {
        if self.fast {
            // SAFETY: the kernel says that the instruction may be used, and nothing in Rust depends on GS.
            unsafe { asm!("wrgsbase {}", in(reg) base, options(nomem, nostack, preserves_flags)) };
        } else {
            const ARCH_SET_GS: libc::c_int = 0x1001;
            // SAFETY: the call sets a register that nothing in Rust depends on.
            unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, base) };
        }
    }
}

impl Drop for Gs {
    fn drop(&mut self) {
        self.write(self.before);
    }
}

fn read_fast() -> u64 {
    let base;
    // SAFETY: the kernel says that the instruction may be used.
    unsafe { asm!("rdgsbase {}", out(reg) base, options(nomem, nostack, preserves_flags)) };
    base
}

fn read_slow() -> u64 {
    const ARCH_GET_GS: libc::c_int = 0x1004;
    let mut base = 0_u64;
    // SAFETY: the kernel writes the eight bytes that the pointer is to.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_GET_GS, &raw mut base) };
    base
}

/// Runs translated code from `code` on, which expects the status flags in the frame; the number of the site where it is
/// left.
///
/// # Safety
/// GS is the base of a frame, with `leave` in its state set by [`leave_address`]; `code` is the address of code that the
/// translator made for that frame and that is still valid.
pub(super) unsafe fn enter(code: u64) -> u32 {
    // SAFETY: as the caller says.
    unsafe { enter_frame(code) }
}

/// What [`State::leave`] must be.
pub(super) fn leave_address() -> u64 {
    (leave_frame as *const ()).expose_provenance() as u64
}

/// Lets the processor execute what was written to code memory at another address (AMD APM 2 7.6.1): IRET is the one
/// instruction that user code has for that.
pub(super) fn serialize() {
    // SAFETY: the frame that IRET takes is that of the next instruction, with all else as it is.
    unsafe {
        asm!(
            "mov {stack}, rsp",
            "mov {selector:e}, ss",
            "push {selector}",
            "push {stack}",
            "pushfq",
            "mov {selector:e}, cs",
            "push {selector}",
            "lea {selector}, [rip + 2f]",
            "push {selector}",
            "iretq",
            "2:",
            stack = out(reg) _,
            selector = out(reg) _,
        );
    }
}

/// # Safety
/// As for [`enter`].
#[unsafe(naked)]
unsafe extern "sysv64" fn enter_frame(code: u64) -> u32 {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "sub rsp, {stack}",
        "mov gs:[{target}], rdi",
        "mov rax, gs:[{registers}+80]",
        "mov [rsp+{r10}], rax",
        "mov rax, gs:[{registers}+88]",
        "mov [rsp+{r11}], rax",
        "mov rax, gs:[{registers}+120]",
        "mov [rsp+{r15}], rax",
        "mov rax, gs:[{flags}]",
        "mov [rsp+{saved}], rax",
        "stmxcsr gs:[{host_mxcsr}]",
        "ldmxcsr gs:[{mxcsr}]",
        "movaps xmm0, gs:[{xmm}]",
        "movaps xmm1, gs:[{xmm}+0x10]",
        "movaps xmm2, gs:[{xmm}+0x20]",
        "movaps xmm3, gs:[{xmm}+0x30]",
        "movaps xmm4, gs:[{xmm}+0x40]",
        "movaps xmm5, gs:[{xmm}+0x50]",
        "movaps xmm6, gs:[{xmm}+0x60]",
        "movaps xmm7, gs:[{xmm}+0x70]",
        "movaps xmm8, gs:[{xmm}+0x80]",
        "movaps xmm9, gs:[{xmm}+0x90]",
        "movaps xmm10, gs:[{xmm}+0xa0]",
        "movaps xmm11, gs:[{xmm}+0xb0]",
        "movaps xmm12, gs:[{xmm}+0xc0]",
        "movaps xmm13, gs:[{xmm}+0xd0]",
        "movaps xmm14, gs:[{xmm}+0xe0]",
        "movaps xmm15, gs:[{xmm}+0xf0]",
        "mov r10, gs:[{registers}]",
        "mov r11, gs:[{registers}+8]",
        "mov rdx, gs:[{registers}+16]",
        "mov rbx, gs:[{registers}+24]",
        "mov r15, gs:[{registers}+32]",
        "mov rbp, gs:[{registers}+40]",
        "mov rsi, gs:[{registers}+48]",
        "mov rdi, gs:[{registers}+56]",
        "mov r8, gs:[{registers}+64]",
        "mov r9, gs:[{registers}+72]",
        "mov r12, gs:[{registers}+96]",
        "mov r13, gs:[{registers}+104]",
        "mov r14, gs:[{registers}+112]",
        "jmp gs:[{target}]",
        target = const at!(target),
        host_mxcsr = const at!(host_mxcsr),
        mxcsr = const at!(mxcsr),
        xmm = const at!(xmm),
        registers = const at!(registers),
        flags = const at!(flags),
        saved = const FLAGS,
        stack = const STACK,
        r10 = const stack_place(10),
        r11 = const stack_place(11),
        r15 = const stack_place(15),
    )
}

/// Where translated code is left, with the number of the site in ECX: the return from [`enter_frame`].
#[unsafe(naked)]
unsafe extern "sysv64" fn leave_frame() {
    naked_asm!(
        "mov rax, [rsp+{r10}]",
        "mov gs:[{registers}+80], rax",
        "mov rax, [rsp+{r11}]",
        "mov gs:[{registers}+88], rax",
        "mov rax, [rsp+{r15}]",
        "mov gs:[{registers}+120], rax",
        "mov rax, [rsp+{saved}]",
        "mov gs:[{flags}], rax",
        "mov gs:[{registers}], r10",
        "mov gs:[{registers}+8], r11",
        "mov gs:[{registers}+16], rdx",
        "mov gs:[{registers}+24], rbx",
        "mov gs:[{registers}+32], r15",
        "mov gs:[{registers}+40], rbp",
        "mov gs:[{registers}+48], rsi",
        "mov gs:[{registers}+56], rdi",
        "mov gs:[{registers}+64], r8",
        "mov gs:[{registers}+72], r9",
        "mov gs:[{registers}+96], r12",
        "mov gs:[{registers}+104], r13",
        "mov gs:[{registers}+112], r14",
        "movaps gs:[{xmm}], xmm0",
        "movaps gs:[{xmm}+0x10], xmm1",
        "movaps gs:[{xmm}+0x20], xmm2",
        "movaps gs:[{xmm}+0x30], xmm3",
        "movaps gs:[{xmm}+0x40], xmm4",
        "movaps gs:[{xmm}+0x50], xmm5",
        "movaps gs:[{xmm}+0x60], xmm6",
        "movaps gs:[{xmm}+0x70], xmm7",
        "movaps gs:[{xmm}+0x80], xmm8",
        "movaps gs:[{xmm}+0x90], xmm9",
        "movaps gs:[{xmm}+0xa0], xmm10",
        "movaps gs:[{xmm}+0xb0], xmm11",
        "movaps gs:[{xmm}+0xc0], xmm12",
        "movaps gs:[{xmm}+0xd0], xmm13",
        "movaps gs:[{xmm}+0xe0], xmm14",
        "movaps gs:[{xmm}+0xf0], xmm15",
        "stmxcsr gs:[{mxcsr}]",
        "ldmxcsr gs:[{host_mxcsr}]",
        "mov eax, ecx",
        "add rsp, {stack}",
        "pop r15",
        "pop r14",
        "pop r13",
        "pop r12",
        "pop rbp",
        "pop rbx",
        "ret",
        host_mxcsr = const at!(host_mxcsr),
        mxcsr = const at!(mxcsr),
        xmm = const at!(xmm),
        registers = const at!(registers),
        flags = const at!(flags),
        saved = const FLAGS,
        stack = const STACK,
        r10 = const stack_place(10),
        r11 = const stack_place(11),
        r15 = const stack_place(15),
    )
}
