//! States of the platform's devices.

use vmm_memory::snapshot::mirror::{VersionMap, Versionize, VersionizeResult};
use vmm_memory::{snapshot_mirror, snapshot_numbered, snapshot_states};

use super::DeviceStates;
use crate::platform::i8042::I8042Argument;
use crate::platform::ioapic::PINS;
use crate::platform::pic::{PicChipState, PicPhase};
use crate::platform::pit::channel::{Bytes, ChannelState, Mode, Run};
use crate::platform::{AcpiPmState, I8042State, IoApicState, PicState, PitState, RtcState, UartState};

snapshot_states!(DeviceStates: AcpiPmState, I8042State, IoApicState, PicState, PitState, RtcState, UartState);

snapshot_mirror!(AcpiPm of AcpiPmState { status: u16, enable: u16, control_low: u8, sleep_type: u8, timer: u32 });

snapshot_mirror!(I8042 of I8042State {
    output: Option<u8>, timeout: bool, command: bool, configuration: u8, argument: I8042Argument,
});

snapshot_numbered!(I8042Argument { None = 0, Configuration = 1, OutputPort = 2, Echo = 3, Second = 4 });

snapshot_mirror!(IoApic of IoApicState { select: u8, id: u8, entries: [u64; PINS], asserted: u32 });

snapshot_mirror!(Pic of PicState { first: PicChipState, second: PicChipState });

snapshot_mirror!(Chip of PicChipState {
    requested: u8,
    in_service: u8,
    mask: u8,
    asserted: u8,
    level_triggered: u8,
    vector_base: u8,
    top: u8,
    phase: PicPhase,
    needs_modes: bool,
    single: bool,
    all_level: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    fully_nested: bool,
    read_in_service: bool,
    poll: bool,
});

snapshot_numbered!(PicPhase { Ready = 0, Vector = 1, Cascade = 2, Modes = 3 });

snapshot_mirror!(Pit of PitState { channels: [ChannelState; 3], control: u8, now: u64 });

snapshot_mirror!(Counter of ChannelState {
    mode: Mode,
    bytes: Bytes,
    bcd: bool,
    count: u32,
    next_count: Option<u32>,
    run: Run,
    written_low: Option<u8>,
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
});

snapshot_numbered!(Mode {
    TerminalCount = 0, OneShot = 1, RateGenerator = 2, SquareWave = 3, SoftwareStrobe = 4, HardwareStrobe = 5,
});

snapshot_numbered!(Bytes { Low = 0, High = 1, Both = 2 });

snapshot_mirror!(Counting of enum Run { Idle = 0, Paused(ticks: u64) = 1, Since(tick: u64) = 2 });

snapshot_mirror!(Rtc of RtcState {
    index: u8,
    ram: [u8; 128],
    alarm: [u8; 3],
    a: u8,
    b: u8,
    c: u8,
    offset_ns: i128,
    frozen: Option<[u8; 8]>,
    divider_reset: bool,
    weekday_shift: u8,
});

snapshot_mirror!(Uart of UartState {
    divisor_low: u8,
    divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
});
