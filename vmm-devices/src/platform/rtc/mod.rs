//! MC146818 real-time clock with 128 bytes of CMOS RAM.
//!
//! The date is a function of an injected clock and of what the guest set, so nothing runs in between.
//! The module `calendar` turns seconds into registers. The guest reaches an index and a data port and chooses every register;
//! a date that does not exist is taken for the nearest that does.

mod calendar;

use std::fmt;

use crate::bus::{BusDeviceMut, read_bytes, write_bytes};
use crate::clock::{Clock, NANOSECONDS};
use crate::error::StateError;
use crate::interrupt::InterruptLine;
use crate::timed::TimedDevice;
use calendar::{DateTime, Format, Registers};

const DEVICE: &str = "MC146818";
const SECOND: i128 = NANOSECONDS as i128;

// Register A.
const REGISTER_A: u8 = 0x0a;
const A_UPDATING: u8 = 1 << 7;
const A_DEFAULT: u8 = 0x26;

// Register B, and the flags of register C in the same bits.
const REGISTER_B: u8 = 0x0b;
const B_24_HOURS: u8 = 1 << 1;
const B_BINARY: u8 = 1 << 2;
const B_SET: u8 = 1 << 7;
const UPDATE: u8 = 1 << 4;
const ALARM: u8 = 1 << 5;
const PERIODIC: u8 = 1 << 6;
const FLAGS: u8 = UPDATE | ALARM | PERIODIC;

const REGISTER_C: u8 = 0x0c;
const C_INTERRUPT: u8 = 1 << 7;
const REGISTER_D: u8 = 0x0d;
const D_POWER_GOOD: u8 = 1 << 7;
/// Where PC firmware keeps the century, and where the FADT says that it is.
pub const CENTURY_REGISTER: u8 = 0x32;

/// An alarm register with these bits matches anything.
const ALARM_ANY: u8 = 0xc0;

/// How long before a change of the registers they are said to be changing: 244 us of warning and 1984 us of update.
const UPDATE_NS: i128 = 2_228_000;

/// A divider that starts to run makes its first update half a second later.
const AFTER_RESET_NS: i128 = SECOND / 2;

/// Hertz of the divider that periodic interrupts are taken from.
const DIVIDER_HERTZ: i128 = 32_768;

/// Registers and time of an [`Rtc`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RtcState {
    /// The register that the data port shows, 0 to 127.
    pub index: u8,
    /// CMOS RAM by register number; those of the clock itself are zero.
    pub ram: [u8; 128],
    /// Alarm second, minute and hour.
    pub alarm: [u8; 3],
    /// Register A without bit 7.
    pub a: u8,
    /// Register B.
    pub b: u8,
    /// Flags of register C: bits 4 to 6.
    pub c: u8,
    /// How far the guest set the clock ahead, in nanoseconds.
    pub offset_ns: i128,
    /// Time registers while they stand still: second, minute, hour, weekday, day, month, year, century.
    pub frozen: Option<[u8; 8]>,
    /// The divider was held in reset since they stand still.
    pub divider_reset: bool,
    /// Days that the weekday register is ahead of the calendar, 0 to 6.
    pub weekday_shift: u8,
}

/// The clock. On the bus: index port, data port ([`ports::RTC`](super::ports::RTC)).
pub struct Rtc {
    state: RtcState,
    /// Time of the RTC up to which flags have been set.
    serviced: i128,
    level: bool,
    clock: Box<dyn Clock>,
    line: Box<dyn InterruptLine>,
}

impl Rtc {
    /// A clock that shows what `clock` does, which counts nanoseconds since 1970-01-01 UTC (or since then in local
    /// time, for guests that want that). It runs in BCD and 24 hours. `line` is ISA interrupt 8.
    pub fn new(clock: impl Clock + 'static, line: impl InterruptLine + 'static) -> Self {
        let state = RtcState {
            index: 0,
            ram: [0; 128],
            alarm: [0; 3],
            a: A_DEFAULT,
            b: B_24_HOURS,
            c: 0,
            offset_ns: 0,
            frozen: None,
            divider_reset: false,
            weekday_shift: 0,
        };
        let serviced = clock.now_ns().into();
        Self { state, serviced, level: false, clock: Box::new(clock), line: Box::new(line) }
    }

    /// Writes CMOS RAM, as firmware does to tell memory sizes. Registers of the clock and numbers from 128 on
    /// are left alone; returns whether it was RAM.
    pub fn set_ram(&mut self, register: u8, value: u8) -> bool {
        match self.ram_mut(register) {
            Some(cell) => {
                *cell = value;
                true
            }
            None => false,
        }
    }

    /// Registers and time.
    pub fn state(&mut self) -> RtcState {
        self.service();
        self.state.clone()
    }

    /// Goes on from a saved state. The time is that of the clock now: the machine's clock decides whether
    /// it went on meanwhile.
    ///
    /// # Errors
    /// [`StateError`] if a register cannot have its value; the device is as it was.
    pub fn restore(&mut self, state: &RtcState) -> Result<(), StateError> {
        StateError::check(state.index < 128, DEVICE, "index", state.index, "0 to 127")?;
        StateError::check(state.a & A_UPDATING == 0, DEVICE, "a", state.a, "bits 0 to 6")?;
        StateError::check(state.c & !FLAGS == 0, DEVICE, "c", state.c, "bits 4 to 6")?;
        StateError::check(state.weekday_shift < 7, DEVICE, "weekday_shift", state.weekday_shift, "0 to 6")?;
        let years = 10_000 * 366 * 86_400 * SECOND;
        let magnitude = u64::try_from(state.offset_ns.unsigned_abs()).unwrap_or(u64::MAX);
        let valid = (-years..=years).contains(&state.offset_ns);
        StateError::check(valid, DEVICE, "offset_ns", magnitude, "no more than 10000 years")?;
        let held = is_held(state.a, state.b);
        let frozen = state.frozen.is_some();
        StateError::check(
            held == frozen,
            DEVICE,
            "frozen",
            frozen,
            "1 exactly while SET or the divider's reset is",
        )?;
        self.state = state.clone();
        for register in (0..128).filter(|&register| !is_ram(register)) {
            if let Some(cell) = self.state.ram.get_mut(usize::from(register)) {
                *cell = 0;
            }
        }
        self.serviced = self.rtc_now();
        self.follow_flags();
        Ok(())
    }

    fn rtc_now(&self) -> i128 {
        i128::from(self.clock.now_ns()) + self.state.offset_ns
    }

    fn format(&self) -> Format {
        Format { binary: self.state.b & B_BINARY != 0, hours_24: self.state.b & B_24_HOURS != 0 }
    }

    /// Log2 of the period in ticks of the divider: bits 0 to 3 of register A.
    fn period_shift(&self) -> Option<u8> {
        match self.state.a & 0xf {
            0 => None,
            // These two are what 8 and 9 are.
            rate @ 1..=2 => Some(rate + 6),
            rate => Some(rate - 1),
        }
    }

    /// Whether a second from `first` to `last` is one that the alarm is set to.
    fn alarm_between(&self, first: i128, last: i128) -> bool {
        let format = self.format();
        let [second, minute, hour] = self.state.alarm;
        let matches = |alarm: u8, register: u8| alarm & ALARM_ANY == ALARM_ANY || alarm == register;
        let second_matches = |value: u8| matches(second, format.number(value));
        let minute_matches = |value: u8| matches(minute, format.number(value));
        let hour_matches = |value: u8| matches(hour, format.hour(value));
        // One that never comes would have the loop below look at every second there is.
        if !((0..60).any(second_matches) && (0..60).any(minute_matches) && (0..24).any(hour_matches)) {
            return false;
        }
        let mut at = first;
        while at <= last {
            let [s, m, h] = calendar::time_of_day(at);
            if !hour_matches(h) {
                at += 3600 - i128::from(m) * 60 - i128::from(s);
            } else if !minute_matches(m) {
                at += 60 - i128::from(s);
            } else if !second_matches(s) {
                at += 1;
            } else {
                return true;
            }
        }
        false
    }

    fn follow_flags(&mut self) {
        let level = self.state.b & self.state.c & FLAGS != 0;
        if std::mem::replace(&mut self.level, level) != level {
            self.line.set_level(level);
        }
    }

    fn time_registers(&self) -> Registers {
        if let Some(frozen) = self.state.frozen {
            return frozen;
        }
        let seconds = i64::try_from(self.rtc_now().div_euclid(SECOND)).unwrap_or(i64::MAX);
        let mut time = DateTime::from_seconds(seconds);
        time.weekday = (time.weekday - 1 + self.state.weekday_shift) % 7 + 1;
        time.to_registers(self.format())
    }

    /// From now on it is the time that `registers` say, `subsecond` nanoseconds into that second.
    fn adopt(&mut self, registers: Registers, subsecond: i128) {
        let time = DateTime::from_registers(registers, self.format());
        let seconds = time.seconds();
        let weekday = DateTime::from_seconds(seconds).weekday;
        self.state.weekday_shift = (time.weekday + 7 - weekday) % 7;
        self.state.offset_ns = i128::from(seconds) * SECOND + subsecond - i128::from(self.clock.now_ns());
        // A jump is no passing of time.
        self.serviced = self.rtc_now();
    }

    fn write_time(&mut self, at: usize, value: u8) {
        let mut registers = self.time_registers();
        if let Some(register) = registers.get_mut(at) {
            *register = value;
        }
        if self.state.frozen.is_some() {
            self.state.frozen = Some(registers);
        } else {
            self.adopt(registers, self.rtc_now().rem_euclid(SECOND));
        }
    }

    /// Changes A and B, and stops or starts the time as they say.
    fn control(&mut self, a: u8, b: u8) {
        let held = is_held(a, b);
        if held && self.state.frozen.is_none() {
            self.state.frozen = Some(self.time_registers());
        }
        self.state.a = a & !A_UPDATING;
        self.state.b = b;
        if is_divider_reset(a) {
            self.state.divider_reset = true;
        }
        if let Some(registers) = self.state.frozen.filter(|_| !held) {
            self.state.frozen = None;
            // Without a reset of the divider, its second goes on where it was.
            let was_reset = std::mem::take(&mut self.state.divider_reset);
            let subsecond = if was_reset { AFTER_RESET_NS } else { self.rtc_now().rem_euclid(SECOND) };
            self.adopt(registers, subsecond);
        }
        self.follow_flags();
    }

    fn is_updating(&self) -> bool {
        self.state.frozen.is_none() && self.rtc_now().rem_euclid(SECOND) >= SECOND - UPDATE_NS
    }

    fn ram_mut(&mut self, register: u8) -> Option<&mut u8> {
        if is_ram(register) { self.state.ram.get_mut(usize::from(register)) } else { None }
    }

    fn read_register(&mut self) -> u8 {
        let register = self.state.index;
        if let Some(at) = time_position(register) {
            return self.time_registers().get(at).copied().unwrap_or(0);
        }
        match register {
            1 | 3 | 5 => self.state.alarm.get(usize::from(register / 2)).copied().unwrap_or(0),
            REGISTER_A => self.state.a | if self.is_updating() { A_UPDATING } else { 0 },
            REGISTER_B => self.state.b,
            REGISTER_C => {
                let interrupt = if self.state.b & self.state.c & FLAGS != 0 { C_INTERRUPT } else { 0 };
                let flags = std::mem::take(&mut self.state.c);
                self.follow_flags();
                flags | interrupt
            }
            REGISTER_D => D_POWER_GOOD,
            _ => self.ram_mut(register).copied().unwrap_or(0),
        }
    }

    fn write_register(&mut self, value: u8) {
        let register = self.state.index;
        if let Some(at) = time_position(register) {
            return self.write_time(at, value);
        }
        match register {
            1 | 3 | 5 => {
                if let Some(alarm) = self.state.alarm.get_mut(usize::from(register / 2)) {
                    *alarm = value;
                }
            }
            REGISTER_A => self.control(value, self.state.b),
            REGISTER_B => {
                // SET takes back the enabling of updates (MC146818, register B).
                let value = if value & B_SET != 0 { value & !UPDATE } else { value };
                self.control(self.state.a, value);
            }
            REGISTER_C | REGISTER_D => (),
            _ => {
                if let Some(cell) = self.ram_mut(register) {
                    *cell = value;
                }
            }
        }
    }
}

/// Where a register stands in [`Registers`].
fn time_position(register: u8) -> Option<usize> {
    match register {
        0 => Some(0),
        2 => Some(1),
        4 => Some(2),
        6..=9 => Some(usize::from(register - 3)),
        CENTURY_REGISTER => Some(7),
        _ => None,
    }
}

fn is_ram(register: u8) -> bool {
    (0x0e..0x80).contains(&register) && register != CENTURY_REGISTER
}

fn is_divider_reset(a: u8) -> bool {
    a & 0x60 == 0x60
}

/// Whether the time registers stand still.
fn is_held(a: u8, b: u8) -> bool {
    b & B_SET != 0 || is_divider_reset(a)
}

/// Periods of `1 << shift` ticks that have passed at `now`.
fn periods(now: i128, shift: u8) -> i128 {
    (now * DIVIDER_HERTZ).div_euclid(SECOND) >> shift
}

impl fmt::Debug for Rtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rtc").field("state", &self.state).finish_non_exhaustive()
    }
}

impl TimedDevice for Rtc {
    /// When an enabled flag may be set next.
    fn next_deadline(&self) -> Option<u64> {
        let wanted = self.state.b & !self.state.c & FLAGS;
        if wanted == 0 || self.state.frozen.is_some() {
            return None;
        }
        let now = self.rtc_now();
        let second = (wanted & (UPDATE | ALARM) != 0).then(|| (now.div_euclid(SECOND) + 1) * SECOND);
        let periodic = self.period_shift().filter(|_| wanted & PERIODIC != 0).map(|shift| {
            // The first nanosecond of the next period.
            let ticks = ((periods(now, shift) + 1) << shift) * SECOND;
            ticks.div_euclid(DIVIDER_HERTZ) + i128::from(ticks.rem_euclid(DIVIDER_HERTZ) != 0)
        });
        let due = second.into_iter().chain(periodic).min()?;
        u64::try_from(due - self.state.offset_ns).ok()
    }

    fn service(&mut self) {
        let now = self.rtc_now();
        let before = std::mem::replace(&mut self.serviced, now);
        if self.state.frozen.is_some() || now <= before {
            return;
        }
        let (first, last) = (before.div_euclid(SECOND) + 1, now.div_euclid(SECOND));
        if first <= last {
            self.state.c |= UPDATE;
            if self.alarm_between(first, last) {
                self.state.c |= ALARM;
            }
        }
        if self.period_shift().is_some_and(|shift| periods(before, shift) != periods(now, shift)) {
            self.state.c |= PERIODIC;
        }
        self.follow_flags();
    }
}

impl BusDeviceMut for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.service();
        read_bytes(offset, data, |offset| match offset {
            1 => self.read_register(),
            // The index port cannot be read.
            _ => 0xff,
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.service();
        write_bytes(offset, data, |offset, value| match offset {
            // Bit 7 masks NMIs, of which there are none.
            0 => self.state.index = value & 0x7f,
            1 => self.write_register(value),
            _ => (),
        });
    }
}

#[cfg(test)]
mod tests;
