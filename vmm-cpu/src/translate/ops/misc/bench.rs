//! A processor with a megabyte of memory that executes single instructions, for the tests of the neighbouring modules.

use std::sync::Arc;

use iced_x86::{Decoder, DecoderOptions};
use vmm_memory::vm_memory::GuestAddress;
use vmm_memory::{GuestRam, RegionConfig};

use crate::hypervisor::{ClockSource, InterruptMode};
use crate::translate::clock::Clock;
use crate::translate::core::{Core, Machine, Reason};
use crate::translate::cpu::{BLOCK, cr0, cr4, efer};
use crate::translate::memory::{MemoryMap, Slot};
use crate::translate::segment::{attribute, index};
use crate::translate::signals::Signals;
use crate::translate::vm::Shared;
use crate::vcpu::VcpuIo;
use crate::vm::GuestAccess;

/// Size of RAM in bytes. The same amount of addresses behind it is mapped too, and belongs to devices.
pub(in crate::translate::ops) const RAM: u64 = 1 << 20;
/// A page of RAM that page tables leave out.
pub(in crate::translate::ops) const HOLE: u64 = 0x4_0000;
/// Where instructions lie as far as RIP tells.
pub(in crate::translate::ops) const CODE: u64 = 0x9000;

/// Devices that log accesses.
#[derive(Debug, Default)]
pub(in crate::translate::ops) struct Devices {
    /// Address, data written, or what was read: 0x10, 0x11 and so on.
    pub(in crate::translate::ops) log: Vec<(u64, Vec<u8>)>,
    next: u8,
}

impl Devices {
    fn read(&mut self, address: u64, data: &mut [u8]) {
        for byte in data.iter_mut() {
            *byte = 0x10_u8.wrapping_add(self.next);
            self.next = self.next.wrapping_add(1);
        }
        self.log.push((address, data.to_vec()));
    }
}

impl VcpuIo for Devices {
    fn pio_read(&mut self, port: u16, _: usize, data: &mut [u8]) {
        self.read(port.into(), data);
    }

    fn pio_write(&mut self, port: u16, _: usize, data: &[u8]) {
        self.log.push((port.into(), data.to_vec()));
    }

    fn mmio_read(&mut self, gpa: GuestAddress, data: &mut [u8]) {
        self.read(gpa.0, data);
    }

    fn mmio_write(&mut self, gpa: GuestAddress, data: &[u8]) {
        self.log.push((gpa.0, data.to_vec()));
    }
}

pub(in crate::translate::ops) struct Bench {
    pub(in crate::translate::ops) core: Core,
    pub(in crate::translate::ops) devices: Devices,
}

impl Bench {
    /// With flat segments; 64-bit code runs with paging, other code without.
    pub(in crate::translate::ops) fn new(code_bits: u32) -> Self {
        let clock = Clock::new(None, ClockSource::Host);
        let shared = Shared::new(
            crate::translate::cpuid::supported(),
            InterruptMode::External,
            1,
            clock,
            crate::translate::TranslateOptions::default(),
        );
        let mut core = Core::new(0, Arc::new(shared), Arc::new(Signals::new()), None);
        let ram = GuestRam::builder().region(RegionConfig::new(GuestAddress(0), RAM)).build().unwrap();
        let mut map = MemoryMap::default();
        map.insert(Slot::new(ram.regions().remove(0), GuestAccess::ReadWrite)).unwrap();
        // The map is this processor's own: nothing is to be taken over after accesses to devices.
        core.see_epoch();
        core.tlb.set_map(Arc::new(map));
        let big = if code_bits == 64 { attribute::LONG } else { attribute::BIG };
        let cs = if code_bits == 16 { 0x9b } else { 0x9b | big };
        for segment in 0..6 {
            let attributes = if segment == index::CS {
                cs
            } else if code_bits == 16 {
                0x93
            } else {
                0x93 | attribute::BIG
            };
            let register = core.cpu.segment_mut(segment);
            (register.base, register.limit, register.attributes) = (0, u32::MAX, attributes);
        }
        core.cpu.cr0 = cr0::PE | cr0::WP;
        let mut bench = Self { core, devices: Devices::default() };
        if code_bits == 64 {
            for (entry, table) in [(0x1000, 0x2000), (0x2000, 0x3000), (0x3000, 0x4000_u64)] {
                bench.poke(entry, &(table | 7).to_le_bytes());
            }
            for page in 0..(2 * RAM) >> 12 {
                if page << 12 != HOLE {
                    bench.poke(0x4000 + page * 8, &(page << 12 | 7).to_le_bytes());
                }
            }
            let cpu = &mut bench.core.cpu;
            cpu.cr0 |= cr0::PG;
            (cpu.cr3, cpu.cr4) = (0x1000, cr4::PAE);
            cpu.efer = efer::LME | efer::LMA | efer::NXE;
        }
        bench.core.update_mode();
        bench
    }

    pub(in crate::translate::ops) fn poke(&mut self, gpa: u64, bytes: &[u8]) {
        assert!(self.core.map().write(gpa, bytes));
    }

    pub(in crate::translate::ops) fn peek(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        assert!(self.core.map().read(gpa, &mut bytes));
        bytes
    }

    /// Executes one instruction at [`CODE`].
    pub(in crate::translate::ops) fn run(&mut self, code: &[u8]) -> Result<(), Reason> {
        let bits = self.core.mode.code_bits;
        let instruction = Decoder::with_ip(bits, code, 0, DecoderOptions::NONE).decode();
        assert_eq!(instruction.len(), code.len(), "{instruction}");
        let lowered = crate::translate::ops::lower(&mut self.core, &instruction, code, 0, bits);
        self.core.cpu.set_r(BLOCK, CODE);
        self.core.cpu.rip = CODE + code.len() as u64;
        self.core.limit = 1;
        let mut machine = Machine::new(&mut self.core, &mut self.devices);
        match (lowered.op.run)(&mut machine, &lowered.op) {
            Ok(()) => Ok(()),
            Err(_) => {
                self.core.cpu.rip = CODE;
                Err(std::mem::take(&mut self.core.reason))
            }
        }
    }

    /// Executes an instruction that starts itself anew until it is done; how often it counts.
    pub(in crate::translate::ops) fn run_through(&mut self, code: &[u8]) -> Result<u32, Reason> {
        let mut counted = 0;
        for _ in 0..100_000 {
            match self.run(code) {
                Ok(()) => counted += 1,
                Err(Reason::None) => {}
                Err(reason) => return Err(reason),
            }
            if self.core.cpu.rip != CODE {
                return Ok(counted);
            }
        }
        panic!("it does not end");
    }

    pub(in crate::translate::ops) fn r(&self, register: u8) -> u64 {
        self.core.cpu.r(register)
    }

    pub(in crate::translate::ops) fn set(&mut self, registers: &[(u8, u64)]) {
        for (register, value) in registers {
            self.core.cpu.set_r(*register, *value);
        }
    }
}

/// An instruction that the host executes too, on RAX, RCX and RDX.
#[cfg(target_arch = "x86_64")]
pub(in crate::translate::ops) struct Native {
    pub(in crate::translate::ops) code: &'static [u8],
    /// RAX, RCX, RDX and the status flags, before and after.
    pub(in crate::translate::ops) run: fn([u64; 4]) -> [u64; 4],
}

/// The [`Native`] of an instruction given by its bytes.
#[cfg(target_arch = "x86_64")]
macro_rules! native {
    ($($byte:literal)*) => {{
        #[allow(unsafe_code, reason = "the host's processor is the reference")]
        fn run([mut rax, mut rcx, mut rdx, mut flags]: [u64; 4]) -> [u64; 4] {
            // SAFETY: the instruction works on registers that are declared, and does not fault with what tests pass;
            // the stack is as before and only status flags are set.
            unsafe {
                std::arch::asm!(
                    "push {flags}",
                    "popfq",
                    concat!($(".byte ", stringify!($byte), "\n"),*),
                    "pushfq",
                    "pop {flags}",
                    flags = inout(reg) flags,
                    inout("rax") rax,
                    inout("rcx") rcx,
                    inout("rdx") rdx,
                );
            }
            [rax, rcx, rdx, flags & $crate::translate::flags::bits::STATUS]
        }
        $crate::translate::ops::misc::bench::Native { code: &[$($byte),*], run }
    }};
}
#[cfg(target_arch = "x86_64")]
pub(in crate::translate::ops) use native;

#[cfg(target_arch = "x86_64")]
impl Bench {
    /// What the interpreter makes of the same instruction.
    pub(in crate::translate::ops) fn run_on(
        &mut self,
        code: &[u8],
        [rax, rcx, rdx, flags]: [u64; 4],
    ) -> Result<[u64; 4], Reason> {
        use crate::translate::cpu::{RAX, RCX, RDX};
        self.set(&[(RAX, rax), (RCX, rcx), (RDX, rdx)]);
        self.core.cpu.flags.set(flags);
        self.run(code)?;
        let flags = self.core.cpu.flags.get() & crate::translate::flags::bits::STATUS;
        Ok([self.r(RAX), self.r(RCX), self.r(RDX), flags])
    }

    /// Compares with the host, with flags as far as they are in `defined`.
    pub(in crate::translate::ops) fn compare(&mut self, native: &Native, before: [u64; 4], defined: u64) {
        let only_defined = |[rax, rcx, rdx, flags]: [u64; 4]| [rax, rcx, rdx, flags & defined];
        let here = only_defined(self.run_on(native.code, before).unwrap());
        let there = only_defined((native.run)(before));
        assert_eq!(here, there, "{:x?} of {before:x?}: {here:x?}, not {there:x?}", native.code);
    }
}

/// Numbers without order (SplitMix64), and now and then one of the special ones.
#[derive(Debug)]
pub(in crate::translate::ops) struct Numbers(pub(in crate::translate::ops) u64);

impl Numbers {
    pub(in crate::translate::ops) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        match z & 15 {
            0 => 0,
            1 => u64::MAX,
            2 => 0x8000_0000_8000_8080,
            3 => 1 << (z >> 8 & 63),
            4 => z >> (z >> 8 & 63),
            5 => (z.cast_signed() >> (z >> 8 & 63)).cast_unsigned(),
            _ => z,
        }
    }

    /// RAX, RCX, RDX and status flags.
    #[cfg(target_arch = "x86_64")]
    pub(in crate::translate::ops) fn registers(&mut self) -> [u64; 4] {
        let flags = self.next() & crate::translate::flags::bits::STATUS;
        [self.next(), self.next(), self.next(), flags]
    }
}
