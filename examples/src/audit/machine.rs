//! What a virtual machine's monitor writes down about it.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use vmm_audit::collector::Attached;
use vmm_audit::event::{Launch, Outcome, Party};
use vmm_audit::hooks::cpu::Machine;
use vmm_audit::hooks::devices::misbehaviour;

use super::LogProcess;

/// How long the launch may take to get to the disk.
const LAUNCH_WITHIN: Duration = Duration::from_secs(30);

/// Who is told why a device gave up.
pub type Failure = Box<dyn Fn(&dyn Error) + Send + Sync>;

/// The same for each device, by its name.
pub type OnFailure = Arc<dyn Fn(&str) -> Failure + Send + Sync>;

/// A machine's own ring. Dropped, it says that the machine is gone.
pub struct MachineLog {
    attached: Attached,
    machine: Machine,
    vm: Party,
}

impl MachineLog {
    /// For `vm`, in the log of that process.
    ///
    /// # Errors
    /// If the ring is not taken.
    pub fn new(log: &LogProcess, vm: Party) -> Result<Self> {
        let attached = log.attach(&vm)?;
        let machine = Machine::new(attached.emitter().clone(), vm.clone());
        Ok(Self { attached, machine, vm })
    }

    /// What hears of its vCPUs.
    #[must_use]
    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    /// Writes down drivers that break the rules.
    #[must_use]
    pub fn on_failure(&self) -> OnFailure {
        let (emitter, vm) = (self.attached.emitter().clone(), self.vm.clone());
        Arc::new(move |device: &str| -> Failure {
            Box::new(misbehaviour(emitter.clone(), vm.clone(), device))
        })
    }

    /// Says that the machine starts, and waits until the disk has that.
    ///
    /// # Errors
    /// If it cannot be written down: then it must not start.
    pub fn launch(&self, launch: &Launch) -> Result<()> {
        let receipt = self.machine.launch(launch).context("the launch cannot be written to the audit log")?;
        receipt.wait(LAUNCH_WITHIN).context("the launch did not get to the audit log")?;
        Ok(())
    }

    /// Says how the machine ended.
    pub fn ended(self, outcome: Outcome, reason: &str) {
        self.machine.ended(outcome, reason);
    }
}
