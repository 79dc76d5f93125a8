//! What belongs to the virtual machine as a whole.

use vmm_memory::snapshot::mirror::{VersionMap, Versionize, VersionizeResult};
use vmm_memory::snapshot_mirror;

use crate::state::{BackendBlob, ClockState, IoApicState, PicState, PitChannelState, PitState, VmState};

snapshot_mirror!(Machine of VmState {
    io_apic: Option<IoApicState>,
    pics: Option<[PicState; 2]>,
    pit: Option<PitState>,
    clock: Option<ClockState>,
    backend: Option<BackendBlob>,
});

snapshot_mirror!(IoApic of IoApicState { base: u64, select: u32, id: u32, irr: u32, redirection: [u64; 24] });

snapshot_mirror!(Pic of PicState {
    last_irr: u8, irr: u8, imr: u8, isr: u8, priority_add: u8, irq_base: u8, read_reg_select: u8, poll: u8,
    special_mask: u8, init_state: u8, auto_eoi: u8, rotate_on_auto_eoi: u8, special_fully_nested_mode: u8, init4: u8,
    elcr: u8, elcr_mask: u8,
});

snapshot_mirror!(PitChannel of PitChannelState {
    count: u32, latched_count: u16, count_latched: u8, status_latched: u8, status: u8, read_state: u8, write_state: u8,
    write_latch: u8, rw_mode: u8, mode: u8, bcd: u8, gate: u8, count_load_time: i64,
});

snapshot_mirror!(Pit of PitState { channels: [PitChannelState; 3], flags: u32 });

snapshot_mirror!(Clock of ClockState { guest_ns: u64, tsc_khz: u32 });
