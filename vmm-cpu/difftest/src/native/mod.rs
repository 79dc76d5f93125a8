//! The processor's side: cases run in ring 3 of a child process that can do nothing but run them.
//!
//! Threat model: a case is random code. It has the child's registers and its address space to itself, and no descriptors,
//! no system calls and no more than some tens of milliseconds. What it can break is the child; the parent then starts
//! another, and says which case it was.
#![allow(unsafe_code, reason = "processes")]

mod arena;
mod child;
mod confine;
mod enter;

use std::io;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::case::{Case, Ending, Mode, Outcome, Registers};
use crate::memory;
use crate::start::Prepared;
use arena::{Arena, Finish, Slot};
use child::Preparation;

pub(crate) use arena::BATCH;

/// How long a batch may take before its child is given up: the timer ends a case much earlier.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks at whether the child lives.
const LOOK: Duration = Duration::from_millis(50);

/// Children that may die in a row before the first case of a batch.
const MOST_STARTS: u32 = 3;

/// What the processor made of a case, or why that cannot be said.
pub(crate) type Answer = Result<Outcome, &'static str>;

/// A child and what it shares with its parent. Dropped with its thread at the latest: children die with it.
pub(crate) struct Native {
    arena: Arena,
    child: Option<libc::pid_t>,
    asked: u32,
    waiting: usize,
}

impl Native {
    pub(crate) fn new() -> Result<Self> {
        let arena = Arena::new().context("cannot make memory to share with a child")?;
        let mut native = Self { arena, child: None, asked: 0, waiting: 0 };
        native.spawn()?;
        Ok(native)
    }

    fn spawn(&mut self) -> Result<()> {
        self.reap();
        self.arena.image().copy_from_slice(memory::pristine());
        let mut preparation = Preparation::new();
        // SAFETY: the child allocates nothing and takes no lock: it runs `child::run` until it ends.
        let pid = unsafe { libc::fork() };
        match pid {
            -1 => Err(io::Error::last_os_error()).context("cannot start a child"),
            0 => child::run(self.arena.address(), self.arena.fd(), &mut preparation, self.asked),
            _ => {
                self.child = Some(pid);
                Ok(())
            }
        }
    }

    /// Ends the child.
    fn reap(&mut self) {
        if let Some(pid) = self.child.take() {
            // SAFETY: a child of ours that was not waited for.
            unsafe { libc::kill(pid, libc::SIGKILL) };
            // SAFETY: as above; nobody wants the status.
            unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
        }
    }

    /// The status of a child that has ended.
    fn ended(&mut self) -> Option<libc::c_int> {
        let pid = self.child?;
        let mut status = 0;
        // SAFETY: a child of ours that was not waited for, and the status lives for the call.
        let ended = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
        if ended == 0 {
            return None;
        }
        self.child = None;
        Some(status)
    }

    /// Hands over at most [`BATCH`] cases. [`Native::finish`] comes next.
    pub(crate) fn start<'a>(&mut self, cases: impl IntoIterator<Item = &'a Prepared>) -> Result<()> {
        if self.child.is_none() {
            self.spawn()?;
        }
        let mut count = 0;
        for case in cases.into_iter().take(BATCH) {
            let slot = self.arena.slot(count);
            slot.start = case.start;
            let memory = case.native_memory.as_ref().unwrap_or(&case.memory);
            slot.memory_len = memory.len();
            if let Some(place) = slot.memory.get_mut(..memory.len()) {
                place.copy_from_slice(memory);
            }
            count += 1;
        }
        self.waiting = count;
        self.ask(count);
        Ok(())
    }

    fn ask(&mut self, count: usize) {
        self.asked = self.asked.wrapping_add(1);
        let [asked, _, slots, current] = self.arena.words();
        slots.store(count as u32, Ordering::Relaxed);
        current.store(0, Ordering::Relaxed);
        asked.store(self.asked, Ordering::Release);
        // SAFETY: the word lives as long as `self`.
        unsafe { libc::syscall(libc::SYS_futex, asked.as_ptr(), libc::FUTEX_WAKE, 1) };
    }

    /// Waits for the child; whether it has done everything.
    fn wait(&mut self) -> bool {
        let look = libc::timespec { tv_sec: 0, tv_nsec: LOOK.subsec_nanos().into() };
        let begin = Instant::now();
        loop {
            let [_, done, _, _] = self.arena.words();
            let now = done.load(Ordering::Acquire);
            if now == self.asked {
                return true;
            }
            // SAFETY: word and timeout live for the call.
            unsafe { libc::syscall(libc::SYS_futex, done.as_ptr(), libc::FUTEX_WAIT, now, &raw const look) };
            let [_, done, _, _] = self.arena.words();
            if done.load(Ordering::Acquire) == self.asked {
                return true;
            }
            if self.ended().is_some() {
                return false;
            }
            if begin.elapsed() > PATIENCE {
                self.reap();
                return false;
            }
        }
    }

    /// What came of the cases that were handed over, given once more.
    pub(crate) fn finish(&mut self, cases: &[(&Case, &Prepared)]) -> Result<Vec<Answer>> {
        if self.wait() {
            let answers = cases.iter().enumerate().map(|(index, (case, _))| Ok(self.outcome(index, case)));
            return Ok(answers.collect());
        }
        // One by one: the case that the child died of may have been the victim of an earlier one.
        cases.iter().map(|(case, prepared)| self.alone(case, prepared)).collect()
    }

    /// Runs a case in a child that has run no other before.
    pub(crate) fn fresh(&mut self, case: &Case, prepared: &Prepared) -> Result<Answer> {
        self.spawn()?;
        self.alone(case, prepared)
    }

    /// Runs a case in the child that there is.
    pub(crate) fn again(&mut self, case: &Case, prepared: &Prepared) -> Result<Answer> {
        self.alone(case, prepared)
    }

    fn alone(&mut self, case: &Case, prepared: &Prepared) -> Result<Answer> {
        self.start([prepared])?;
        if self.wait() {
            return Ok(Ok(self.outcome(0, case)));
        }
        // A child that cannot even start is no case's fault.
        for _ in 0..MOST_STARTS {
            self.spawn()?;
            self.ask(0);
            if self.wait() {
                return Ok(Err("the child died of it"));
            }
        }
        bail!("children cannot start here: is seccomp allowed, and are the areas' addresses free?")
    }

    fn outcome(&mut self, index: usize, case: &Case) -> Outcome {
        let slot: &Slot = self.arena.slot(index);
        let finish = &slot.finish;
        let stores = slot.stores.get(..slot.stores_len).unwrap_or_default();
        let mut fxsave = finish.fxsave;
        if let Some(unused) = fxsave.get_mut(416..) {
            unused.fill(0);
        }
        let mut registers = Registers {
            general: finish.general,
            rflags: finish.rflags,
            fs_base: finish.fs_base,
            gs_base: finish.gs_base,
            fxsave,
        };
        if case.mode == Mode::Compatibility {
            registers.only_32_bits();
        }
        let (ending, rip) = ending(finish, case);
        let stores = memory::runs(stores).map(|(address, data)| (address, data.to_vec())).collect();
        Outcome { ending, rip, registers, selectors: finish.selectors, stores }
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        self.reap();
    }
}

/// What a signal means.
fn ending(finish: &Finish, case: &Case) -> (Ending, u64) {
    match finish.signal as libc::c_int {
        libc::SIGVTALRM => (Ending::TimedOut, finish.rip),
        libc::SIGSYS => (Ending::SystemCall, finish.rip),
        _ => Ending::of_exception(case, finish.trap, finish.error, finish.address, finish.rip),
    }
}

#[cfg(test)]
pub(crate) mod tests;
