//! One attempt at something that should fail: machine code runs with chosen registers, and whatever signal comes of it is
//! caught and told, so that the next attempt finds everything as it was.
//!
//! The handler and what it jumps to touch nothing that an attempt may have broken: no thread-local storage, which
//! is behind FS, and no stack but the handler's own.

use std::ffi::c_int;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering::SeqCst};

use crate::system::{self, Action, CONTEXT_REGISTERS, Stack};

pub(crate) const SIGILL: u64 = 4;
pub(crate) const SIGTRAP: u64 = 5;
pub(crate) const SIGBUS: u64 = 7;
pub(crate) const SIGFPE: u64 = 8;
pub(crate) const SIGSEGV: u64 = 11;
const SIGALRM: u64 = 14;
const SIGSYS: u64 = 31;

/// Registers of `struct sigcontext` (arch/x86/include/uapi/asm/sigcontext.h).
const RAX: usize = 13;
const RSP: usize = 15;
const RIP: usize = 16;
const FLAGS: usize = 17;
const SELECTORS: usize = 18;

/// Seconds between two looks at whether an attempt hangs.
const TICK: i64 = 5;

/// What an attempt starts with. RSP is the caller's stack, on top of it the address to return to.
#[derive(Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct Registers {
    pub(crate) rax: u64,
    pub(crate) rbx: u64,
    pub(crate) rcx: u64,
    pub(crate) rdx: u64,
    pub(crate) rsi: u64,
    pub(crate) rdi: u64,
    pub(crate) r8: u64,
    pub(crate) r9: u64,
    pub(crate) r10: u64,
    pub(crate) r11: u64,
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The code returned, with this in RAX.
    Returned(u64),
    Signal(Caught),
    /// Nothing happened for seconds.
    Hung {
        rip: u64,
    },
}

/// A signal, and the registers at that moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Caught {
    pub(crate) signal: u64,
    /// Of SIGSEGV and SIGBUS: the address that was accessed, where the processor tells it.
    pub(crate) address: u64,
    pub(crate) rip: u64,
    pub(crate) rax: u64,
}

impl Outcome {
    pub(crate) fn is_signal(&self) -> bool {
        matches!(self, Self::Signal(_))
    }

    /// One word for the table.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Returned(_) => "returned",
            Self::Hung { .. } => "hung",
            Self::Signal(caught) => match caught.signal {
                SIGILL => "SIGILL",
                SIGTRAP => "SIGTRAP",
                SIGBUS => "SIGBUS",
                SIGFPE => "SIGFPE",
                SIGSEGV => "SIGSEGV",
                SIGSYS => "SIGSYS",
                _ => "another signal",
            },
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Returned(rax) => write!(f, "returned {rax:#x}"),
            Self::Hung { rip } => write!(f, "hung at {rip:#x}"),
            Self::Signal(Caught { address, rip, rax, .. }) => {
                write!(f, "{}, address {address:#x}, rip {rip:#x}, rax {rax:#x}", self.kind())
            }
        }
    }
}

/// Where the attempt's caller continues: RSP under its saved registers.
static RESUME_RSP: AtomicU64 = AtomicU64::new(0);
static TARGET: AtomicU64 = AtomicU64::new(0);
/// FS base of this thread.
static FS_BASE: AtomicU64 = AtomicU64::new(0);
static RESTORE_FS: AtomicBool = AtomicBool::new(false);
/// Selectors of CS and SS as the handler puts them back.
static NORMAL_SELECTORS: AtomicU64 = AtomicU64::new(0);

static ACTIVE: AtomicBool = AtomicBool::new(false);
static HUNG: AtomicBool = AtomicBool::new(false);
static ATTEMPTS: AtomicU64 = AtomicU64::new(0);
static TICK_SAW: AtomicU64 = AtomicU64::new(0);

static RESULT: AtomicU64 = AtomicU64::new(0);
static SIGNAL: AtomicU64 = AtomicU64::new(0);
static ADDRESS: AtomicU64 = AtomicU64::new(0);
static AT_RIP: AtomicU64 = AtomicU64::new(0);
/// Selectors and RIP that the next signal's handler returns to, once; 0 for none.
static REDIRECT: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];

static HANDLER_STACK: AtomicPtr<Stack> = AtomicPtr::new(std::ptr::null_mut());

std::arch::global_asm!(
    // RDI: code, RSI: registers.
    ".global probe_attempt",
    "probe_attempt:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "sub rsp, 8",
    "mov [rip + {resume_rsp}], rsp",
    "mov [rip + {target}], rdi",
    "mov rax, [rsi]",
    "mov rbx, [rsi + 8]",
    "mov rcx, [rsi + 16]",
    "mov rdx, [rsi + 24]",
    "mov rdi, [rsi + 40]",
    "mov r8, [rsi + 48]",
    "mov r9, [rsi + 56]",
    "mov r10, [rsi + 64]",
    "mov r11, [rsi + 72]",
    "mov rsi, [rsi + 32]",
    "call [rip + {target}]",
    "mov [rip + {result}], rax",
    // arch_prctl(ARCH_SET_FS) where a selector's descriptor may have changed the base.
    ".global probe_resume",
    "probe_resume:",
    "mov rsp, [rip + {resume_rsp}]",
    "cmp byte ptr [rip + {restore_fs}], 0",
    "je 2f",
    "mov eax, 158",
    "mov edi, 0x1002",
    "mov rsi, [rip + {fs_base}]",
    "syscall",
    "2:",
    "push 0x202",
    "popfq",
    "add rsp, 8",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    resume_rsp = sym RESUME_RSP,
    target = sym TARGET,
    result = sym RESULT,
    fs_base = sym FS_BASE,
    restore_fs = sym RESTORE_FS,
);

unsafe extern "C" {
    fn probe_attempt(code: u64, registers: *const Registers);
    fn probe_resume();
}

/// Makes the handlers and the clock that ends what hangs. To be called by a process of one thread.
pub(crate) fn install() {
    let stack = Box::leak(Box::new(Stack::new()));
    HANDLER_STACK.store(stack, SeqCst);
    system::use_signal_stack(stack);
    FS_BASE.store(system::fs_base(), SeqCst);
    let (cs, ss): (u64, u64);
    // SAFETY: reads two selectors.
    unsafe { std::arch::asm!("mov {0:e}, cs", "mov {1:e}, ss", out(reg) cs, out(reg) ss) };
    NORMAL_SELECTORS.store(cs | ss << 48, SeqCst);
    for signal in [SIGILL, SIGTRAP, SIGBUS, SIGFPE, SIGSEGV, SIGALRM, SIGSYS] {
        system::handle(signal as c_int, handler as Action);
    }
    system::every(TICK);
}

/// Runs the code at `code`.
pub(crate) fn attempt(code: u64, registers: &Registers) -> Outcome {
    SIGNAL.store(0, SeqCst);
    HUNG.store(false, SeqCst);
    ATTEMPTS.fetch_add(1, SeqCst);
    ACTIVE.store(true, SeqCst);
    // SAFETY: none whatsoever for what is at `code`: that is the point. Faults come back through the handler.
    unsafe { probe_attempt(code, registers) };
    ACTIVE.store(false, SeqCst);
    let signal = SIGNAL.load(SeqCst);
    let (rip, rax) = (AT_RIP.load(SeqCst), RESULT.load(SeqCst));
    if HUNG.load(SeqCst) {
        Outcome::Hung { rip }
    } else if signal == 0 {
        Outcome::Returned(rax)
    } else {
        Outcome::Signal(Caught { signal, address: ADDRESS.load(SeqCst), rip, rax })
    }
}

/// As [`attempt`], for code that may change FS.
pub(crate) fn attempt_with_fs(code: u64, registers: &Registers) -> Outcome {
    RESTORE_FS.store(true, SeqCst);
    let outcome = attempt(code, registers);
    RESTORE_FS.store(false, SeqCst);
    outcome
}

/// As [`attempt`], where the first signal's handler returns to `rip` with those selectors of CS and SS.
pub(crate) fn attempt_redirected(code: u64, registers: &Registers, [cs, ss]: [u16; 2], rip: u64) -> Outcome {
    REDIRECT[0].store(u64::from(cs) | u64::from(ss) << 48, SeqCst);
    REDIRECT[1].store(rip, SeqCst);
    let outcome = attempt(code, registers);
    REDIRECT[1].store(0, SeqCst);
    outcome
}

/// Selectors of CS and SS as this program has them.
pub(crate) fn normal_selectors() -> [u16; 2] {
    let both = NORMAL_SELECTORS.load(SeqCst);
    [both as u16, (both >> 48) as u16]
}

extern "C" fn handler(signal: c_int, info: *const u8, context: *mut u8) {
    let signal = signal as u64;
    let register = |number: usize| context.wrapping_add(CONTEXT_REGISTERS + number * 8).cast::<u64>();
    // SAFETY: the kernel gives a context that is so long, for this handler to read and write.
    let (get, set) = (|n| unsafe { register(n).read() }, |n, value| unsafe { register(n).write(value) });
    if !ACTIVE.load(SeqCst) {
        if signal != SIGALRM {
            system::die("probe: a signal outside of an attempt\n");
        }
        return;
    }
    if signal == SIGALRM {
        let attempts = ATTEMPTS.load(SeqCst);
        if TICK_SAW.swap(attempts, SeqCst) != attempts {
            return;
        }
        HUNG.store(true, SeqCst);
    }
    let redirect = REDIRECT[1].swap(0, SeqCst);
    if redirect != 0 && signal != SIGALRM {
        set(SELECTORS, REDIRECT[0].load(SeqCst));
        set(RIP, redirect);
        return;
    }
    SIGNAL.store(signal, SeqCst);
    // SAFETY: the kernel gives an information that is so long.
    ADDRESS.store(unsafe { info.wrapping_add(16).cast::<u64>().read() }, SeqCst);
    AT_RIP.store(get(RIP), SeqCst);
    RESULT.store(get(RAX), SeqCst);
    set(RIP, probe_resume as *const () as u64);
    set(RSP, RESUME_RSP.load(SeqCst));
    set(FLAGS, 0x202);
    set(SELECTORS, NORMAL_SELECTORS.load(SeqCst));
}
