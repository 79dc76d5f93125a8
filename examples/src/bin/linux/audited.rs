//! The audit log of a run: what the guest was started from, the channels that opened, drivers that broke the rules, and how it ended.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use vmm_audit::collector::Attached;
use vmm_audit::event::{Launch, Outcome, Party};
use vmm_audit::hooks::devices::AuditedGate;
use vmm_cpu::{Hypervisor, VcpuEvents, VmConfig};
use vmm_devices::channel::{AllowAll, Gatekeeper};
use vmm_devices::platform::PlatformEvent;
use vmm_examples::audit::{LogProcess, MachineLog, OnFailure, collect};

use crate::end::End;
use crate::guest::Guest;

/// The log, with a source for the gate and one for the machine, whose first event is its launch.
pub(crate) struct Audited {
    log: LogProcess,
    gate: Attached,
    machine: MachineLog,
}

impl Audited {
    pub(crate) fn start(dir: &Path) -> Result<Self> {
        let log = LogProcess::start(dir, "--write-audit")?;
        let gate = log.attach(&Party::host("gate"))?;
        let machine = MachineLog::new(&log, Party::vm(std::process::id().into(), 1))?;
        Ok(Self { log, gate, machine })
    }

    /// Lets through what the user has named, and writes it down first.
    pub(crate) fn gatekeeper(&self) -> Gatekeeper {
        Gatekeeper::new(AuditedGate::new(AllowAll, self.gate.emitter().clone()))
    }

    pub(crate) fn on_failure(&self) -> OnFailure {
        self.machine.on_failure()
    }

    pub(crate) fn observer(&self) -> Arc<dyn VcpuEvents> {
        Arc::new(self.machine.machine().clone())
    }

    /// Writes down what the machine is started from: kernel, initial RAM disk, command line, CPU model, and this program.
    pub(crate) fn launch(&self, guest: &Guest, config: &VmConfig, hypervisor: &dyn Hypervisor) -> Result<()> {
        let mut launch = Launch::new().kernel(&guest.image);
        if let Some(initrd) = &guest.initrd {
            launch = launch.initrd(initrd);
        }
        let cpuid = config.cpu.resolve(hypervisor.supported_cpuid())?;
        let cpu = format!("{:x?}", cpuid.entries());
        let launch = launch.command_line(guest.command_line.trim()).cpu_model(cpu.as_bytes());
        self.machine.launch(&launch.vmm()?)
    }

    /// Writes down how it ended, and waits until the log is closed.
    pub(crate) fn end(self, platform: Option<PlatformEvent>, end: &Result<End>) -> Result<()> {
        let Self { log, gate, machine } = self;
        if let Some(PlatformEvent::Reset) = platform {
            machine.machine().reset("the guest asked the platform for it");
        }
        match (platform, end) {
            (Some(event), Ok(_)) => {
                machine.ended(Outcome::Success, &format!("the guest asked for {event:?}"))
            }
            (None, Ok(End::TimeIsUp)) => machine.ended(Outcome::Killed, "its time was up"),
            (None, Ok(End::User)) => machine.ended(Outcome::Killed, "the user ended it"),
            (None, Ok(_)) => machine.ended(Outcome::Success, "the guest ended"),
            (_, Err(error)) => machine.ended(Outcome::Failed, &format!("{error:#}")),
        }
        drop(gate);
        log.end("").map(drop)
    }
}

/// What the process that writes the log does.
pub(crate) fn write(dir: &Path) -> Result<()> {
    collect(dir, "linux.example/audit").map(drop)
}
