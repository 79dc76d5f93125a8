//! Portable state of vCPUs and virtual machines: named elements in structures of our own, which any
//! backend can read back, plus a tagged blob for what only one backend understands.
//!
//! Structures that will grow are `#[non_exhaustive]`: build them from `default()` or one of the constructors
//! and set fields. Those that mirror a register file are complete by nature. Whoever reads one treats it as hostile,
//! since snapshots come from files.

mod events;
mod platform;
mod registers;
mod xsave;

pub use events::{ExceptionEvent, ExceptionStage, InterruptEvent, InterruptShadow, NmiState, PendingEvents};
pub use platform::{ClockState, IoApicState, PicState, PitChannelState, PitState, VmState};
pub use registers::{DescriptorTable, GeneralRegisters, Segment, SystemRegisters, rflags};
pub use xsave::{XSAVE_HEADER_END, XSAVE_MAX, XsaveArea};

/// One model-specific register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Msr {
    /// ECX of RDMSR.
    pub index: u32,
    /// EDX:EAX.
    pub value: u64,
}

/// Registers of a local APIC in the order of its register page: element n stands at offset
/// `16 * n` (Intel SDM 3A table 12-1). In x2APIC mode the ID register holds the 32-bit ID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LocalApicState {
    /// The 64 registers.
    pub registers: [u32; 64],
}

impl Default for LocalApicState {
    fn default() -> Self {
        Self { registers: [0; 64] }
    }
}

/// What a vCPU is doing when nothing new happens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RunState {
    /// Executing instructions.
    #[default]
    Running,
    /// Halted by HLT.
    Halted,
    /// Not started: waits for INIT.
    WaitForInit,
    /// Got INIT, waits for SIPI.
    WaitForSipi,
}

/// State that only the backend which wrote it understands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BackendBlob {
    /// [`Hypervisor::name`](crate::Hypervisor::name) of the writer.
    pub backend: String,
    /// Version of the blob's format.
    pub version: u32,
    /// The blob.
    pub data: Vec<u8>,
}

/// Everything that a vCPU is, system-management mode and nested virtualization excepted: a backend refuses to save
/// a vCPU that is in either.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CpuState {
    /// General registers, RIP, RFLAGS.
    pub general: GeneralRegisters,
    /// Segment, table, control and debug registers.
    pub system: SystemRegisters,
    /// x87, SSE and later register files.
    pub xsave: XsaveArea,
    /// Model-specific registers, ascending by index. Registers that have a field elsewhere in the state
    /// (EFER, FS and GS base, APIC base) are left out.
    pub msrs: Vec<Msr>,
    /// The local APIC, where the backend has one.
    pub local_apic: Option<LocalApicState>,
    /// Events between two instructions.
    pub events: PendingEvents,
    /// Running, halted, or not started.
    pub run_state: RunState,
    /// What only the writing backend understands; others ignore it.
    pub backend: Option<BackendBlob>,
}
impl CpuState {
    /// The state after RESET (Intel SDM 3A table 11-1) with an empty x87 and SSE state.
    pub fn at_reset() -> Self {
        Self {
            general: GeneralRegisters::at_reset(),
            system: SystemRegisters::at_reset(),
            xsave: XsaveArea::at_reset(),
            ..Self::default()
        }
    }

    /// The value of a model-specific register in [`CpuState::msrs`].
    pub fn msr(&self, index: u32) -> Option<u64> {
        self.msrs.iter().find(|msr| msr.index == index).map(|msr| msr.value)
    }
}
