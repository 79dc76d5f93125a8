//! ACPI fixed hardware: event and control registers, the PM timer, and a reset register beside them.
//!
//! The alternative is hardware-reduced ACPI, with a sleep control register and nothing else. Linux takes both,
//! but under that one it uses neither PIC nor PIT, has no PM timer, and is left to guess how fast its
//! TSC and local APIC timer run (arch/x86, `acpi_reduced_hw_init`). With fixed hardware it calibrates both against
//! the PM timer, has that as a clock source, and the power button is a bit here instead of an AML event. The price is
//! one level-triggered interrupt. There is no SMI command port: ACPI mode is always on.
//!
//! The guest reaches 16 ports; their sizes and places are in the FADT that the module `acpi` writes.

use std::fmt;

use crate::bus::{BusDeviceMut, write_bytes};
use crate::clock::{Clock, ns_of_tick, ticks_at};
use crate::error::StateError;
use crate::interrupt::InterruptLine;
use crate::platform::{PlatformEvent, PlatformEvents};
use crate::timed::TimedDevice;

const DEVICE: &str = "ACPI PM";

/// Offset of the event block: status and enable, 2 bytes each (ACPI 6.5, 4.8.3.1).
pub const EVENT_BLOCK: u16 = 0;
/// Offset of the control block, 2 bytes (4.8.3.2).
pub const CONTROL_BLOCK: u16 = 4;
/// Offset of the timer, 4 bytes (4.8.3.3).
pub const TIMER_BLOCK: u16 = 8;
/// Offset of the reset register, 1 byte (4.8.3.6).
pub const RESET_REGISTER: u16 = 12;
/// What is to be written there for a reset.
pub const RESET_VALUE: u8 = 1;
/// The sleep type of S5, "soft off".
pub const SLEEP_TYPE_S5: u8 = 5;

/// Frequency of the PM timer, in Hz (ACPI 6.5, 4.8.1.4).
pub const PM_TIMER_HERTZ: u64 = 3_579_545;

const STATUS_LOW: u64 = EVENT_BLOCK as u64;
const STATUS_HIGH: u64 = STATUS_LOW + 1;
const ENABLE_LOW: u64 = STATUS_LOW + 2;
const ENABLE_HIGH: u64 = STATUS_LOW + 3;
const CONTROL_LOW: u64 = CONTROL_BLOCK as u64;
const CONTROL_HIGH: u64 = CONTROL_LOW + 1;
const RESET: u64 = RESET_REGISTER as u64;

// Event bits (ACPI 6.5, tables 4.13 and 4.14).
const TIMER_EVENT: u16 = 1;
const GLOBAL_LOCK_EVENT: u16 = 1 << 5;
const POWER_BUTTON_EVENT: u16 = 1 << 8;
/// Can be enabled, as ACPICA insists whatever the FADT says, and never happens.
const RTC_EVENT: u16 = 1 << 10;
const WAKE_STATUS: u16 = 1 << 15;
const STATUS_BITS: u16 = TIMER_EVENT | GLOBAL_LOCK_EVENT | POWER_BUTTON_EVENT | WAKE_STATUS;
const ENABLE_BITS: u16 = TIMER_EVENT | GLOBAL_LOCK_EVENT | POWER_BUTTON_EVENT | RTC_EVENT;

// Control bits (table 4.15).
const CONTROL_SCI_ENABLED: u8 = 1;
const CONTROL_BUS_MASTER_RELOAD: u8 = 1 << 1;
const CONTROL_SLEEP_TYPE: u8 = 7 << 2;
const CONTROL_SLEEP: u8 = 1 << 5;

/// Registers of an [`AcpiPm`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct AcpiPmState {
    /// PM1a status.
    pub status: u16,
    /// PM1a enable.
    pub enable: u16,
    /// Low byte of PM1a control, without SCI_EN.
    pub control_low: u8,
    /// Sleep type as last written, 0 to 7.
    pub sleep_type: u8,
    /// The PM timer.
    pub timer: u32,
}

/// The power management registers ([`ports::ACPI_PM`](super::ports::ACPI_PM)).
pub struct AcpiPm {
    status: u16,
    enable: u16,
    control_low: u8,
    sleep_type: u8,
    /// What a restored timer is ahead of the clock.
    timer_offset: u32,
    /// Timer when its top bit was last looked at.
    serviced: u32,
    level: bool,
    clock: Box<dyn Clock>,
    sci: Box<dyn InterruptLine>,
    events: Box<dyn PlatformEvents>,
}

impl AcpiPm {
    /// `clock` counts from any moment on; `sci` is a level-triggered interrupt, that of the FADT; `events` hears of
    /// [`PlatformEvent::PowerOff`] and [`PlatformEvent::Reset`].
    pub fn new(
        clock: impl Clock + 'static,
        sci: impl InterruptLine + 'static,
        events: impl PlatformEvents + 'static,
    ) -> Self {
        let mut this = Self {
            status: 0,
            enable: 0,
            control_low: 0,
            sleep_type: 0,
            timer_offset: 0,
            serviced: 0,
            level: false,
            clock: Box::new(clock),
            sci: Box::new(sci),
            events: Box::new(events),
        };
        this.serviced = this.timer();
        this
    }

    /// The user asks for an orderly end: the guest gets a power button event, if it wants such.
    pub fn press_power_button(&mut self) {
        self.status |= POWER_BUTTON_EVENT;
        self.follow_events();
    }

    /// The PM timer, 32 bits at 3.579545 MHz.
    fn timer(&self) -> u32 {
        let ticks = ticks_at(self.clock.now_ns(), PM_TIMER_HERTZ);
        u32::try_from(ticks & 0xffff_ffff).unwrap_or(0).wrapping_add(self.timer_offset)
    }

    /// The registers.
    pub fn state(&mut self) -> AcpiPmState {
        self.service();
        AcpiPmState {
            status: self.status,
            enable: self.enable,
            control_low: self.control_low,
            sleep_type: self.sleep_type,
            timer: self.timer(),
        }
    }

    /// Goes on from a saved state; the timer goes on from where it was.
    ///
    /// # Errors
    /// [`StateError`] if bits are set that there are not; the device is as it was.
    pub fn restore(&mut self, state: &AcpiPmState) -> Result<(), StateError> {
        let AcpiPmState { status, enable, control_low, sleep_type, timer } = *state;
        StateError::check(status & !STATUS_BITS == 0, DEVICE, "status", status, "bits 0, 5, 8 and 15")?;
        StateError::check(enable & !ENABLE_BITS == 0, DEVICE, "enable", enable, "bits 0, 5, 8 and 10")?;
        let low_is_valid = control_low & !CONTROL_BUS_MASTER_RELOAD == 0;
        StateError::check(low_is_valid, DEVICE, "control_low", control_low, "bit 1")?;
        StateError::check(sleep_type < 8, DEVICE, "sleep_type", sleep_type, "0 to 7")?;
        (self.status, self.enable, self.control_low, self.sleep_type) =
            (status, enable, control_low, sleep_type);
        self.timer_offset = self.timer_offset.wrapping_add(timer.wrapping_sub(self.timer()));
        self.serviced = timer;
        self.follow_events();
        Ok(())
    }

    fn follow_events(&mut self) {
        let level = self.status & self.enable != 0;
        if std::mem::replace(&mut self.level, level) != level {
            self.sci.set_level(level);
        }
    }

    /// All 16 registers at one moment, so that no value is torn.
    fn image(&self) -> [u8; 16] {
        let [status_low, status_high] = self.status.to_le_bytes();
        let [enable_low, enable_high] = self.enable.to_le_bytes();
        let [t0, t1, t2, t3] = self.timer().to_le_bytes();
        let control_low = self.control_low | CONTROL_SCI_ENABLED;
        let control_high = self.sleep_type << 2;
        [
            status_low,
            status_high,
            enable_low,
            enable_high,
            control_low,
            control_high,
            0,
            0,
            t0,
            t1,
            t2,
            t3,
            0,
            0,
            0,
            0,
        ]
    }

    fn write_byte(&mut self, offset: u64, value: u8) {
        match offset {
            // Writing a one clears.
            STATUS_LOW => self.status &= !u16::from(value),
            STATUS_HIGH => self.status &= !(u16::from(value) << 8),
            ENABLE_LOW => self.enable = (self.enable & 0xff00 | u16::from(value)) & ENABLE_BITS,
            ENABLE_HIGH => self.enable = (self.enable & 0x00ff | u16::from(value) << 8) & ENABLE_BITS,
            CONTROL_LOW => self.control_low = value & CONTROL_BUS_MASTER_RELOAD,
            CONTROL_HIGH => {
                self.sleep_type = (value & CONTROL_SLEEP_TYPE) >> 2;
                // The other sleep types are not in the tables.
                if value & CONTROL_SLEEP != 0 && self.sleep_type == SLEEP_TYPE_S5 {
                    self.events.event(PlatformEvent::PowerOff);
                }
            }
            RESET if value == RESET_VALUE => self.events.event(PlatformEvent::Reset),
            _ => (),
        }
    }
}

impl fmt::Debug for AcpiPm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AcpiPm")
            .field("status", &self.status)
            .field("enable", &self.enable)
            .field("timer", &self.timer())
            .finish_non_exhaustive()
    }
}

impl TimedDevice for AcpiPm {
    /// When the top bit of the timer changes next, if the guest wants to be told of that.
    fn next_deadline(&self) -> Option<u64> {
        if self.enable & TIMER_EVENT == 0 || self.status & TIMER_EVENT != 0 {
            return None;
        }
        let ticks = ticks_at(self.clock.now_ns(), PM_TIMER_HERTZ);
        let left = 0x8000_0000 - (self.timer() & 0x7fff_ffff);
        Some(ns_of_tick(ticks.saturating_add(left.into()), PM_TIMER_HERTZ))
    }

    fn service(&mut self) {
        let timer = self.timer();
        if (timer ^ self.serviced) >> 31 != 0 {
            self.status |= TIMER_EVENT;
        }
        self.serviced = timer;
        self.follow_events();
    }
}

impl BusDeviceMut for AcpiPm {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.service();
        let skip = usize::try_from(offset).unwrap_or(usize::MAX);
        for (to, from) in data.iter_mut().zip(self.image().into_iter().skip(skip)) {
            *to = from;
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.service();
        write_bytes(offset, data, |offset, value| self.write_byte(offset, value));
        self.follow_events();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::clock::{ManualClock, NANOSECONDS};
    use crate::interrupt::testing::Recorder;

    struct Bench {
        device: AcpiPm,
        clock: Arc<ManualClock>,
        sci: Recorder<bool>,
        events: Recorder<PlatformEvent>,
    }

    impl Bench {
        fn new() -> Self {
            let (clock, sci, events) =
                (Arc::new(ManualClock::default()), Recorder::default(), Recorder::default());
            let seen = events.clone();
            let device =
                AcpiPm::new(Arc::clone(&clock), sci.clone(), move |event: PlatformEvent| seen.record(event));
            Self { device, clock, sci, events }
        }

        fn read<const N: usize>(&mut self, offset: u16) -> [u8; N] {
            let mut data = [0xff; N];
            self.device.read(offset.into(), &mut data);
            data
        }

        fn timer(&mut self) -> u32 {
            u32::from_le_bytes(self.read(TIMER_BLOCK))
        }
    }

    #[test]
    fn linux_powers_off() {
        let mut bench = Bench::new();
        // What ACPICA writes: the sleep type, then the same with SLP_EN, 16 bits each.
        assert_eq!(bench.read(CONTROL_BLOCK), [1, 0]);
        bench.device.write(CONTROL_LOW, &0x1401_u16.to_le_bytes());
        assert!(bench.events.take().is_empty());
        assert_eq!(bench.read(CONTROL_BLOCK), [1, 0x14]);
        bench.device.write(CONTROL_LOW, &0x3401_u16.to_le_bytes());
        assert_eq!(bench.events.take(), [PlatformEvent::PowerOff]);
        // Another sleep type is none.
        bench.device.write(CONTROL_LOW, &0x2401_u16.to_le_bytes());
        assert!(bench.events.take().is_empty());
    }

    #[test]
    fn the_reset_register_resets() {
        let mut bench = Bench::new();
        bench.device.write(RESET, &[0]);
        assert!(bench.events.take().is_empty());
        bench.device.write(RESET, &[RESET_VALUE]);
        assert_eq!(bench.events.take(), [PlatformEvent::Reset]);
    }

    #[test]
    fn the_timer_counts_and_wraps() {
        let mut bench = Bench::new();
        bench.clock.set(NANOSECONDS);
        assert_eq!(bench.timer(), 3_579_545);
        bench.clock.set(ns_of_tick(0x1_0000_0005, PM_TIMER_HERTZ));
        assert_eq!(bench.timer(), 5);
        bench.clock.set(u64::MAX);
        bench.timer();
    }

    #[test]
    fn the_power_button_interrupts_until_it_is_acknowledged() {
        let mut bench = Bench::new();
        bench.device.press_power_button();
        assert!(bench.sci.take().is_empty(), "not enabled");
        bench.device.write(ENABLE_LOW, &0x0120_u16.to_le_bytes());
        assert_eq!(bench.sci.take(), [true]);
        assert_eq!(bench.read(EVENT_BLOCK), [0, 1, 0x20, 1]);
        bench.device.write(STATUS_LOW, &0x0001_u16.to_le_bytes());
        assert!(bench.sci.take().is_empty());
        bench.device.write(STATUS_LOW, &0x0100_u16.to_le_bytes());
        assert_eq!(bench.sci.take(), [false]);
        bench.device.write(ENABLE_LOW, &[0xff, 0xff]);
        assert_eq!(bench.read(EVENT_BLOCK), [0, 0, 0x21, 5]);
    }

    #[test]
    fn the_timer_event_comes_when_the_top_bit_turns() {
        let mut bench = Bench::new();
        assert_eq!(bench.device.next_deadline(), None);
        bench.device.write(ENABLE_LOW, &[1]);
        let deadline = bench.device.next_deadline().unwrap();
        bench.clock.set(deadline - 1);
        bench.device.service();
        assert!(bench.sci.take().is_empty());
        bench.clock.set(deadline);
        bench.device.service();
        assert_eq!(bench.sci.take(), [true]);
        assert_eq!(bench.device.next_deadline(), None);
        bench.device.write(STATUS_LOW, &[1]);
        let next = bench.device.next_deadline().unwrap();
        assert!((next - deadline).abs_diff(deadline) < 1000);
    }

    #[test]
    fn saved_states_go_on_and_are_checked() {
        let mut bench = Bench::new();
        bench.clock.set(5 * NANOSECONDS);
        bench.device.write(ENABLE_LOW, &0x0100_u16.to_le_bytes());
        bench.device.press_power_button();
        let state = bench.device.state();
        let mut other = Bench::new();
        other.clock.set(77);
        other.device.restore(&state).unwrap();
        assert_eq!(other.sci.take(), [true]);
        assert_eq!(other.device.state(), state);
        other.clock.advance(NANOSECONDS);
        assert!(other.timer().abs_diff(6 * 3_579_545) < 2);

        let kept = other.device.state();
        for bad in [
            AcpiPmState { status: 2, ..state.clone() },
            AcpiPmState { enable: 0x8000, ..state.clone() },
            AcpiPmState { control_low: 1, ..state.clone() },
            AcpiPmState { sleep_type: 8, ..state.clone() },
        ] {
            assert!(other.device.restore(&bad).is_err(), "{bad:?}");
            assert_eq!(other.device.state(), kept);
        }
    }
}
