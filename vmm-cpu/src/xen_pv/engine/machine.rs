//! [`Ring3Machine`]: a virtual machine of another backend, made to run one deprivileged guest.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_memory::vm_memory::{GuestAddress, GuestMemoryRegion as _};
use vmm_memory::{GuestRam, MemoryError, PAGE_SIZE, RegionConfig};

use super::layout::Layout;
use super::native::{self, XCR0_KNOWN};
use super::private::Private;
use super::ring3::Ring3;
use super::{Engine as _, EngineCapabilities};
use crate::cpuid::{CpuModel, CpuidTable, Feature};
use crate::error::{Error, Result};
use crate::hypervisor::{ClockConfig, Hypervisor, VmConfig};
use crate::state::{ClockState, VmState};
use crate::vm::Vm;

/// A virtual machine whose guest, kernel and programs alike, runs in ring 3 of long mode.
pub struct Ring3Machine {
    vm: Arc<dyn Vm>,
    ram: GuestRam,
    private: Private,
    capabilities: EngineCapabilities,
    store_in_guest: bool,
    /// The first engine, which was asked what ring 3 is like, until somebody wants it.
    first: Mutex<Option<Ring3>>,
    in_ring_3: Option<CpuidTable>,
    above: Arc<Above>,
    sets_bases: bool,
}

impl fmt::Debug for Ring3Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring3Machine")
            .field("vm", &self.vm)
            .field("private", &self.private)
            .finish_non_exhaustive()
    }
}

/// How the engine is made.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Ring3Config {
    /// Where things lie.
    pub layout: Layout,
    /// Virtual processors, at least 1.
    pub vcpus: u32,
    /// What programs of the guest see of the processor, as far as the backend can have it so; the kernel asks the ABI.
    pub cpu: CpuModel,
    /// The clock.
    pub clock: ClockConfig,
    /// Whether code in the guest stores to entries of page tables once more, without a change, after the VMM has stored them,
    /// and forgets translations. Backends that shadow page tables notice just what happens in the guest.
    pub store_in_guest: bool,
    /// Whether code in the guest does what needs no VMM: system calls, page faults, frequent hypercalls.
    pub shim: bool,
    /// The time that the clock goes on from.
    pub resumes: Option<ClockState>,
}

impl Ring3Config {
    /// One processor that shows all the backend has, and page tables that the VMM writes.
    pub fn new(layout: Layout) -> Self {
        Self {
            layout,
            vcpus: 1,
            cpu: CpuModel::Host,
            clock: ClockConfig::default(),
            store_in_guest: false,
            shim: false,
            resumes: None,
        }
    }

    /// Sets [`Ring3Config::vcpus`].
    #[must_use]
    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// Sets [`Ring3Config::cpu`].
    #[must_use]
    pub fn cpu(mut self, cpu: CpuModel) -> Self {
        self.cpu = cpu;
        self
    }

    /// Sets [`Ring3Config::clock`].
    #[must_use]
    pub fn clock(mut self, clock: ClockConfig) -> Self {
        self.clock = clock;
        self
    }

    /// Sets [`Ring3Config::shim`].
    #[must_use]
    pub fn shim(mut self, yes: bool) -> Self {
        self.shim = yes;
        self
    }

    /// Sets [`Ring3Config::resumes`].
    #[must_use]
    pub fn resumes(mut self, clock: Option<ClockState>) -> Self {
        self.resumes = clock;
        self
    }

    /// Sets [`Ring3Config::store_in_guest`].
    #[must_use]
    pub fn store_in_guest(mut self, yes: bool) -> Self {
        self.store_in_guest = yes;
        self
    }
}

impl Ring3Machine {
    /// Makes the virtual machine with the domain's RAM, which is all of `ram` and starts at 0, and adds to that what
    /// ABI and engine keep above, until the machine and the last of its engines are gone.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the RAM is not that of the layout; [`Error::Unsupported`] if the backend lacks long
    /// mode or cannot address the memory; what it and the host refuse.
    pub fn new(hypervisor: &dyn Hypervisor, config: &Ring3Config, ram: &GuestRam) -> Result<Self> {
        let layout = config.layout;
        check_ram(ram, layout)?;
        let mut private = Private::new(layout, config.vcpus);
        if config.shim {
            private = private.with_shim(config.vcpus)?;
        }
        let end = layout.private().0 + private.size();
        let doorbell = private.shim().map_or(end, |shim| shim.doorbell().0 + PAGE_SIZE);
        let width = hypervisor.capabilities().gpa_bits.min(52);
        if doorbell > 1 << width {
            return Err(Error::unsupported(
                "a domain of that size",
                format!(
                    "it ends at {end:#x}, {} has guest-physical addresses of {width} bits",
                    hypervisor.name()
                ),
            ));
        }
        let mut table = config.cpu.resolve(hypervisor.supported_cpuid())?;
        // The shim sets the bases of segments, and leaves that to the VMM where ring 3 may not.
        let sets_bases = config.shim && table.enable(Feature::FSGSBASE, hypervisor.supported_cpuid());
        for feature in [Feature::LM, Feature::SYSCALL, Feature::NX] {
            if !table.has(feature) {
                return Err(Error::unsupported(
                    "a paravirtual guest",
                    format!("the processor lacks {feature}"),
                ));
            }
        }
        let xcr0 = match table.get(0xd, 0).filter(|_| table.has(Feature::XSAVE)) {
            Some(leaf) => (u64::from(leaf.edx) << 32 | u64::from(leaf.eax)) & XCR0_KNOWN,
            None => 0,
        };
        let below = VmConfig::new(CpuModel::Exact(table.clone())).vcpus(config.vcpus).clock(config.clock);
        let vm = create_vm(hypervisor, below, config.resumes)?;
        let abi = layout.abi_frames();
        let mut above = Above { ram: ram.clone(), regions: Vec::new() };
        above.add(abi.start * PAGE_SIZE, abi.end * PAGE_SIZE)?;
        above.add(layout.m2p().0, end)?;
        // KVM that shadows page tables emulates 32-bit code, whose SYSCALL it takes to ring 0 at the lower half of CSTAR,
        // where a program may have pages. So no segment leads there.
        let compatibility_mode = !config.store_in_guest;
        private.write(&ram.memory(), compatibility_mode)?;
        vm.map_ram(ram)?;
        let tsc_khz = vm.clock().map_or(0, |clock| clock.tsc_khz());
        let capabilities = EngineCapabilities { tsc_khz, xcr0, compatibility_mode };
        let mut machine = Self {
            vm,
            ram: ram.clone(),
            private,
            capabilities,
            store_in_guest: config.store_in_guest,
            sets_bases,
            first: Mutex::default(),
            in_ring_3: None,
            above: Arc::new(above),
        };
        let mut first = machine.new_engine(0)?;
        if first.is_xcr0_fixed() {
            machine.capabilities = first.capabilities();
            // Hypervisors hide it where a guest may move to a processor that does not. A guest kernel then loads each
            // selector twice, GS by hypercalls; a domain of this backend ends with its machine.
            let clears_base = first.null_selectors_clear_bases()?;
            let found = |leaf, subleaf| first.cpuid_in_ring_3(leaf, subleaf);
            let mut table = native::with_instructions(&table, machine.capabilities.xcr0, found)?;
            if clears_base {
                native::tell(&mut table, Feature::NULL_SEL_CLR_BASE);
            }
            machine.in_ring_3 = Some(table);
        }
        machine.first = Mutex::new(Some(first));
        Ok(machine)
    }

    /// The memory: the domain's RAM, the ABI's frames, the machine-to-physical table, and the engine's own.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// Where things lie.
    pub fn layout(&self) -> Layout {
        self.private.layout()
    }

    /// The virtual machine below.
    pub fn vm(&self) -> &Arc<dyn Vm> {
        &self.vm
    }

    /// What its engines can do.
    pub fn capabilities(&self) -> EngineCapabilities {
        self.capabilities
    }

    /// CPUID as the guest's programs find it where that is the processor's own, whatever [`Ring3Config::cpu`] says: a
    /// guest kernel that is not told of it does not keep the registers of its programs apart.
    pub fn cpuid_in_ring_3(&self) -> Option<&CpuidTable> {
        self.in_ring_3.as_ref()
    }

    /// Makes virtual processor `index`, each once.
    ///
    /// # Errors
    /// As [`Vm::create_vcpu`].
    pub fn create_engine(&self, index: u32) -> Result<Ring3> {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        match first.take_if(|_| index == 0) {
            Some(first) => Ok(first),
            None => self.new_engine(index),
        }
    }

    fn new_engine(&self, index: u32) -> Result<Ring3> {
        let vcpu = self.vm.create_vcpu(index)?;
        let above = Arc::clone(&self.above);
        let (private, capabilities) = (self.private, self.capabilities);
        Ring3::new(vcpu, self.ram.clone(), private, capabilities, self.store_in_guest, above, self.sets_bases)
    }
}

/// The regions above the domain's RAM. They leave that as it was before, for another machine, when nobody uses them any more,
/// be it that the first one could not be made.
#[derive(Debug)]
pub(super) struct Above {
    ram: GuestRam,
    regions: Vec<GuestAddress>,
}

impl Above {
    fn add(&mut self, start: u64, end: u64) -> Result<()> {
        let start = GuestAddress(start);
        self.ram.add_region(RegionConfig::new(start, end - start.0)).map_err(memory_error)?;
        self.regions.push(start);
        Ok(())
    }
}

impl Drop for Above {
    fn drop(&mut self) {
        for start in &self.regions {
            if let Err(error) = self.ram.remove_region(*start) {
                tracing::debug!(%error, "somebody else took a region of the engine's away");
            }
        }
    }
}

/// A virtual machine whose clock goes on. Its counter has the rate that it had, if the backend and the configuration leave that open;
/// else the guest is told of the new one.
fn create_vm(
    hypervisor: &dyn Hypervisor,
    mut config: VmConfig,
    resumes: Option<ClockState>,
) -> Result<Arc<dyn Vm>> {
    let Some(clock) = resumes else { return hypervisor.create_vm(&config) };
    if hypervisor.capabilities().tsc_scaling {
        config.clock.tsc_khz.get_or_insert(clock.tsc_khz);
    }
    let restore =
        |clock| hypervisor.restore_vm(&config, &VmState { clock: Some(clock), ..VmState::default() });
    match restore(clock) {
        Err(Error::InvalidState { element: "clock.tsc_khz", .. }) => {
            let tsc_khz = hypervisor.create_vm(&config)?.clock().map_or(0, |clock| clock.tsc_khz());
            restore(ClockState { tsc_khz, ..clock })
        }
        vm => vm,
    }
}

fn memory_error(source: MemoryError) -> Error {
    Error::Backend { backend: super::super::NAME, source: Box::new(source) }
}

/// Whether the regions are the domain's RAM, one after the other.
fn check_ram(ram: &GuestRam, layout: Layout) -> Result<()> {
    let mut end = 0;
    for region in ram.regions() {
        let start = region.start_addr().0;
        if start != end || vmm_memory::is_read_only(&region) {
            let value = format!("a region at {start:#x} behind {end:#x}");
            return Err(Error::invalid(
                "RAM of a paravirtual domain",
                value,
                "writable regions without gaps from 0",
            ));
        }
        end = start.saturating_add(region.len());
    }
    if end != layout.ram() {
        let allowed = format_args!("{:#x}, as its layout says", layout.ram());
        return Err(Error::invalid("end of a paravirtual domain's RAM", format_args!("{end:#x}"), allowed));
    }
    Ok(())
}
