//! [`XenPvHypervisor`]: the entry to the backend.

use std::sync::Arc;

use vmm_memory::GuestRam;

use super::console::{ConsoleSink, NoConsole};
use super::gate::{BackendsOnly, Gate};
use super::vm::{Resumes, XenPvVm};
use super::{NAME, pv_cpuid};
use crate::cpuid::CpuidTable;
use crate::error::{Error, Result};
use crate::hypervisor::{Capabilities, ClockSource, Hypervisor, InterruptMode, VmConfig};
use crate::state::VmState;
use crate::vm::Vm;

/// vCPUs of one domain, at most: those whose information fits into the shared page.
const MAX_VCPUS: u32 = 32;

/// Runs paravirtual guests on another backend of this crate.
#[derive(Debug)]
pub struct XenPvHypervisor {
    pub(super) below: Arc<dyn Hypervisor>,
    shim: bool,
    capabilities: Capabilities,
    cpuid: CpuidTable,
}

/// What a domain is connected to.
#[derive(Debug)]
#[non_exhaustive]
pub struct DomainDevices {
    /// Where the console goes.
    pub console: Box<dyn ConsoleSink>,
    /// Whom the domain may talk to.
    pub gate: Box<dyn Gate>,
}

impl Default for DomainDevices {
    /// No console; nobody but back ends.
    fn default() -> Self {
        Self { console: Box::new(NoConsole), gate: Box::new(BackendsOnly) }
    }
}

impl DomainDevices {
    /// Sets [`DomainDevices::console`].
    #[must_use]
    pub fn console(mut self, sink: impl ConsoleSink + 'static) -> Self {
        self.console = Box::new(sink);
        self
    }

    /// Sets [`DomainDevices::gate`].
    #[must_use]
    pub fn gate(mut self, gate: impl Gate + 'static) -> Self {
        self.gate = Box::new(gate);
        self
    }
}

impl XenPvHypervisor {
    /// Runs domains on `below`: `translate`, which needs nothing of the host, or `kvm`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if `below` is this backend itself.
    pub fn new(below: Arc<dyn Hypervisor>) -> Result<Self> {
        if below.name() == NAME {
            return Err(Error::unsupported("a paravirtual domain", "on the paravirtual backend itself"));
        }
        let mut capabilities = Capabilities::minimal();
        capabilities.max_vcpus = below.capabilities().max_vcpus.min(MAX_VCPUS);
        capabilities.gpa_bits = below.capabilities().gpa_bits;
        capabilities.tsc_scaling = below.capabilities().tsc_scaling;
        // All of the guest, its kernel too, runs where its programs do.
        capabilities.hardware_assisted = below.capabilities().hardware_assisted;
        capabilities.shadowed_page_tables = below.capabilities().shadowed_page_tables;
        let cpuid = pv_cpuid(below.supported_cpuid());
        Ok(Self { below, shim: false, capabilities, cpuid })
    }

    /// Whether code in the guest does what needs no VMM: system calls and page faults of programs, frequent hypercalls.
    /// Worth it where leaving the guest is expensive.
    #[must_use]
    pub fn shim(mut self, yes: bool) -> Self {
        self.shim = yes;
        self
    }

    /// Creates a domain with all of `ram`, which starts at 0 and has no gaps; the backend adds its own memory above.
    ///
    /// # Errors
    /// As [`Hypervisor::create_vm`], and [`Error::InvalidArgument`] for RAM that no domain can have.
    pub fn create_domain(
        &self,
        config: &VmConfig,
        ram: &GuestRam,
        devices: DomainDevices,
    ) -> Result<Arc<XenPvVm>> {
        let vm = self.create(config, ram.clone(), devices, None)?;
        vm.built()?;
        Ok(vm)
    }

    /// Creates a domain that goes on from a saved one: with its RAM, as [`XenPvVm::ram`] has it, and `state`. Its vCPUs follow
    /// with [`Vm::restore_vcpu`]; all of them, before the first one runs. What was connected with its event channels connects again
    /// ([`EventChannels::connect`](super::EventChannels::connect)), and takes its grants into use anew.
    ///
    /// # Errors
    /// As [`XenPvHypervisor::create_domain`] and [`Hypervisor::restore_vm`].
    pub fn restore_domain(
        &self,
        config: &VmConfig,
        ram: &GuestRam,
        devices: DomainDevices,
        state: &VmState,
    ) -> Result<Arc<XenPvVm>> {
        let vm = self.create(config, ram.clone(), devices, Some(resumes(config, state)?))?;
        vm.built()?;
        Ok(vm)
    }

    fn create(
        &self,
        config: &VmConfig,
        ram: GuestRam,
        devices: DomainDevices,
        resumes: Option<Resumes>,
    ) -> Result<Arc<XenPvVm>> {
        let limit = self.capabilities.max_vcpus;
        if config.max_vcpus > limit {
            let reason = "limit of the paravirtual backend on this engine";
            return Err(Error::TooManyVcpus { index: config.max_vcpus - 1, limit, reason });
        }
        if config.interrupts != InterruptMode::External || config.legacy_timer {
            return Err(Error::unsupported(
                "an interrupt controller or legacy timer",
                "a paravirtual guest has event channels and Xen's timers; take InterruptMode::External",
            ));
        }
        if config.clock.source == ClockSource::Deterministic {
            return Err(Error::unsupported("a deterministic clock", "Xen's timers follow the host's"));
        }
        let cpuid = config.cpu.resolve(&self.cpuid)?;
        let below = Arc::clone(&self.below);
        Ok(Arc::new(XenPvVm::new(below, self.shim, config, cpuid, ram, devices, resumes)))
    }
}

#[cfg(feature = "snapshot")]
fn resumes(config: &VmConfig, state: &VmState) -> Result<Resumes> {
    Ok(Resumes { clock: state.clock, domain: super::saved::check_config(config, state)? })
}

#[cfg(not(feature = "snapshot"))]
fn resumes(_: &VmConfig, _: &VmState) -> Result<Resumes> {
    Err(Error::unsupported("restoring a paravirtual domain", super::NO_SNAPSHOTS))
}

fn no_ram() -> Result<GuestRam> {
    let failed = |source| Error::Backend { backend: NAME, source: Box::new(source) };
    GuestRam::builder().build().map_err(failed)
}

impl Hypervisor for XenPvHypervisor {
    fn name(&self) -> &'static str {
        NAME
    }

    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn supported_cpuid(&self) -> &CpuidTable {
        &self.cpuid
    }

    fn create_vm(&self, config: &VmConfig) -> Result<Arc<dyn Vm>> {
        Ok(self.create(config, no_ram()?, DomainDevices::default(), None)?)
    }

    fn restore_vm(&self, config: &VmConfig, state: &VmState) -> Result<Arc<dyn Vm>> {
        let resumes = resumes(config, state)?;
        Ok(self.create(config, no_ram()?, DomainDevices::default(), Some(resumes))?)
    }
}
