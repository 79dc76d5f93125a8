//! State of what belongs to the virtual machine as a whole.

use super::BackendBlob;

/// An I/O APIC (82093AA) with 24 inputs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct IoApicState {
    /// Guest-physical base of its register window.
    pub base: u64,
    /// Index register.
    pub select: u32,
    /// APIC ID.
    pub id: u32,
    /// Requests pending, one bit an input.
    pub irr: u32,
    /// Redirection table.
    pub redirection: [u64; 24],
}

/// One 8259A.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "fields are the registers and flip-flops of the 8259A by their names")]
pub struct PicState {
    pub last_irr: u8,
    pub irr: u8,
    pub imr: u8,
    pub isr: u8,
    pub priority_add: u8,
    pub irq_base: u8,
    pub read_reg_select: u8,
    pub poll: u8,
    pub special_mask: u8,
    pub init_state: u8,
    pub auto_eoi: u8,
    pub rotate_on_auto_eoi: u8,
    pub special_fully_nested_mode: u8,
    pub init4: u8,
    pub elcr: u8,
    pub elcr_mask: u8,
}

/// One channel of an i8254.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "fields are the registers and latches of the 8254 by their names")]
pub struct PitChannelState {
    pub count: u32,
    pub latched_count: u16,
    pub count_latched: u8,
    pub status_latched: u8,
    pub status: u8,
    pub read_state: u8,
    pub write_state: u8,
    pub write_latch: u8,
    pub rw_mode: u8,
    pub mode: u8,
    pub bcd: u8,
    pub gate: u8,
    /// Host monotonic time of the last load, ns.
    pub count_load_time: i64,
}

/// An i8254.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PitState {
    /// The three channels.
    pub channels: [PitChannelState; 3],
    /// Backend flags (HPET legacy mode, speaker).
    pub flags: u32,
}

/// The virtual machine's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClockState {
    /// Guest time in nanoseconds.
    pub guest_ns: u64,
    /// Time-stamp-counter frequency in kHz.
    pub tsc_khz: u32,
}

/// What belongs to the virtual machine as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct VmState {
    /// I/O APIC, if the backend provides it.
    pub io_apic: Option<IoApicState>,
    /// Master and slave PIC, if the backend provides them.
    pub pics: Option<[PicState; 2]>,
    /// i8254, if the backend provides it.
    pub pit: Option<PitState>,
    /// The clock.
    pub clock: Option<ClockState>,
    /// What only the writing backend understands; others ignore it.
    pub backend: Option<BackendBlob>,
}
