//! The virtual machine that the interpreter runs cases in: what a 64-bit Linux makes of a processor, as far as ring 3 can
//! see it.
//!
//! | guest-physical | is |
//! |---|---|
//! | 0x1000 | page tables |
//! | 0x20000 | GDT, IDT, TSS, a page each |
//! | 0x24000 | code of ring 0 |
//! | 0x28000 | the state that a case begins with, and at its end that which it ended with |
//! | 0x30000 | the areas |
//!
//! Ring 0 sees all of it from [`KERNEL`] on, where no case has an address of its own.

use std::sync::Arc;

use anyhow::{Context, Result};
use vmm_cpu::state::{DescriptorTable, GeneralRegisters, Segment, SystemRegisters};
use vmm_cpu::translate::{AddressWindow, TranslateHypervisor, TranslateOptions};
use vmm_cpu::{ClockConfig, ClockSource, CpuModel, GuestAccess, Hypervisor, Vcpu, Vm, VmConfig};
use vmm_memory::vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};
use vmm_memory::{Backing, GuestRam, GuestRegion, RegionConfig};

use super::{Who, kernel};
use crate::case::AREAS;
use crate::memory::{self, IMAGE};
use crate::start::{USER_DS, USER32_CS, USER64_CS};

/// Where ring 0 sees guest-physical memory from 0 on: displacements reach it.
pub(super) const KERNEL: u64 = 0xffff_ffff_9000_0000;

const PAGE: u64 = 0x1000;
const TABLES: u64 = 0x1000;
const GDT: u64 = 0x2_0000;
const IDT: u64 = 0x2_1000;
const TSS: u64 = 0x2_2000;
/// Code of ring 0.
pub(super) const CODE: u64 = 0x2_4000;
/// See [`kernel`] for what lies in it.
pub(super) const STATE: u64 = 0x2_8000;
/// The areas' image.
pub(super) const AREA_IMAGE: u64 = 0x3_0000;
const SIZE: u64 = 0x4_0000;

const KERNEL_CS: u16 = 0x10;
const KERNEL_DS: u16 = 0x18;
const TASK: u16 = 0x40;

/// Bits of page table entries.
mod entry {
    pub(super) const PRESENT: u64 = 1;
    pub(super) const WRITABLE: u64 = 1 << 1;
    pub(super) const USER: u64 = 1 << 2;
    pub(super) const ACCESSED: u64 = 1 << 5;
    pub(super) const DIRTY: u64 = 1 << 6;
    pub(super) const NO_EXECUTE: u64 = 1 << 63;
}

/// PE MP ET NE WP AM PG.
const CR0: u64 = 0x8005_0033;
/// PAE PGE OSFXSR OSXMMEXCPT UMIP FSGSBASE.
const CR4: u64 = 1 << 5 | 1 << 7 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 16;
/// SCE LME LMA NXE.
const EFER: u64 = 0xd01;

const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SFMASK: u32 = 0xc000_0084;

/// Guest RAM that is filled as a program would.
pub(super) struct Ram(Arc<GuestRegion>);

impl Ram {
    pub(super) fn write(&self, gpa: u64, bytes: &[u8]) -> Result<()> {
        self.0
            .write_slice(bytes, MemoryRegionAddress(gpa))
            .with_context(|| format!("no guest memory at {gpa:#x}"))
    }

    pub(super) fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<()> {
        self.0
            .read_slice(bytes, MemoryRegionAddress(gpa))
            .with_context(|| format!("no guest memory at {gpa:#x}"))
    }

    fn write_word(&self, gpa: u64, word: u64) -> Result<()> {
        self.write(gpa, &word.to_le_bytes())
    }
}

/// Page tables that grow a table at a time.
struct Tables<'a> {
    ram: &'a Ram,
    next: u64,
}

impl Tables<'_> {
    fn map(&mut self, va: u64, gpa: u64, bits: u64) -> Result<()> {
        let through = entry::PRESENT | entry::WRITABLE | entry::USER | entry::ACCESSED;
        let mut table = TABLES;
        for level in [39, 30, 21] {
            let place = table + (va >> level & 0x1ff) * 8;
            let mut bytes = [0; 8];
            self.ram.read(place, &mut bytes)?;
            table = u64::from_le_bytes(bytes) & !0xfff;
            if table == 0 {
                table = self.next;
                self.next += PAGE;
                self.ram.write_word(place, table | through)?;
            }
        }
        let leaf = gpa | bits | entry::PRESENT | entry::ACCESSED | entry::DIRTY;
        self.ram.write_word(table + (va >> 12 & 0x1ff) * 8, leaf)
    }
}

/// What [`build`] makes.
pub(super) struct Machine {
    pub(super) vcpu: Box<dyn Vcpu>,
    pub(super) ram: Ram,
    // Holds the vCPU's memory.
    _vm: Arc<dyn Vm>,
}

/// A machine whose vCPU is about to load the state of a case.
pub(super) fn build(who: Who) -> Result<Machine> {
    let mut clock = ClockConfig::default();
    // Stops at instruction counts come with it.
    clock.source = ClockSource::Deterministic;
    let config = VmConfig::new(CpuModel::Host).clock(clock);
    let (translate_after, window) = match who {
        Who::Interpreter => (None, AddressWindow::Never),
        Who::Translator | Who::TranslatorAgain => (Some(0), AddressWindow::Never),
        Who::Window | Who::WindowAgain => (Some(0), AddressWindow::Always),
    };
    let options = TranslateOptions::default().translate_after(translate_after).address_window(window);
    let vm = TranslateHypervisor::with_options(options).create_vm(&config)?;
    // Shared, as the window needs it.
    let region = RegionConfig::new(GuestAddress(0), SIZE).backing(Backing::Memfd);
    let memory = GuestRam::builder().region(region).build()?;
    let region = memory.regions().into_iter().next().context("no guest memory")?;
    vm.map_memory(Arc::clone(&region), GuestAccess::ReadWrite)?;
    let ram = Ram(region);
    let kernel = kernel::assemble()?;
    ram.write(CODE, &kernel.code)?;
    ram.write(AREA_IMAGE, memory::pristine())?;
    write_tables(&ram)?;
    write_descriptors(&ram, &kernel)?;

    let mut vcpu = vm.create_vcpu(0)?;
    let now = vcpu.system_registers()?;
    let data = Segment::data32(KERNEL_DS);
    vcpu.set_system_registers(&SystemRegisters {
        cs: Segment::code64(KERNEL_CS),
        ds: data,
        es: data,
        fs: data,
        gs: data,
        ss: data,
        tr: Segment::task_state(TASK, KERNEL + TSS),
        ldtr: Segment::null(),
        gdtr: DescriptorTable { base: KERNEL + GDT, limit: 0x7f },
        idtr: DescriptorTable { base: KERNEL + IDT, limit: 0xfff },
        cr0: CR0,
        cr3: TABLES,
        cr4: CR4,
        efer: EFER,
        ..now
    })?;
    // SYSRET's selectors are USER32_CS and what follows from it.
    vcpu.set_msr(STAR, u64::from(USER32_CS) << 48 | u64::from(KERNEL_CS) << 32)?;
    vcpu.set_msr(LSTAR, kernel.system_call)?;
    vcpu.set_msr(CSTAR, kernel.system_call_32)?;
    // TF DF IF IOPL NT AC.
    vcpu.set_msr(SFMASK, 0x4_7700)?;
    let general = GeneralRegisters { rip: KERNEL + CODE, rflags: 2, ..GeneralRegisters::default() };
    vcpu.set_registers(&general)?;
    Ok(Machine { vcpu, ram, _vm: vm })
}

fn write_tables(ram: &Ram) -> Result<()> {
    let mut tables = Tables { ram, next: TABLES + PAGE };
    for gpa in (GDT..SIZE).step_by(PAGE as usize) {
        tables.map(KERNEL + gpa, gpa, entry::WRITABLE)?;
    }
    let mut gpa = AREA_IMAGE;
    for area in AREAS {
        let writable = if area.writable { entry::WRITABLE } else { 0 };
        let fetched = if area.executable { 0 } else { entry::NO_EXECUTE };
        for va in (area.start..area.start + area.size).step_by(PAGE as usize) {
            tables.map(va, gpa, entry::USER | writable | fetched)?;
            gpa += PAGE;
        }
    }
    debug_assert!(gpa == AREA_IMAGE + IMAGE as u64 && gpa <= SIZE && tables.next <= GDT);
    Ok(())
}

fn write_descriptors(ram: &Ram, kernel: &kernel::Kernel) -> Result<()> {
    // Linux, arch/x86/include/asm/segment.h: those that ring 3 can see or ring 0 needs here.
    let task = KERNEL + TSS;
    let descriptors = [
        (KERNEL_CS, 0x00af_9b00_0000_ffff),
        (KERNEL_DS, 0x00cf_9300_0000_ffff),
        (USER32_CS, 0x00cf_fb00_0000_ffff),
        (USER_DS, 0x00cf_f300_0000_ffff),
        (USER64_CS, 0x00af_fb00_0000_ffff),
        (TASK, 0x0000_8b00_0000_0067 | (task & 0xff_ffff) << 16 | (task >> 24 & 0xff) << 56),
        (TASK + 8, task >> 32),
        // The number of the processor, as the limit of a segment.
        (0x78, 0x0040_f500_0000_0000),
    ];
    for (selector, descriptor) in descriptors {
        ram.write_word(GDT + u64::from(selector & !7), descriptor)?;
    }
    // RSP0; and the I/O permission map lies beyond the limit, so that no port is permitted.
    ram.write_word(TSS + 4, KERNEL + STATE + kernel::STACK_TOP)?;
    ram.write(TSS + 0x66, &0x68_u16.to_le_bytes())?;
    for (vector, handler) in (0_u64..).zip(&kernel.vectors) {
        // INT3, INTO and INT 80h are for everybody.
        let dpl: u64 = if matches!(vector, 3 | 4 | 0x80) { 3 } else { 0 };
        let gate = handler & 0xffff
            | u64::from(KERNEL_CS) << 16
            | (0x8e00 | dpl << 13) << 32
            | (handler >> 16 & 0xffff) << 48;
        ram.write_word(IDT + 16 * vector, gate)?;
        ram.write_word(IDT + 16 * vector + 8, handler >> 32)?;
    }
    Ok(())
}
