//! 8254 timer: three counters, of which channel 0 interrupts and channel 2 has its gate and output in port 0x61.
//!
//! [`channel`] is one counter, a function of ticks; this module is the ports, the interrupt and the clock.
//! The guest reaches the ports. The event loop sees a [`TimedDevice`].

pub mod channel;

use std::fmt;

use crate::bus::{BusDeviceMut, read_bytes, write_bytes};
use crate::clock::{Clock, ns_of_tick, ticks_at};
use crate::error::StateError;
use crate::interrupt::InterruptLine;
use crate::timed::TimedDevice;
use channel::{Channel, ChannelState};

/// Input clock of all three counters, in Hz (14.31818 MHz / 12).
pub const PIT_HERTZ: u64 = 1_193_182;

// Port 0x61 (Intel ICH9 13.7.1).
const CONTROL_WRITABLE: u8 = 0x0f;
const CONTROL_GATE: u8 = 1;
const CONTROL_REFRESH: u8 = 1 << 4;
const CONTROL_OUTPUT: u8 = 1 << 5;
/// The refresh bit turns every 18 ticks, which is about every 15 us.
const REFRESH_TICKS: u64 = 18;

/// State of a [`Pit`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PitState {
    /// The counters.
    pub channels: [ChannelState; 3],
    /// Bits 0 to 3 of port 0x61: bit 0 is the gate of channel 2.
    pub control: u8,
    /// The tick at which this was saved, less than 2^62. The counters' ticks are on the same scale.
    pub now: u64,
}

/// The timer. On the bus it has its four ports and, at offset 4, port 0x61
/// ([`ports::PIT`](super::ports::PIT)).
///
/// The interrupt line sees rising edges of channel 0's output. Periods that passed unserved give one
/// edge, not one each: a guest that keeps time by counting them falls behind on a host that is late.
pub struct Pit {
    channels: [Channel; 3],
    control: u8,
    clock: Box<dyn Clock>,
    line: Box<dyn InterruptLine>,
    /// How far the ticks of the counters are ahead of the clock's: what a restore made up for.
    ahead: i64,
    /// Up to where channel 0's output has been looked at.
    serviced: u64,
    level: bool,
}

impl Pit {
    /// A timer whose counters stand still until the guest programs them. `clock` counts from any moment on;
    /// `line` is ISA interrupt 0.
    pub fn new(clock: impl Clock + 'static, line: impl InterruptLine + 'static) -> Self {
        let serviced = ticks_at(clock.now_ns(), PIT_HERTZ);
        let mut channels = [Channel::default(), Channel::default(), Channel::default()];
        channels[2].set_gate(false, serviced);
        Self {
            channels,
            control: 0,
            clock: Box::new(clock),
            line: Box::new(line),
            ahead: 0,
            serviced,
            level: false,
        }
    }

    /// The counters and port 0x61.
    pub fn state(&mut self) -> PitState {
        let now = self.catch_up();
        let channels = self.channels.each_ref().map(Channel::state);
        PitState { channels, control: self.control, now }
    }

    /// Goes on from a saved state, from the clock's present time on: time in between did not pass.
    ///
    /// # Errors
    /// [`StateError`] if an element cannot have its value; the device is as it was.
    pub fn restore(&mut self, state: &PitState) -> Result<(), StateError> {
        let control = state.control;
        StateError::check(control & !CONTROL_WRITABLE == 0, "8254", "control", control, "0 to 0xf")?;
        let now = state.now;
        StateError::check(now < 1 << 62, "8254", "now", now, "0 to 0x3fff_ffff_ffff_ffff")?;
        let [a, b, c] = &state.channels;
        let gate = control & CONTROL_GATE != 0;
        self.channels = [
            Channel::restored(a, true, now)?,
            Channel::restored(b, true, now)?,
            Channel::restored(c, gate, now)?,
        ];
        self.control = control;
        // Clocks give ticks below 2^55, so this is exact.
        self.ahead = now.cast_signed().wrapping_sub(ticks_at(self.clock.now_ns(), PIT_HERTZ).cast_signed());
        self.serviced = now;
        // What the controller saw is part of its own state; a rise from here on is a new one.
        let [timer, _, _] = &self.channels;
        self.level = timer.output(now);
        Ok(())
    }

    fn now(&self) -> u64 {
        ticks_at(self.clock.now_ns(), PIT_HERTZ).saturating_add_signed(self.ahead)
    }

    /// Brings the counters up to now, signals channel 0 and returns the present tick.
    fn catch_up(&mut self) -> u64 {
        let now = self.now().max(self.serviced);
        let [timer, refresh, speaker] = &mut self.channels;
        let rose = timer.next_rise(self.serviced).is_some_and(|tick| tick <= now);
        timer.advance(now);
        refresh.advance(now);
        speaker.advance(now);
        self.serviced = now;
        if rose {
            self.set_level(false);
            self.set_level(true);
        }
        self.follow_output();
        now
    }

    /// What the guest's own access made of the output.
    fn follow_output(&mut self) {
        let [timer, _, _] = &self.channels;
        self.set_level(timer.output(self.serviced));
    }

    fn set_level(&mut self, level: bool) {
        if std::mem::replace(&mut self.level, level) != level {
            self.line.set_level(level);
        }
    }

    fn channel(&mut self, index: u8) -> &mut Channel {
        let [first, second, third] = &mut self.channels;
        match index & 3 {
            0 => first,
            1 => second,
            _ => third,
        }
    }

    fn control_word(&mut self, value: u8, now: u64) {
        if value >> 6 == 3 {
            // Read-back: bits 1 to 3 choose channels, bits 5 and 4 what is not latched.
            for index in (0..3).filter(|index| value & (2 << index) != 0) {
                self.channel(index).read_back(value & 0x20 == 0, value & 0x10 == 0, now);
            }
        } else if value & 0x30 == 0 {
            self.channel(value >> 6).latch_count(now);
        } else {
            self.channel(value >> 6).program(value & 0x3f);
        }
    }
}

impl fmt::Debug for Pit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pit")
            .field("channels", &self.channels)
            .field("control", &self.control)
            .finish_non_exhaustive()
    }
}

impl TimedDevice for Pit {
    /// When the output of channel 0 rises next.
    fn next_deadline(&self) -> Option<u64> {
        let [timer, _, _] = &self.channels;
        let rise = timer.next_rise(self.serviced)?;
        Some(ns_of_tick(rise.saturating_sub_signed(self.ahead), PIT_HERTZ))
    }

    fn service(&mut self) {
        self.catch_up();
    }
}

impl BusDeviceMut for Pit {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        let now = self.catch_up();
        read_bytes(offset, data, |offset| match u8::try_from(offset) {
            Ok(index @ 0..=2) => self.channel(index).read(now),
            Ok(4) => {
                let refresh = if now / REFRESH_TICKS % 2 == 1 { CONTROL_REFRESH } else { 0 };
                let output = if self.channel(2).output(now) { CONTROL_OUTPUT } else { 0 };
                self.control | refresh | output
            }
            _ => 0xff,
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let now = self.catch_up();
        write_bytes(offset, data, |offset, value| match u8::try_from(offset) {
            Ok(index @ 0..=2) => self.channel(index).write(value, now),
            Ok(3) => self.control_word(value, now),
            Ok(4) => {
                self.control = value & CONTROL_WRITABLE;
                self.channel(2).set_gate(value & CONTROL_GATE != 0, now);
            }
            _ => (),
        });
        self.follow_output();
    }
}

#[cfg(test)]
mod tests;
