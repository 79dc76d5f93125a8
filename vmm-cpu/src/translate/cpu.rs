//! The architectural state of one vCPU.
//!
//! It holds no pointer and has a defined layout, so that code in another process can work on it through shared memory.

use super::flags::{Flags, bits};
use super::memory::Reach;
use super::segment::{SegmentRegister, attribute, index};
use super::word::Word;
use super::x87::X87State;
use crate::state::SystemRegisters;

/// Slots of the register file: the sixteen general registers, then what addresses can be made of.
pub(crate) const ZERO: u8 = 16;
/// Start of the running basic block, as RIP.
pub(crate) const BLOCK: u8 = 17;

pub(crate) const RAX: u8 = 0;
pub(crate) const RCX: u8 = 1;
pub(crate) const RDX: u8 = 2;
pub(crate) const RBX: u8 = 3;
pub(crate) const RSP: u8 = 4;
pub(crate) const RBP: u8 = 5;
pub(crate) const RSI: u8 = 6;
pub(crate) const RDI: u8 = 7;
pub(crate) const R11: u8 = 11;
/// Marks AH, CH, DH and BH, whose index is that of the register that they are part of.
pub(crate) const HIGH_BYTE: u8 = 0x40;

/// Control register bits (Intel SDM 3A 2.5).
pub(crate) mod cr0 {
    pub(crate) const PE: u64 = 1 << 0;
    pub(crate) const MP: u64 = 1 << 1;
    pub(crate) const EM: u64 = 1 << 2;
    pub(crate) const TS: u64 = 1 << 3;
    pub(crate) const ET: u64 = 1 << 4;
    pub(crate) const NE: u64 = 1 << 5;
    pub(crate) const WP: u64 = 1 << 16;
    pub(crate) const AM: u64 = 1 << 18;
    pub(crate) const NW: u64 = 1 << 29;
    pub(crate) const CD: u64 = 1 << 30;
    pub(crate) const PG: u64 = 1 << 31;
    pub(crate) const ALL: u64 = PE | MP | EM | TS | ET | NE | WP | AM | NW | CD | PG;
}

pub(crate) mod cr4 {
    pub(crate) const TSD: u64 = 1 << 2;
    pub(crate) const DE: u64 = 1 << 3;
    pub(crate) const PSE: u64 = 1 << 4;
    pub(crate) const PAE: u64 = 1 << 5;
    pub(crate) const MCE: u64 = 1 << 6;
    pub(crate) const PGE: u64 = 1 << 7;
    pub(crate) const PCE: u64 = 1 << 8;
    pub(crate) const OSFXSR: u64 = 1 << 9;
    pub(crate) const OSXMMEXCPT: u64 = 1 << 10;
    pub(crate) const UMIP: u64 = 1 << 11;
    pub(crate) const FSGSBASE: u64 = 1 << 16;
    pub(crate) const OSXSAVE: u64 = 1 << 18;
    pub(crate) const SMEP: u64 = 1 << 20;
    pub(crate) const SMAP: u64 = 1 << 21;
    pub(crate) const PKE: u64 = 1 << 22;
}

pub(crate) mod efer {
    pub(crate) const SCE: u64 = 1 << 0;
    pub(crate) const LME: u64 = 1 << 8;
    pub(crate) const LMA: u64 = 1 << 10;
    pub(crate) const NXE: u64 = 1 << 11;
    pub(crate) const FFXSR: u64 = 1 << 14;
    pub(crate) const ALL: u64 = SCE | LME | LMA | NXE;
}

/// GDTR or IDTR.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TableRegister {
    pub(crate) base: u64,
    pub(crate) limit: u16,
}

/// Model-specific registers that are plain storage.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ModelSpecific {
    pub(crate) star: u64,
    pub(crate) lstar: u64,
    pub(crate) cstar: u64,
    pub(crate) fmask: u64,
    pub(crate) kernel_gs_base: u64,
    pub(crate) sysenter_cs: u64,
    pub(crate) sysenter_esp: u64,
    pub(crate) sysenter_eip: u64,
    pub(crate) pat: u64,
    pub(crate) tsc_aux: u64,
    pub(crate) misc_enable: u64,
    /// Guest TSC less the virtual machine's.
    pub(crate) tsc_offset: u64,
    /// IA32_TSC_ADJUST: what the guest has added to the counter since RESET.
    pub(crate) tsc_adjust: u64,
    pub(crate) mtrr_def_type: u64,
    pub(crate) mtrr_variable: [u64; 16],
    pub(crate) mtrr_fixed: [u64; 11],
}

/// What a vCPU is doing when no instruction is due.
#[repr(u8)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Activity {
    #[default]
    Running,
    Halted,
    WaitForInit,
    WaitForSipi,
}

/// Everything that software can see of a vCPU, its local APIC aside.
#[repr(C)]
#[derive(Clone, Debug)]
pub(crate) struct Cpu {
    /// See [`ZERO`] and [`BLOCK`]; a power of two, so that a masked index is in bounds.
    file: [u64; 32],
    pub(crate) rip: u64,
    pub(crate) flags: Flags,
    pub(crate) segments: [SegmentRegister; 8],
    pub(crate) ldtr: SegmentRegister,
    pub(crate) tr: SegmentRegister,
    pub(crate) gdtr: TableRegister,
    pub(crate) idtr: TableRegister,
    pub(crate) cr0: u64,
    pub(crate) cr2: u64,
    pub(crate) cr3: u64,
    pub(crate) cr4: u64,
    /// Task priority where there is no local APIC.
    pub(crate) cr8: u64,
    pub(crate) efer: u64,
    pub(crate) apic_base: u64,
    pub(crate) xcr0: u64,
    pub(crate) dr: [u64; 4],
    pub(crate) dr6: u64,
    pub(crate) dr7: u64,
    pub(crate) msr: ModelSpecific,
    pub(crate) x87: X87State,
    xmm: [u128; 16],
    pub(crate) mxcsr: u32,
    pub(crate) activity: Activity,
    pub(crate) nmi_pending: bool,
    pub(crate) nmi_masked: bool,
    /// Interrupts are held off for one instruction after STI, MOV SS or POP SS.
    pub(crate) shadow_sti: bool,
    pub(crate) shadow_mov_ss: bool,
    /// Counts where CR4.PKE is set, which no guest of this backend can: that of another engine's, see `substitute`.
    pub(crate) pkru: u32,
}

impl Cpu {
    /// Distances from the start, for code that is not Rust's: the register file, and the vector registers.
    pub(crate) const FILE: usize = std::mem::offset_of!(Self, file);
    pub(crate) const XMM: usize = std::mem::offset_of!(Self, xmm);

    /// After RESET (Intel SDM 3A table 11-1).
    pub(crate) fn at_reset() -> Self {
        let system = SystemRegisters::at_reset();
        let mut cpu = Self {
            file: [0; 32],
            rip: 0xfff0,
            flags: Flags::new(bits::FIXED),
            segments: [SegmentRegister::default(); 8],
            ldtr: (&system.ldtr).into(),
            tr: (&system.tr).into(),
            gdtr: TableRegister { base: 0, limit: 0xffff },
            idtr: TableRegister { base: 0, limit: 0xffff },
            cr0: system.cr0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            efer: 0,
            apic_base: system.apic_base,
            xcr0: 1,
            dr: [0; 4],
            dr6: system.dr6,
            dr7: system.dr7,
            msr: ModelSpecific { pat: 0x0007_0406_0007_0406, misc_enable: 1, ..ModelSpecific::default() },
            x87: X87State::default(),
            xmm: [0; 16],
            mxcsr: 0x1f80,
            activity: Activity::Running,
            nmi_pending: false,
            nmi_masked: false,
            shadow_sti: false,
            shadow_mov_ss: false,
            pkru: 0,
        };
        for (register, segment) in
            [system.es, system.cs, system.ss, system.ds, system.fs, system.gs].iter().enumerate()
        {
            *cpu.segment_mut(register) = segment.into();
        }
        cpu
    }

    /// Takes over what INIT leaves alone.
    pub(crate) fn keep_over_init(&mut self, old: &Self) {
        (self.x87, self.xmm, self.mxcsr, self.xcr0) = (old.x87, old.xmm, old.mxcsr, old.xcr0);
        (self.msr, self.apic_base) = (old.msr, old.apic_base);
        self.cr0 = self.cr0 & !(cr0::CD | cr0::NW) | old.cr0 & (cr0::CD | cr0::NW);
    }

    /// Register `slot` of the file.
    #[allow(clippy::indexing_slicing, reason = "the index is masked to the length")]
    #[inline(always)]
    pub(crate) fn r(&self, slot: u8) -> u64 {
        self.file[usize::from(slot & 31)]
    }

    #[allow(clippy::indexing_slicing, reason = "the index is masked to the length")]
    #[inline(always)]
    pub(crate) fn set_r(&mut self, slot: u8, value: u64) {
        self.file[usize::from(slot & 31)] = value;
    }

    /// A general register of width `W`.
    #[inline(always)]
    pub(crate) fn get<W: Word>(&self, register: u8) -> u64 {
        let value = self.r(register);
        if W::BITS == 8 { value >> ((register & HIGH_BYTE) >> 3) & 0xff } else { value & W::MASK }
    }

    /// Writes a general register of width `W`: 32-bit writes clear the upper half, narrower ones leave the rest.
    #[inline(always)]
    pub(crate) fn set<W: Word>(&mut self, register: u8, value: u64) {
        match W::BITS {
            64 => self.set_r(register, value),
            32 => self.set_r(register, value & W::MASK),
            16 => self.set_r(register, self.r(register) & !0xffff | value & 0xffff),
            _ => {
                let shift = (register & HIGH_BYTE) >> 3;
                self.set_r(register, self.r(register) & !(0xff << shift) | (value & 0xff) << shift);
            }
        }
    }

    #[allow(clippy::indexing_slicing, reason = "the index is masked to the length")]
    #[inline(always)]
    pub(crate) fn segment(&self, index: usize) -> &SegmentRegister {
        &self.segments[index & 7]
    }

    #[allow(clippy::indexing_slicing, reason = "the index is masked to the length")]
    #[inline(always)]
    pub(crate) fn segment_mut(&mut self, index: usize) -> &mut SegmentRegister {
        &mut self.segments[index & 7]
    }

    #[allow(clippy::indexing_slicing, reason = "the index is masked to the length")]
    #[inline(always)]
    pub(crate) fn xmm(&self, index: u8) -> u128 {
        self.xmm[usize::from(index & 15)]
    }

    #[allow(clippy::indexing_slicing, reason = "the index is masked to the length")]
    #[inline(always)]
    pub(crate) fn set_xmm(&mut self, index: u8, value: u128) {
        self.xmm[usize::from(index & 15)] = value;
    }

    pub(crate) fn all_xmm(&self) -> [u128; 16] {
        self.xmm
    }

    pub(crate) fn cs(&self) -> &SegmentRegister {
        self.segment(index::CS)
    }

    pub(crate) fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }

    pub(crate) fn virtual_8086(&self) -> bool {
        self.flags.control(bits::VM)
    }

    pub(crate) fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// Width of the running code in bits: 16, 32 or 64.
    pub(crate) fn code_bits(&self) -> u32 {
        if self.long_mode() && self.cs().has(attribute::LONG) {
            64
        } else if self.cs().has(attribute::BIG) {
            32
        } else {
            16
        }
    }

    /// The current privilege level: that of SS in protected mode.
    pub(crate) fn cpl(&self) -> u8 {
        if !self.protected() {
            0
        } else if self.virtual_8086() {
            3
        } else {
            self.segment(index::SS).dpl()
        }
    }

    /// Whose rights accesses have at privilege level `cpl`.
    pub(crate) fn reach(&self, cpl: u8) -> Reach {
        let ac = self.flags.control(bits::AC);
        match cpl {
            3 if ac && self.cr0 & cr0::AM != 0 => Reach::UserAligned,
            3 => Reach::User,
            _ if self.cr4 & cr4::SMAP != 0 && !ac => Reach::Supervisor,
            _ => Reach::SupervisorAll,
        }
    }

    pub(crate) fn iopl(&self) -> u8 {
        super::segment::low8(self.flags.get() >> 12) & 3
    }
}
