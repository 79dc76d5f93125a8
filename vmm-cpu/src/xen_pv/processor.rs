//! What others may ask of a virtual processor: events, kicks, flushes, starts, its run state.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use super::abi::vcpu::{RunstateInfo, VcpuGuestContext, runstate};
use super::engine::EngineHandle;

/// Outside of the guest and not asleep: it looks for news before it enters.
const OUTSIDE: u8 = 0;
/// In the guest, or about to be.
const GUEST: u8 = 1;
/// Asleep, or about to be.
const ASLEEP: u8 = 2;

/// A virtual processor as other threads see it.
#[derive(Debug)]
pub(crate) struct Processor {
    /// Guest-physical address of its `vcpu_info`.
    info: AtomicU64,
    info_registered: AtomicBool,
    place: AtomicU8,
    polling: AtomicBool,
    /// A wake-up that it has not seen.
    token: Mutex<bool>,
    wake: Condvar,
    kicked: AtomicBool,
    handle: OnceLock<Arc<dyn EngineHandle>>,
    nmi: AtomicBool,
    up: AtomicBool,
    start: Mutex<Option<Box<VcpuGuestContext>>>,
    initialised: AtomicBool,
    runstate: Mutex<RunstateInfo>,
    /// Guest-virtual address where the guest wants a copy of it, 0 for none.
    runstate_area: AtomicU64,
    /// The same for the time information.
    time_area: AtomicU64,
}

impl Processor {
    pub(crate) fn new(info: u64) -> Self {
        Self {
            info: AtomicU64::new(info),
            info_registered: AtomicBool::new(false),
            place: AtomicU8::new(OUTSIDE),
            polling: AtomicBool::new(false),
            token: Mutex::new(false),
            wake: Condvar::new(),
            kicked: AtomicBool::new(false),
            handle: OnceLock::new(),
            nmi: AtomicBool::new(false),
            up: AtomicBool::new(false),
            start: Mutex::new(None),
            initialised: AtomicBool::new(false),
            runstate: Mutex::new(RunstateInfo { state: runstate::OFFLINE, ..Default::default() }),
            runstate_area: AtomicU64::new(0),
            time_area: AtomicU64::new(0),
        }
    }

    pub(crate) fn info(&self) -> u64 {
        self.info.load(Ordering::Acquire)
    }

    /// Moves the `vcpu_info`, which is possible once. Returns whether it was.
    pub(crate) fn move_info(&self, info: u64) -> bool {
        if self.info_registered.swap(true, Ordering::AcqRel) {
            return false;
        }
        self.info.store(info, Ordering::Release);
        true
    }

    pub(crate) fn info_is_registered(&self) -> bool {
        self.info_registered.load(Ordering::Acquire)
    }

    pub(crate) fn set_handle(&self, handle: Arc<dyn EngineHandle>) {
        self.handle.get_or_init(|| handle);
    }

    /// It is about to enter the guest: from here on news are worth a kick. It looks for them after this.
    pub(crate) fn enter(&self) {
        self.place.store(GUEST, Ordering::SeqCst);
    }

    pub(crate) fn leave(&self) {
        self.place.store(OUTSIDE, Ordering::SeqCst);
    }

    /// There is news for it.
    pub(crate) fn notify(&self) {
        match self.place.load(Ordering::SeqCst) {
            GUEST => {
                if let Some(handle) = self.handle.get() {
                    handle.kick();
                }
            }
            ASLEEP => self.unpark(),
            _ => {}
        }
    }

    /// Somebody outside of the domain wants its attention.
    pub(crate) fn kick(&self) {
        self.kicked.store(true, Ordering::SeqCst);
        if let Some(handle) = self.handle.get() {
            handle.kick();
        }
        self.unpark();
    }

    /// Whether there was a kick since the last call.
    pub(crate) fn take_kick(&self) -> bool {
        self.kicked.swap(false, Ordering::SeqCst)
    }

    pub(crate) fn is_kicked(&self) -> bool {
        self.kicked.load(Ordering::SeqCst)
    }

    fn unpark(&self) {
        *lock(&self.token) = true;
        self.wake.notify_all();
    }

    /// Sleeps until there is news, at most `timeout`. `ready` is asked once more after everybody knows that this
    /// one sleeps.
    pub(crate) fn park(&self, timeout: Option<Duration>, ready: impl FnOnce() -> bool) {
        self.place.store(ASLEEP, Ordering::SeqCst);
        if !ready() {
            let token = lock(&self.token);
            let mut token = match timeout {
                Some(timeout) => self
                    .wake
                    .wait_timeout_while(token, timeout, |token| !*token)
                    .map_or_else(|poisoned| poisoned.into_inner().0, |(token, _)| token),
                None => self.wake.wait_while(token, |token| !*token).unwrap_or_else(PoisonError::into_inner),
            };
            *token = false;
        }
        self.place.store(OUTSIDE, Ordering::SeqCst);
    }

    pub(crate) fn set_polling(&self, polling: bool) {
        self.polling.store(polling, Ordering::SeqCst);
    }

    /// An event became pending, masked or not: a virtual processor that polls looks whether it is one of its.
    pub(crate) fn wake_poller(&self) {
        if self.polling.load(Ordering::SeqCst) {
            self.unpark();
        }
    }

    /// Lets it forget cached translations.
    pub(crate) fn flush(&self) {
        if let Some(handle) = self.handle.get() {
            handle.flush();
        }
    }

    pub(crate) fn send_nmi(&self) {
        self.nmi.store(true, Ordering::SeqCst);
        self.notify();
    }

    pub(crate) fn has_nmi(&self) -> bool {
        self.nmi.load(Ordering::SeqCst)
    }

    pub(crate) fn take_nmi(&self) -> bool {
        self.nmi.swap(false, Ordering::SeqCst)
    }

    /// Stores where it starts. Returns whether it had no start before.
    pub(crate) fn initialise(&self, context: Option<Box<VcpuGuestContext>>) -> bool {
        if self.initialised.swap(true, Ordering::AcqRel) {
            return false;
        }
        *lock(&self.start) = context;
        true
    }

    pub(crate) fn is_initialised(&self) -> bool {
        self.initialised.load(Ordering::Acquire)
    }

    pub(crate) fn take_start(&self) -> Option<Box<VcpuGuestContext>> {
        lock(&self.start).take()
    }

    pub(crate) fn is_up(&self) -> bool {
        self.up.load(Ordering::SeqCst)
    }

    pub(crate) fn set_up(&self, up: bool) {
        self.up.store(up, Ordering::SeqCst);
        self.unpark();
    }

    /// Goes over to a run state at system time `now`.
    pub(crate) fn set_runstate(&self, state: u32, now: u64) {
        let mut info = lock(&self.runstate);
        let past = now.saturating_sub(info.state_entry_time);
        let old = info.state;
        if let Some(time) = info.time.get_mut(old as usize) {
            *time = time.saturating_add(past);
        }
        info.state = state;
        info.state_entry_time = now;
    }

    /// The run state, with the time in it up to `now`.
    pub(crate) fn runstate(&self, now: u64) -> RunstateInfo {
        let mut info = *lock(&self.runstate);
        let past = now.saturating_sub(info.state_entry_time);
        if let Some(time) = info.time.get_mut(info.state as usize) {
            *time = time.saturating_add(past);
        }
        info
    }

    pub(crate) fn runstate_area(&self) -> Option<u64> {
        Some(self.runstate_area.load(Ordering::Acquire)).filter(|area| *area != 0)
    }

    pub(crate) fn set_runstate_area(&self, area: u64) {
        self.runstate_area.store(area, Ordering::Release);
    }

    pub(crate) fn time_area(&self) -> Option<u64> {
        Some(self.time_area.load(Ordering::Acquire)).filter(|area| *area != 0)
    }

    pub(crate) fn set_time_area(&self, area: u64) {
        self.time_area.store(area, Ordering::Release);
    }

    /// The run state as it was entered.
    pub(crate) fn runstate_as_entered(&self) -> RunstateInfo {
        *lock(&self.runstate)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(feature = "snapshot")]
mod saved;
