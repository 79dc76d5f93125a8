//! The system calls that std has no function for.

use std::ffi::{c_int, c_long, c_void};

/// Where the registers are in a signal's context.
pub(crate) const CONTEXT_REGISTERS: usize = 40;

const READ_WRITE_EXECUTE: c_int = 7;
const PRIVATE_ANONYMOUS_LOW: c_int = 0x62;
const SIGINFO: c_int = 4;
const ON_STACK: c_int = 0x0800_0000;
const RESTART: c_int = 0x1000_0000;
const GET_FS: c_long = 0x1003;
const ARCH_PRCTL: c_long = 158;

/// A signal's handler: its number, its information, its context.
pub(crate) type Action = extern "C" fn(c_int, *const u8, *mut u8);

/// A stack for handlers.
#[repr(C, align(4096))]
pub(crate) struct Stack([u8; 64 << 10]);

impl Stack {
    pub(crate) fn new() -> Self {
        Self([0; 64 << 10])
    }
}

#[repr(C)]
struct SignalStack {
    base: *mut c_void,
    flags: c_int,
    size: usize,
}

/// As glibc has it.
#[repr(C)]
struct SignalAction {
    handler: Action,
    mask: [u64; 16],
    flags: c_int,
    restorer: usize,
}

unsafe extern "C" {
    fn sigaltstack(new: *const SignalStack, old: *mut SignalStack) -> c_int;
    fn sigaction(signal: c_int, new: *const SignalAction, old: *mut SignalAction) -> c_int;
    fn setitimer(which: c_int, new: *const [i64; 4], old: *mut [i64; 4]) -> c_int;
    fn mmap(at: *mut c_void, size: usize, prot: c_int, flags: c_int, fd: c_int, from: c_long) -> *mut c_void;
    fn syscall(number: c_long, ...) -> c_long;
    fn fork() -> c_int;
    fn waitpid(child: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn setgroups(count: usize, groups: *const u32) -> c_int;
    fn setgid(group: u32) -> c_int;
    fn setuid(user: u32) -> c_int;
    fn write(descriptor: c_int, from: *const u8, length: usize) -> isize;
    fn _exit(status: c_int) -> !;
}

pub(crate) fn use_signal_stack(stack: &'static mut Stack) {
    let stack = SignalStack { base: (&raw mut *stack).cast(), flags: 0, size: size_of::<Stack>() };
    // SAFETY: the stack is there for good, and nobody else's.
    assert_eq!(unsafe { sigaltstack(&stack, std::ptr::null_mut()) }, 0, "sigaltstack");
}

pub(crate) fn handle(signal: c_int, handler: Action) {
    let action = SignalAction { handler, mask: [0; 16], flags: SIGINFO | ON_STACK | RESTART, restorer: 0 };
    // SAFETY: the handler is one that takes an information.
    assert_eq!(unsafe { sigaction(signal, &action, std::ptr::null_mut()) }, 0, "sigaction");
}

/// SIGALRM every so many seconds.
pub(crate) fn every(seconds: i64) {
    // SAFETY: plain values.
    let result = unsafe { setitimer(0, &[seconds, 0, seconds, 0], std::ptr::null_mut()) };
    assert_eq!(result, 0, "setitimer");
}

pub(crate) fn fs_base() -> u64 {
    let mut base = 0_u64;
    // SAFETY: stores to the variable.
    assert_eq!(unsafe { syscall(ARCH_PRCTL, GET_FS, &raw mut base) }, 0, "arch_prctl");
    base
}

/// Pages below 2 GiB that may be written and executed, never given back.
pub(crate) fn low_pages(count: usize) -> &'static mut [u8] {
    let size = count * 4096;
    // SAFETY: new pages wherever the kernel likes.
    let base = unsafe { mmap(std::ptr::null_mut(), size, READ_WRITE_EXECUTE, PRIVATE_ANONYMOUS_LOW, -1, 0) };
    assert_ne!(base.addr(), usize::MAX, "mmap");
    // SAFETY: they are this slice's alone, and zero.
    unsafe { std::slice::from_raw_parts_mut(base.cast(), size) }
}

/// The system call, with six times the same argument.
pub(crate) fn call(number: u64, argument: u64) -> u64 {
    let result: u64;
    // SAFETY: in a child of its own, whatever it does.
    unsafe {
        std::arch::asm!(
            "syscall", inlateout("rax") number => result, in("rdi") argument, in("rsi") argument,
            in("rdx") argument, in("r10") argument, in("r8") argument, in("r9") argument,
            lateout("rcx") _, lateout("r11") _
        );
    }
    result
}

/// Runs `work` in a child that ends with its result, and returns the child's status as from `waitpid`.
pub(crate) fn in_child(work: impl FnOnce() -> c_int) -> c_int {
    // SAFETY: the process has one thread.
    let child = unsafe { fork() };
    assert_ne!(child, -1, "fork");
    if child == 0 {
        let status = work();
        // SAFETY: ends the child.
        unsafe { _exit(status) }
    }
    let mut status = 0;
    // SAFETY: stores to the variable.
    assert_eq!(unsafe { waitpid(child, &mut status, 0) }, child, "waitpid");
    status
}

/// Gives up the rights of root, if the program has them.
pub(crate) fn become_nobody() {
    const NOBODY: u32 = 65534;
    // SAFETY: plain values.
    unsafe {
        if setgroups(0, std::ptr::null()) == 0 {
            assert_eq!((setgid(NOBODY), setuid(NOBODY)), (0, 0), "setgid, setuid");
        }
    }
}

/// Ends the program from a handler.
pub(crate) fn die(message: &str) -> ! {
    // SAFETY: the message is there; then nothing is.
    unsafe {
        write(2, message.as_ptr(), message.len());
        _exit(99)
    }
}
