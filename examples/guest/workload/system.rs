//! The system calls that std has no function for.

use std::ffi::{c_int, c_long, c_void};
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicU64, Ordering};

pub(crate) const READ: c_int = 1;
pub(crate) const WRITE: c_int = 2;
const PRIVATE_ANONYMOUS: c_int = 0x22;

pub(crate) const SIGUSR1: c_int = 10;
pub(crate) const SIGSEGV: c_int = 11;
pub(crate) const SIGALRM: c_int = 14;

/// As glibc has it.
#[repr(C)]
struct SignalAction {
    handler: usize,
    mask: [u64; 16],
    flags: c_int,
    restorer: usize,
}

unsafe extern "C" {
    fn fork() -> c_int;
    fn waitpid(child: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn _exit(status: c_int) -> !;
    fn getppid() -> c_int;
    fn clock_gettime(clock: c_int, time: *mut [i64; 2]) -> c_int;
    fn kill(process: c_int, signal: c_int) -> c_int;
    fn sigaction(signal: c_int, new: *const SignalAction, old: *mut SignalAction) -> c_int;
    fn setitimer(which: c_int, new: *const [i64; 4], old: *mut [i64; 4]) -> c_int;
    fn mmap(at: *mut c_void, size: usize, prot: c_int, flags: c_int, fd: c_int, from: c_long) -> *mut c_void;
    fn mprotect(at: *mut c_void, size: usize, prot: c_int) -> c_int;
    fn munmap(at: *mut c_void, size: usize) -> c_int;
    fn syscall(number: c_long, ...) -> c_long;
}

/// Signals that arrived, by number.
pub(crate) static ARRIVED: [AtomicU64; 32] = [const { AtomicU64::new(0) }; 32];

extern "C" fn count(signal: c_int) {
    if let Some(counter) = usize::try_from(signal).ok().and_then(|signal| ARRIVED.get(signal)) {
        counter.fetch_add(1, Ordering::SeqCst);
    }
}

/// Counts that signal from here on.
pub(crate) fn count_signal(signal: c_int) {
    const RESTART: c_int = 0x1000_0000;
    let handler = count as extern "C" fn(c_int);
    set_handler(signal, handler as usize, RESTART);
}

/// Leaves the signal to the kernel.
pub(crate) fn default_signal(signal: c_int) {
    set_handler(signal, 0, 0);
}

extern "C" fn leave(signal: c_int) {
    // SAFETY: ends the process.
    unsafe { _exit(signal) }
}

/// Ends the process with the signal's number as its status. Of a signal that it leaves to the kernel, that writes to its log.
pub(crate) fn exit_by(signal: c_int) {
    let handler = leave as extern "C" fn(c_int);
    set_handler(signal, handler as usize, 0);
}

fn set_handler(signal: c_int, handler: usize, flags: c_int) {
    let action = SignalAction { handler, mask: [0; 16], flags, restorer: 0 };
    // SAFETY: the handler is one, or SIG_DFL.
    assert_eq!(unsafe { sigaction(signal, &action, std::ptr::null_mut()) }, 0, "sigaction");
}

pub(crate) fn send(process: c_int, signal: c_int) {
    // SAFETY: plain values.
    assert_eq!(unsafe { kill(process, signal) }, 0, "kill");
}

/// SIGALRM every so many microseconds; 0 for none.
pub(crate) fn every(microseconds: i64) {
    // SAFETY: plain values.
    let result = unsafe { setitimer(0, &[0, microseconds, 0, microseconds], std::ptr::null_mut()) };
    assert_eq!(result, 0, "setitimer");
}

pub(crate) fn parent() -> c_int {
    // SAFETY: no arguments.
    unsafe { getppid() }
}

/// Nanoseconds since the kernel began to count.
pub(crate) fn monotonic() -> i64 {
    let mut time = [0; 2];
    // SAFETY: stores to the variable.
    assert_eq!(unsafe { clock_gettime(1, &mut time) }, 0, "clock_gettime");
    time[0] * 1_000_000_000 + time[1]
}

/// A child that ends with what `work` returns.
pub(crate) fn child(work: impl FnOnce() -> c_int) -> c_int {
    // SAFETY: the process has one thread.
    let child = unsafe { fork() };
    assert_ne!(child, -1, "fork");
    if child == 0 {
        let status = work();
        // SAFETY: ends the child.
        unsafe { _exit(status) }
    }
    child
}

/// Waits for a child, and returns what `waitpid` says of it.
pub(crate) fn wait(child: c_int) -> c_int {
    let mut status = 0;
    // SAFETY: stores to the variable.
    assert_eq!(unsafe { waitpid(child, &mut status, 0) }, child, "waitpid");
    status
}

/// Pages of this process, unmapped when dropped.
pub(crate) struct Pages {
    base: *mut u8,
    length: usize,
}

impl Pages {
    pub(crate) fn new(count: usize) -> Self {
        let length = count * 4096;
        // SAFETY: new pages wherever the kernel likes.
        let base = unsafe { mmap(std::ptr::null_mut(), length, READ | WRITE, PRIVATE_ANONYMOUS, -1, 0) };
        assert_ne!(base.addr(), usize::MAX, "mmap");
        Self { base: base.cast(), length }
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the pages are this value's own, and zero at first.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.length) }
    }

    pub(crate) fn protect(&mut self, prot: c_int) {
        // SAFETY: the pages are this value's own; whoever touches them afterwards may get a signal.
        assert_eq!(unsafe { mprotect(self.base.cast(), self.length, prot) }, 0, "mprotect");
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the pages are this value's own.
        unsafe { munmap(self.base.cast(), self.length) };
    }
}

const IO_SETUP: c_long = 206;
const IO_GETEVENTS: c_long = 208;
const IO_SUBMIT: c_long = 209;

/// A request that goes on by itself (struct iocb of linux/aio_abi.h).
#[repr(C)]
pub(crate) struct IoControl {
    data: u64,
    key: u32,
    flags: c_int,
    operation: u16,
    priority: i16,
    file: u32,
    buffer: u64,
    bytes: u64,
    offset: i64,
    reserved: u64,
    more_flags: u32,
    event_file: u32,
}

impl IoControl {
    /// Reads `buffer` from `at`, or writes it there. Nobody touches it until it has ended.
    pub(crate) fn new(data: u64, file: RawFd, write: bool, buffer: &mut [u8], at: u64) -> Self {
        Self {
            data,
            key: 0,
            flags: 0,
            operation: write.into(),
            priority: 0,
            file: file as u32,
            buffer: buffer.as_mut_ptr() as u64,
            bytes: buffer.len() as u64,
            offset: at as i64,
            reserved: 0,
            more_flags: 0,
            event_file: 0,
        }
    }
}

/// How one has ended.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(crate) struct IoEvent {
    pub(crate) data: u64,
    control: u64,
    pub(crate) result: i64,
    second: i64,
}

/// Where so many go on at a time.
pub(crate) fn io_setup(depth: usize) -> u64 {
    let mut context = 0_u64;
    // SAFETY: the kernel writes the context's number.
    let result = unsafe { syscall(IO_SETUP, depth as c_long, &raw mut context) };
    assert_eq!(result, 0, "io_setup");
    context
}

/// Begins all; how many those are.
pub(crate) fn io_submit(context: u64, controls: &mut [&mut IoControl]) -> u64 {
    let mut begun = 0;
    while begun < controls.len() {
        let rest = &mut controls[begun..];
        // SAFETY: so many pointers to requests, whose buffers live for ever.
        let result = unsafe { syscall(IO_SUBMIT, context, rest.len() as c_long, rest.as_mut_ptr()) };
        assert!(result > 0, "io_submit");
        begun += result as usize;
    }
    begun as u64
}

/// Waits for one at least.
pub(crate) fn io_getevents(context: u64, events: &mut [IoEvent]) -> &[IoEvent] {
    let most = events.len() as c_long;
    let forever = std::ptr::null_mut::<c_void>();
    // SAFETY: there is room for so many.
    let result = unsafe { syscall(IO_GETEVENTS, context, 1 as c_long, most, events.as_mut_ptr(), forever) };
    assert!(result > 0, "io_getevents");
    &events[..result as usize]
}
