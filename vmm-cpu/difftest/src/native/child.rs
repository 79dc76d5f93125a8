//! What a child does: one case after the other, from signal handler to signal handler.
//!
//! The handler of the signal that ends a case notes what came of it and goes straight on to the next: it never returns,
//! since the next signal begins at the top of the alternate stack anyway. Only the timer's returns.
//!
//! Nothing here allocates, panics, or uses thread-local storage: FS and GS are as the case left them.
#![allow(clippy::multiple_unsafe_ops_per_block, reason = "fields of one structure, for one reason")]
#![allow(unsafe_code, reason = "signal handlers")]

use std::arch::asm;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, Ordering};

use super::arena::{BATCH, Finish, Shared, Slot};
use super::confine::confine;
use super::enter::{enter, restorer, signal_entry, system_call};
use crate::case::{AREAS, Area};
use crate::memory::{self, IMAGE};

/// The signals that end a case.
const ENDS: [libc::c_int; 6] =
    [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGSYS];

/// Bytes of the alternate stack.
const STACK: usize = 0x2_0000;

/// Ticks of the timer that a case may see.
const PATIENCE: u32 = 3;
/// Microseconds of the processor's time between two ticks.
const TICK: i64 = 10_000;

/// Statuses that a child ends with by itself.
const CANNOT_START: usize = 70;
const LOST: usize = 71;

static SHARED: AtomicPtr<Shared> = AtomicPtr::new(std::ptr::null_mut());
/// What the areas of the running case held at its start.
static EXPECTED: AtomicPtr<[u8; IMAGE]> = AtomicPtr::new(std::ptr::null_mut());
/// Whether a signal is of a case.
static IN_CASE: AtomicBool = AtomicBool::new(false);
/// Ticks of the timer since the running case began.
static TICKS: AtomicU32 = AtomicU32::new(0);

/// `struct sigaction` of the kernel, which is not the C library's.
#[repr(C)]
struct KernelAction {
    handler: usize,
    flags: u64,
    restorer: usize,
    mask: u64,
}

/// Flag of [`KernelAction`]: `restorer` is valid.
const SA_RESTORER: u64 = 0x0400_0000;

/// What a child needs and the parent makes before the fork, where memory can be allocated.
pub(super) struct Preparation {
    stack: Vec<u8>,
    expected: Box<[u8; IMAGE]>,
}

impl Preparation {
    pub(super) fn new() -> Self {
        Self { stack: vec![0; STACK], expected: Box::new(*memory::pristine()) }
    }
}

/// Begins the life of a child, right after the fork. `asked` is the last request that is not for it.
pub(super) fn run(shared: *mut Shared, fd: libc::c_int, preparation: &mut Preparation, asked: u32) -> ! {
    SHARED.store(shared, Ordering::Relaxed);
    EXPECTED.store(&raw mut *preparation.expected, Ordering::Relaxed);
    IN_CASE.store(false, Ordering::Relaxed);
    let ready = dies_with_parent()
        && AREAS.iter().all(|area| map_area(fd, area))
        && take_signals(&mut preparation.stack)
        && confine();
    if !ready {
        exit(CANNOT_START);
    }
    serve(asked)
}

fn exit(status: usize) -> ! {
    loop {
        // SAFETY: ends the process.
        unsafe { system_call(libc::SYS_exit_group, [status, 0, 0, 0]) };
    }
}

fn dies_with_parent() -> bool {
    // SAFETY: an option that takes a number.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == 0 }
}

/// Maps an area where cases see it. What is there already, if anything, stays, and there is no child.
fn map_area(fd: libc::c_int, area: &Area) -> bool {
    let protection = libc::PROT_READ
        | if area.writable { libc::PROT_WRITE } else { 0 }
        | if area.executable { libc::PROT_EXEC } else { 0 };
    let wanted = std::ptr::without_provenance_mut(area.start as usize);
    let flags = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
    let offset = memory::area_offset(area) as libc::off_t;
    // SAFETY: a mapping that replaces none.
    let address = unsafe { libc::mmap(wanted, area.size as usize, protection, flags, fd, offset) };
    address == wanted
}

/// Sets the alternate stack, the handlers and the timer.
fn take_signals(stack: &mut Vec<u8>) -> bool {
    let stack = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: stack.len() };
    // SAFETY: the stack is used for nothing else, and lives until the process ends.
    if unsafe { libc::sigaltstack(&raw const stack, std::ptr::null_mut()) } != 0 {
        return false;
    }
    let action = KernelAction {
        handler: signal_entry as *const () as usize,
        flags: (libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER) as u64 | SA_RESTORER,
        restorer: restorer(),
        mask: 0,
    };
    for signal in ENDS.into_iter().chain([libc::SIGVTALRM]) {
        let arguments = [signal as usize, &raw const action as usize, 0, 8];
        // SAFETY: the action is one that the kernel understands, of eight bytes of signals.
        if unsafe { system_call(libc::SYS_rt_sigaction, arguments) } != 0 {
            return false;
        }
    }
    let mask = 0_u64;
    // SAFETY: unblocks all signals; the mask lives for the call.
    unsafe {
        system_call(libc::SYS_rt_sigprocmask, [libc::SIG_SETMASK as usize, &raw const mask as usize, 0, 8])
    };
    let tick = libc::timeval { tv_sec: 0, tv_usec: TICK };
    let timer = libc::itimerval { it_interval: tick, it_value: tick };
    // SAFETY: the timer's values live for the call.
    unsafe { libc::setitimer(libc::ITIMER_VIRTUAL, &raw const timer, std::ptr::null_mut()) == 0 }
}

/// Does what the parent asks for, for ever.
fn serve(mut seen: u32) -> ! {
    let shared = SHARED.load(Ordering::Relaxed);
    // SAFETY: the mapping is there as long as the process, and the field is only accessed atomically.
    let (asked, done) = unsafe { (&(*shared).asked, &(*shared).done) };
    // SAFETY: as above.
    let (count, current) = unsafe { (&(*shared).count, &(*shared).current) };
    loop {
        let now = asked.load(Ordering::Acquire);
        if now == seen {
            wait(asked, seen);
            continue;
        }
        seen = now;
        current.store(0, Ordering::Relaxed);
        if count.load(Ordering::Relaxed) != 0 {
            begin(shared, 0);
        }
        done.store(seen, Ordering::Release);
        wake(done);
    }
}

/// Sleeps until the word is no longer `value`, or for no reason.
fn wait(word: &AtomicU32, value: u32) {
    let arguments = [word.as_ptr() as usize, libc::FUTEX_WAIT as usize, value as usize, 0];
    // SAFETY: the word lives as long as the process.
    unsafe { system_call(libc::SYS_futex, arguments) };
}

fn wake(word: &AtomicU32) {
    let arguments = [word.as_ptr() as usize, libc::FUTEX_WAKE as usize, 1, 0];
    // SAFETY: the word lives as long as the process.
    unsafe { system_call(libc::SYS_futex, arguments) };
}

/// A slot; the index is reduced to their number.
fn slot(shared: *mut Shared, index: u32) -> *mut Slot {
    // SAFETY: only an address is computed, within the array.
    unsafe { (&raw mut (*shared).slots).cast::<Slot>().add(index as usize % BATCH) }
}

/// The image that cases see and the one that they are compared with.
fn images<'a>(shared: *mut Shared) -> (&'a mut [u8; IMAGE], &'a mut [u8; IMAGE]) {
    // SAFETY: no case runs, there is one thread, and neither caller holds them across a call of the other.
    let now = unsafe { &mut (*shared).image };
    // SAFETY: as above.
    let expected = unsafe { &mut *EXPECTED.load(Ordering::Relaxed) };
    (now, expected)
}

/// Begins the case in a slot.
fn begin(shared: *mut Shared, index: u32) -> ! {
    // SAFETY: during the child's turn, slots are its own.
    let slot = unsafe { &mut *slot(shared, index) };
    let (now, expected) = images(shared);
    let memory = slot.memory.get(..slot.memory_len).unwrap_or_default();
    memory::put(now, memory);
    memory::put(expected, memory);
    TICKS.store(0, Ordering::Relaxed);
    IN_CASE.store(true, Ordering::Release);
    // SAFETY: whatever the case does ends in a signal, at the latest the timer's.
    unsafe { enter(&raw const slot.start) }
}

/// Goes on after a signal.
pub(super) extern "C" fn handle_signal(
    signal: libc::c_int,
    _: *const libc::siginfo_t,
    context: *const libc::ucontext_t,
) {
    if signal == libc::SIGVTALRM {
        let is_too_long =
            IN_CASE.load(Ordering::Relaxed) && TICKS.fetch_add(1, Ordering::Relaxed) >= PATIENCE;
        if !is_too_long {
            return;
        }
    }
    if !IN_CASE.swap(false, Ordering::Acquire) {
        // A case has written to this program's memory, or there is an error here.
        exit(LOST);
    }
    let shared = SHARED.load(Ordering::Relaxed);
    // SAFETY: as in `serve`.
    let (asked, done) = unsafe { (&(*shared).asked, &(*shared).done) };
    // SAFETY: as in `serve`.
    let (count, current) = unsafe { (&(*shared).count, &(*shared).current) };
    let index = current.load(Ordering::Relaxed);
    // SAFETY: during the child's turn, slots are its own.
    let slot = unsafe { &mut *slot(shared, index) };
    // SAFETY: the kernel's argument.
    note(unsafe { &*context }, signal, &mut slot.finish);
    let (now, expected) = images(shared);
    slot.stores_len = memory::changes(now, expected, &mut slot.stores);
    memory::take(now, slot.stores.get(..slot.stores_len).unwrap_or_default());
    let memory = slot.memory.get(..slot.memory_len).unwrap_or_default();
    memory::take(now, memory);
    memory::take(expected, memory);
    let next = index + 1;
    if next < count.load(Ordering::Relaxed) {
        current.store(next, Ordering::Relaxed);
        begin(shared, next);
    }
    let seen = asked.load(Ordering::Relaxed);
    done.store(seen, Ordering::Release);
    wake(done);
    serve(seen)
}

/// Where ucontext has RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15.
const GENERAL: [libc::c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

fn note(context: &libc::ucontext_t, signal: libc::c_int, finish: &mut Finish) {
    let registers = &context.uc_mcontext.gregs;
    let register =
        |index: libc::c_int| registers.get(index as usize).map_or(0, |value| value.cast_unsigned());
    let (es, ds, fs, gs): (u16, u16, u16, u16);
    let (fs_base, gs_base): (u64, u64);
    // SAFETY: reads registers.
    unsafe {
        asm!(
            "mov {0:x}, es", "mov {1:x}, ds", "mov {2:x}, fs", "mov {3:x}, gs", "rdfsbase {4}", "rdgsbase {5}",
            out(reg) es, out(reg) ds, out(reg) fs, out(reg) gs, out(reg) fs_base, out(reg) gs_base,
            options(nomem, nostack, preserves_flags),
        );
    }
    // CS in bits 0 to 15, SS in bits 48 to 63.
    let code_and_stack = register(libc::REG_CSGSFS);
    finish.signal = signal as u64;
    finish.trap = register(libc::REG_TRAPNO);
    finish.error = register(libc::REG_ERR);
    finish.address = register(libc::REG_CR2);
    for (to, from) in finish.general.iter_mut().zip(GENERAL) {
        *to = register(from);
    }
    finish.rip = register(libc::REG_RIP);
    finish.rflags = register(libc::REG_EFL);
    (finish.fs_base, finish.gs_base) = (fs_base, gs_base);
    finish.selectors = [es, code_and_stack as u16, (code_and_stack >> 48) as u16, ds, fs, gs];
    let image = context.uc_mcontext.fpregs.cast::<[u8; 512]>();
    if !image.is_null() {
        // SAFETY: the kernel points it to an XSAVE area, which begins with an FXSAVE image.
        finish.fxsave = unsafe { image.read() };
    }
}
