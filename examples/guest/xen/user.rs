//! A program: page tables of its own, the way there by IRET and back by SYSCALL and page faults.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, Ordering};

use crate::abi::{
    self, MMUEXT_OP, Page, SELF, SS, STACK_SWITCH, StartInfo, hypercall, machine_frame, protect,
};
use crate::check;
use crate::entry::{self, Frame};

/// Where the program is, beyond what the kernel has mapped.
const PROGRAM: u64 = 1 << 30;
/// Present, writable, user.
const ENTRY: u64 = 7;

const PIN_L4_TABLE: u64 = 3;
const NEW_USER_BASEPTR: u64 = 15;

global_asm!(
    r#"
    .section .rodata.program, "a"
    .global program_start, program_end
program_start:
    mov $1, %eax
    syscall
    mov %rax, %rbx                  // the answer
    movabs $0x100000, %rdi          // the kernel
    mov (%rdi), %rax
    movabs $0xffff800000000000, %rdi // the machine-to-physical table
    mov (%rdi), %rax
    movabs $0xffff818000000000, %rdi // the same, elsewhere
    mov (%rdi), %rax
    mov $2, %eax
    syscall
    ud2
program_end:
"#,
    options(att_syntax)
);

unsafe extern "C" {
    safe static program_start: u8;
    safe static program_end: u8;
}

/// Root, two tables in between, the last one, and the program's page.
static PAGES: [Page; 5] = [const { Page::new() }; 5];

/// Page faults of the program, and those that were as they should be.
static FAULTS: [AtomicU64; 2] = [const { AtomicU64::new(0) }; 2];
/// What the program made of its first system call's answer.
static ANSWER: AtomicU64 = AtomicU64::new(0);
static CALLS: AtomicU64 = AtomicU64::new(0);

pub(crate) fn faulted(error_code: u64, address: u64) {
    FAULTS[0].fetch_add(1, Ordering::SeqCst);
    // A load in user mode.
    if error_code & 6 == 4 && [0x10_0000, abi::MACH2PHYS, 0xffff_8180_0000_0000].contains(&address) {
        FAULTS[1].fetch_add(1, Ordering::SeqCst);
    }
}

/// A system call: the first one is answered, the second one ends the program.
pub(crate) fn called(frame: &mut Frame) {
    CALLS.fetch_add(1, Ordering::SeqCst);
    if frame.rax == 1 {
        frame.rax = 42;
        return;
    }
    ANSWER.store(frame.others[11], Ordering::SeqCst);
    frame.rip = entry::user_returns as unsafe extern "C" fn() as usize as u64;
    frame.cs = 0xe030;
    // SAFETY: `enter_user` wrote it before the program ran.
    frame.rsp = unsafe { (&raw const entry::kernel_stack_pointer).read_volatile() };
}

pub(crate) fn program(info: &StartInfo) {
    let [root, upper, middle, last, page] = &PAGES;
    let frame = |page: &Page| machine_frame(info, page.address() >> 12) << 12;
    root.set(0, frame(upper) | ENTRY);
    upper.set(1, frame(middle) | ENTRY);
    middle.set(0, frame(last) | ENTRY);
    last.set(0, frame(page) | ENTRY);
    let length = &raw const program_end as usize - &raw const program_start as usize;
    for offset in 0..length {
        // SAFETY: within the program's text, and within the page, which nobody has a reference into.
        unsafe {
            let byte = (&raw const program_start).add(offset).read_volatile();
            (page.address() as *mut u8).add(offset).write_volatile(byte);
        }
    }
    let protected = [root, upper, middle, last].iter().all(|table| protect(info, table));
    // Command, frame and nothing: `mmuext_op`.
    let pin = [PIN_L4_TABLE, frame(root) >> 12, 0, NEW_USER_BASEPTR, frame(root) >> 12, 0];
    let used = hypercall(MMUEXT_OP, [pin.as_ptr() as u64, 2, 0, SELF]) == 0;
    let stack = hypercall(STACK_SWITCH, [SS, &raw const entry::trap_stack_end as u64, 0, 0]) == 0;
    check("page tables of a program", protected && used && stack);
    // SAFETY: the program ends by the system call that lets this function come back.
    unsafe { entry::enter_user(PROGRAM, PROGRAM + 4096) };
    let load = |value: &AtomicU64| value.load(Ordering::SeqCst);
    check("system calls of a program", load(&CALLS) == 2 && load(&ANSWER) == 42);
    check("page faults of a program", load(&FAULTS[0]) == 3 && load(&FAULTS[1]) == 3);
}
