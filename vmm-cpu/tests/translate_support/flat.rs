//! A small machine for single attacks: 32-bit code in flat segments, no paging, RAM from 0 on. Or 64-bit code, which can be
//! translated, with page tables of the test's own.

use std::sync::Arc;
use std::time::Duration;

use vmm_cpu::state::{DescriptorTable, GeneralRegisters, RunState, Segment, SystemRegisters};
use vmm_cpu::translate::{TranslateHypervisor, TranslateOptions};
use vmm_cpu::{
    ClockConfig, ClockSource, CpuModel, EmptyBus, GuestAccess, Halt, Hypervisor, InterruptMode, Vcpu, VcpuIo,
    Vm, VmConfig,
};
use vmm_memory::vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, MemoryRegionAddress};
use vmm_memory::{Backing, GuestRam, GuestRegion, RegionConfig};

use super::guest::Tier;
use super::watchdog;

pub const SIZE: u64 = 0x4_0000;

pub struct Flat {
    pub vcpu: Box<dyn Vcpu>,
    pub vm: Arc<dyn Vm>,
    pub ram: Arc<GuestRegion>,
}

/// A region of its own, shared as the address window needs it.
pub fn region(gpa: u64, size: u64) -> Arc<GuestRegion> {
    made(RegionConfig::new(GuestAddress(gpa), size).backing(Backing::Memfd))
}

/// One whose host mapping refuses writes.
pub fn rom(gpa: u64, size: u64) -> Arc<GuestRegion> {
    made(RegionConfig::new(GuestAddress(gpa), size).backing(Backing::Memfd).read_only(true))
}

fn made(config: RegionConfig) -> Arc<GuestRegion> {
    let ram = GuestRam::builder().region(config).build().unwrap();
    ram.regions().into_iter().next().unwrap()
}

/// Writes a region that the guest may not write.
pub fn fill(region: &GuestRegion, at: u64, bytes: &[u8]) {
    match region.file_offset() {
        Some(file) => {
            use std::os::unix::fs::FileExt;
            file.file().write_all_at(bytes, file.start() + at).unwrap();
        }
        None => region.write_slice(bytes, MemoryRegionAddress(at)).unwrap(),
    }
}

pub fn config(interrupts: InterruptMode) -> VmConfig {
    let mut clock = ClockConfig::default();
    clock.source = ClockSource::Deterministic;
    VmConfig::new(CpuModel::Host).interrupts(interrupts).clock(clock)
}

pub fn system_registers(now: &SystemRegisters) -> SystemRegisters {
    let data = Segment::data32(0x10);
    SystemRegisters {
        cs: Segment::code32(8),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: Segment::task_state(0x18, 0x3000),
        ldtr: Segment::null(),
        gdtr: DescriptorTable { base: 0x1000, limit: 0xff },
        idtr: DescriptorTable { base: 0x2000, limit: 0x7ff },
        cr0: 0x31,
        ..*now
    }
}

impl Flat {
    /// Runs `code` at `at`.
    pub fn new(at: u64, code: &[u8]) -> Self {
        Self::with(&config(InterruptMode::External), at, code)
    }

    pub fn with(config: &VmConfig, at: u64, code: &[u8]) -> Self {
        Self::on(TranslateOptions::default(), config, at, code)
    }

    /// Runs 64-bit code at a linear address with that CR3, which memory is yet to be filled for.
    pub fn long(tier: Tier, cr3: u64, at: u64) -> Self {
        Self::long_with(tier, &config(InterruptMode::External), cr3, at)
    }

    /// The same with another configuration.
    pub fn long_with(tier: Tier, config: &VmConfig, cr3: u64, at: u64) -> Self {
        let mut machine = Self::on(tier.options(), config, 0, &[]);
        let mut system = machine.vcpu.system_registers().unwrap();
        system.cs = Segment::code64(8);
        // PE MP NE WP PG, PAE OSFXSR OSXMMEXCPT, LME LMA.
        (system.cr0, system.cr3, system.cr4, system.efer) = (0x8001_0033, cr3, 0x620, 0x500);
        machine.vcpu.set_system_registers(&system).unwrap();
        let general = machine.vcpu.registers().unwrap();
        machine.vcpu.set_registers(&GeneralRegisters { rip: at, ..general }).unwrap();
        machine
    }

    fn on(options: TranslateOptions, config: &VmConfig, at: u64, code: &[u8]) -> Self {
        let vm = TranslateHypervisor::with_options(options).create_vm(config).unwrap();
        let ram = region(0, SIZE);
        vm.map_memory(Arc::clone(&ram), GuestAccess::ReadWrite).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let system = system_registers(&vcpu.system_registers().unwrap());
        vcpu.set_system_registers(&system).unwrap();
        let general = GeneralRegisters { rip: at, rsp: 0x9000, rflags: 2, ..GeneralRegisters::default() };
        vcpu.set_registers(&general).unwrap();
        let mut flat = Self { vcpu, vm, ram };
        flat.write(at, code);
        flat
    }

    pub fn write(&mut self, gpa: u64, bytes: &[u8]) {
        self.ram.write_slice(bytes, MemoryRegionAddress(gpa)).unwrap();
    }

    pub fn read<const N: usize>(&self, gpa: u64) -> [u8; N] {
        let mut bytes = [0; N];
        self.ram.read_slice(&mut bytes, MemoryRegionAddress(gpa)).unwrap();
        bytes
    }

    /// Sets registers, and wakes the vCPU if it was halted.
    pub fn go_on(&mut self, general: &GeneralRegisters) {
        let mut state = self.vcpu.save().unwrap();
        (state.general, state.run_state) = (*general, RunState::Running);
        self.vcpu.restore(&state).unwrap();
    }

    /// Runs until something other than a kick of the watchdog ends it; [`Halt::Interrupted`] if nothing does.
    pub fn run(&mut self) -> Halt {
        self.run_with(&mut EmptyBus)
    }

    pub fn run_with(&mut self, io: &mut dyn VcpuIo) -> Halt {
        for _ in 0..200_000 {
            match self.run_once(io) {
                Halt::Interrupted => {}
                halt => return halt,
            }
        }
        Halt::Interrupted
    }

    /// Runs until something ends it, at the latest a kick of the watchdog.
    pub fn run_once(&mut self, io: &mut dyn VcpuIo) -> Halt {
        watchdog::set_patience(Duration::from_secs(10));
        let _watch = watchdog::watch(self.vcpu.handle(), watchdog::KICK_AFTER, || "an attack".to_owned());
        self.vcpu.run(io).unwrap()
    }
}
