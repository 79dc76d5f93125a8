//! A machine for small guests: 1 MiB of RAM, flat 64-bit code with an identity map of the first 4 GiB,
//! and a recorder for whatever the guest asks.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use vmm_cpu::state::{CpuState, DescriptorTable, GeneralRegisters, Segment, SystemRegisters, rflags};
use vmm_cpu::vmm_memory::vm_memory::{Bytes, GuestAddress};
use vmm_cpu::vmm_memory::{GuestRam, PAGE_SIZE};
use vmm_cpu::{Halt, InterruptMode, Vcpu, VcpuHandle, Vm, VmConfig};

use super::backend::Backend;
use super::case::{Outcome, Stop};
use super::program::Image;
use super::recorder::Recorder;

/// Where things are in guest-physical memory.
pub(crate) mod layout {
    pub(crate) const GDT: u64 = 0x1000;
    pub(crate) const IDT: u64 = 0x2000;
    pub(crate) const TSS: u64 = 0x3000;
    /// Real-mode start of further vCPUs.
    pub(crate) const TRAMPOLINE: u64 = 0x8000;
    pub(crate) const PAGE_TABLES: u64 = 0x1_0000;
    pub(crate) const CODE: u64 = 0x2_0000;
    /// Free for guests, up to the stack.
    pub(crate) const DATA: u64 = 0x4_0000;
    pub(crate) const DATA_SIZE: u64 = 0x2_0000;
    pub(crate) const STACK_TOP: u64 = 0x7_0000;
    pub(crate) const RAM_SIZE: u64 = 1 << 20;
    /// No memory here; mapped by the guest's page tables.
    pub(crate) const MMIO: u64 = 0xd000_0000;
}

/// Selectors of the machine's GDT.
pub(crate) mod selector {
    pub(crate) const CODE: u16 = 0x08;
    pub(crate) const DATA: u16 = 0x10;
    pub(crate) const TSS: u16 = 0x18;
    pub(crate) const USER_DATA: u16 = 0x2b;
    pub(crate) const USER_CODE: u16 = 0x33;
}

/// Longest that one stay in the guest may take on a loaded machine.
const RUN_DEADLINE: Duration = Duration::from_secs(20);

/// See the module.
pub(crate) struct Machine {
    // First, since a vCPU goes before what it runs on.
    pub(crate) vcpu: Box<dyn Vcpu>,
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) ram: GuestRam,
    pub(crate) bus: Recorder,
}

impl Machine {
    /// A machine without interrupt controllers that is about to execute `image`.
    pub(crate) fn new(backend: &Backend, image: &Image) -> Outcome<Self> {
        Self::with_config(backend, &backend.config(InterruptMode::External)?, image)
    }

    /// A machine in interrupt mode `mode` that is about to execute `image`.
    pub(crate) fn in_mode(backend: &Backend, mode: InterruptMode, image: &Image) -> Outcome<Self> {
        Self::with_config(backend, &backend.config(mode)?, image)
    }

    /// A machine of `config` that is about to execute `image`.
    pub(crate) fn with_config(backend: &Backend, config: &VmConfig, image: &Image) -> Outcome<Self> {
        Self::of_vcpu(backend, config, 0, image)
    }

    /// A machine of `config` whose vCPU `index` is about to execute `image`.
    pub(crate) fn of_vcpu(backend: &Backend, config: &VmConfig, index: u32, image: &Image) -> Outcome<Self> {
        let ram = guest_ram()?;
        prepare_memory(&ram, image)?;
        let vm = backend.hypervisor.create_vm(config)?;
        vm.map_ram(&ram)?;
        let mut vcpu = vm.create_vcpu(index)?;
        let apic_base = vcpu.system_registers()?.apic_base;
        vcpu.set_system_registers(&SystemRegisters { apic_base, ..flat_system_registers() })?;
        vcpu.set_registers(&entry_registers(image.base))?;
        let bus = Recorder::new(vcpu.handle());
        Ok(Self { vcpu, vm, ram, bus })
    }

    /// A fresh machine with a copy of memory, controllers and clock, and with vCPU 0 in `state`.
    pub(crate) fn copy(&self, backend: &Backend, config: &VmConfig, state: &CpuState) -> Outcome<Self> {
        let ram = guest_ram()?;
        copy_ram(&self.ram, &ram)?;
        let vm = backend.hypervisor.restore_vm(config, &self.vm.save()?)?;
        vm.map_ram(&ram)?;
        let vcpu = vm.restore_vcpu(0, state)?;
        let bus = Recorder::new(vcpu.handle());
        Ok(Self { vcpu, vm, ram, bus })
    }

    /// Lets the guest go on at privilege level 3, with the right to use ports.
    pub(crate) fn enter_ring_3(&mut self) -> Outcome {
        let mut system = self.vcpu.system_registers()?;
        system.cs = Segment { dpl: 3, ..Segment::code64(selector::USER_CODE) };
        let data = Segment { dpl: 3, ..Segment::data32(selector::USER_DATA) };
        (system.ss, system.ds, system.es) = (data, data, data);
        self.vcpu.set_system_registers(&system)?;
        let mut registers = self.vcpu.registers()?;
        registers.rflags |= 3 << 12;
        Ok(self.vcpu.set_registers(&registers)?)
    }

    /// Runs once; a guest that does not come back is an error.
    pub(crate) fn run(&mut self) -> Outcome<Halt> {
        let expired = Arc::new(AtomicBool::new(false));
        let halt = {
            let _watch = Watch::over(self.vcpu.handle(), Arc::clone(&expired))?;
            self.vcpu.run(&mut self.bus)?
        };
        if let Some(violation) = self.bus.violations.first() {
            return Err(Stop::failed(format!("contract of VcpuIo: {violation}")));
        }
        if expired.load(Ordering::SeqCst) {
            return Err(Stop::failed(format!(
                "the guest ran for {} s: {}; seen: {:?}",
                RUN_DEADLINE.as_secs(),
                self.vcpu.registers()?,
                self.bus.log,
            )));
        }
        Ok(halt)
    }

    /// Runs, and says what came instead of `expected`.
    pub(crate) fn run_until(&mut self, expected: &Halt) -> Outcome {
        let halt = self.run()?;
        if halt != *expected {
            let registers = self.vcpu.registers()?;
            return Err(Stop::failed(format!(
                "{halt:?} instead of {expected:?} at {registers}; seen: {:?}",
                self.bus.log
            )));
        }
        Ok(())
    }

    /// Runs until the guest says that it has reached its end.
    pub(crate) fn run_to_end(&mut self) -> Outcome {
        self.bus.ended = false;
        self.run_until(&Halt::Interrupted)?;
        if !self.bus.ended {
            return Err(Stop::failed(format!("interrupted before its end, after {:?}", self.bus.log)));
        }
        Ok(())
    }

    /// The 8 bytes of guest memory at `gpa`.
    pub(crate) fn word(&self, gpa: u64) -> Outcome<u64> {
        Ok(self.ram.memory().read_obj(GuestAddress(gpa))?)
    }

    /// Guest memory.
    pub(crate) fn bytes(&self, gpa: u64, length: usize) -> Outcome<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.ram.memory().read_slice(&mut bytes, GuestAddress(gpa))?;
        Ok(bytes)
    }

    /// Changes guest memory.
    pub(crate) fn write(&self, gpa: u64, bytes: &[u8]) -> Outcome {
        Ok(self.ram.memory().write_slice(bytes, GuestAddress(gpa))?)
    }
}

/// Memory for one machine.
pub(crate) fn guest_ram() -> Outcome<GuestRam> {
    Ok(GuestRam::builder().ram(layout::RAM_SIZE).track_dirty(true).build()?)
}

/// Copies all guest memory.
pub(crate) fn copy_ram(from: &GuestRam, to: &GuestRam) -> Outcome {
    let mut page = [0; PAGE_SIZE as usize];
    for gpa in (0..layout::RAM_SIZE).step_by(page.len()).map(GuestAddress) {
        from.memory().read_slice(&mut page, gpa)?;
        to.memory().write_slice(&page, gpa)?;
    }
    Ok(())
}

/// Descriptor tables, page tables and the image.
fn prepare_memory(ram: &GuestRam, image: &Image) -> Outcome {
    let memory = ram.memory();
    let put = |gpa: u64, value: u64| memory.write_obj(value, GuestAddress(gpa));

    let tss = 0x0000_8b00_0000_0067 | layout::TSS << 16;
    let gdt = [
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        tss,
        0,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
    ];
    for (entry, gpa) in gdt.iter().zip((layout::GDT..).step_by(8)) {
        put(gpa, *entry)?;
    }
    for (vector, handler) in &image.gates {
        let gpa = layout::IDT + u64::from(*vector) * 16;
        let present_interrupt_gate = 0x8e00 << 32;
        put(
            gpa,
            handler & 0xffff
                | u64::from(selector::CODE) << 16
                | present_interrupt_gate
                | (handler >> 16 & 0xffff) << 48,
        )?;
        put(gpa + 8, handler >> 32)?;
    }

    let (present_writable_user, large) = (7, 1 << 7);
    let [pml4, pdpt, directories] = [0, 1, 2].map(|page| layout::PAGE_TABLES + page * PAGE_SIZE);
    put(pml4, pdpt | present_writable_user)?;
    for gib in 0..4 {
        put(pdpt + gib * 8, (directories + gib * PAGE_SIZE) | present_writable_user)?;
    }
    for entry in 0..4 * 512 {
        put(directories + entry * 8, entry << 21 | large | present_writable_user)?;
    }

    memory.write_slice(image.bytes(), GuestAddress(image.base))?;
    Ok(())
}

/// Flat 64-bit mode at privilege level 0.
pub(crate) fn flat_system_registers() -> SystemRegisters {
    let data = Segment::data32(selector::DATA);
    SystemRegisters {
        cs: Segment::code64(selector::CODE),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: Segment::task_state(selector::TSS, layout::TSS),
        ldtr: Segment::null(),
        gdtr: DescriptorTable { base: layout::GDT, limit: 7 * 8 - 1 },
        idtr: DescriptorTable { base: layout::IDT, limit: 256 * 16 - 1 },
        // PG, NE, ET, MP, PE.
        cr0: 0x8000_0033,
        cr3: layout::PAGE_TABLES,
        cr4: SystemRegisters::CR4_PAE,
        efer: SystemRegisters::EFER_LME | SystemRegisters::EFER_LMA,
        ..SystemRegisters::at_reset()
    }
}

fn entry_registers(rip: u64) -> GeneralRegisters {
    GeneralRegisters { rip, rsp: layout::STACK_TOP, rflags: rflags::FIXED, ..GeneralRegisters::default() }
}

/// Kicks a vCPU that stays in the guest for too long.
struct Watch {
    done: Option<mpsc::Sender<()>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Watch {
    fn over(handle: Arc<dyn VcpuHandle>, expired: Arc<AtomicBool>) -> Outcome<Self> {
        let (done, receiver) = mpsc::channel();
        let thread = thread::Builder::new().spawn(move || {
            if receiver.recv_timeout(RUN_DEADLINE) == Err(mpsc::RecvTimeoutError::Timeout) {
                expired.store(true, Ordering::SeqCst);
                handle.kick();
            }
        })?;
        Ok(Self { done: Some(done), thread: Some(thread) })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.done = None;
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}
