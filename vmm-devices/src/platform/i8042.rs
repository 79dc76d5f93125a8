//! i8042 keyboard controller with nothing plugged in: its reset pulse, and quick answers to those who look for ports.
//!
//! A kernel that is told by the FADT that there is none (ACPI 6.5, table 5.11) does not look; all may
//! reset through it. The guest reaches two ports.

use std::fmt;

use crate::bus::{BusDeviceMut, read_bytes, write_bytes};
use crate::error::StateError;
use crate::platform::{PlatformEvent, PlatformEvents};

const DATA: u64 = 0;
const COMMAND: u64 = 4;

// Status port.
const STATUS_OUTPUT_FULL: u8 = 1;
const STATUS_SYSTEM: u8 = 1 << 2;
const STATUS_COMMAND: u8 = 1 << 3;
const STATUS_UNLOCKED: u8 = 1 << 4;
const STATUS_TIMEOUT: u8 = 1 << 6;

/// Configuration byte: both ports disabled, self test passed, no interrupts.
const CONFIGURATION: u8 = 0x34;
/// Output port: the processor is not in reset, address line 20 is not held low.
const OUTPUT_PORT: u8 = 0x03;
/// Result of a port's test: its clock line is stuck low.
const PORT_BROKEN: u8 = 0x01;
/// What a keyboard that does not answer gives: "resend".
const NO_ANSWER: u8 = 0xfe;

/// What the next byte at the data port belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum I8042Argument {
    /// No command: it goes to the keyboard.
    #[default]
    None,
    /// The configuration byte.
    Configuration,
    /// The output port.
    OutputPort,
    /// A byte to be read back.
    Echo,
    /// A byte for the second port's device.
    Second,
}

/// Registers of an [`I8042`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct I8042State {
    /// The byte that waits to be read.
    pub output: Option<u8>,
    /// That byte stands for a device that did not answer.
    pub timeout: bool,
    /// The last write was to the command port.
    pub command: bool,
    /// Configuration byte.
    pub configuration: u8,
    /// What the next byte at the data port belongs to.
    pub argument: I8042Argument,
}

impl Default for I8042State {
    fn default() -> Self {
        Self {
            output: None,
            timeout: false,
            command: false,
            configuration: CONFIGURATION,
            argument: I8042Argument::None,
        }
    }
}

/// The controller. On the bus: data port at offset 0, status and command port at offset 4
/// ([`ports::I8042`](super::ports::I8042)).
pub struct I8042 {
    state: I8042State,
    events: Box<dyn PlatformEvents>,
}

impl I8042 {
    /// A controller that tells `events` of [`PlatformEvent::Reset`].
    pub fn new(events: impl PlatformEvents + 'static) -> Self {
        Self { state: I8042State::default(), events: Box::new(events) }
    }

    /// The registers.
    pub fn state(&self) -> I8042State {
        self.state.clone()
    }

    /// Goes on from a saved state.
    ///
    /// # Errors
    /// [`StateError`] if a time-out is noted for a byte that is not there; the device is as it was.
    pub fn restore(&mut self, state: &I8042State) -> Result<(), StateError> {
        let valid = state.output.is_some() || !state.timeout;
        StateError::check(valid, "i8042", "timeout", state.timeout, "0 where no byte waits")?;
        self.state = state.clone();
        Ok(())
    }

    fn answer(&mut self, byte: u8) {
        self.state.output = Some(byte);
        self.state.timeout = false;
    }

    fn command(&mut self, command: u8) {
        self.state.command = true;
        self.state.argument = I8042Argument::None;
        match command {
            0x20 => self.answer(self.state.configuration),
            0x60 => self.state.argument = I8042Argument::Configuration,
            0xaa => self.answer(0x55),
            0xa9 | 0xab => self.answer(PORT_BROKEN),
            0xa7 => self.state.configuration |= 1 << 5,
            0xa8 => self.state.configuration &= !(1 << 5),
            0xad => self.state.configuration |= 1 << 4,
            0xae => self.state.configuration &= !(1 << 4),
            0xd0 => self.answer(OUTPUT_PORT),
            0xd1 => self.state.argument = I8042Argument::OutputPort,
            // A byte sent through the second port comes back as the first one's: there is no second.
            0xd2 | 0xd3 => self.state.argument = I8042Argument::Echo,
            0xd4 => self.state.argument = I8042Argument::Second,
            // A pulse on output lines: bit 0 clear is that of the processor's reset.
            0xf0..=0xff if command & 1 == 0 => self.events.event(PlatformEvent::Reset),
            _ => (),
        }
    }

    fn data(&mut self, value: u8) {
        self.state.command = false;
        match std::mem::take(&mut self.state.argument) {
            I8042Argument::None | I8042Argument::Second => {
                self.state.output = Some(NO_ANSWER);
                self.state.timeout = true;
            }
            I8042Argument::Configuration => self.state.configuration = value,
            I8042Argument::OutputPort if value & 1 == 0 => self.events.event(PlatformEvent::Reset),
            I8042Argument::OutputPort => (),
            I8042Argument::Echo => self.answer(value),
        }
    }

    fn status(&self) -> u8 {
        let bit = |set: bool, bit: u8| if set { bit } else { 0 };
        STATUS_SYSTEM
            | STATUS_UNLOCKED
            | bit(self.state.output.is_some(), STATUS_OUTPUT_FULL)
            | bit(self.state.command, STATUS_COMMAND)
            | bit(self.state.timeout, STATUS_TIMEOUT)
    }
}

impl fmt::Debug for I8042 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("I8042").field("state", &self.state).finish_non_exhaustive()
    }
}

impl BusDeviceMut for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        read_bytes(offset, data, |offset| match offset {
            DATA => {
                self.state.timeout = false;
                self.state.output.take().unwrap_or(0)
            }
            COMMAND => self.status(),
            _ => 0xff,
        });
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        write_bytes(offset, data, |offset, value| match offset {
            DATA => self.data(value),
            COMMAND => self.command(value),
            _ => (),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interrupt::testing::Recorder;

    fn bench() -> (I8042, Recorder<PlatformEvent>) {
        let events = Recorder::default();
        let seen = events.clone();
        (I8042::new(move |event: PlatformEvent| seen.record(event)), events)
    }

    fn read(device: &mut I8042, offset: u64) -> u8 {
        let mut data = [0];
        device.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn the_reset_pulse_resets() {
        let (mut device, events) = bench();
        device.write(COMMAND, &[0xfe]);
        device.write(COMMAND, &[0xd1]);
        device.write(DATA, &[0xfe]);
        assert_eq!(events.take(), [PlatformEvent::Reset; 2]);
        for (command, data) in [(0xff, 0), (0xd1, 3), (0xaa, 0)] {
            device.write(COMMAND, &[command]);
            device.write(DATA, &[data]);
        }
        assert!(events.take().is_empty());
    }

    #[test]
    fn a_probe_gets_answers_at_once() {
        let (mut device, _) = bench();
        assert_eq!(read(&mut device, COMMAND) & 3, 0, "nothing to read, ready for a command");
        for (command, answer) in [(0xaa, 0x55), (0xab, 1), (0xa9, 1), (0x20, 0x34), (0xd0, 3)] {
            device.write(COMMAND, &[command]);
            assert_eq!(read(&mut device, COMMAND) & 0x4b, 0x09, "{command:#x}");
            assert_eq!(read(&mut device, DATA), answer, "{command:#x}");
            assert_eq!(read(&mut device, COMMAND) & 1, 0);
        }
        device.write(COMMAND, &[0xd3]);
        device.write(DATA, &[0x5a]);
        assert_eq!(read(&mut device, COMMAND) & 0x21, 1, "not from a second port");
        assert_eq!(read(&mut device, DATA), 0x5a);
        device.write(DATA, &[0xf2]);
        assert_eq!(read(&mut device, COMMAND) & 0x41, 0x41);
        assert_eq!(read(&mut device, DATA), 0xfe);
    }

    #[test]
    fn the_configuration_is_kept() {
        let (mut device, _) = bench();
        device.write(COMMAND, &[0x60]);
        device.write(DATA, &[0x47]);
        device.write(COMMAND, &[0xad]);
        device.write(COMMAND, &[0xa7]);
        device.write(COMMAND, &[0x20]);
        assert_eq!(read(&mut device, DATA), 0x77);
        device.write(COMMAND, &[0xae]);
        device.write(COMMAND, &[0xa8]);
        assert_eq!(device.state().configuration, 0x47);
    }

    #[test]
    fn saved_states_go_on_and_are_checked() {
        let (mut device, _) = bench();
        device.write(COMMAND, &[0xaa]);
        let state = device.state();
        let (mut other, _) = bench();
        other.restore(&state).unwrap();
        assert_eq!(read(&mut other, DATA), 0x55);
        let bad = I8042State { output: None, timeout: true, ..state };
        assert!(other.restore(&bad).is_err());
    }
}
