//! [`XenPvVm`]: a domain, as the common traits show it, and what is special about it.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use vmm_memory::vm_memory::{GuestAddress, GuestMemoryRegion as _};
use vmm_memory::{GuestRam, GuestRegion};

use super::abi::sched::ShutdownReason;
use super::builder::{PvBoot, PvEntry, Rings};
use super::domain::{Domain, DomainConfig};
use super::engine::{Layout, Ring3Config, Ring3Machine};
use super::event_channels::EventChannels;
use super::hypervisor::DomainDevices;
use super::vcpu::XenPvVcpu;
use super::vcpu_abi::VcpuAbi;
use super::{NAME, pv_cpuid};
use crate::cpuid::{CpuModel, CpuidTable};
use crate::error::{Error, Result};
use crate::hypervisor::{Hypervisor, VmConfig};
use crate::state::{ClockState, VmState};
use crate::vcpu::Vcpu;
use crate::vm::{GuestAccess, Vm, VmClock};

/// Leaves of hypervisors, which the engine's own CPUID does not have.
const HYPERVISOR_LEAVES: std::ops::Range<u32> = 0x4000_0000..0x4001_0000;

/// A paravirtual domain.
#[derive(Debug)]
pub struct XenPvVm {
    below: Arc<dyn Hypervisor>,
    shim: bool,
    config: VmConfig,
    cpuid: CpuidTable,
    ram: GuestRam,
    devices: Mutex<Option<DomainDevices>>,
    built: OnceLock<Built>,
    created: Mutex<BTreeSet<u32>>,
    entry: Mutex<Option<PvEntry>>,
    resumes: Option<Resumes>,
}

/// What a domain goes on from.
#[derive(Debug)]
#[cfg_attr(not(feature = "snapshot"), allow(dead_code, reason = "there are no restored domains"))]
pub(super) struct Resumes {
    pub(super) clock: Option<ClockState>,
    #[cfg(feature = "snapshot")]
    pub(super) domain: super::saved::DomainState,
}

/// What there is once the memory is known.
#[derive(Debug)]
pub(super) struct Built {
    pub(super) machine: Ring3Machine,
    pub(super) domain: Arc<Domain>,
}

impl XenPvVm {
    pub(super) fn new(
        below: Arc<dyn Hypervisor>,
        shim: bool,
        config: &VmConfig,
        cpuid: CpuidTable,
        ram: GuestRam,
        devices: DomainDevices,
        resumes: Option<Resumes>,
    ) -> Self {
        Self {
            below,
            shim,
            config: config.clone(),
            cpuid,
            ram,
            devices: Mutex::new(Some(devices)),
            built: OnceLock::new(),
            created: Mutex::default(),
            entry: Mutex::default(),
            resumes,
        }
    }

    /// Machine and domain, made with the memory that is there at the first call.
    pub(super) fn built(&self) -> Result<&Built> {
        // Held while building, so that it happens once.
        let mut devices = lock(&self.devices);
        if let Some(built) = self.built.get() {
            return Ok(built);
        }
        let layout = Layout::new(self.ram.size())?;
        let mut engine_cpuid = self.cpuid.clone();
        let leaves: Vec<u32> = engine_cpuid.entries().iter().map(|entry| entry.leaf).collect();
        for leaf in leaves.into_iter().filter(|leaf| HYPERVISOR_LEAVES.contains(leaf)) {
            engine_cpuid.remove_leaf(leaf);
        }
        let ring3 = Ring3Config::new(layout)
            .vcpus(self.config.max_vcpus)
            .cpu(CpuModel::Exact(engine_cpuid))
            .clock(self.config.clock)
            .store_in_guest(self.below.capabilities().shadowed_page_tables)
            .resumes(self.resumes.as_ref().and_then(|resumes| resumes.clock))
            .shim(self.shim);
        let machine = Ring3Machine::new(&*self.below, &ring3, &self.ram)?;
        let mut config = DomainConfig::new(self.ram.clone(), layout, machine.capabilities().tsc_khz);
        config.vcpus = self.config.max_vcpus;
        config.cpuid = machine.cpuid_in_ring_3().map_or_else(|| self.cpuid.clone(), pv_cpuid);
        if let Some(devices) = devices.take() {
            (config.console, config.gate) = (devices.console, devices.gate);
        }
        let domain = self.new_domain(config, &machine)?;
        Ok(self.built.get_or_init(|| Built { machine, domain }))
    }

    #[cfg(feature = "snapshot")]
    fn new_domain(&self, config: DomainConfig, machine: &Ring3Machine) -> Result<Arc<Domain>> {
        let compatibility_mode = machine.capabilities().compatibility_mode;
        match &self.resumes {
            Some(resumes) => Domain::restore(config, compatibility_mode, &resumes.domain),
            None => Domain::new(config),
        }
    }

    #[cfg(not(feature = "snapshot"))]
    #[allow(clippy::unused_self, reason = "as with the feature")]
    fn new_domain(&self, config: DomainConfig, _: &Ring3Machine) -> Result<Arc<Domain>> {
        Domain::new(config)
    }

    /// Loads a kernel, which the first virtual processor starts with when it is created.
    ///
    /// # Errors
    /// What the builder says, as [`Error::Backend`]; [`Error::InvalidArgument`] if there is a kernel already, as in a domain that
    /// was restored.
    pub fn boot(&self, boot: &PvBoot<'_>) -> Result<PvEntry> {
        let mut entry = lock(&self.entry);
        if entry.is_some() || self.resumes.is_some() {
            return Err(Error::invalid("kernels of a domain", 2, "one"));
        }
        let Built { machine, domain } = self.built()?;
        let plan = boot.plan(machine.layout())?;
        let console_port = domain.attach_console(plan.console_frame())?;
        let rings = Rings { console_port, store_port: 0 };
        let start = plan.write(&machine.ram().memory(), rings)?;
        Ok(*entry.insert(start))
    }

    /// The domain: its events, console and shutdown.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] while it has no memory that a domain can have.
    pub fn domain(&self) -> Result<&Arc<Domain>> {
        Ok(&self.built()?.domain)
    }

    /// The domain's RAM: what a snapshot has to hold beside the states. The handle that the domain was made with shows what the
    /// backend keeps above it, too, for as long as the domain lives.
    ///
    /// # Errors
    /// As [`XenPvVm::domain`].
    pub fn ram(&self) -> Result<GuestRam> {
        let end = self.built()?.machine.layout().ram();
        let failed =
            |source: vmm_memory::MemoryError| Error::Backend { backend: NAME, source: Box::new(source) };
        let ram = GuestRam::builder().build().map_err(failed)?;
        for region in self.ram.regions().into_iter().filter(|region| region.start_addr().0 < end) {
            ram.insert(region).map_err(failed)?;
        }
        Ok(ram)
    }

    /// Event channels, for back ends.
    ///
    /// # Errors
    /// As [`XenPvVm::domain`].
    pub fn events(&self) -> Result<EventChannels> {
        Ok(self.domain()?.events())
    }

    /// Why the domain shut down, if it has.
    pub fn shutdown_reason(&self) -> Option<ShutdownReason> {
        self.built.get()?.domain.shutdown_reason()
    }
}

impl Vm for XenPvVm {
    fn map_memory(&self, region: Arc<GuestRegion>, access: GuestAccess) -> Result<()> {
        if self.built.get().is_some() {
            return Err(Error::unsupported("more memory", "a domain gets all of it before its first vCPU"));
        }
        if access != GuestAccess::ReadWrite {
            return Err(Error::unsupported("read-only memory", "a domain's RAM is its own"));
        }
        let gpa = region.start_addr();
        let len = region.len();
        self.ram.insert(region).map_err(|error| match error {
            vmm_memory::MemoryError::Overlap { other_gpa, other_size, .. } => {
                Error::RegionOverlap { gpa, len, other_gpa: GuestAddress(other_gpa), other_len: other_size }
            }
            source => Error::Backend { backend: NAME, source: Box::new(source) },
        })
    }

    fn unmap_memory(&self, gpa: GuestAddress) -> Result<Arc<GuestRegion>> {
        if self.built.get().is_some() {
            return Err(Error::unsupported("less memory", "a domain gives pages back by hypercalls"));
        }
        self.ram.remove_region(gpa).map_err(|_| Error::NoSuchRegion { gpa })
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>> {
        let limit = self.config.max_vcpus;
        if index >= limit {
            let reason = "VmConfig::max_vcpus of this virtual machine";
            return Err(Error::TooManyVcpus { index, limit, reason });
        }
        let Built { machine, domain } = self.built()?;
        let mut created = lock(&self.created);
        if created.contains(&index) {
            return Err(Error::VcpuExists { index });
        }
        let mut engine = machine.create_engine(index)?;
        let mut abi = VcpuAbi::new(Arc::clone(domain), index)?;
        if let Some(entry) = lock(&self.entry).filter(|_| index == 0) {
            entry.apply(&mut engine)?;
            abi.adopt_initial_root(&mut engine, entry.root.0 / vmm_memory::PAGE_SIZE)?;
        }
        let vcpu = XenPvVcpu::new(engine, abi)?;
        created.insert(index);
        Ok(Box::new(vcpu))
    }

    #[cfg(feature = "snapshot")]
    fn save(&self) -> Result<VmState> {
        let Built { machine, domain } = self.built()?;
        domain.save(machine.capabilities().compatibility_mode, machine.vm().save()?.clock)
    }

    #[cfg(not(feature = "snapshot"))]
    fn save(&self) -> Result<VmState> {
        Err(Error::unsupported("saving a paravirtual domain", super::NO_SNAPSHOTS))
    }

    fn clock(&self) -> Option<Arc<dyn VmClock>> {
        self.built.get()?.machine.vm().clock()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[path = "vm_tests.rs"]
mod tests;
