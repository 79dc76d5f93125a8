//! The way into translated code and out of it.
//!
//! GS holds the address of the vCPU's [`Frame`] while [`Frame`] is in use; Rust code does not use it. The host's stack
//! pointer stays that of the entry. Of the guest's registers most are in the host's of the same number; RAX, RCX and RSP,
//! whose places translated code needs, are in R10, R11 and R15, and the guest's R10, R11 and R15 on the host's stack, as the
//! saved status flags are.
#![allow(unsafe_code, reason = "the host's registers are the guest's")]

use std::arch::{asm, naked_asm};
use std::mem::offset_of;

use crate::translate::cpu::Cpu;
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

/// Runs translated code from `code` on with the general and vector registers of `cpu`, and the status flags of the frame;
/// the number of the site where it is left.
///
/// # Safety
/// GS is the base of a frame, with `leave` in its state set by [`leave_address`]; `code` is the address of code that the
/// translator made for that frame and that is still valid.
pub(super) unsafe fn enter(code: u64, cpu: &mut Cpu) -> u32 {
    // SAFETY: as the caller says, and the registers of `cpu` are nobody else's meanwhile.
    unsafe { enter_frame(code, cpu) }
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
unsafe extern "sysv64" fn enter_frame(code: u64, cpu: *mut Cpu) -> u32 {
    naked_asm!(
        "push rbx",
        "push rbp",
        "push r12",
        "push r13",
        "push r14",
        "push r15",
        "sub rsp, {stack}",
        "mov gs:[{target}], rdi",
        "mov gs:[{cpu}], rsi",
        "mov rax, [rsi+{file}+80]",
        "mov [rsp+{r10}], rax",
        "mov rax, [rsi+{file}+88]",
        "mov [rsp+{r11}], rax",
        "mov rax, [rsi+{file}+120]",
        "mov [rsp+{r15}], rax",
        "mov rax, gs:[{flags}]",
        "mov [rsp+{saved}], rax",
        "stmxcsr gs:[{host_mxcsr}]",
        "ldmxcsr gs:[{mxcsr}]",
        "movaps xmm0, [rsi+{xmm}]",
        "movaps xmm1, [rsi+{xmm}+0x10]",
        "movaps xmm2, [rsi+{xmm}+0x20]",
        "movaps xmm3, [rsi+{xmm}+0x30]",
        "movaps xmm4, [rsi+{xmm}+0x40]",
        "movaps xmm5, [rsi+{xmm}+0x50]",
        "movaps xmm6, [rsi+{xmm}+0x60]",
        "movaps xmm7, [rsi+{xmm}+0x70]",
        "movaps xmm8, [rsi+{xmm}+0x80]",
        "movaps xmm9, [rsi+{xmm}+0x90]",
        "movaps xmm10, [rsi+{xmm}+0xa0]",
        "movaps xmm11, [rsi+{xmm}+0xb0]",
        "movaps xmm12, [rsi+{xmm}+0xc0]",
        "movaps xmm13, [rsi+{xmm}+0xd0]",
        "movaps xmm14, [rsi+{xmm}+0xe0]",
        "movaps xmm15, [rsi+{xmm}+0xf0]",
        "mov r10, [rsi+{file}]",
        "mov r11, [rsi+{file}+8]",
        "mov rdx, [rsi+{file}+16]",
        "mov rbx, [rsi+{file}+24]",
        "mov r15, [rsi+{file}+32]",
        "mov rbp, [rsi+{file}+40]",
        "mov rdi, [rsi+{file}+56]",
        "mov r8, [rsi+{file}+64]",
        "mov r9, [rsi+{file}+72]",
        "mov r12, [rsi+{file}+96]",
        "mov r13, [rsi+{file}+104]",
        "mov r14, [rsi+{file}+112]",
        "mov rsi, [rsi+{file}+48]",
        "jmp gs:[{target}]",
        target = const at!(target),
        host_mxcsr = const at!(host_mxcsr),
        mxcsr = const at!(mxcsr),
        cpu = const at!(cpu),
        file = const Cpu::FILE,
        xmm = const Cpu::XMM,
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
        "mov rax, gs:[{cpu}]",
        "mov [rax+{file}], r10",
        "mov r10, [rsp+{r10}]",
        "mov [rax+{file}+80], r10",
        "mov r10, [rsp+{r11}]",
        "mov [rax+{file}+88], r10",
        "mov r10, [rsp+{r15}]",
        "mov [rax+{file}+120], r10",
        "mov r10d, [rsp+{saved}]",
        "mov gs:[{flags}], r10",
        "mov [rax+{file}+8], r11",
        "mov [rax+{file}+16], rdx",
        "mov [rax+{file}+24], rbx",
        "mov [rax+{file}+32], r15",
        "mov [rax+{file}+40], rbp",
        "mov [rax+{file}+48], rsi",
        "mov [rax+{file}+56], rdi",
        "mov [rax+{file}+64], r8",
        "mov [rax+{file}+72], r9",
        "mov [rax+{file}+96], r12",
        "mov [rax+{file}+104], r13",
        "mov [rax+{file}+112], r14",
        "movaps [rax+{xmm}], xmm0",
        "movaps [rax+{xmm}+0x10], xmm1",
        "movaps [rax+{xmm}+0x20], xmm2",
        "movaps [rax+{xmm}+0x30], xmm3",
        "movaps [rax+{xmm}+0x40], xmm4",
        "movaps [rax+{xmm}+0x50], xmm5",
        "movaps [rax+{xmm}+0x60], xmm6",
        "movaps [rax+{xmm}+0x70], xmm7",
        "movaps [rax+{xmm}+0x80], xmm8",
        "movaps [rax+{xmm}+0x90], xmm9",
        "movaps [rax+{xmm}+0xa0], xmm10",
        "movaps [rax+{xmm}+0xb0], xmm11",
        "movaps [rax+{xmm}+0xc0], xmm12",
        "movaps [rax+{xmm}+0xd0], xmm13",
        "movaps [rax+{xmm}+0xe0], xmm14",
        "movaps [rax+{xmm}+0xf0], xmm15",
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
        cpu = const at!(cpu),
        file = const Cpu::FILE,
        xmm = const Cpu::XMM,
        flags = const at!(flags),
        saved = const FLAGS,
        stack = const STACK,
        r10 = const stack_place(10),
        r11 = const stack_place(11),
        r15 = const stack_place(15),
    )
}
