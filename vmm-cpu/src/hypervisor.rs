//! [`Hypervisor`]: the entry to a backend, and what a virtual machine is created from.
//!
//! Called once per process (open, look at the capabilities) and once per virtual machine.

use std::fmt;
use std::sync::Arc;

use crate::cpuid::{CpuModel, CpuidTable};
use crate::error::Result;
use crate::state::VmState;
use crate::vm::Vm;

/// A way of executing guests: the entry to one backend.
///
/// What an implementation must do is in [`writing_a_backend`](crate::writing_a_backend) and at each method.
pub trait Hypervisor: fmt::Debug + Send + Sync {
    /// Short name of the backend, as used on command lines and in saved state: `"kvm"`.
    fn name(&self) -> &'static str;

    /// What virtual machines of this backend can do on this host.
    fn capabilities(&self) -> &Capabilities;

    /// The CPUID leaves that this backend can honour on this host: the upper bound of any
    /// [`CpuModel`].
    fn supported_cpuid(&self) -> &CpuidTable;

    /// Creates an empty virtual machine: no memory, no vCPUs.
    ///
    /// # Errors
    /// [`Error::TooManyVcpus`](crate::Error::TooManyVcpus) if the configuration asks for more than
    /// [`Capabilities::max_vcpus`]; [`Error::Unsupported`](crate::Error::Unsupported) for an
    /// interrupt mode, timer or clock that the backend lacks.
    fn create_vm(&self, config: &VmConfig) -> Result<Arc<dyn Vm>>;

    /// Creates a virtual machine whose interrupt controllers, timer and clock continue from `state`.
    ///
    /// Memory and vCPUs follow with [`Vm::map_memory`] and [`Vm::restore_vcpu`].
    ///
    /// # Errors
    /// As [`Hypervisor::create_vm`], and [`Error::InvalidState`](crate::Error::InvalidState)
    /// naming the element that does not fit.
    fn restore_vm(&self, config: &VmConfig, state: &VmState) -> Result<Arc<dyn Vm>>;
}

/// What a backend can do on this host.
///
/// Capabilities with an interface of their own are visible as such: see the `Option`-returning
/// methods of [`Vm`] and [`Vcpu`](crate::Vcpu).
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// Upper bound of [`VmConfig::max_vcpus`].
    pub max_vcpus: u32,
    /// Width of guest-physical addresses in bits.
    pub gpa_bits: u8,
    /// The interrupt modes that [`VmConfig::interrupts`] may name.
    pub interrupt_modes: Vec<InterruptMode>,
    /// Whether [`VmConfig::legacy_timer`] may be set.
    pub legacy_timer: bool,
    /// Whether the guest's time-stamp counter can run at another rate than the host's.
    pub tsc_scaling: bool,
    /// Whether guest code at privilege level 0 is executed by the processor itself, or
    /// `None` where the backend cannot know (it then pays to measure).
    pub hardware_assisted: Option<bool>,
    /// Whether the backend keeps shadows of the guest's page tables, so that entries which anybody but the guest stores to
    /// tables in use go unnoticed.
    pub shadowed_page_tables: bool,
}

impl Capabilities {
    /// Capabilities of a backend that can run one vCPU and has nothing optional.
    pub fn minimal() -> Self {
        Self {
            max_vcpus: 1,
            gpa_bits: 32,
            interrupt_modes: vec![InterruptMode::External],
            legacy_timer: false,
            tsc_scaling: false,
            hardware_assisted: Some(false),
            shadowed_page_tables: false,
        }
    }
}

/// Which interrupt controllers the backend provides.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum InterruptMode {
    /// None. The VMM owns all controllers and drives each vCPU's INTR pin with
    /// [`VcpuHandle::set_intr`](crate::VcpuHandle::set_intr); a halted vCPU returns
    /// [`Halt::Halted`](crate::Halt::Halted).
    #[default]
    External,
    /// A local APIC in each vCPU. The VMM owns I/O APIC and PIC: it sends message-signalled
    /// interrupts and hears of level-triggered ends of interrupt by
    /// [`VcpuIo::eoi`](crate::VcpuIo::eoi).
    LocalApic,
    /// Local APICs, I/O APIC and PIC. The VMM drives numbered lines.
    Platform,
}

/// The clock that a virtual machine sees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClockConfig {
    /// Guest time-stamp-counter frequency in kHz; `None` is the host's.
    pub tsc_khz: Option<u32>,
    /// Where time comes from.
    pub source: ClockSource,
}

impl ClockConfig {
    /// The host's clock with a guest TSC of `khz` kHz.
    pub fn host_at_khz(khz: u32) -> Self {
        Self { tsc_khz: Some(khz), source: ClockSource::Host }
    }
}

/// Where a virtual machine's time comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ClockSource {
    /// The host's monotonic clock.
    #[default]
    Host,
    /// The host's monotonic clock, and as time-stamp counter the host's own, without an offset and at its rate, which is
    /// [`ClockConfig::tsc_khz`]. That is what programs read where KVM has no virtualization hardware beneath it, and a guest that is to be moved there
    /// has to have read it from the beginning. What a guest writes to the counter has no effect.
    HostTsc,
    /// Retired guest instructions (backends that execute in software).
    Deterministic,
}

/// What a virtual machine is created from. CPUID is fixed here, for good.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct VmConfig {
    /// The CPU that every vCPU shows.
    pub cpu: CpuModel,
    /// How many vCPUs may be created, at least 1.
    pub max_vcpus: u32,
    /// Who provides the interrupt controllers.
    pub interrupts: InterruptMode,
    /// Whether the backend provides an i8254 timer (needs [`InterruptMode::Platform`]).
    pub legacy_timer: bool,
    /// The clock.
    pub clock: ClockConfig,
}

impl VmConfig {
    /// One vCPU of the given model, no interrupt controller, the host's clock.
    pub fn new(cpu: CpuModel) -> Self {
        Self {
            cpu,
            max_vcpus: 1,
            interrupts: InterruptMode::External,
            legacy_timer: false,
            clock: ClockConfig::default(),
        }
    }

    /// This configuration as `vm` has it, which was made from it on this host: the CPUID of its vCPUs and the rate of its time-stamp counter
    /// instead of what depends on the host. To create the machine anew, elsewhere or by another backend, or to be told what keeps it from
    /// being created there.
    ///
    /// # Errors
    /// None for a machine that was made from it.
    pub fn resolve(&self, hypervisor: &dyn Hypervisor, vm: &dyn Vm) -> Result<Self> {
        let mut resolved = self.clone();
        resolved.cpu = CpuModel::Exact(self.cpu.resolve(hypervisor.supported_cpuid())?);
        if let Some(clock) = vm.clock() {
            resolved.clock.tsc_khz = Some(clock.tsc_khz());
            if clock.is_host_tsc() {
                resolved.clock.source = ClockSource::HostTsc;
            }
        }
        Ok(resolved)
    }

    /// Sets [`VmConfig::max_vcpus`].
    #[must_use]
    pub fn vcpus(mut self, max: u32) -> Self {
        self.max_vcpus = max;
        self
    }

    /// Sets [`VmConfig::interrupts`].
    #[must_use]
    pub fn interrupts(mut self, mode: InterruptMode) -> Self {
        self.interrupts = mode;
        self
    }

    /// Sets [`VmConfig::legacy_timer`].
    #[must_use]
    pub fn legacy_timer(mut self, present: bool) -> Self {
        self.legacy_timer = present;
        self
    }

    /// Sets [`VmConfig::clock`].
    #[must_use]
    pub fn clock(mut self, clock: ClockConfig) -> Self {
        self.clock = clock;
        self
    }
}
