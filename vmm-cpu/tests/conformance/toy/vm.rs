//! A virtual machine of the toy backend.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_cpu::state::{ClockState, VmState};
use vmm_cpu::vmm_memory::GuestRegion;
use vmm_cpu::vmm_memory::vm_memory::GuestAddress;
use vmm_cpu::{
    CpuidTable, Error, GuestAccess, GuestDirtyLog, Hypercalls, MsrFilter, MsrRange, Result, Vcpu, Vm, VmClock,
};

use super::clock::ToyClock;
use super::memory::Memory;
use super::vcpu::ToyVcpu;

/// What a virtual machine shares with its vCPUs.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) cpuid: CpuidTable,
    pub(super) memory: Arc<Memory>,
    pub(super) clock: Arc<ToyClock>,
    pub(super) passed_on: Arc<PassedOn>,
}

/// Which accesses go to the VMM although they would not have to.
#[derive(Debug, Default)]
pub(super) struct PassedOn(Mutex<Choice>);

#[derive(Debug, Default)]
struct Choice {
    msrs: Vec<MsrRange>,
    unknown_msrs: bool,
    hypercalls: BTreeSet<u64>,
}

/// A virtual machine: what its vCPUs share, and which of them exist.
#[derive(Debug)]
pub(super) struct ToyVm {
    shared: Arc<Shared>,
    max_vcpus: u32,
    vcpus: Mutex<BTreeSet<u32>>,
}

impl ToyVm {
    pub(super) fn new(cpuid: CpuidTable, max_vcpus: u32, tsc_khz: Option<u32>) -> Self {
        let shared = Shared {
            cpuid,
            memory: Arc::default(),
            clock: Arc::new(ToyClock::new(tsc_khz)),
            passed_on: Arc::default(),
        };
        Self { shared: Arc::new(shared), max_vcpus, vcpus: Mutex::default() }
    }

    pub(super) fn restore_clock(&self, state: Option<ClockState>) -> Result<()> {
        let Some(state) = state else { return Ok(()) };
        let tsc_khz = self.shared.clock.tsc_khz();
        if state.tsc_khz != tsc_khz {
            let problem =
                format!("the rate was {} kHz, that of this machine is {tsc_khz} kHz", state.tsc_khz);
            return Err(Error::InvalidState { element: "clock.tsc_khz", problem });
        }
        self.shared.clock.set(state.guest_ns);
        Ok(())
    }
}

impl Vm for ToyVm {
    fn map_memory(&self, region: Arc<GuestRegion>, access: GuestAccess) -> Result<()> {
        self.shared.memory.map(region, access)
    }

    fn unmap_memory(&self, gpa: GuestAddress) -> Result<Arc<GuestRegion>> {
        self.shared.memory.unmap(gpa)
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>> {
        if index >= self.max_vcpus {
            return Err(Error::TooManyVcpus {
                index,
                limit: self.max_vcpus,
                reason: "limit of this machine",
            });
        }
        if !self.vcpus.lock().unwrap_or_else(PoisonError::into_inner).insert(index) {
            return Err(Error::VcpuExists { index });
        }
        let cpuid = self.shared.cpuid.for_vcpu(index, self.max_vcpus);
        Ok(Box::new(ToyVcpu::new(index, Arc::clone(&self.shared), cpuid)))
    }

    fn save(&self) -> Result<VmState> {
        let mut clock = ClockState::default();
        clock.guest_ns = self.shared.clock.nanoseconds();
        clock.tsc_khz = self.shared.clock.tsc_khz();
        let mut state = VmState::default();
        state.clock = Some(clock);
        Ok(state)
    }

    fn dirty_log(&self) -> Option<Arc<dyn GuestDirtyLog>> {
        Some(Arc::clone(&self.shared.memory) as Arc<dyn GuestDirtyLog>)
    }

    fn msr_filter(&self) -> Option<Arc<dyn MsrFilter>> {
        Some(Arc::clone(&self.shared.passed_on) as Arc<dyn MsrFilter>)
    }

    fn hypercalls(&self) -> Option<Arc<dyn Hypercalls>> {
        Some(Arc::clone(&self.shared.passed_on) as Arc<dyn Hypercalls>)
    }

    fn clock(&self) -> Option<Arc<dyn VmClock>> {
        Some(Arc::clone(&self.shared.clock) as Arc<dyn VmClock>)
    }
}

impl PassedOn {
    pub(super) fn msr_read(&self, index: u32) -> bool {
        self.choice().msrs.iter().any(|range| range.reads && contains(range, index))
    }

    pub(super) fn msr_write(&self, index: u32) -> bool {
        self.choice().msrs.iter().any(|range| range.writes && contains(range, index))
    }

    pub(super) fn unknown_msrs(&self) -> bool {
        self.choice().unknown_msrs
    }

    pub(super) fn hypercall(&self, nr: u64) -> bool {
        self.choice().hypercalls.contains(&nr)
    }

    fn choice(&self) -> MutexGuard<'_, Choice> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn contains(range: &MsrRange, index: u32) -> bool {
    index.checked_sub(range.first).is_some_and(|offset| offset < range.count)
}

impl MsrFilter for PassedOn {
    fn pass_on(&self, ranges: &[MsrRange], unknown: bool) -> Result<()> {
        for range in ranges {
            if range.count == 0 || range.first.checked_add(range.count - 1).is_none() {
                let value = format!("{} registers from {:#x}", range.count, range.first);
                return Err(Error::invalid("MSR range", value, "1 or more, up to 0xffffffff"));
            }
        }
        let mut choice = self.choice();
        choice.msrs = ranges.to_vec();
        choice.unknown_msrs = unknown;
        Ok(())
    }
}

impl Hypercalls for PassedOn {
    fn pass_on(&self, nr: u64) -> Result<()> {
        self.choice().hypercalls.insert(nr);
        Ok(())
    }
}
