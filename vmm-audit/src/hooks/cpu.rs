//! Launch and end of a virtual machine (feature `vmm-cpu`).

use vmm_cpu::{Error, Halt, VcpuEvents, VcpuExit};

use super::emit;
use crate::event::{Action, Event, Kind, Launch, Object, ObjectClass, Outcome, Party};
use crate::pipeline::{Emitter, Receipt, Refused};

/// Writes down what becomes of a virtual machine's processors.
///
/// ```no_run
/// # fn f(emitter: vmm_audit::pipeline::Emitter, threads: vmm_cpu::VcpuThreads) -> Result<(), Box<dyn std::error::Error>> {
/// use std::sync::Arc;
/// use vmm_audit::event::{Launch, Party};
/// use vmm_audit::hooks::cpu::Machine;
///
/// let machine = Machine::new(emitter, Party::vm(0x1234, 1));
/// machine.launch(&Launch::new().kernel(b"bzImage").command_line("console=ttyS0").vmm()?)?;
/// threads.observe(Arc::new(machine));
/// threads.resume();
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Machine {
    emitter: Emitter,
    vm: Party,
}

impl Machine {
    /// `emitter` is the machine's own; `vm` is who it is.
    pub fn new(emitter: Emitter, vm: Party) -> Self {
        Self { emitter, vm }
    }

    /// Says that the machine starts, from what was measured. To be called before it runs; its
    /// [digest](Launch::digest) is what `vmm_policy::SubjectSpec::digest` takes.
    ///
    /// # Errors
    /// If that cannot be written down: the machine must not run then.
    pub fn launch(&self, launch: &Launch) -> Result<Receipt, Refused> {
        self.emitter.admit(&Event::launch(self.vm.clone(), launch).outcome(Outcome::Success))
    }

    /// Says that the machine was reset, by whom `reason` says.
    pub fn reset(&self, reason: &str) {
        emit(&self.emitter, &self.event(Kind::Reset).reason(reason));
    }

    /// Says that the machine has ended, and why.
    pub fn ended(&self, outcome: Outcome, reason: &str) {
        emit(&self.emitter, &self.event(Kind::Shutdown).outcome(outcome).reason(reason));
    }

    fn event(&self, kind: Kind) -> Event {
        Event::new(kind).subject(self.vm.clone())
    }
}

impl VcpuEvents for Machine {
    fn stopped(&self, exit: &VcpuExit) {
        let vcpu = Object::numbered(ObjectClass::Vcpu, exit.index.into());
        let event = match &exit.reason {
            Ok(Halt::Reset) => self.event(Kind::Reset).object(vcpu).outcome(Outcome::Success),
            Ok(Halt::Shutdown) => self.event(Kind::Shutdown).object(vcpu).outcome(Outcome::Success),
            // For a debugger, or to be run again.
            Ok(_) => return,
            Err(error @ Error::ThreadPanicked { .. }) => {
                let event = self.event(Kind::Shutdown).object(vcpu).outcome(Outcome::Failed);
                event.reason(error.to_string())
            }
            Err(error) => {
                let event = self.event(Kind::EmulationFailure).object(vcpu).action(Action::Execute);
                event.outcome(Outcome::Failed).reason(error.to_string())
            }
        };
        emit(&self.emitter, &event);
    }
}
