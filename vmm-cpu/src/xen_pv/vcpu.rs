//! A virtual processor of a domain, as the common traits show it: the loop between engine and ABI.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use vmm_memory::PAGE_SIZE;
use vmm_memory::vm_memory::GuestAddress;

use super::abi::sched::ShutdownReason;
use super::alarm::Alarm;
use super::domain::Domain;
use super::engine::{Engine, EngineExit, GuestMode, Mmu as _, Ring3};
use super::memory::{frame_of, is_canonical};
use super::vcpu_abi::{Action, VcpuAbi, Wake};
use crate::error::{Error, Result};
use crate::state::{CpuState, GeneralRegisters, Segment, SystemRegisters};
use crate::vcpu::{Halt, Vcpu, VcpuHandle, VcpuIo};

pub(super) mod msr {
    pub(in crate::xen_pv) const TSC: u32 = 0x10;
    pub(super) const FS_BASE: u32 = 0xc000_0100;
    pub(super) const GS_BASE: u32 = 0xc000_0101;
    pub(in crate::xen_pv) const KERNEL_GS_BASE: u32 = 0xc000_0102;
}

/// What left the guest, since the vCPU's creation.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    hypercalls: u64,
    system_calls: u64,
    page_faults: u64,
    exceptions: u64,
    interrupted: u64,
    blocks: u64,
}

/// A virtual processor of a paravirtual domain.
#[derive(Debug)]
pub(super) struct XenPvVcpu {
    pub(super) engine: Ring3,
    pub(super) abi: VcpuAbi,
    index: u32,
    alarm: Alarm,
    /// The deadline that the alarm is set for, in system time.
    armed: Option<u64>,
    counts: Counts,
    #[cfg_attr(not(feature = "snapshot"), allow(dead_code, reason = "there are no restored domains"))]
    pub(super) has_run: bool,
}

impl XenPvVcpu {
    pub(super) fn new(engine: Ring3, abi: VcpuAbi) -> Result<Self> {
        let index = abi.index;
        abi.domain().set_handle(index, engine.handle())?;
        let alarm = Alarm::new(index, engine.handle())?;
        Ok(Self { engine, abi, index, alarm, armed: None, counts: Counts::default(), has_run: false })
    }

    /// Lets the alarm ring when the next timer of the guest runs out.
    fn arm(&mut self) -> Result<()> {
        let deadline = self.abi.deadline();
        if deadline != self.armed {
            let left = match deadline {
                Some(deadline) => Some(deadline.saturating_sub(self.abi.now(&mut self.engine)?)),
                None => None,
            };
            self.alarm.set(left.and_then(|left| Instant::now().checked_add(Duration::from_nanos(left))));
            self.armed = deadline;
        }
        Ok(())
    }

    fn trace(&mut self, exit: EngineExit) {
        if tracing::enabled!(tracing::Level::TRACE) {
            let instructions =
                self.engine.exit_counts().into_iter().find(|(kind, _)| *kind == "instructions");
            let instructions = instructions.map_or(0, |(_, count)| count);
            let context = self.engine.context();
            let (mode, general) = (context.mode, context.general);
            let (rip, rax, rdi, rsi) = (general.rip, general.rax, general.rdi, general.rsi);
            tracing::trace!(
                vcpu = self.index,
                ?exit,
                ?mode,
                rip = format_args!("{rip:#x}"),
                rax,
                rdi = format_args!("{rdi:#x}"),
                rsi = format_args!("{rsi:#x}"),
                instructions,
                "exit"
            );
        }
    }

    fn count(&mut self, exit: EngineExit) {
        let counts = &mut self.counts;
        let counter = match exit {
            EngineExit::Syscall if self.engine.context().mode == GuestMode::Kernel => &mut counts.hypercalls,
            EngineExit::Syscall => &mut counts.system_calls,
            EngineExit::Exception { vector: 14, .. } => &mut counts.page_faults,
            EngineExit::Exception { .. } => &mut counts.exceptions,
            EngineExit::Interrupted | EngineExit::Crashed => &mut counts.interrupted,
        };
        *counter += 1;
    }

    /// What an action of the ABI means for the loop: `None` to go on.
    fn act(&mut self, action: Action) -> Result<Option<Halt>> {
        match action {
            Action::Continue => Ok(None),
            Action::Yield => {
                std::thread::yield_now();
                Ok(None)
            }
            Action::Block => {
                self.counts.blocks += 1;
                self.sleep()
            }
            // The loop looks whether it is up again.
            Action::Offline => Ok(None),
            Action::Shutdown(reason) => Ok(Some(halt(reason))),
            Action::Crash(why) => {
                tracing::warn!(vcpu = self.index, why, registers = %self.engine.context().general, "the domain crashed");
                Ok(Some(halt(ShutdownReason::Crash)))
            }
        }
    }

    fn sleep(&mut self) -> Result<Option<Halt>> {
        Ok(match self.abi.wait(&mut self.engine)? {
            Wake::Ready => None,
            Wake::Kicked => Some(Halt::Interrupted),
            Wake::Shutdown(reason) => Some(halt(reason)),
        })
    }
}

/// What a shutdown is to a monitor that knows no domains. [`XenPvVm::shutdown_reason`](super::XenPvVm::shutdown_reason)
/// tells all of it.
fn halt(reason: ShutdownReason) -> Halt {
    match reason {
        ShutdownReason::Reboot => Halt::Reset,
        _ => Halt::Shutdown,
    }
}

impl Vcpu for XenPvVcpu {
    fn index(&self) -> u32 {
        self.index
    }

    fn run(&mut self, _: &mut dyn VcpuIo) -> Result<Halt> {
        self.has_run = true;
        loop {
            if let Some(reason) = self.abi.domain().shutdown_reason() {
                return Ok(halt(reason));
            }
            if self.abi.take_kick() {
                return Ok(Halt::Interrupted);
            }
            let up = self.abi.start(&mut self.engine)?;
            let halt = if up {
                let action = self.abi.before_entry(&mut self.engine)?;
                match action {
                    Action::Continue => {
                        self.arm()?;
                        let exit = self.engine.run()?;
                        self.count(exit);
                        self.trace(exit);
                        if exit == EngineExit::Interrupted {
                            // The alarm may have rung a moment before its time.
                            self.armed = None;
                        }
                        let action = self.abi.handle_exit(&mut self.engine, exit)?;
                        self.act(action)?
                    }
                    other => self.act(other)?,
                }
            } else {
                self.sleep()?
            };
            if let Some(halt) = halt {
                return Ok(halt);
            }
        }
    }

    fn handle(&self) -> Arc<dyn VcpuHandle> {
        Arc::new(Handle { domain: Arc::downgrade(self.abi.domain()), index: self.index })
    }

    fn wait(&mut self, timeout: Option<Duration>) -> bool {
        // Blocking is part of `run`, so nothing but a kick is waited for here.
        let domain = Arc::clone(self.abi.domain());
        let Some(processor) = domain.processor(self.index) else { return false };
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        while !processor.is_kicked() {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return false;
            }
            processor.park(left, || processor.is_kicked());
        }
        true
    }

    fn registers(&mut self) -> Result<GeneralRegisters> {
        Ok(self.engine.context().general)
    }

    fn set_registers(&mut self, registers: &GeneralRegisters) -> Result<()> {
        self.engine.context().general = *registers;
        Ok(())
    }

    fn system_registers(&mut self) -> Result<SystemRegisters> {
        let context = *self.engine.context();
        let root = match context.mode {
            GuestMode::Kernel => Some(self.engine.kernel_root()),
            GuestMode::User => self.engine.user_root(),
        };
        let mut system = self.engine.system_registers();
        system.cr3 = root.map_or(0, |root| root.0);
        system.cr2 = self.abi.control.cr2;
        Ok(system)
    }

    fn set_system_registers(&mut self, registers: &SystemRegisters) -> Result<()> {
        let root = GuestAddress(registers.cr3);
        if root != self.engine.kernel_root() {
            self.abi.adopt_initial_root(&mut self.engine, root.0 / PAGE_SIZE)?;
        }
        let context = self.engine.context();
        let selectors =
            [&registers.cs, &registers.ss, &registers.ds, &registers.es, &registers.fs, &registers.gs];
        [context.cs, context.ss, context.ds, context.es, context.fs, context.gs] =
            selectors.map(|segment: &Segment| segment.selector);
        (context.fs_base, context.gs_base) = (registers.fs.base, registers.gs.base);
        Ok(())
    }

    fn msr(&mut self, index: u32) -> Result<u64> {
        let context = *self.engine.context();
        match index {
            msr::TSC => self.engine.time_stamp(),
            msr::FS_BASE => Ok(context.fs_base),
            msr::GS_BASE => Ok(context.gs_base),
            msr::KERNEL_GS_BASE => Ok(context.other_gs_base),
            _ => Err(no_msr(index)),
        }
    }

    fn set_msr(&mut self, index: u32, value: u64) -> Result<()> {
        if !is_canonical(value) {
            return Err(Error::invalid(
                "MSR",
                format_args!("{value:#x} in {index:#x}"),
                "a canonical address",
            ));
        }
        let context = self.engine.context();
        match index {
            msr::FS_BASE => context.fs_base = value,
            msr::GS_BASE => context.gs_base = value,
            msr::KERNEL_GS_BASE => context.other_gs_base = value,
            _ => return Err(no_msr(index)),
        }
        Ok(())
    }

    fn translate(&mut self, gva: u64) -> Result<Option<GuestAddress>> {
        let root = match self.engine.context().mode {
            GuestMode::Kernel => Some(self.engine.kernel_root()),
            GuestMode::User => self.engine.user_root(),
        };
        let Some(root) = root.filter(|_| is_canonical(gva)) else { return Ok(None) };
        let walk = self.abi.domain().memory.walk(root.0 / PAGE_SIZE, gva);
        let frame = walk.leaf().map(frame_of);
        Ok(frame.map(|frame| GuestAddress((frame * PAGE_SIZE) | gva & (PAGE_SIZE - 1))))
    }

    #[cfg(feature = "snapshot")]
    fn save(&mut self) -> Result<CpuState> {
        self.saved()
    }

    #[cfg(feature = "snapshot")]
    fn restore(&mut self, state: &CpuState) -> Result<()> {
        self.restore_saved(state)
    }

    #[cfg(not(feature = "snapshot"))]
    fn save(&mut self) -> Result<CpuState> {
        Err(Error::unsupported("saving a paravirtual vCPU", super::NO_SNAPSHOTS))
    }

    #[cfg(not(feature = "snapshot"))]
    fn restore(&mut self, _: &CpuState) -> Result<()> {
        Err(Error::unsupported("restoring a paravirtual vCPU", super::NO_SNAPSHOTS))
    }

    fn exit_counts(&self) -> Vec<(&'static str, u64)> {
        let counts = &self.counts;
        let mut all = vec![
            ("hypercall", counts.hypercalls),
            ("system call", counts.system_calls),
            ("page fault", counts.page_faults),
            ("other exception", counts.exceptions),
            ("interrupted", counts.interrupted),
            ("block", counts.blocks),
        ];
        all.extend(self.engine.fast_counts());
        // Of the engine's exits, each of which is one above, only the work in between is news.
        all.extend(self.engine.exit_counts().into_iter().filter(|(kind, _)| *kind == "instructions"));
        all
    }
}

fn no_msr(index: u32) -> Error {
    Error::invalid("MSR", format_args!("{index:#x}"), "a register of a paravirtual processor")
}

/// The handle; a weak reference, so that a forgotten handle keeps nothing alive.
#[derive(Debug)]
struct Handle {
    domain: Weak<Domain>,
    index: u32,
}

impl VcpuHandle for Handle {
    fn kick(&self) {
        if let Some(domain) = self.domain.upgrade() {
            domain.kick(self.index);
        }
    }

    fn nmi(&self) -> Result<()> {
        if let Some(domain) = self.domain.upgrade()
            && let Some(processor) = domain.processor(self.index)
        {
            processor.send_nmi();
        }
        Ok(())
    }

    fn set_intr(&self, _: bool) -> Result<()> {
        Err(Error::unsupported("driving INTR", "a paravirtual guest has event channels instead"))
    }
}
