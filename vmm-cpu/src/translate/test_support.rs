//! A small guest for unit tests: some RAM, descriptor tables, a vCPU without run loop that executes one instruction at a
//! time.

use std::sync::Arc;

use iced_x86::Decoder;
use vmm_memory::GuestRam;

use super::block::{BlockCache, DECODING};
use super::clock::Clock;
use super::core::{Core, Machine, Reason};
use super::cpu::{BLOCK, RSP, TableRegister, cr0, cr4, efer};
use super::exception::Exception;
use super::hypervisor::TranslateOptions;
use super::jit::Tier1;
use super::memory::PAGE;
use super::native::Elsewhere;
use super::ops;
use super::run;
use super::segment::{SegmentRegister, index};
use super::signals::Signals;
use super::vm::{Shared, TranslateVm};
use crate::cpuid::CpuidTable;
use crate::hypervisor::{ClockSource, InterruptMode};
use crate::vcpu::{EmptyBus, Halt, VcpuIo};
use crate::vm::{GuestAccess, Vm};

/// Bytes of RAM, from address 0.
pub(crate) const RAM: u64 = 4 << 20;
pub(crate) const GDT: u64 = 0x1000;
pub(crate) const IDT: u64 = 0x2000;
pub(crate) const TSS: u64 = 0x3000;
/// Where code is, when a guest starts.
pub(crate) const CODE: u64 = 0x8000;
/// Initial stack pointer.
pub(crate) const STACK: u64 = 0x1_0000;
/// Stack of level 0 in the TSS.
pub(crate) const INNER_STACK: u64 = 0x1_2000;
/// First entry of the interrupt stack table.
pub(crate) const IST_1: u64 = 0x1_4000;
/// A page that the page tables leave out, in long mode.
pub(crate) const HOLE: u64 = 0x20_0000 - PAGE;

/// Selectors of the GDT.
pub(crate) const CODE_64: u16 = 0x08;
pub(crate) const DATA: u16 = 0x10;
pub(crate) const CODE_32: u16 = 0x18;
pub(crate) const USER_CODE_32: u16 = 0x23;
pub(crate) const USER_DATA: u16 = 0x2b;
pub(crate) const USER_CODE_64: u16 = 0x33;
/// Two entries, as long mode has it.
pub(crate) const TASK: u16 = 0x38;
/// Entries from here on are free.
pub(crate) const FREE: u16 = 0x48;

const PAGE_TABLES: u64 = 0x4000;
/// The page-table entries of the first 2 MiB, in long mode.
pub(crate) const PAGE_TABLE: u64 = PAGE_TABLES + 3 * PAGE;

/// A vCPU with its memory.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) core: Core,
    /// What the run loop works with, where a test uses that.
    pub(crate) cache: BlockCache,
    pub(crate) tier1: Option<Tier1>,
    bus: EmptyBus,
}

/// Calls `test` with a guest that is interpreted, and with one that is translated from the first run of a block on.
pub(crate) fn on_each_tier(guest: fn() -> Guest, mut test: impl FnMut(Guest)) {
    test(guest());
    let mut translated = guest();
    translated.tier1 = Tier1::new(&translated.core.shared);
    test(translated);
}

impl Guest {
    /// In real mode, with code at 0x8000 and the stack below 0x10000 of segment 0.
    pub(crate) fn real() -> Self {
        Self::with(TranslateOptions::default().translate_after(Some(0)), ClockSource::Deterministic)
    }

    /// The same, executed as the options say, with that clock.
    pub(crate) fn with(options: TranslateOptions, clock: ClockSource) -> Self {
        let clock = Clock::new(None, clock);
        let cpuid = CpuidTable::default();
        let shared = Arc::new(Shared::new(cpuid, InterruptMode::External, 1, clock, options));
        let ram = GuestRam::builder().ram(RAM).build().unwrap();
        for region in ram.regions() {
            TranslateVm(Arc::clone(&shared)).map_memory(region, GuestAccess::ReadWrite).unwrap();
        }
        let core = Core::new(0, shared, Arc::new(Signals::new()), None);
        let mut guest = Self { core, cache: BlockCache::new(), tier1: None, bus: EmptyBus };
        guest.core.cpu.segment_mut(index::CS).load_real(0);
        guest.core.cpu.rip = CODE;
        guest.core.cpu.set_r(RSP, STACK - 2);
        guest.core.update_mode();
        guest
    }

    /// At level 0 of 32-bit protected mode without paging, with flat segments and a TSS.
    pub(crate) fn protected() -> Self {
        Self::real().enter_protected()
    }

    fn enter_protected(self) -> Self {
        let mut guest = self;
        guest.descriptor(CODE_32, 0x00cf_9b00_0000_ffff);
        guest.descriptor(DATA, 0x00cf_9300_0000_ffff);
        guest.descriptor(USER_CODE_32, 0x00cf_fb00_0000_ffff);
        guest.descriptor(USER_DATA, 0x00cf_f300_0000_ffff);
        guest.descriptor(TASK, 0x0000_8b00_3000_0067);
        guest.write::<4>(TSS + 4, INNER_STACK);
        guest.write::<2>(TSS + 8, DATA.into());
        let cpu = &mut guest.core.cpu;
        cpu.cr0 |= cr0::PE;
        cpu.gdtr = TableRegister { base: GDT, limit: 0xfff };
        cpu.idtr = TableRegister { base: IDT, limit: 0x7ff };
        cpu.set_r(RSP, STACK);
        guest.set_segments(CODE_32, DATA);
        guest.core.cpu.tr = guest.segment(TASK);
        guest
    }

    /// At level 0 of 64-bit mode, RAM but for [`HOLE`] mapped one to one for all levels.
    pub(crate) fn long() -> Self {
        Self::real().enter_long()
    }

    /// From real mode to that state.
    pub(crate) fn enter_long(self) -> Self {
        let mut guest = self.enter_protected();
        guest.descriptor(CODE_64, 0x00af_9b00_0000_ffff);
        guest.descriptor(USER_CODE_64, 0x00af_fb00_0000_ffff);
        guest.write::<8>(TSS + 4, INNER_STACK);
        guest.write::<8>(TSS + 0x24, IST_1);
        for level in 0..3 {
            let table = PAGE_TABLES + level * PAGE;
            guest.write::<8>(table, (table + PAGE) | 7);
        }
        for page in (0..0x20_0000 / PAGE).filter(|page| page * PAGE != HOLE) {
            guest.write::<8>(PAGE_TABLE + page * 8, (page * PAGE) | 7);
        }
        let cpu = &mut guest.core.cpu;
        cpu.cr3 = PAGE_TABLES;
        cpu.cr4 |= cr4::PAE;
        cpu.efer |= efer::LME | efer::LMA;
        cpu.cr0 |= cr0::PG;
        cpu.idtr.limit = 0xfff;
        guest.set_segments(CODE_64, DATA);
        guest
    }

    /// Loads CS with one selector and the other segment registers with another, without checks.
    pub(crate) fn set_segments(&mut self, code: u16, data: u16) {
        *self.core.cpu.segment_mut(index::CS) = self.segment(code);
        for segment in [index::ES, index::SS, index::DS, index::FS, index::GS] {
            *self.core.cpu.segment_mut(segment) = self.segment(data);
        }
        self.core.update_mode();
    }

    /// What a selector of the GDT stands for.
    pub(crate) fn segment(&self, selector: u16) -> SegmentRegister {
        SegmentRegister::from_descriptor(selector, self.read::<8>(GDT + u64::from(selector & !7)))
    }

    /// Writes an entry of the GDT.
    pub(crate) fn descriptor(&mut self, selector: u16, descriptor: u64) {
        self.write::<8>(GDT + u64::from(selector & !7), descriptor);
    }

    /// Writes an entry of the IDT of the current mode: type and rights as in its byte 5, IST as in its byte 4.
    pub(crate) fn gate(&mut self, vector: u8, selector: u16, offset: u64, rights: u64, ist: u64) {
        let low = gate(selector, offset, rights) | ist << 32;
        if self.core.cpu.long_mode() {
            self.write::<8>(IDT + u64::from(vector) * 16, low);
            self.write::<8>(IDT + u64::from(vector) * 16 + 8, offset >> 32);
        } else {
            self.write::<8>(IDT + u64::from(vector) * 8, low);
        }
    }

    /// Writes `N` bytes at a guest-physical address.
    pub(crate) fn write<const N: usize>(&mut self, gpa: u64, value: u64) {
        assert!(self.core.map().write(gpa, &value.to_le_bytes()[..N]));
    }

    /// Reads `N` bytes at a guest-physical address.
    pub(crate) fn read<const N: usize>(&self, gpa: u64) -> u64 {
        let mut bytes = [0; 8];
        assert!(self.core.map().read(gpa, &mut bytes[..N]));
        u64::from_le_bytes(bytes)
    }

    /// `COUNT` words of `N` bytes from a guest-physical address.
    pub(crate) fn words<const N: usize, const COUNT: usize>(&self, gpa: u64) -> [u64; COUNT] {
        std::array::from_fn(|word| self.read::<N>(gpa + (word * N) as u64))
    }

    pub(crate) fn machine(&mut self) -> Machine<'_> {
        Machine::new(&mut self.core, &mut self.bus)
    }

    /// Runs, as a vCPU does.
    pub(crate) fn run(&mut self) -> Halt {
        let mut bus = EmptyBus;
        self.run_with(&mut bus)
    }

    /// Runs with a VMM of the test's own.
    pub(crate) fn run_with(&mut self, io: &mut dyn VcpuIo) -> Halt {
        let mut m = Machine::new(&mut self.core, io);
        run::run(&mut m, &mut self.cache, &mut self.tier1, &mut Elsewhere::default()).unwrap()
    }

    /// Executes one instruction at RIP, as the run loop does.
    pub(crate) fn execute(&mut self, code: &[u8]) -> Result<(), Reason> {
        let core = &mut self.core;
        let bits = core.mode.code_bits;
        let instruction = Decoder::with_ip(bits, code, 0, DECODING).decode();
        assert_eq!(instruction.len(), code.len(), "{code:x?} is {instruction:?}");
        let lowered = ops::lower(core, &instruction, code, 0, bits);
        let rip = core.cpu.rip;
        core.cpu.set_r(BLOCK, rip);
        core.cpu.rip = rip.wrapping_add(code.len() as u64) & core.mode.ip_mask;
        core.limit = 1;
        let result = (lowered.op.run)(&mut Machine::new(core, &mut self.bus), &lowered.op);
        result.map_err(|_| {
            self.core.cpu.rip = rip;
            std::mem::take(&mut self.core.reason)
        })
    }

    /// Executes one instruction, which must fault.
    pub(crate) fn fault(&mut self, code: &[u8]) -> Exception {
        match self.execute(code) {
            Err(Reason::Exception(exception)) => exception,
            other => panic!("{code:x?}: {other:?}"),
        }
    }
}

/// The first 8 bytes of a gate; `rights` is its byte 5.
pub(crate) fn gate(selector: u16, offset: u64, rights: u64) -> u64 {
    offset & 0xffff | u64::from(selector) << 16 | rights << 40 | (offset & 0xffff_0000) << 32
}
