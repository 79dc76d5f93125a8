//! [`TranslateHypervisor`]: the entry to the backend.

use std::sync::Arc;

use super::clock::Clock;
use super::vm::{Shared, TranslateVm};
use super::{NAME, cpuid};
use crate::cpuid::CpuidTable;
use crate::error::{Error, Result};
use crate::hypervisor::{Capabilities, ClockConfig, ClockSource, Hypervisor, InterruptMode, VmConfig};
use crate::state::VmState;
use crate::vm::Vm;

/// vCPUs of one virtual machine, at most.
const MAX_VCPUS: u32 = 8;

/// Whose memory accesses the host's MMU translates instead of a software TLB.
///
/// An address window costs microseconds for each page that a program comes to use, and makes each access several times as
/// fast. It takes guest memory that is mapped shared ([`Backing::Memfd`](vmm_memory::Backing)), BMI2, and a handler of
/// SIGSEGV and SIGBUS, which the first vCPU to use a window installs; it passes on what is not its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum AddressWindow {
    /// Nobody's.
    Never,
    /// Those of user programs that run long enough to make up for the cost; nobody's where the clock is deterministic.
    #[default]
    Adaptive,
    /// Those of all user programs.
    Always,
}

/// How guests are executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TranslateOptions {
    /// How often a basic block is interpreted before it is translated to the host's instructions; `None`: whatever it is, it
    /// stays interpreted. On hosts that are not x86-64 or where memory cannot be made executable, nothing is translated.
    pub translate_after: Option<u32>,
    /// Whether [`Vcpu::exit_counts`](crate::Vcpu::exit_counts) has a digest of the general registers, status flags and
    /// vector registers at the start of each basic block, so that runs of deterministic virtual machines can be compared.
    /// It costs much time.
    pub digest: bool,
    /// Whose memory accesses go through an address window.
    pub address_window: AddressWindow,
    /// Bytes of memory for translated code that each vCPU has: 256 KiB to 1 GiB, what is less or more counts as that. When it
    /// is full, the oldest translations make room for new ones. What else is kept for translations takes up to three times
    /// as much.
    pub code_memory: usize,
}

impl Default for TranslateOptions {
    fn default() -> Self {
        let address_window = AddressWindow::default();
        Self { translate_after: Some(2), digest: false, address_window, code_memory: 64 << 20 }
    }
}

impl TranslateOptions {
    /// Sets [`TranslateOptions::translate_after`].
    #[must_use]
    pub fn translate_after(mut self, runs: Option<u32>) -> Self {
        self.translate_after = runs;
        self
    }

    /// Sets [`TranslateOptions::address_window`].
    #[must_use]
    pub fn address_window(mut self, window: AddressWindow) -> Self {
        self.address_window = window;
        self
    }

    /// Sets [`TranslateOptions::code_memory`].
    #[must_use]
    pub fn code_memory(mut self, bytes: usize) -> Self {
        self.code_memory = bytes;
        self
    }

    /// Sets [`TranslateOptions::digest`].
    #[must_use]
    pub fn digest(mut self, digest: bool) -> Self {
        self.digest = digest;
        self
    }
}

/// Runs guests in software. Needs nothing of the host.
#[derive(Debug)]
pub struct TranslateHypervisor {
    capabilities: Capabilities,
    cpuid: CpuidTable,
    options: TranslateOptions,
}

impl TranslateHypervisor {
    /// Opens the backend.
    pub fn new() -> Self {
        Self::with_options(TranslateOptions::default())
    }

    /// Opens the backend for virtual machines that are executed as `options` say.
    pub fn with_options(options: TranslateOptions) -> Self {
        let mut capabilities = Capabilities::minimal();
        capabilities.max_vcpus = MAX_VCPUS;
        capabilities.gpa_bits = u8::try_from(cpuid::GPA_BITS).unwrap_or(u8::MAX);
        capabilities.interrupt_modes = vec![InterruptMode::External, InterruptMode::LocalApic];
        capabilities.tsc_scaling = true;
        Self { capabilities, cpuid: cpuid::supported(), options }
    }

    fn create(&self, config: &VmConfig) -> Result<TranslateVm> {
        check(config)?;
        let cpuid = config.cpu.resolve(&self.cpuid)?;
        let clock = clock(&config.clock)?;
        tracing::debug!(vcpus = config.max_vcpus, "{NAME}: virtual machine created");
        let shared = Shared::new(cpuid, config.interrupts, config.max_vcpus, clock, self.options);
        Ok(TranslateVm(Arc::new(shared)))
    }
}

/// The clock of a virtual machine.
fn clock(config: &ClockConfig) -> Result<Clock> {
    match (config.source, config.tsc_khz) {
        #[cfg(target_arch = "x86_64")]
        (ClockSource::HostTsc, Some(tsc_khz)) => Ok(Clock::with_counter(tsc_khz, crate::tsc::host_tsc)),
        (ClockSource::HostTsc, None) => {
            Err(Error::invalid("ClockConfig::tsc_khz", "none", "the rate of the host's time-stamp counter"))
        }
        #[cfg(not(target_arch = "x86_64"))]
        (ClockSource::HostTsc, Some(_)) => {
            Err(Error::unsupported("the host's time-stamp counter", "this host's processor has none"))
        }
        (source, tsc_khz) => Ok(Clock::new(tsc_khz, source)),
    }
}

/// Whether such a state can be restored.
pub(crate) fn check_restored(state: &VmState) -> Result<()> {
    if state.io_apic.is_some() || state.pics.is_some() || state.pit.is_some() {
        let problem = "the translate backend has no I/O APIC, PIC or timer".to_owned();
        return Err(Error::InvalidState { element: "interrupt controllers", problem });
    }
    Ok(())
}

/// Whether the backend can make such a virtual machine.
pub(super) fn check(config: &VmConfig) -> Result<()> {
    let limit = MAX_VCPUS;
    if config.max_vcpus > limit {
        let reason = "limit of the translate backend";
        return Err(Error::TooManyVcpus { index: config.max_vcpus - 1, limit, reason });
    }
    if config.max_vcpus == 0 {
        return Err(Error::invalid("VmConfig::max_vcpus", 0, format!("1 to {limit}")));
    }
    if config.interrupts == InterruptMode::Platform {
        return Err(Error::unsupported(
            "InterruptMode::Platform",
            "the translate backend has local APICs only; the I/O APIC and PIC of vmm-devices go with \
             InterruptMode::LocalApic",
        ));
    }
    if config.legacy_timer {
        return Err(Error::unsupported("a legacy timer", "the translate backend has none; vmm-devices has"));
    }
    if config.clock.tsc_khz == Some(0) {
        return Err(Error::invalid("ClockConfig::tsc_khz", 0, "1 or more"));
    }
    if config.clock.source == ClockSource::Deterministic && config.max_vcpus > 1 {
        return Err(Error::unsupported(
            "a deterministic clock with more than one vCPU",
            "their threads run in no defined order",
        ));
    }
    Ok(())
}

impl Default for TranslateHypervisor {
    fn default() -> Self {
        Self::new()
    }
}

impl Hypervisor for TranslateHypervisor {
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
        Ok(Arc::new(self.create(config)?))
    }

    fn restore_vm(&self, config: &VmConfig, state: &VmState) -> Result<Arc<dyn Vm>> {
        check_restored(state)?;
        let vm = self.create(config)?;
        vm.restore_clock(state.clock)?;
        Ok(Arc::new(vm))
    }
}
