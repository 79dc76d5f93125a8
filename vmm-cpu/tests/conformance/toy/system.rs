//! The processor that the toy backend is: its CPUID, its model-specific registers, and which states of it exist.

use std::collections::BTreeMap;

use vmm_cpu::cpuid::CpuidEntry;
use vmm_cpu::state::{CpuState, Msr, PendingEvents, RunState, Segment, SystemRegisters, XsaveArea};
use vmm_cpu::{CpuidTable, Error, Result};

/// Exceptions have vectors below (Intel SDM 3A 7.2).
const EXCEPTIONS: u8 = 32;

const EFER: u32 = 0xc000_0080;
const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const APIC_BASE: u32 = 0x1b;

/// IA32_TIME_STAMP_COUNTER, kept as the offset from the virtual machine's clock.
pub(super) const TSC: u32 = 0x10;

/// Registers that are plain storage: the three of SYSENTER, PAT, STAR, LSTAR, CSTAR, FMASK, KERNEL_GS_BASE, TSC_AUX.
const STORAGE: [u32; 10] = [
    0x174,
    0x175,
    0x176,
    0x277,
    0xc000_0081,
    0xc000_0082,
    0xc000_0083,
    0xc000_0084,
    0xc000_0102,
    0xc000_0103,
];

/// Those that hold addresses.
const ADDRESSES: [u32; 7] = [0x175, 0x176, 0xc000_0082, 0xc000_0083, 0xc000_0102, FS_BASE, GS_BASE];

/// What CPUID can say.
pub(super) fn supported_cpuid() -> CpuidTable {
    let text = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes);
    let vendor = text(b"ToyT");
    let (tsc, msr, pae) = (1 << 4, 1 << 5, 1 << 6);
    let (long_mode, no_execute) = (1 << 29, 1 << 20);
    let address_widths = 48 << 8 | 40;
    CpuidTable::new(vec![
        CpuidEntry::new(0, None, [1, vendor, text(b"oyTo"), text(b"oyTo")]),
        CpuidEntry::new(1, None, [0x600, 0, 1 << 31, tsc | msr | pae]),
        CpuidEntry::new(0x8000_0000, None, [0x8000_0008, vendor, text(b"oyTo"), text(b"oyTo")]),
        CpuidEntry::new(0x8000_0001, None, [0, 0, 0, long_mode | no_execute]),
        CpuidEntry::new(0x8000_0008, None, [address_widths, 0, 0, 0]),
    ])
}

/// What a vCPU is, its pins aside.
#[derive(Clone, Debug)]
pub(super) struct Cpu {
    pub(super) state: CpuState,
    /// The registers of [`CpuState::msrs`] by index. Those that this processor lacks are kept for the next save.
    pub(super) msrs: BTreeMap<u32, u64>,
}

impl Cpu {
    pub(super) fn at_reset() -> Self {
        Self {
            state: CpuState::at_reset(),
            msrs: STORAGE.into_iter().chain([TSC]).map(|index| (index, 0)).collect(),
        }
    }

    /// Takes a saved state over, if it is one. `now` is the virtual machine's clock.
    pub(super) fn from_state(state: &CpuState, now: u64) -> Result<Self> {
        check_system(&state.system)?;
        check_events(&state.events)?;
        check_xsave(&state.xsave)?;
        if !is_canonical(state.general.rip) {
            return Err(invalid(
                "general",
                format!("RIP is {:#x}, which is not canonical", state.general.rip),
            ));
        }
        if matches!(state.run_state, RunState::WaitForInit | RunState::WaitForSipi) {
            return Err(invalid(
                "run_state",
                "the toy backend's vCPUs do not wait for INIT or SIPI".to_owned(),
            ));
        }
        let mut cpu = Self { state: state.clone(), ..Self::at_reset() };
        for Msr { index, value } in &state.msrs {
            if ADDRESSES.contains(index) && !is_canonical(*value) {
                return Err(invalid("msrs", format!("{index:#x} is {value:#x}, which is not canonical")));
            }
            cpu.msrs.insert(*index, if *index == TSC { value.wrapping_sub(now) } else { *value });
        }
        cpu.state.backend = None;
        Ok(cpu)
    }

    pub(super) fn to_state(&self, now: u64) -> CpuState {
        let mut state = self.state.clone();
        let value_of = |index, kept: u64| if index == TSC { kept.wrapping_add(now) } else { kept };
        state.msrs =
            self.msrs.iter().map(|(&index, &kept)| Msr { index, value: value_of(index, kept) }).collect();
        state
    }

    /// RDMSR; `None` if there is no such register. `now` is the virtual machine's clock.
    pub(super) fn msr(&self, index: u32, now: u64) -> Option<u64> {
        let system = &self.state.system;
        match index {
            TSC => Some(now.wrapping_add(self.tsc_offset())),
            EFER => Some(system.efer),
            APIC_BASE => Some(system.apic_base),
            FS_BASE => Some(system.fs.base),
            GS_BASE => Some(system.gs.base),
            _ => self.msrs.get(&index).filter(|_| STORAGE.contains(&index)).copied(),
        }
    }

    /// WRMSR; `None` if there is no such register or it cannot hold `value`.
    pub(super) fn set_msr(&mut self, index: u32, value: u64, now: u64) -> Option<()> {
        if ADDRESSES.contains(&index) && !is_canonical(value) {
            return None;
        }
        let system = &mut self.state.system;
        match index {
            TSC => drop(self.msrs.insert(TSC, value.wrapping_sub(now))),
            EFER => {
                let new =
                    SystemRegisters { efer: value | system.efer & SystemRegisters::EFER_LMA, ..*system };
                check_system(&new).ok()?;
                *system = new;
            }
            FS_BASE => system.fs.base = value,
            GS_BASE => system.gs.base = value,
            _ if STORAGE.contains(&index) => drop(self.msrs.insert(index, value)),
            _ => return None,
        }
        Some(())
    }

    pub(super) fn tsc_offset(&self) -> u64 {
        self.msrs.get(&TSC).copied().unwrap_or(0)
    }
}

fn invalid(element: &'static str, problem: String) -> Error {
    Error::InvalidState { element, problem }
}

pub(super) fn is_canonical(address: u64) -> bool {
    super::alu::sign_extend(address << 16 >> 16, 6) == address
}

/// Whether a processor can be in this mode (Intel SDM 3A 2.2 and 2.5).
pub(super) fn check_system(system: &SystemRegisters) -> Result<()> {
    let cr0 = |bit| system.cr0 & bit != 0;
    let efer = |bit| system.efer & bit != 0;
    let efer_bits = 0xd01;
    let long_mode_active = efer(SystemRegisters::EFER_LME) && cr0(SystemRegisters::CR0_PG);
    let rules = [
        (system.cr0 >> 32 == 0, format!("CR0 is {:#x}, wider than 32 bits", system.cr0)),
        (
            !cr0(SystemRegisters::CR0_PG) || cr0(SystemRegisters::CR0_PE),
            format!("CR0 is {:#x}: paging without protection", system.cr0),
        ),
        (system.cr8 < 16, format!("CR8 is {:#x}, allowed is 0 to 15", system.cr8)),
        (
            system.efer & !efer_bits == 0,
            format!("EFER is {:#x}, allowed are the bits {efer_bits:#x}", system.efer),
        ),
        (
            efer(SystemRegisters::EFER_LMA) == long_mode_active,
            format!("EFER is {:#x} with CR0 {:#x}: LMA must be LME and PG", system.efer, system.cr0),
        ),
        (
            !long_mode_active || system.cr4 & SystemRegisters::CR4_PAE != 0,
            format!("CR4 is {:#x}: long mode without PAE", system.cr4),
        ),
        (
            segments(system).iter().all(|segment| segment.kind < 16 && segment.dpl < 4),
            "a segment's type is above 15 or its DPL above 3".to_owned(),
        ),
    ];
    match rules.into_iter().find(|(holds, _)| !holds) {
        Some((_, problem)) => Err(invalid("system", problem)),
        None => Ok(()),
    }
}

fn segments(system: &SystemRegisters) -> [Segment; 8] {
    [system.cs, system.ds, system.es, system.fs, system.gs, system.ss, system.tr, system.ldtr]
}

fn check_events(events: &PendingEvents) -> Result<()> {
    match events.exception {
        Some(exception) if exception.vector >= EXCEPTIONS => {
            Err(invalid("events", format!("exception {}, allowed is 0 to 31", exception.vector)))
        }
        _ => Ok(()),
    }
}

fn check_xsave(area: &XsaveArea) -> Result<()> {
    // The components defined so far end with bit 19 (Intel SDM 1 13.1).
    if area.xstate_bv() >> 20 != 0 {
        return Err(invalid("xsave", format!("XSTATE_BV is {:#x}", area.xstate_bv())));
    }
    if area.mxcsr() >> 16 != 0 {
        return Err(invalid("xsave", format!("MXCSR is {:#x}, wider than 16 bits", area.mxcsr())));
    }
    Ok(())
}
