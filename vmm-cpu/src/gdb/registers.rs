//! A vCPU's registers in the debugger's layout.
//!
//! The core and SSE registers come as GDB knows them (its features `org.gnu.gdb.i386.core` and `.sse`), the segment bases as
//! `org.gnu.gdb.i386.segments`, control registers as a feature of our own.

use std::num::NonZeroUsize;

use gdbstub::arch::{Arch, RegId, Registers};
use gdbstub_arch::x86::reg::X86_64CoreRegs;
use gdbstub_arch::x86::reg::id::X86_64CoreRegId;

use super::float;
use crate::error::{Error, Result};
use crate::state::{GeneralRegisters, RunState, SystemRegisters, XsaveArea};
use crate::vcpu::Vcpu;

/// IA32_KERNEL_GS_BASE.
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// Registers of the core and SSE features.
const CORE: usize = 57;
/// Their bytes.
const CORE_BYTES: usize = 0x218;
/// Registers beyond those, of 8 bytes each.
const SYSTEM: usize = 9;

/// Describes the registers (GDB, "Target Descriptions"): their order is their number.
const TARGET_XML: &str = concat!(
    r#"<?xml version="1.0"?><!DOCTYPE target SYSTEM "gdb-target.dtd"><target version="1.0">"#,
    "<architecture>i386:x86-64</architecture>",
    include_str!("target.xml"),
    "</target>"
);

/// x86-64, as this stub shows it.
#[derive(Debug)]
pub(super) enum X86_64 {}

impl Arch for X86_64 {
    type Usize = u64;
    type Registers = AllRegisters;
    type RegId = RegisterNumber;
    type BreakpointKind = usize;

    fn target_description_xml() -> Option<&'static str> {
        Some(TARGET_XML)
    }
}

/// Number of a register in the target description.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RegisterNumber(usize);

impl RegisterNumber {
    fn bytes(number: usize) -> Option<NonZeroUsize> {
        if number < CORE {
            return X86_64CoreRegId::from_raw_id(number).and_then(|(_, bytes)| bytes);
        }
        NonZeroUsize::new(8).filter(|_| number < CORE + SYSTEM)
    }

    /// Where it lies among the bytes of all registers.
    pub(super) fn place(self) -> Option<std::ops::Range<usize>> {
        let start = (0..self.0).filter_map(Self::bytes).map(NonZeroUsize::get).sum();
        Some(start..start + Self::bytes(self.0)?.get())
    }
}

impl RegId for RegisterNumber {
    fn from_raw_id(id: usize) -> Option<(Self, Option<NonZeroUsize>)> {
        Some((Self(id), Some(Self::bytes(id)?)))
    }
}

/// All registers of one vCPU.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct AllRegisters {
    core: X86_64CoreRegs,
    system: System,
}

/// Bases of segments and control registers, in the order of the target description.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct System {
    fs_base: u64,
    gs_base: u64,
    kernel_gs_base: u64,
    cr0: u64,
    cr2: u64,
    cr3: u64,
    cr4: u64,
    cr8: u64,
    efer: u64,
}

impl System {
    fn values(&self) -> [u64; SYSTEM] {
        [
            self.fs_base,
            self.gs_base,
            self.kernel_gs_base,
            self.cr0,
            self.cr2,
            self.cr3,
            self.cr4,
            self.cr8,
            self.efer,
        ]
    }

    fn of([fs_base, gs_base, kernel_gs_base, cr0, cr2, cr3, cr4, cr8, efer]: [u64; SYSTEM]) -> Self {
        Self { fs_base, gs_base, kernel_gs_base, cr0, cr2, cr3, cr4, cr8, efer }
    }
}

impl Registers for AllRegisters {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.core.rip
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        self.core.gdb_serialize(&mut write_byte);
        for byte in self.system.values().into_iter().flat_map(u64::to_le_bytes) {
            write_byte(Some(byte));
        }
    }

    #[allow(clippy::result_unit_err, reason = "the trait's")]
    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        let (core, system) = bytes.split_at_checked(CORE_BYTES).ok_or(())?;
        self.core.gdb_deserialize(core)?;
        let (values, rest) = system.as_chunks();
        let values = values.iter().map(|value| u64::from_le_bytes(*value)).collect::<Vec<_>>();
        self.system = System::of(values.try_into().map_err(|_| ())?);
        if rest.is_empty() { Ok(()) } else { Err(()) }
    }
}

impl AllRegisters {
    /// Those of `vcpu`.
    ///
    /// # Errors
    /// Whatever the backend's host says.
    pub(super) fn read(vcpu: &mut dyn Vcpu) -> Result<Self> {
        let state = vcpu.save()?;
        let system = &state.system;
        let mut core = X86_64CoreRegs {
            regs: general(&state.general),
            // Bits 63 to 32 are reserved.
            eflags: low32(state.general.rflags),
            rip: state.general.rip,
            ..X86_64CoreRegs::default()
        };
        core.segments.cs = system.cs.selector.into();
        core.segments.ss = system.ss.selector.into();
        core.segments.ds = system.ds.selector.into();
        core.segments.es = system.es.selector.into();
        core.segments.fs = system.fs.selector.into();
        core.segments.gs = system.gs.selector.into();
        float::show(&state.xsave, &mut core);
        let system = System {
            fs_base: system.fs.base,
            gs_base: system.gs.base,
            // A vCPU without long mode has none.
            kernel_gs_base: vcpu.msr(KERNEL_GS_BASE).unwrap_or(0),
            cr0: system.cr0,
            cr2: system.cr2,
            cr3: system.cr3,
            cr4: system.cr4,
            cr8: system.cr8,
            efer: system.efer,
        };
        Ok(Self { core, system })
    }

    /// Changes in `vcpu` what differs from what it has.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for another segment selector: that would need a descriptor.
    /// [`Error::InvalidState`] for control registers that no processor has.
    pub(super) fn write(&self, vcpu: &mut dyn Vcpu) -> Result<()> {
        let old = Self::read(vcpu)?;
        let (new, core) = (&self.system, &self.core);
        if core.segments != old.core.segments {
            return Err(Error::invalid("segment selector", format_args!("{:x?}", core.segments), "as it is"));
        }
        if new != &old.system {
            let mut system = vcpu.system_registers()?;
            (system.fs.base, system.gs.base) = (new.fs_base, new.gs_base);
            (system.cr0, system.cr2, system.cr3) = (new.cr0, new.cr2, new.cr3);
            (system.cr4, system.cr8, system.efer) = (new.cr4, new.cr8, new.efer);
            vcpu.set_system_registers(&SystemRegisters { ..system })?;
            if new.kernel_gs_base != old.system.kernel_gs_base {
                vcpu.set_msr(KERNEL_GS_BASE, new.kernel_gs_base)?;
            }
        }
        let float_differs = (&core.st, &core.fpu, &core.xmm, core.mxcsr)
            != (&old.core.st, &old.core.fpu, &old.core.xmm, old.core.mxcsr);
        let mut state = if float_differs || core.rip != old.core.rip { Some(vcpu.save()?) } else { None };
        if let Some(state) = &mut state {
            if float_differs {
                let area = float::changed(&state.xsave, core);
                state.xsave = XsaveArea::from_bytes(area).unwrap_or_default();
            }
            let wakes = core.rip != old.core.rip && state.run_state == RunState::Halted;
            if wakes {
                // It is to run what the debugger wants, which comes after the HLT.
                state.run_state = RunState::Running;
            }
            if wakes || float_differs {
                vcpu.restore(state)?;
            }
        }
        let mut registers = vcpu.registers()?;
        set_general(&mut registers, &core.regs);
        registers.rip = core.rip;
        registers.rflags = registers.rflags & !u64::from(u32::MAX) | u64::from(core.eflags);
        vcpu.set_registers(&registers)
    }

    /// The bytes of all, one register after another.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(CORE_BYTES + 8 * SYSTEM);
        self.gdb_serialize(|byte| bytes.push(byte.unwrap_or(0)));
        bytes
    }
}

fn low32(value: u64) -> u32 {
    let [a, b, c, d, ..] = value.to_le_bytes();
    u32::from_le_bytes([a, b, c, d])
}

/// In GDB's order.
fn general(r: &GeneralRegisters) -> [u64; 16] {
    [
        r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15,
    ]
}

fn set_general(r: &mut GeneralRegisters, values: &[u64; 16]) {
    [
        r.rax, r.rbx, r.rcx, r.rdx, r.rsi, r.rdi, r.rbp, r.rsp, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15,
    ] = *values;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_description_has_the_registers_in_the_order_of_their_numbers() {
        let names: Vec<&str> =
            TARGET_XML.split("<reg name=\"").skip(1).map(|rest| rest.split('"').next().unwrap()).collect();
        assert_eq!(names.len(), CORE + SYSTEM);
        for (number, name) in [
            (0, "rax"),
            (1, "rbx"),
            (6, "rbp"),
            (7, "rsp"),
            (16, "rip"),
            (17, "eflags"),
            (18, "cs"),
            (24, "st0"),
        ] {
            assert_eq!(names[number], name);
        }
        assert_eq!((names[32], names[40], names[56]), ("fctrl", "xmm0", "mxcsr"));
        assert_eq!((names[57], names[59], names[65]), ("fs_base", "k_gs_base", "efer"));
        // Their widths too.
        for (number, rest) in TARGET_XML.split("<reg name=\"").skip(1).enumerate() {
            let bits = rest.split("bitsize=\"").nth(1).unwrap().split('"').next().unwrap();
            let bytes = RegisterNumber::bytes(number).unwrap().get();
            assert_eq!(bits.parse::<usize>().unwrap(), 8 * bytes, "{}", names[number]);
        }
    }

    #[test]
    fn registers_lie_where_their_numbers_say() {
        let mut registers = AllRegisters::default();
        registers.core.rip = 0x1122_3344_5566_7788;
        registers.core.xmm[15] = 0xabcd;
        registers.system.efer = 0xd01;
        let bytes = registers.bytes();
        let at = |number| bytes[RegisterNumber(number).place().unwrap()].to_vec();
        assert_eq!(at(16), registers.core.rip.to_le_bytes());
        assert_eq!(at(55), 0xabcd_u128.to_le_bytes());
        assert_eq!(at(65), 0xd01_u64.to_le_bytes());
        assert_eq!(RegisterNumber(65).place().unwrap().end, bytes.len());
        assert!(RegisterNumber::from_raw_id(66).is_none());

        let mut again = AllRegisters::default();
        assert_eq!(again.gdb_deserialize(&bytes), Ok(()));
        assert_eq!(again, registers);
        assert_eq!(again.gdb_deserialize(&bytes[1..]), Err(()));
    }
}
