//! Faults of the host's in translated code: accesses through the address window that it does not allow.
//!
//! The handler of SIGSEGV and SIGBUS (of a non-canonical address on the stack) takes what happens in code memory while
//! the thread is in translated code, which it then leaves; everything else goes to the handler of before, also a signal
//! that somebody has sent, whatever the thread was in. A handler that the program installs while a vCPU runs has to pass on
//! what it does not know as well; a vCPU that is run while another handler is there, or while the thread blocks one of the
//! two signals, uses no window.
#![allow(unsafe_code, reason = "signal handlers work on raw contexts")]

use std::cell::Cell;
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;

use crate::translate::memory::frame::Frame;

/// What translated code a thread is in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Running {
    /// Where code memory starts, and its bytes.
    pub(super) start: u64,
    pub(super) len: u64,
    /// Where translated code goes on after a fault.
    pub(super) landing: u64,
    pub(super) frame: *mut Frame,
}

thread_local! {
    static RUNNING: Cell<Option<Running>> = const { Cell::new(None) };
}

const SIGNALS: [libc::c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];

/// The handlers of before.
static BEFORE: [OnceLock<libc::sigaction>; 2] = [const { OnceLock::new() }; 2];

/// Whether faults of translated code in this thread are handled: the handlers are installed at the first call, nobody else's
/// took their place, and the thread does not block the signals, as threads do that leave all to others. The kernel ends the
/// process at a fault whose signal is blocked.
pub(super) fn are_handled() -> bool {
    static INSTALLED: OnceLock<bool> = OnceLock::new();
    let address = (on_fault as *const ()).expose_provenance();
    *INSTALLED
        .get_or_init(|| SIGNALS.iter().zip(&BEFORE).all(|(signal, before)| install(*signal, before, address)))
        && SIGNALS.iter().all(|signal| current(*signal).is_some_and(|action| action.sa_sigaction == address))
        && !are_blocked()
}

/// Whether this thread blocks one of the signals.
fn are_blocked() -> bool {
    let mut mask = MaybeUninit::uninit();
    // SAFETY: the mask is written to where the pointer is to, or the call fails.
    if unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, ptr::null(), mask.as_mut_ptr()) } != 0 {
        return true;
    }
    // SAFETY: it did not fail.
    let mask = unsafe { mask.assume_init() };
    // SAFETY: the set is this function's.
    SIGNALS.iter().any(|signal| unsafe { libc::sigismember(&raw const mask, *signal) } != 0)
}

fn current(signal: libc::c_int) -> Option<libc::sigaction> {
    let mut action = MaybeUninit::uninit();
    // SAFETY: the kernel writes an action to where the pointer is to, or fails.
    let done = unsafe { libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) };
    // SAFETY: it did not fail.
    (done == 0).then(|| unsafe { action.assume_init() })
}

fn install(signal: libc::c_int, before: &OnceLock<libc::sigaction>, address: usize) -> bool {
    let Some(old) = current(signal) else { return false };
    before.get_or_init(|| old);
    let mut action = old;
    action.sa_sigaction = address;
    if is_function(&old) {
        // It finds the stack and the mask that it wants.
        action.sa_flags = old.sa_flags & !libc::SA_RESETHAND | libc::SA_SIGINFO;
    } else {
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
        // SAFETY: the set is this function's.
        unsafe { libc::sigemptyset(&raw mut action.sa_mask) };
    }
    // SAFETY: the handler does only what is allowed in one.
    unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) == 0 }
}

/// Whether an action is a handler of the program's.
fn is_function(action: &libc::sigaction) -> bool {
    !matches!(action.sa_sigaction, libc::SIG_DFL | libc::SIG_IGN)
}

/// The thread is in translated code until dropped.
#[derive(Debug)]
pub(super) struct Guard(());

impl Guard {
    pub(super) fn set(running: Running) -> Self {
        RUNNING.set(Some(running));
        Self(())
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        RUNNING.set(None);
    }
}

/// The handler.
unsafe extern "C" fn on_fault(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    const RIP: usize = libc::REG_RIP as usize;
    let context_of_thread = context.cast::<libc::ucontext_t>();
    // SAFETY: the kernel gives a handler with SA_SIGINFO what the signal is about.
    let code = unsafe { (*info).si_code };
    if is_fault(code)
        && let Some(running) = RUNNING.get()
    {
        // SAFETY: the kernel gives a handler with SA_SIGINFO the context that the thread goes on with; nobody else has it.
        let registers = unsafe { &mut (*context_of_thread).uc_mcontext.gregs };
        let rip = registers[RIP].cast_unsigned();
        if rip.wrapping_sub(running.start) < running.len {
            // SAFETY: translated code is running, so no reference to the frame exists.
            unsafe { (*running.frame).state.fault = rip };
            registers[RIP] = running.landing.cast_signed();
            return;
        }
    }
    let before =
        SIGNALS.iter().zip(&BEFORE).find(|(known, _)| **known == signal).and_then(|(_, before)| before.get());
    // SAFETY: what was installed before has the type that its flags say.
    unsafe { pass_on(before, signal, info, context) };
}

/// Whether the running instruction is the cause, not somebody who has sent the signal, or memory that failed elsewhere.
fn is_fault(code: libc::c_int) -> bool {
    code > 0 && code != libc::BUS_MCEERR_AO
}

/// # Safety
/// As for a signal handler; `before` is the action that was there.
unsafe fn pass_on(
    before: Option<&libc::sigaction>,
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    match before {
        Some(before) if is_function(before) => {
            type Long = unsafe extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
            type Short = unsafe extern "C" fn(libc::c_int);
            let address = before.sa_sigaction as *const ();
            if before.sa_flags & libc::SA_SIGINFO != 0 {
                // SAFETY: with that flag the address is that of such a function.
                let handler = unsafe { std::mem::transmute::<*const (), Long>(address) };
                // SAFETY: the arguments are those of the kernel.
                unsafe { handler(signal, info, context) };
            } else {
                // SAFETY: without that flag the address is that of such a function.
                let handler = unsafe { std::mem::transmute::<*const (), Short>(address) };
                // SAFETY: the argument is that of the kernel.
                unsafe { handler(signal) };
            }
        }
        // SAFETY: the kernel gives the handler what the signal is about.
        Some(before) if before.sa_sigaction == libc::SIG_IGN && !is_fault(unsafe { (*info).si_code }) => {}
        _ => {
            // SAFETY: the default action is always valid.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
            // SAFETY: as above.
            if !is_fault(unsafe { (*info).si_code }) {
                // It comes when this handler returns. Without, the instruction is executed again, and ends the process.
                // SAFETY: the call has no pointer.
                let _ = unsafe { libc::raise(signal) };
            }
        }
    }
}
