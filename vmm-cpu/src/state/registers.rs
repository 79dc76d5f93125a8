//! General, segment, table, control and debug registers.

use std::fmt;

/// Bits of RFLAGS (Intel SDM 1 3.4.3).
pub mod rflags {
    /// Carry.
    pub const CF: u64 = 1 << 0;
    /// Always one.
    pub const FIXED: u64 = 1 << 1;
    /// Zero.
    pub const ZF: u64 = 1 << 6;
    /// Trap: debug exception after each instruction.
    pub const TF: u64 = 1 << 8;
    /// Maskable interrupts are taken.
    pub const IF: u64 = 1 << 9;
    /// String instructions go down.
    pub const DF: u64 = 1 << 10;
}

/// General registers, RIP and RFLAGS.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "each field is the register of its name")]
pub struct GeneralRegisters {
    pub rax: u64,
    pub rbx: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub rsp: u64,
    pub rbp: u64,
    pub r8: u64,
    pub r9: u64,
    pub r10: u64,
    pub r11: u64,
    pub r12: u64,
    pub r13: u64,
    pub r14: u64,
    pub r15: u64,
    pub rip: u64,
    pub rflags: u64,
}

impl GeneralRegisters {
    /// After RESET: RIP 0xfff0, RFLAGS 2; RDX holds no processor signature.
    pub fn at_reset() -> Self {
        Self { rip: 0xfff0, rflags: rflags::FIXED, ..Self::default() }
    }
}

impl fmt::Display for GeneralRegisters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "rax={:x} rbx={:x} rcx={:x} rdx={:x} rsi={:x} rdi={:x} rsp={:x} rbp={:x} \
             r8={:x} r9={:x} r10={:x} r11={:x} r12={:x} r13={:x} r14={:x} r15={:x} rip={:x} rflags={:x}",
            self.rax,
            self.rbx,
            self.rcx,
            self.rdx,
            self.rsi,
            self.rdi,
            self.rsp,
            self.rbp,
            self.r8,
            self.r9,
            self.r10,
            self.r11,
            self.r12,
            self.r13,
            self.r14,
            self.r15,
            self.rip,
            self.rflags
        )
    }
}

/// A segment register with its hidden part (Intel SDM 3A 3.4.3 and 3.4.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Visible part.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes (granularity applied).
    pub limit: u32,
    /// Type field, 4 bits.
    pub kind: u8,
    /// S: code or data (true) or system segment.
    pub code_or_data: bool,
    /// Descriptor privilege level, 0 to 3.
    pub dpl: u8,
    /// P.
    pub present: bool,
    /// AVL.
    pub available: bool,
    /// L: 64-bit code.
    pub long: bool,
    /// D/B: 32-bit default.
    pub big: bool,
    /// G: limit is in 4 KiB units.
    pub granularity: bool,
    /// Loaded with a null selector; the other fields mean nothing.
    pub unusable: bool,
}

impl Segment {
    /// A 64-bit code segment at privilege level 0.
    pub fn code64(selector: u16) -> Self {
        Self { long: true, big: false, ..Self::code32(selector) }
    }

    /// A flat 32-bit code segment at privilege level 0.
    pub fn code32(selector: u16) -> Self {
        Self { kind: 0xb, ..Self::data32(selector) }
    }

    /// A flat 32-bit writable data segment at privilege level 0.
    pub fn data32(selector: u16) -> Self {
        Self {
            selector,
            limit: u32::MAX,
            kind: 3,
            code_or_data: true,
            present: true,
            big: true,
            granularity: true,
            ..Self::default()
        }
    }

    /// A real-mode segment: base `selector << 4`, limit 64 KiB.
    pub fn real_mode(selector: u16, code: bool) -> Self {
        Self {
            selector,
            base: u64::from(selector) << 4,
            limit: 0xffff,
            kind: if code { 0xb } else { 3 },
            code_or_data: true,
            present: true,
            ..Self::default()
        }
    }

    /// A busy task-state segment of 0x68 bytes at `base`.
    pub fn task_state(selector: u16, base: u64) -> Self {
        Self { selector, base, limit: 0x67, kind: 0xb, present: true, ..Self::default() }
    }

    /// Not loaded.
    pub fn null() -> Self {
        Self { unusable: true, ..Self::default() }
    }
}

/// GDTR or IDTR.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DescriptorTable {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes: size minus one.
    pub limit: u16,
}

/// Segment, table, control and debug registers, and those model-specific registers that are part of
/// the mode: EFER and the APIC base.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "each field is the register of its name")]
pub struct SystemRegisters {
    pub cs: Segment,
    pub ds: Segment,
    pub es: Segment,
    pub fs: Segment,
    pub gs: Segment,
    pub ss: Segment,
    pub tr: Segment,
    pub ldtr: Segment,
    pub gdtr: DescriptorTable,
    pub idtr: DescriptorTable,
    pub cr0: u64,
    pub cr2: u64,
    pub cr3: u64,
    pub cr4: u64,
    pub cr8: u64,
    pub efer: u64,
    /// IA32_APIC_BASE (MSR 0x1b).
    pub apic_base: u64,
    /// DR0 to DR3.
    pub dr: [u64; 4],
    pub dr6: u64,
    pub dr7: u64,
    /// XCR0; 1 where XSAVE is off.
    pub xcr0: u64,
}

impl SystemRegisters {
    /// CR0.PE.
    pub const CR0_PE: u64 = 1 << 0;
    /// CR0.ET, hard-wired to one.
    pub const CR0_ET: u64 = 1 << 4;
    /// CR0.PG.
    pub const CR0_PG: u64 = 1 << 31;
    /// CR4.PAE.
    pub const CR4_PAE: u64 = 1 << 5;
    /// EFER.LME.
    pub const EFER_LME: u64 = 1 << 8;
    /// EFER.LMA.
    pub const EFER_LMA: u64 = 1 << 10;

    /// After RESET (Intel SDM 3A table 11-1): real mode, CS base 0xffff_0000.
    pub fn at_reset() -> Self {
        let data = Segment::real_mode(0, false);
        Self {
            cs: Segment { selector: 0xf000, base: 0xffff_0000, ..Segment::real_mode(0, true) },
            ds: data,
            es: data,
            fs: data,
            gs: data,
            ss: data,
            tr: Segment { limit: 0xffff, kind: 0xb, present: true, ..Segment::default() },
            ldtr: Segment { limit: 0xffff, kind: 2, present: true, ..Segment::default() },
            gdtr: DescriptorTable { base: 0, limit: 0xffff },
            idtr: DescriptorTable { base: 0, limit: 0xffff },
            cr0: 0x6000_0010,
            apic_base: 0xfee0_0800,
            dr6: 0xffff_0ff0,
            dr7: 0x400,
            xcr0: 1,
            ..Self::default()
        }
    }

    /// Width of the code that CS selects: 16, 32 or 64 bits.
    pub fn code_bits(&self) -> u32 {
        if self.efer & Self::EFER_LMA != 0 && self.cs.long {
            64
        } else if self.cs.big {
            32
        } else {
            16
        }
    }
}
