//! The ABI's side of one virtual processor: what it does with an exit of the engine, and what it does before the engine
//! goes on.

use std::sync::Arc;
use std::time::Duration;

use super::abi::sched::ShutdownReason;
use super::abi::vcpu::{TrapInfo, runstate};
use super::abi::{shared_info, virq, vm_assist};
use super::domain::Domain;
use super::emulate::CR4_AT_START;
use super::engine::{Engine, EngineExit, FastPath, GuestMode};
use super::processor::Processor;
use super::trap::{Bounce, PAGE_FAULT};
use crate::error::Result;
use vmm_memory::vm_memory::GuestAddress;

/// What becomes of a virtual processor after an exit.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Action {
    /// It goes on.
    Continue,
    /// It goes on, and lets others run first.
    Yield,
    /// It waits: [`VcpuAbi::wait`].
    Block,
    /// It went offline, until another one starts it.
    Offline,
    /// The domain shut down.
    Shutdown(ShutdownReason),
    /// The guest did what leaves it no way to go on. The domain shut down with [`ShutdownReason::Crash`].
    Crash(String),
}

/// Why [`VcpuAbi::wait`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Wake {
    /// There is something to do for the guest.
    Ready,
    /// [`Domain::kick`].
    Kicked,
    /// The domain shut down.
    Shutdown(ShutdownReason),
}

/// Entry points of the guest kernel beside its traps.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Callback {
    pub(crate) rip: u64,
    pub(crate) masks_events: bool,
}

/// Registers that the guest kernel believes to have.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Control {
    pub(crate) task_switched: bool,
    pub(crate) cr2: u64,
    pub(crate) cr4: u64,
    pub(crate) iopl: u64,
}

/// The port set that a virtual processor polls.
#[derive(Clone, Debug, Default)]
pub(crate) struct Polling {
    pub(crate) ports: Vec<u32>,
    pub(crate) until: Option<u64>,
}

/// The ABI's state of one virtual processor, owned by the thread that runs it.
#[derive(Debug)]
pub struct VcpuAbi {
    pub(crate) domain: Arc<Domain>,
    pub(crate) index: u32,
    pub(crate) traps: Box<[TrapInfo; 256]>,
    pub(crate) kernel_ss: u16,
    pub(crate) event: Callback,
    pub(crate) failsafe: Callback,
    pub(crate) syscall: Callback,
    pub(crate) syscall32: Callback,
    pub(crate) sysenter: Callback,
    pub(crate) nmi: Callback,
    pub(crate) gdt: Vec<u64>,
    pub(crate) gdt_entries: u64,
    pub(crate) control: Control,
    /// System times.
    pub(crate) singleshot: Option<u64>,
    pub(crate) periodic: Option<(u64, u64)>,
    /// A timer was set, or may have run out.
    pub(crate) timers_due: bool,
    pub(crate) polling: Option<Polling>,
    pub(crate) time_published: bool,
    /// It goes on by itself; else [`VcpuAbi::start`] comes before anything.
    pub(crate) online: bool,
}

impl VcpuAbi {
    /// The state of virtual processor `index`, which starts with number 0 running and all others offline.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`](crate::Error::InvalidArgument) if the domain has no such virtual processor.
    pub fn new(domain: Arc<Domain>, index: u32) -> Result<Self> {
        let limit = domain.vcpus();
        let processor = domain.processor(index).ok_or_else(|| {
            crate::Error::invalid("virtual processor", index, format_args!("less than {limit}"))
        })?;
        // In a restored domain it is what it was, and is told by its own state.
        let starts = index == 0 && domain.republished.is_none();
        if starts {
            processor.initialise(None);
            processor.set_up(true);
            processor.set_runstate(runstate::RUNNING, 0);
        }
        Ok(Self {
            domain,
            index,
            traps: Box::new([TrapInfo::default(); 256]),
            kernel_ss: 0,
            event: Callback::default(),
            failsafe: Callback::default(),
            syscall: Callback::default(),
            syscall32: Callback::default(),
            sysenter: Callback::default(),
            nmi: Callback::default(),
            gdt: Vec::new(),
            gdt_entries: 0,
            control: Control { task_switched: false, cr2: 0, cr4: CR4_AT_START, iopl: 0 },
            singleshot: None,
            periodic: None,
            timers_due: false,
            polling: None,
            time_published: false,
            online: starts,
        })
    }

    /// The domain.
    pub fn domain(&self) -> &Arc<Domain> {
        &self.domain
    }

    /// Whether it is online.
    pub fn is_up(&self) -> bool {
        self.processor().is_some_and(Processor::is_up)
    }

    /// Whether there was a [`Domain::kick`] since the last call, or since [`VcpuAbi::wait`] reported one.
    pub fn take_kick(&self) -> bool {
        self.processor().is_some_and(Processor::take_kick)
    }

    pub(crate) fn processor(&self) -> Option<&Processor> {
        self.domain.processor(self.index)
    }

    /// Guest-physical address of the `vcpu_info`.
    pub(crate) fn info(&self) -> u64 {
        self.processor().map_or(0, Processor::info)
    }

    pub(crate) fn now(&self, engine: &mut dyn Engine) -> Result<u64> {
        Ok(self.domain.clock.system_time(engine.time_stamp()?))
    }

    /// Does what an exit asks for.
    ///
    /// # Errors
    /// Only what the engine's host refuses.
    pub fn handle_exit(&mut self, engine: &mut dyn Engine, exit: EngineExit) -> Result<Action> {
        if let Some(processor) = self.processor() {
            processor.leave();
        }
        let action = match exit {
            EngineExit::Interrupted => {
                // Maybe for the deadline.
                self.timers_due = true;
                Action::Continue
            }
            EngineExit::Crashed => Action::Crash("the guest destroyed what it runs on".to_owned()),
            EngineExit::Syscall if engine.context().mode == GuestMode::Kernel => self.hypercall(engine)?,
            EngineExit::Syscall => self.user_syscall(engine)?,
            EngineExit::Exception { vector, error_code, address } => {
                self.exception(engine, vector, error_code, address)?
            }
        };
        Ok(self.conclude(action))
    }

    /// Records a crash, and turns what others decided meanwhile into this one's action.
    fn conclude(&self, action: Action) -> Action {
        match action {
            Action::Crash(text) => {
                self.domain.shut_down(ShutdownReason::Crash);
                Action::Crash(text)
            }
            Action::Shutdown(reason) => {
                self.domain.shut_down(reason);
                Action::Shutdown(self.domain.shutdown_reason().unwrap_or(reason))
            }
            other => self.domain.shutdown_reason().map_or(other, Action::Shutdown),
        }
    }

    /// To be called before each [`Engine::run`]: lets timers run out and delivers what is pending. Anything but
    /// [`Action::Continue`] means that the engine must not run.
    ///
    /// # Errors
    /// Only what the engine's host refuses.
    pub fn before_entry(&mut self, engine: &mut dyn Engine) -> Result<Action> {
        if !self.time_published {
            self.publish_time(engine)?;
        }
        if std::mem::take(&mut self.timers_due) {
            self.expire_timers(engine)?;
        }
        if let Some(processor) = self.processor() {
            processor.enter();
        }
        // Only now: whoever has news from here on kicks.
        let action = self.deliver(engine)?;
        engine.set_fast_path(&self.fast_path());
        Ok(self.conclude(action))
    }

    /// What an engine may do of this by itself.
    fn fast_path(&self) -> FastPath {
        let page_fault = self.traps.get(usize::from(PAGE_FAULT)).copied().unwrap_or_default();
        FastPath {
            // Its frames have no I/O privilege level.
            enabled: !self.domain.has_assist(vm_assist::ARCHITECTURAL_IOPL),
            syscall: self.syscall.rip,
            syscall_masks: self.syscall.masks_events,
            page_fault: page_fault.address,
            page_fault_masks: page_fault.masks_events(),
            vcpu_info: GuestAddress(self.info()),
        }
    }

    fn deliver(&mut self, engine: &mut dyn Engine) -> Result<Action> {
        if self.nmi.rip != 0 && self.processor().is_some_and(|processor| processor.take_nmi()) {
            return self.bounce(engine, Bounce { rip: self.nmi.rip, error_code: None, mask: true });
        }
        if self.upcall_is_due() {
            if self.event.rip == 0 {
                return Ok(Action::Continue);
            }
            return self.bounce(engine, Bounce { rip: self.event.rip, error_code: None, mask: true });
        }
        Ok(Action::Continue)
    }

    /// Whether an event waits and is not masked.
    pub(crate) fn upcall_is_due(&self) -> bool {
        let (memory, info) = (&self.domain.memory, self.info());
        memory.load_byte(info + shared_info::UPCALL_PENDING).is_ok_and(|pending| pending != 0)
            && memory.load_byte(info + shared_info::UPCALL_MASK).is_ok_and(|mask| mask == 0)
    }

    /// When a timer runs out next, in system time. The engine is to be kicked then: timers are looked at when they are set,
    /// after [`EngineExit::Interrupted`], and while [`VcpuAbi::wait`] waits.
    pub fn deadline(&self) -> Option<u64> {
        self.singleshot.into_iter().chain(self.periodic.map(|(_, next)| next)).min()
    }

    fn expire_timers(&mut self, engine: &mut dyn Engine) -> Result<()> {
        let now = self.now(engine)?;
        let mut due = false;
        if self.singleshot.is_some_and(|at| at <= now) {
            self.singleshot = None;
            due = true;
        }
        if let Some((period, next)) = self.periodic
            && next <= now
        {
            // Ticks that were missed are missed.
            self.periodic = Some((period, now.saturating_add(period)));
            due = true;
        }
        if due {
            self.domain.raise_virq(self.index, virq::TIMER);
        }
        Ok(())
    }

    /// Waits as the guest asked for: until an event can be delivered, or, offline, until it is brought up (then
    /// [`VcpuAbi::start`] comes next); or for [`Domain::kick`].
    ///
    /// # Errors
    /// Only what the engine's host refuses.
    pub fn wait(&mut self, engine: &mut dyn Engine) -> Result<Wake> {
        engine.publish_entries()?;
        let start = self.now(engine)?;
        let state = if self.online { runstate::BLOCKED } else { runstate::OFFLINE };
        if let Some(processor) = self.processor() {
            processor.set_runstate(state, start);
            processor.set_polling(self.polling.is_some());
        }
        let wake = loop {
            self.expire_timers(engine)?;
            if let Some(reason) = self.domain.shutdown_reason() {
                break Wake::Shutdown(reason);
            }
            let now = self.now(engine)?;
            if self.is_ready(now) {
                break Wake::Ready;
            }
            let domain = Arc::clone(&self.domain);
            let Some(processor) = domain.processor(self.index) else { break Wake::Ready };
            if processor.take_kick() {
                break Wake::Kicked;
            }
            let until = self
                .deadline()
                .into_iter()
                .chain(self.polling.as_ref().and_then(|polling| polling.until))
                .min();
            let timeout = until.map(|until| Duration::from_nanos(until.saturating_sub(now)));
            processor.park(timeout, || {
                self.is_ready(now) || processor.is_kicked() || self.domain.shutdown_reason().is_some()
            });
        };
        // A call that waited for ports comes back however the wait ended, as Xen's may.
        self.polling = None;
        let end = self.now(engine)?;
        let state = if self.online { runstate::RUNNING } else { runstate::OFFLINE };
        if let Some(processor) = self.processor() {
            processor.set_polling(false);
            processor.set_runstate(state, end);
        }
        self.publish_runstate(engine);
        Ok(wake)
    }

    /// Whether waiting has an end at system time `now`.
    fn is_ready(&self, now: u64) -> bool {
        if !self.online {
            return self.is_up();
        }
        if self.upcall_is_due() || (self.nmi.rip != 0 && self.processor().is_some_and(Processor::has_nmi)) {
            return true;
        }
        self.polling.as_ref().is_some_and(|polling| {
            polling.until.is_some_and(|until| until <= now)
                || polling.ports.iter().any(|port| self.domain.is_pending(*port).unwrap_or(true))
        })
    }

    /// Copies the run state to where the guest wants it.
    pub(crate) fn publish_runstate(&self, engine: &mut dyn Engine) {
        use super::memory::element;
        let Some(processor) = self.processor() else { return };
        let Some(area) = processor.runstate_area() else { return };
        let mut info = processor.runstate_as_entered();
        let space = self.domain.memory.space(engine.kernel_root());
        let flagged = self.domain.has_assist(vm_assist::RUNSTATE_UPDATE_FLAG);
        // An area that the guest unmapped gets nothing.
        let entry_time = element::<u64>(area, 1);
        let written = if flagged {
            info.state_entry_time |= runstate::UPDATE;
            space.write(area, &info).and_then(|()| {
                let done = info.state_entry_time & !runstate::UPDATE;
                space.write(entry_time?, &done)
            })
        } else {
            space.write(area, &info)
        };
        if written.is_err() {
            tracing::debug!(area, "no run state could be written");
        }
    }
}

impl Domain {
    /// Makes virtual processor `index` come back from the engine and from [`VcpuAbi::wait`].
    pub fn kick(&self, index: u32) {
        if let Some(processor) = self.processor(index) {
            processor.kick();
        }
    }
}
