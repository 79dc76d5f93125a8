//! How a stay in the guest ends: by a port of the engine's stubs, and by other threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmm_memory::PAGE_SIZE;
use vmm_memory::vm_memory::GuestAddress;

use super::EngineHandle;
use super::private::PORT_SHIM;
use crate::vcpu::{VcpuHandle, VcpuIo};

/// What reaches an engine from other threads.
///
/// The vCPU's own kick serves for three things: to end the stay after a stub's OUT, to return from `run`, and to look at
/// flushes. Kicks of the vCPU merge, and an operation of the engine takes those that come meanwhile; so what is wanted
/// stands here, is set before the vCPU is kicked, and is looked at before the guest goes on.
#[derive(Debug)]
pub(super) struct Signals {
    vcpu: Arc<dyn VcpuHandle>,
    kicked: AtomicBool,
    inside: AtomicBool,
    flush_wanted: AtomicU64,
    flushed: AtomicU64,
}

impl Signals {
    pub(super) fn new(vcpu: Arc<dyn VcpuHandle>) -> Self {
        Self {
            vcpu,
            kicked: AtomicBool::new(false),
            inside: AtomicBool::new(false),
            flush_wanted: AtomicU64::new(0),
            flushed: AtomicU64::new(0),
        }
    }

    pub(super) fn take_kick(&self) -> bool {
        self.kicked.swap(false, Ordering::SeqCst)
    }

    /// Kicks the vCPU again if its last kick went to an operation of the engine, and whoever kicked still waits.
    pub(super) fn renew_kick(&self) {
        if self.is_wanted() {
            self.vcpu.kick();
        }
    }

    /// Whether somebody waits for the engine to look.
    pub(super) fn is_wanted(&self) -> bool {
        self.kicked.load(Ordering::SeqCst) || self.flush_wanted().is_some()
    }

    /// The number of the last flush that was asked for and not done.
    pub(super) fn flush_wanted(&self) -> Option<u64> {
        let wanted = self.flush_wanted.load(Ordering::SeqCst);
        (wanted > self.flushed.load(Ordering::SeqCst)).then_some(wanted)
    }

    pub(super) fn flushed(&self, number: u64) {
        self.flushed.store(number, Ordering::SeqCst);
    }

    /// Says that the guest may use translations, until the result is dropped. Flushes are to be looked at afterwards.
    pub(super) fn enter(self: &Arc<Self>) -> Inside {
        self.inside.store(true, Ordering::SeqCst);
        Inside(Arc::clone(self))
    }
}

/// The engine is in the guest.
pub(super) struct Inside(Arc<Signals>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.inside.store(false, Ordering::SeqCst);
    }
}

impl EngineHandle for Signals {
    fn kick(&self) {
        if !self.kicked.swap(true, Ordering::SeqCst) {
            self.vcpu.kick();
        }
    }

    fn flush(&self) {
        let number = self.flush_wanted.fetch_add(1, Ordering::SeqCst) + 1;
        let mut kicked = false;
        while self.inside.load(Ordering::SeqCst) && self.flushed.load(Ordering::SeqCst) < number {
            if !kicked {
                self.vcpu.kick();
                kicked = true;
            }
            std::thread::yield_now();
        }
    }
}

/// The bus of the stubs: the first OUT ends the stay.
#[derive(Debug)]
pub(super) struct Exits<'a> {
    signals: &'a Signals,
    doorbell: Option<GuestAddress>,
    port: Option<u8>,
}

impl<'a> Exits<'a> {
    /// Stores to `doorbell` count as [`PORT_SHIM`].
    pub(super) fn new(signals: &'a Signals, doorbell: Option<GuestAddress>) -> Self {
        Self { signals, doorbell, port: None }
    }

    pub(super) fn port(&self) -> Option<u8> {
        self.port
    }
}

impl VcpuIo for Exits<'_> {
    fn pio_write(&mut self, port: u16, _: usize, _: &[u8]) {
        if self.port.is_none() {
            // Others than the stubs' are no better than an unknown one.
            self.port = Some(u8::try_from(port).unwrap_or(u8::MAX));
            self.signals.vcpu.kick();
        }
    }

    fn mmio_write(&mut self, gpa: GuestAddress, _: &[u8]) {
        if self.port.is_none() && self.doorbell.is_some_and(|page| gpa.0 & !(PAGE_SIZE - 1) == page.0) {
            self.port = Some(PORT_SHIM);
            self.signals.vcpu.kick();
        }
    }
}
