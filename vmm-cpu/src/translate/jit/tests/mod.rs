//! Small guests of 64-bit code that end with HLT, interpreted and translated.

mod crossing;
mod eviction;
mod pages;
mod storing;
mod two;

use iced_x86::code_asm::CodeAssembler;

use super::Tier1;
use crate::hypervisor::ClockSource;
use crate::translate::TranslateOptions;
use crate::translate::block::BlockCache;
use crate::translate::core::Machine;
use crate::translate::cpu::Activity;
use crate::translate::memory::PAGE;
use crate::translate::native::Elsewhere;
use crate::translate::run;
use crate::translate::test_support::{Guest, PAGE_TABLE};
use crate::vcpu::{EmptyBus, Halt, VcpuIo};

/// Where programs begin.
const MAIN: u64 = 0x8000;
/// The first of many free pages.
const FREE: u64 = 0x10_0000;

/// A vCPU with what it knows of its code.
struct Vcpu {
    guest: Guest,
    cache: BlockCache,
    tier1: Option<Tier1>,
}

impl Vcpu {
    fn new(options: TranslateOptions, clock: ClockSource) -> Self {
        let guest = Guest::with(options, clock).enter_long();
        let tier1 = Tier1::new(&guest.core.shared);
        let mut guest = guest;
        guest.core.checks_code = tier1.is_some();
        Self { guest, cache: BlockCache::new(), tier1 }
    }

    /// Puts code at an address, which is also its guest-physical one.
    fn put(&mut self, at: u64, code: impl FnOnce(&mut CodeAssembler) -> Result<(), iced_x86::IcedError>) {
        let mut assembler = CodeAssembler::new(64).unwrap();
        code(&mut assembler).unwrap();
        self.put_bytes(at, &assembler.assemble(at).unwrap());
    }

    fn put_bytes(&mut self, at: u64, bytes: &[u8]) {
        assert!(self.guest.core.map().write(at, bytes));
    }

    /// Runs from [`MAIN`] to a HLT.
    fn run(&mut self) {
        self.run_with(&mut EmptyBus);
    }

    fn run_with(&mut self, io: &mut dyn VcpuIo) {
        self.guest.core.cpu.rip = MAIN;
        self.guest.core.cpu.activity = Activity::Running;
        let mut machine = Machine::new(&mut self.guest.core, io);
        let halt =
            run::run(&mut machine, &mut self.cache, &mut self.tier1, &mut Elsewhere::default()).unwrap();
        if let Some(tier1) = &self.tier1 {
            tier1.verify(&mut self.guest.machine());
        }
        assert_eq!(halt, Halt::Halted);
    }

    fn register(&self, slot: u8) -> u64 {
        self.guest.core.cpu.r(slot)
    }

    /// One of the figures of translated code; zero where nothing is translated.
    fn figure(&self, name: &str) -> u64 {
        let tlb = &self.guest.core.tlb;
        let counts = self.tier1.as_ref().map(|tier1| tier1.counts(tlb)).unwrap_or_default();
        counts.into_iter().find_map(|(other, count)| (other == name).then_some(count)).unwrap_or(0)
    }

    /// Whether code is translated, and what it executes is counted.
    fn counts_translated(&self) -> bool {
        self.tier1.is_some() && self.guest.core.shared.clock.is_deterministic()
    }
}

/// The page-table entry of a page.
fn entry(va: u64) -> u64 {
    PAGE_TABLE + va / PAGE * 8
}

/// Does the same with vCPUs that interpret, that translate at once, and that translate later, by either clock.
fn on_all(test: impl Fn(Vcpu)) {
    on_all_with(TranslateOptions::default(), test);
}

fn on_all_with(options: TranslateOptions, test: impl Fn(Vcpu)) {
    test(Vcpu::new(options.translate_after(None), ClockSource::Deterministic));
    for clock in [ClockSource::Deterministic, ClockSource::Host] {
        for runs in [0, 2] {
            test(Vcpu::new(options.translate_after(Some(runs)), clock));
        }
    }
}
