//! Hypercalls: number in RAX, arguments in RDI, RSI, RDX, R10, R8, R9, result in RAX.
//!
//! Threat model: every argument was chosen by the guest. A call does a bounded amount of work, then has itself made again
//! with what is left, so that kicks and events come through.

mod console;
mod event;
mod grant;
mod memory;
mod misc;
mod mmu;
mod mmuext;
mod multicall;
mod sched;
pub(crate) mod vcpu;
mod version;

use std::sync::Arc;

use super::abi::errno::Errno;
use super::abi::nr;
use super::domain::Domain;
use super::engine::Engine;
use super::memory::AddressSpace;
use super::vcpu_abi::{Action, VcpuAbi};
use crate::error::Result;

/// Steps of lists (page-table updates, calls of a multicall) that one call takes.
const BUDGET: u32 = 1024;

/// Page tables that one call reads for the first time.
const TABLES: u32 = 512;

/// Those whose first argument is an int in Xen's interface, so that compilers may leave anything above it.
const FIRST_IS_INT: [u64; 15] = [
    nr::FPU_TASKSWITCH,
    nr::SCHED_OP_COMPAT,
    nr::SET_DEBUGREG,
    nr::GET_DEBUGREG,
    nr::XEN_VERSION,
    nr::CONSOLE_IO,
    nr::GRANT_TABLE_OP,
    nr::VM_ASSIST,
    nr::VCPU_OP,
    nr::SET_SEGMENT_BASE,
    nr::NMI_OP,
    nr::SCHED_OP,
    nr::CALLBACK_OP,
    nr::EVENT_CHANNEL_OP,
    nr::PHYSDEV_OP,
];

/// What a hypercall that did not fail leads to.
#[derive(Debug)]
pub(crate) enum Done {
    /// RAX becomes this.
    Value(u64),
    /// RAX becomes 0, and this follows.
    Then(Action),
    /// The call is made again with the arguments as they are now.
    Again,
    /// The registers are set.
    Registers(Action),
}

impl Done {
    pub(crate) const OK: Self = Self::Value(0);
}

/// Why a hypercall was not done.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The guest hears of it.
    Guest(Errno),
    /// The engine's host failed.
    Host(crate::Error),
    /// This call has worked enough. What it has done stays done, so the step that said so is to be made again.
    Later,
}

impl From<Errno> for Failure {
    fn from(errno: Errno) -> Self {
        Self::Guest(errno)
    }
}

impl From<crate::Error> for Failure {
    fn from(error: crate::Error) -> Self {
        Self::Host(error)
    }
}

pub(crate) type Outcome = Result<Done, Failure>;

/// A hypercall under way.
#[derive(Debug)]
pub(crate) struct Call<'a> {
    pub(crate) vcpu: &'a mut VcpuAbi,
    pub(crate) engine: &'a mut dyn Engine,
    pub(crate) domain: Arc<Domain>,
    budget: u32,
    tables: u32,
}

impl<'a> Call<'a> {
    pub(crate) fn new(vcpu: &'a mut VcpuAbi, engine: &'a mut dyn Engine) -> Self {
        let domain = Arc::clone(&vcpu.domain);
        Self { vcpu, engine, domain, budget: BUDGET, tables: TABLES }
    }
}

impl Call<'_> {
    /// The guest kernel's memory.
    pub(crate) fn space(&self) -> AddressSpace<'_> {
        self.domain.memory.space(self.engine.kernel_root())
    }

    /// Takes a step of a list. `false` when this call has taken enough of them.
    pub(crate) fn step(&mut self) -> bool {
        self.budget = self.budget.saturating_sub(1);
        self.budget != 0
    }

    /// A command that is not there.
    pub(crate) fn unknown(&self, nr: u64) -> Outcome {
        self.refused(nr, Errno::ENOSYS)
    }

    /// A command that is not there, and for which Xen has an error of its own.
    pub(crate) fn refused(&self, nr: u64, errno: Errno) -> Outcome {
        self.domain.count_unknown(nr);
        Err(errno.into())
    }

    /// Calls hypercall `nr`. What a multicall may not contain is not here.
    fn dispatch(&mut self, nr: u64, args: &mut [u64; 6]) -> Outcome {
        if FIRST_IS_INT.contains(&nr) {
            args[0] &= u64::from(u32::MAX);
        }
        match nr {
            nr::SET_TRAP_TABLE => self.set_trap_table(args),
            nr::MMU_UPDATE => self.mmu_update(args),
            nr::SET_GDT => self.set_gdt(args),
            nr::STACK_SWITCH => self.stack_switch(args),
            nr::SET_CALLBACKS => self.set_callbacks(args),
            nr::FPU_TASKSWITCH => self.fpu_taskswitch(args),
            nr::SCHED_OP_COMPAT => self.sched_op_compat(args),
            nr::SET_DEBUGREG => self.set_debugreg(args),
            nr::GET_DEBUGREG => self.get_debugreg(args),
            nr::UPDATE_DESCRIPTOR => self.update_descriptor(args),
            nr::MEMORY_OP => self.memory_op(args),
            nr::UPDATE_VA_MAPPING => self.update_va_mapping(args),
            nr::UPDATE_VA_MAPPING_OTHERDOMAIN => self.update_va_mapping_otherdomain(args),
            nr::SET_TIMER_OP => self.set_timer_op(args),
            nr::XEN_VERSION => self.xen_version(args),
            nr::CONSOLE_IO => self.console_io(args),
            nr::GRANT_TABLE_OP => self.grant_table_op(args),
            nr::VM_ASSIST => self.vm_assist(args),
            nr::VCPU_OP => self.vcpu_op(args),
            nr::SET_SEGMENT_BASE => self.set_segment_base(args),
            nr::MMUEXT_OP => self.mmuext_op(args),
            nr::NMI_OP => self.nmi_op(args),
            nr::SCHED_OP => self.sched_op(args),
            nr::CALLBACK_OP => self.callback_op(args),
            nr::EVENT_CHANNEL_OP => self.event_channel_op(args),
            nr::PHYSDEV_OP => self.physdev_op(args),
            _ => self.unknown(nr),
        }
    }
}

impl VcpuAbi {
    /// The hypercall that the guest kernel's registers ask for.
    pub(crate) fn hypercall(&mut self, engine: &mut dyn Engine) -> Result<Action> {
        let general = engine.context().general;
        let nr = general.rax;
        if nr == nr::IRET {
            return Ok(self.iret(engine));
        }
        let mut args = [general.rdi, general.rsi, general.rdx, general.r10, general.r8, general.r9];
        let mut call = Call::new(self, engine);
        let outcome = match nr {
            nr::MULTICALL => call.multicall(&mut args),
            _ => call.dispatch(nr, &mut args),
        };
        let general = &mut engine.context().general;
        match outcome {
            Ok(Done::Value(value)) => general.rax = value,
            Ok(Done::Then(action)) => {
                general.rax = 0;
                return Ok(action);
            }
            Ok(Done::Again) | Err(Failure::Later) => {
                // RIP goes back to the SYSCALL instruction.
                general.rip = general.rip.wrapping_sub(2);
                [general.rdi, general.rsi, general.rdx, general.r10, general.r8, general.r9] = args;
            }
            Ok(Done::Registers(action)) => return Ok(action),
            Err(Failure::Guest(errno)) => {
                tracing::trace!(nr, ?args, errno = errno.0, "hypercall failed");
                general.rax = errno.value();
            }
            Err(Failure::Host(error)) => return Err(error),
        }
        Ok(Action::Continue)
    }
}

#[cfg(test)]
mod tests;
