//! The audit log of a run: what the guest was started from, the channels that opened, drivers that broke the rules, and how it ended. The one who
//! has started the program launches the machine and stops it, if it does not end by itself; what he wants is written down before it is done. He
//! needs nobody's leave: whoever may start the program may start the machine.

use std::path::Path;
use std::sync::Arc;

use anyhow::Result;
use vmm_audit::collector::Attached;
use vmm_audit::event::{Launch, Outcome, Party};
use vmm_audit::hooks::devices::AuditedGate;
use vmm_audit::verb::{Begun, Verb};
use vmm_cpu::{Hypervisor, VcpuEvents, VmConfig};
use vmm_devices::channel::{AllowAll, Gatekeeper};
use vmm_devices::platform::PlatformEvent;
use vmm_examples::audit::{LogProcess, MachineLog, OnFailure, collect};
use vmm_examples::confine::Confinement;

use crate::end::End;
use crate::guest::Guest;

/// The log, with a source for the gate, one for the user's verbs, and one for the machine, whose first event is its launch.
pub(crate) struct Audited {
    /// Until the guest runs.
    launching: Option<Begun>,
    log: LogProcess,
    gate: Attached,
    verbs: Attached,
    /// Who started the program.
    user: Party,
    machine: MachineLog,
}

/// Who the machine is in the log.
fn vm() -> Party {
    Party::vm(std::process::id().into(), 1)
}

impl Audited {
    pub(crate) fn start(dir: &Path) -> Result<Self> {
        let log = LogProcess::start(dir, "--write-audit")?;
        let gate = log.attach(&Party::host("gate"))?;
        let verbs = log.attach(&Party::host("verbs"))?;
        let machine = MachineLog::new(&log, vm())?;
        let user = Party::host(format!("uid {}", rustix::process::getuid().as_raw()));
        Ok(Self { launching: None, log, gate, verbs, user, machine })
    }

    /// What the user wants of the machine.
    fn verb(&self, verb: &str) -> Verb {
        Verb::new(self.verbs.emitter().clone(), self.user.clone(), verb).of(vm())
    }

    /// With what the log needs.
    pub(crate) fn confinement(&self, confinement: Confinement) -> Confinement {
        self.log.confinement(confinement)
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
    pub(crate) fn launch(
        &mut self,
        guest: &Guest,
        config: &VmConfig,
        hypervisor: &dyn Hypervisor,
    ) -> Result<()> {
        self.launching = Some(self.verb("launch").begin()?);
        let mut launch = Launch::new().kernel(&guest.image);
        if let Some(initrd) = &guest.initrd {
            launch = launch.initrd(initrd);
        }
        let cpuid = config.cpu.resolve(hypervisor.supported_cpuid())?;
        let cpu = format!("{:x?}", cpuid.entries());
        let launch = launch.command_line(guest.command_line.trim()).cpu_model(cpu.as_bytes());
        self.machine.launch(&launch.vmm()?)
    }

    /// Says that the guest runs.
    pub(crate) fn launched(&mut self) {
        if let Some(launching) = self.launching.take() {
            launching.done();
        }
    }

    /// Writes down how it ended, and waits until the log is closed.
    pub(crate) fn end(self, platform: Option<PlatformEvent>, end: &Result<End>) -> Result<()> {
        let stopped = match (platform, end) {
            (None, Ok(End::TimeIsUp)) => Some("its time was up"),
            (None, Ok(End::User)) => Some("the user ended it"),
            (None, Ok(End::Snapshot)) => Some("it was saved in a snapshot"),
            _ => None,
        };
        // The guest stands still already; with this it ends.
        let stopping = stopped.map(|why| self.verb("stop").attribute("why", why).begin()).transpose()?;
        let Self { launching, log, gate, verbs, machine, .. } = self;
        drop(launching);
        if let Some(PlatformEvent::Reset) = platform {
            machine.machine().reset("the guest asked the platform for it");
        }
        match (platform, end) {
            (Some(event), Ok(_)) => {
                machine.ended(Outcome::Success, &format!("the guest asked for {event:?}"))
            }
            (None, Ok(_)) => match stopped {
                Some(why) => machine.ended(Outcome::Killed, why),
                None => machine.ended(Outcome::Success, "the guest ended"),
            },
            (_, Err(error)) => machine.ended(Outcome::Failed, &format!("{error:#}")),
        }
        if let Some(stopping) = stopping {
            stopping.done();
        }
        drop((gate, verbs));
        log.end("").map(drop)
    }
}

/// What the process that writes the log does.
pub(crate) fn write(dir: &Path) -> Result<()> {
    collect(dir, "linux.example/audit").map(drop)
}
