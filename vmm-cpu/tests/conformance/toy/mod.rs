//! A trivial software backend, to show that the traits ask for nothing that only KVM has.
//!
//! It interprets flat 64-bit code one instruction at a time, takes linear addresses as physical ones,
//! knows the instructions that the suite's guests use, and refuses all others by name. It has no interrupt
//! controllers; it offers what KVM does not, forwarding any hypercall.

mod alu;
mod clock;
mod interpreter;
mod memory;
mod signals;
mod system;
mod vcpu;
mod vm;

use std::sync::Arc;

use vmm_cpu::state::{CpuState, VmState};
use vmm_cpu::{
    Capabilities, ClockSource, CpuidTable, Error, Hypervisor, InterruptMode, Result, UnhandledInstruction,
    Vm, VmConfig,
};

use vm::ToyVm;

/// See the module.
#[derive(Debug)]
pub(crate) struct ToyHypervisor {
    capabilities: Capabilities,
    cpuid: CpuidTable,
}

/// vCPUs of one virtual machine, at most.
const MAX_VCPUS: u32 = 4;

impl ToyHypervisor {
    pub(crate) const NAME: &'static str = "toy";

    pub(crate) fn new() -> Self {
        let mut capabilities = Capabilities::minimal();
        capabilities.max_vcpus = MAX_VCPUS;
        capabilities.gpa_bits = 40;
        capabilities.tsc_scaling = true;
        Self { capabilities, cpuid: system::supported_cpuid() }
    }

    fn create(&self, config: &VmConfig) -> Result<ToyVm> {
        let limit = MAX_VCPUS;
        if config.max_vcpus > limit {
            let reason = "limit of the toy backend";
            return Err(Error::TooManyVcpus { index: config.max_vcpus - 1, limit, reason });
        }
        if config.max_vcpus == 0 {
            return Err(Error::invalid("number of vCPUs", 0, format!("1 to {limit}")));
        }
        if config.interrupts != InterruptMode::External {
            return Err(Error::unsupported("an interrupt controller", "the toy backend has none"));
        }
        if config.legacy_timer {
            return Err(Error::unsupported("a timer", "the toy backend has none"));
        }
        if config.clock.source != ClockSource::Host {
            return Err(Error::unsupported("a deterministic clock", "the toy backend's is the host's"));
        }
        if config.clock.tsc_khz == Some(0) {
            return Err(Error::invalid("ClockConfig::tsc_khz", 0, "1 or more"));
        }
        let cpuid = config.cpu.resolve(&self.cpuid)?;
        Ok(ToyVm::new(cpuid, config.max_vcpus, config.clock.tsc_khz))
    }
}

impl Hypervisor for ToyHypervisor {
    fn name(&self) -> &'static str {
        Self::NAME
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
        // Interrupt controllers cannot be carried over to where there are none.
        if state.io_apic.is_some() || state.pics.is_some() || state.pit.is_some() {
            let problem = "the toy backend has no interrupt controllers and no timer".to_owned();
            return Err(Error::InvalidState { element: "interrupt controllers", problem });
        }
        let vm = self.create(config)?;
        vm.restore_clock(state.clock)?;
        Ok(Arc::new(vm))
    }
}

/// Describes the instruction at the instruction pointer of `state`.
fn unhandled(vcpu: u32, reason: String, bytes: Vec<u8>, state: &CpuState) -> UnhandledInstruction {
    UnhandledInstruction::new(ToyHypervisor::NAME, vcpu, reason, bytes, state.general, state.system)
}
