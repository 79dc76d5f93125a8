//! What reaches a vCPU from other threads: kicks, NMIs, INTR, and requests to forget what it has cached.
//!
//! Whoever wants something sets it first and `attention` second; the vCPU takes `attention` first and looks second, so
//! nothing is lost. The loop that runs blocks polls just `attention`.
//!
//! Changes of the memory map and of what is watched are an epoch of the virtual machine: whoever makes one waits until
//! each vCPU has seen it or is not in the guest. A vCPU enters the guest by saying so and reading the epoch afterwards,
//! both sequentially consistent, so that one of the two sees the other.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::Duration;

use super::core::CodeStore;
use crate::error::Result;
use crate::pin::{IntrPin, Sleeper};
use crate::vcpu::VcpuHandle;

const KICK: u32 = 1;
const NMI: u32 = 2;

/// Stores of other vCPUs to code that are listed one by one; beyond, all blocks are dropped.
const MAX_CODE_STORES: usize = 256;

/// Shared by a vCPU, its handles and its virtual machine.
#[derive(Debug)]
pub(crate) struct Signals {
    attention: AtomicBool,
    /// Zero where `attention` was set, for translated code. It may be zero once more than that.
    go: AtomicU64,
    requests: AtomicU32,
    pub(crate) intr: IntrPin,
    in_guest: AtomicBool,
    seen: AtomicU64,
    code_stores: Mutex<Vec<CodeStore>>,
    sleeper: Sleeper,
    /// What ends the stay of a program that another engine runs.
    native: OnceLock<Arc<dyn VcpuHandle>>,
    is_native: AtomicBool,
}

impl Signals {
    pub(crate) fn new() -> Self {
        Self {
            attention: AtomicBool::new(false),
            go: AtomicU64::new(1),
            requests: AtomicU32::new(0),
            intr: IntrPin::default(),
            in_guest: AtomicBool::new(false),
            seen: AtomicU64::new(0),
            code_stores: Mutex::default(),
            sleeper: Sleeper::default(),
            native: OnceLock::new(),
            is_native: AtomicBool::new(false),
        }
    }

    #[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
    /// Says how to end the stay of a program that another engine runs.
    pub(crate) fn set_native(&self, handle: Arc<dyn VcpuHandle>) {
        self.native.get_or_init(|| handle);
    }

    #[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
    /// Says that another engine runs the program until the result is dropped; `None` if somebody wants attention first.
    pub(crate) fn enter_native(self: &Arc<Self>) -> Option<InNative> {
        self.is_native.store(true, Ordering::SeqCst);
        let inside = InNative(Arc::clone(self));
        (!self.attention.load(Ordering::SeqCst)).then_some(inside)
    }

    /// Whether to look at the rest.
    #[inline(always)]
    pub(crate) fn wants_attention(&self) -> bool {
        self.attention.load(Ordering::Relaxed)
    }

    pub(crate) fn take_attention(&self) -> bool {
        self.go.store(1, Ordering::SeqCst);
        self.attention.swap(false, Ordering::SeqCst)
    }

    fn want_attention(&self) {
        self.attention.store(true, Ordering::SeqCst);
        self.go.store(0, Ordering::SeqCst);
        // One kick ends the stay.
        if self.is_native.load(Ordering::SeqCst)
            && self.is_native.swap(false, Ordering::SeqCst)
            && let Some(native) = self.native.get()
        {
            native.kick();
        }
    }

    /// Host address of a quadword that is zero while somebody wants attention.
    pub(crate) fn go_address(&self) -> u64 {
        self.go.as_ptr().expose_provenance() as u64
    }

    /// Makes the vCPU look, and wakes it.
    pub(crate) fn attract(&self) {
        self.want_attention();
        self.sleeper.wake();
    }

    fn request(&self, bit: u32) {
        self.requests.fetch_or(bit, Ordering::SeqCst);
        self.attract();
    }

    pub(crate) fn take_kick(&self) -> bool {
        self.requests.fetch_and(!KICK, Ordering::SeqCst) & KICK != 0
    }

    pub(crate) fn kick_pending(&self) -> bool {
        self.requests.load(Ordering::SeqCst) & KICK != 0
    }

    pub(crate) fn take_nmi(&self) -> bool {
        self.requests.fetch_and(!NMI, Ordering::SeqCst) & NMI != 0
    }

    pub(crate) fn nmi_pending(&self) -> bool {
        self.requests.load(Ordering::SeqCst) & NMI != 0
    }

    /// Another vCPU wrote to a page that holds code.
    pub(crate) fn post_code_store(&self, store: CodeStore) {
        let mut stores = self.code_stores.lock().unwrap_or_else(PoisonError::into_inner);
        if stores.len() < MAX_CODE_STORES {
            stores.push(store);
        } else {
            // One that covers everything.
            stores.clear();
            stores.push(CodeStore { gpa: 0, bytes: u64::MAX });
        }
        drop(stores);
        self.attract();
    }

    pub(crate) fn take_code_stores(&self) -> Vec<CodeStore> {
        std::mem::take(&mut *self.code_stores.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Says that guest memory may be accessed from now on. The epoch has to be looked at afterwards.
    pub(crate) fn enter_guest(&self) {
        self.in_guest.store(true, Ordering::SeqCst);
    }

    pub(crate) fn leave_guest(&self) {
        self.in_guest.store(false, Ordering::SeqCst);
    }

    /// Says that nothing older than `epoch` is cached.
    pub(crate) fn saw(&self, epoch: u64) {
        self.seen.store(epoch, Ordering::SeqCst);
    }

    pub(crate) fn last_seen(&self) -> u64 {
        self.seen.load(Ordering::SeqCst)
    }

    /// Whether nothing older than `epoch` is cached, or the vCPU is out of the guest.
    pub(crate) fn has_seen(&self, epoch: u64) -> bool {
        !self.in_guest.load(Ordering::SeqCst) || self.seen.load(Ordering::SeqCst) >= epoch
    }

    /// Waits until the vCPU has seen `epoch` or is out of the guest.
    pub(crate) fn wait_for(&self, epoch: u64) {
        self.wait_until(|signals| signals.has_seen(epoch));
    }

    /// Waits until the vCPU is out of the guest. What keeps it out is to be set before.
    pub(crate) fn wait_until_outside(&self) {
        self.wait_until(|signals| !signals.in_guest.load(Ordering::SeqCst));
    }

    fn wait_until(&self, done: impl Fn(&Self) -> bool) {
        let mut spins = 0_u32;
        while !done(self) {
            self.want_attention();
            spins += 1;
            if spins < 64 {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }

    /// Sleeps until `awake`, at most until `timeout` has passed; whether it is awake.
    pub(crate) fn sleep(&self, timeout: Option<Duration>, awake: impl Fn(&Self) -> bool) -> bool {
        self.sleeper.sleep(timeout, || awake(self))
    }
}

#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
/// See [`Signals::enter_native`].
#[derive(Debug)]
pub(crate) struct InNative(Arc<Signals>);

#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
impl InNative {
    /// Says so again, after a kick that somebody may have come late with; false if somebody wants attention.
    pub(crate) fn stays(&self) -> bool {
        self.0.is_native.store(true, Ordering::SeqCst);
        !self.0.attention.load(Ordering::SeqCst)
    }
}

#[cfg(all(feature = "kvm", target_os = "linux", target_arch = "x86_64"))]
impl Drop for InNative {
    fn drop(&mut self) {
        self.0.is_native.store(false, Ordering::SeqCst);
    }
}

/// The handle; a weak reference, so that a forgotten handle keeps nothing alive.
#[derive(Debug)]
pub(crate) struct Handle(pub(crate) Weak<Signals>);

impl Handle {
    pub(crate) fn new(signals: &Arc<Signals>) -> Self {
        Self(Arc::downgrade(signals))
    }
}

impl VcpuHandle for Handle {
    fn kick(&self) {
        if let Some(signals) = self.0.upgrade() {
            signals.request(KICK);
        }
    }

    fn nmi(&self) -> Result<()> {
        if let Some(signals) = self.0.upgrade() {
            signals.request(NMI);
        }
        Ok(())
    }

    fn set_intr(&self, asserted: bool) -> Result<()> {
        let Some(signals) = self.0.upgrade() else { return Ok(()) };
        signals.intr.set(asserted);
        signals.attract();
        Ok(())
    }
}
