//! States of the platform's devices.

use versionize::{VersionMap, Versionize, VersionizeError, VersionizeResult};
use versionize_derive::Versionize;
use vmm_memory::snapshot::StateError;

use super::mirror::{Mirror, mirror, states};
use crate::platform::i8042::I8042Argument;
use crate::platform::pic::{PicChipState, PicPhase};
use crate::platform::pit::channel::{Bytes, ChannelState, Mode, Run};
use crate::platform::{AcpiPmState, I8042State, IoApicState, PicState, PitState, RtcState, UartState};

states! {
    AcpiPmState: AcpiPm,
    I8042State: I8042,
    IoApicState: IoApic,
    PicState: Pic,
    PitState: Pit,
    RtcState: Rtc,
    UartState: Uart,
}

#[derive(Versionize)]
struct AcpiPm {
    status: u16,
    enable: u16,
    control_low: u8,
    sleep_type: u8,
    timer: u32,
}

mirror!(struct AcpiPm = AcpiPmState { status, enable, control_low, sleep_type, timer });

#[derive(Versionize)]
struct I8042 {
    output: Option<u8>,
    timeout: bool,
    command: bool,
    configuration: u8,
    argument: Argument,
}

mirror!(struct I8042 = I8042State { output, timeout, command, configuration, argument });

#[derive(Versionize)]
enum Argument {
    None,
    Configuration,
    OutputPort,
    Echo,
    Second,
}

mirror!(enum Argument = I8042Argument { None, Configuration, OutputPort, Echo, Second });

/// The redirection table.
type Entries = [u64; crate::platform::ioapic::PINS];

#[derive(Versionize)]
struct IoApic {
    select: u8,
    id: u8,
    entries: Entries,
    asserted: u32,
}

mirror!(struct IoApic = IoApicState { select, id, entries, asserted });

#[derive(Versionize)]
struct Pic {
    first: Chip,
    second: Chip,
}

mirror!(struct Pic = PicState { first, second });

#[derive(Versionize)]
struct Chip {
    requested: u8,
    in_service: u8,
    mask: u8,
    asserted: u8,
    level_triggered: u8,
    vector_base: u8,
    top: u8,
    phase: Phase,
    needs_modes: bool,
    single: bool,
    all_level: bool,
    auto_eoi: bool,
    rotate_on_auto_eoi: bool,
    special_mask: bool,
    fully_nested: bool,
    read_in_service: bool,
    poll: bool,
}

mirror!(struct Chip = PicChipState {
    requested, in_service, mask, asserted, level_triggered, vector_base, top, phase, needs_modes, single, all_level, auto_eoi,
    rotate_on_auto_eoi, special_mask, fully_nested, read_in_service, poll,
});

#[derive(Versionize)]
enum Phase {
    Ready,
    Vector,
    Cascade,
    Modes,
}

mirror!(enum Phase = PicPhase { Ready, Vector, Cascade, Modes });

#[derive(Versionize)]
struct Pit {
    timer: Counter,
    refresh: Counter,
    speaker: Counter,
    control: u8,
    now: u64,
}

impl Mirror<PitState> for Pit {
    fn of(PitState { channels: [timer, refresh, speaker], control, now }: &PitState) -> Self {
        let (timer, refresh, speaker) = (Counter::of(timer), Counter::of(refresh), Counter::of(speaker));
        Self { timer, refresh, speaker, control: *control, now: *now }
    }

    fn back(self) -> Result<PitState, StateError> {
        let Self { timer, refresh, speaker, control, now } = self;
        Ok(PitState { channels: [timer.back()?, refresh.back()?, speaker.back()?], control, now })
    }
}

#[derive(Versionize)]
struct Counter {
    mode: CounterMode,
    bytes: CounterBytes,
    bcd: bool,
    count: u32,
    next_count: Option<u32>,
    run: CounterRun,
    written_low: Option<u8>,
    read_high: bool,
    latched_count: Option<u16>,
    latched_status: Option<u8>,
}

mirror!(struct Counter = ChannelState {
    mode, bytes, bcd, count, next_count, run, written_low, read_high, latched_count, latched_status,
});

#[derive(Versionize)]
enum CounterMode {
    TerminalCount,
    OneShot,
    RateGenerator,
    SquareWave,
    SoftwareStrobe,
    HardwareStrobe,
}

mirror!(enum CounterMode = Mode {
    TerminalCount, OneShot, RateGenerator, SquareWave, SoftwareStrobe, HardwareStrobe,
});

#[derive(Versionize)]
enum CounterBytes {
    Low,
    High,
    Both,
}

mirror!(enum CounterBytes = Bytes { Low, High, Both });

#[derive(Versionize)]
enum CounterRun {
    Idle,
    Paused(u64),
    Since(u64),
}

mirror!(enum CounterRun = Run { Idle, Paused(ticks), Since(tick) });

type CmosRam = [u8; 128];
type Alarm = [u8; 3];
type TimeRegisters = [u8; 8];

#[derive(Versionize)]
struct Rtc {
    index: u8,
    ram: CmosRam,
    alarm: Alarm,
    a: u8,
    b: u8,
    c: u8,
    offset_ns: i128,
    frozen: Option<TimeRegisters>,
    divider_reset: bool,
    weekday_shift: u8,
}

mirror!(struct Rtc = RtcState {
    index, ram, alarm, a, b, c, offset_ns, frozen, divider_reset, weekday_shift,
});

#[derive(Versionize)]
struct Uart {
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
}

mirror!(struct Uart = UartState {
    divisor_low, divisor_high, interrupt_enable, interrupt_identification, line_control, line_status, modem_control, modem_status,
    scratch, input,
});
