//! Kick, NMI and INTR from other threads.
//!
//! The protocol, and why no kick is lost:
//!
//! - The requester sets its bit in `requests`, then `immediate_exit`, then reads `running`. If a
//!   thread is in [`Vcpu::run`](crate::Vcpu::run), it sends that thread a signal.
//! - The vCPU thread publishes itself in `running`, then answers requests, then enters KVM_RUN,
//!   where the kernel reads `immediate_exit` (after the publication, both sequentially
//!   consistent). On EINTR it clears `immediate_exit` first and takes the bits second.
//!
//! Either the requester sees the thread and the signal ends KVM_RUN (a pending signal does so even if
//! it comes first), or the publication comes later and the thread sees the request on entry.
//! A bit set between clearing and taking is taken now, and its `immediate_exit` causes one
//! more EINTR that finds nothing.

use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::host;
use super::sys::{self, RunPage};
use crate::error::{Error, Result};
use crate::pin::{IntrPin, Sleeper};
use crate::vcpu::VcpuHandle;

/// Request bit: [`VcpuHandle::kick`].
pub(super) const KICK: u32 = 1;
/// Request bit: [`VcpuHandle::nmi`].
pub(super) const NMI: u32 = 2;
/// Request bit: the INTR pin changed.
pub(super) const INTR: u32 = 4;

/// What a vCPU shares with its handles.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) page: RunPage,
    /// Thread inside of `run`, 0 if none.
    running: AtomicI32,
    requests: AtomicU32,
    /// Level of the INTR pin.
    pub(super) intr: IntrPin,
    /// Whether the INTR pin is the VMM's.
    has_intr: bool,
    /// Writes of this virtual machine may wait. Here, since the run loop looks at what is beside it anyway.
    gathers: AtomicBool,
    sleeper: Sleeper,
}

impl Shared {
    pub(super) fn new(page: RunPage, has_intr: bool) -> Self {
        Self {
            page,
            running: AtomicI32::new(0),
            requests: AtomicU32::new(0),
            intr: IntrPin::default(),
            has_intr,
            gathers: AtomicBool::new(false),
            sleeper: Sleeper::default(),
        }
    }

    /// Publishes the calling thread until the guard is dropped, also by a panic.
    pub(super) fn enter(self: &Arc<Self>) -> Result<Running> {
        sys::unblock_kick_signal().map_err(|errno| host("pthread_sigmask", errno))?;
        self.running.store(sys::thread_id(), Ordering::SeqCst);
        Ok(Running(Arc::clone(self)))
    }

    /// Takes all request bits.
    pub(super) fn take_requests(&self) -> u32 {
        self.page.set_immediate_exit(false);
        self.requests.swap(0, Ordering::SeqCst)
    }

    /// Forgets requests that were not answered yet.
    pub(super) fn withdraw(&self, requests: u32) {
        self.requests.fetch_and(!requests, Ordering::SeqCst);
    }

    /// Undoes an `immediate_exit` that the vCPU thread set for itself; that of a request stays.
    pub(super) fn rearm(&self) {
        self.page.set_immediate_exit(false);
        if self.pending() != 0 {
            self.page.set_immediate_exit(true);
        }
    }

    pub(super) fn pending(&self) -> u32 {
        self.requests.load(Ordering::SeqCst)
    }

    pub(super) fn has_intr(&self) -> bool {
        self.has_intr
    }

    /// Whether writes may wait for this vCPU to hand them over.
    #[inline(always)]
    pub(super) fn gathers(&self) -> bool {
        self.gathers.load(Ordering::Relaxed)
    }

    /// Has the vCPU look for writes that wait, for good: what waits outlives its zone.
    pub(super) fn gather(&self) {
        self.gathers.store(true, Ordering::Relaxed);
    }

    fn request(&self, bit: u32) {
        self.requests.fetch_or(bit, Ordering::SeqCst);
        self.page.set_immediate_exit(true);
        match self.running.load(Ordering::SeqCst) {
            0 => {}
            // A callback's own kick: the next KVM_RUN sees `immediate_exit`.
            tid if tid == sys::thread_id() => {}
            tid => sys::signal_thread(tid),
        }
        self.sleeper.wake();
    }

    /// Sleeps until `awake`, at most until `timeout` has passed; whether it is awake.
    pub(super) fn sleep(&self, timeout: Option<Duration>, awake: impl Fn(&Self) -> bool) -> bool {
        self.sleeper.sleep(timeout, || awake(self))
    }
}

/// A thread is inside of `run`.
#[derive(Debug)]
pub(super) struct Running(Arc<Shared>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.store(0, Ordering::SeqCst);
    }
}

/// The handle; a weak reference, so that a forgotten handle does not keep the vCPU's pages.
#[derive(Debug)]
pub(super) struct KvmVcpuHandle(pub(super) Weak<Shared>);

impl VcpuHandle for KvmVcpuHandle {
    fn kick(&self) {
        if let Some(shared) = self.0.upgrade() {
            shared.request(KICK);
        }
    }

    fn nmi(&self) -> Result<()> {
        if let Some(shared) = self.0.upgrade() {
            shared.request(NMI);
        }
        Ok(())
    }

    fn set_intr(&self, asserted: bool) -> Result<()> {
        let Some(shared) = self.0.upgrade() else { return Ok(()) };
        if !shared.has_intr {
            return Err(Error::unsupported(
                "driving INTR",
                "with InterruptMode::Platform the pin belongs to the backend's PIC; use Vm::interrupt_lines",
            ));
        }
        shared.intr.set(asserted);
        if asserted {
            shared.request(INTR);
        }
        Ok(())
    }
}
