//! Two 8259A interrupt controllers, cascaded as in a PC: 15 inputs, one output to the processor's INTR pin.
//!
//! Devices drive the inputs from any thread; the vCPU that takes the interrupt calls [`Pic::acknowledge`]. The
//! guest chooses every command in every state of the initialization sequence.

use std::fmt;
use std::sync::{Arc, Mutex};

use crate::bus::{BusDevice, read_bytes, write_bytes};
use crate::error::{LineError, StateError};
use crate::interrupt::{InterruptLine, lock};

const DEVICE: &str = "8259A";

/// The input of the first controller that the second one is on.
const CASCADE: u8 = 2;

/// Inputs that may be level-triggered (ELCR, Intel ICH9 13.4.6): not timer, keyboard, cascade, RTC, FPU.
const ELCR_ALLOWED: [u8; 2] = [0xf8, 0xde];

// ICW1 and OCW bits of the command port (Intel 8259A, "Initialization Command Words").
const ICW1: u8 = 1 << 4;
const ICW1_NEEDS_ICW4: u8 = 1;
const ICW1_SINGLE: u8 = 1 << 1;
const ICW1_LEVEL: u8 = 1 << 3;
const ICW4_AUTO_EOI: u8 = 1 << 1;
const ICW4_FULLY_NESTED: u8 = 1 << 4;
const OCW3: u8 = 1 << 3;
const OCW3_POLL: u8 = 1 << 2;

/// What the data port expects next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PicPhase {
    /// Operation: the interrupt mask.
    #[default]
    Ready,
    /// ICW2: the vector base.
    Vector,
    /// ICW3: where the cascade is.
    Cascade,
    /// ICW4: the modes.
    Modes,
}

/// Registers of one 8259A.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PicChipState {
    /// Interrupt request register.
    pub requested: u8,
    /// In-service register.
    pub in_service: u8,
    /// Interrupt mask register.
    pub mask: u8,
    /// Bit n: input n is asserted.
    pub asserted: u8,
    /// Edge/level control: bit n is set if input n is level-triggered.
    pub level_triggered: u8,
    /// Vector of input 0, a multiple of 8.
    pub vector_base: u8,
    /// Input with the highest priority, 0 to 7.
    pub top: u8,
    /// Where the initialization is.
    pub phase: PicPhase,
    /// ICW1 announced an ICW4.
    pub needs_modes: bool,
    /// ICW1 said that there is no cascade.
    pub single: bool,
    /// ICW1 made all inputs level-triggered.
    pub all_level: bool,
    /// An acknowledged interrupt ends at once.
    pub auto_eoi: bool,
    /// An automatic end makes the input the one with the lowest priority.
    pub rotate_on_auto_eoi: bool,
    /// A masked input in service does not block lower ones.
    pub special_mask: bool,
    /// The cascade input does not block itself.
    pub fully_nested: bool,
    /// The command port reads the in-service register.
    pub read_in_service: bool,
    /// The next read is a poll.
    pub poll: bool,
}

impl PicChipState {
    /// How far `input` is from the highest priority.
    fn rank(&self, input: u8) -> u8 {
        input.wrapping_sub(self.top) & 7
    }

    /// The input of `set` with the highest priority.
    fn highest(&self, set: u8) -> Option<u8> {
        (0..8).filter(|input| set & (1 << input) != 0).min_by_key(|&input| self.rank(input))
    }

    fn levels(&self) -> u8 {
        if self.all_level { 0xff } else { self.level_triggered }
    }

    /// The input that asks for service: requested, not masked, and above what is in service.
    fn pending(&self) -> Option<u8> {
        if self.phase != PicPhase::Ready {
            return None;
        }
        let input = self.highest(self.requested & !self.mask)?;
        let mut blocking = self.in_service;
        if self.special_mask {
            blocking &= !self.mask;
        }
        if self.fully_nested {
            blocking &= !(1 << CASCADE);
        }
        match self.highest(blocking) {
            Some(current) if self.rank(current) <= self.rank(input) => None,
            _ => Some(input),
        }
    }

    /// A falling edge takes a level-triggered request back. The request of an edge stays, though the 8259A
    /// wants the line held until the acknowledge: lines here may be pulsed.
    fn set_line(&mut self, input: u8, asserted: bool) {
        let bit = 1 << (input & 7);
        let rising = asserted && self.asserted & bit == 0;
        if asserted {
            self.asserted |= bit;
        } else {
            self.asserted &= !bit;
        }
        if rising {
            self.requested |= bit;
        } else if !asserted && self.levels() & bit != 0 {
            self.requested &= !bit;
        }
    }

    /// The INTA cycle for `input`.
    fn accept(&mut self, input: u8) {
        let bit = 1 << (input & 7);
        if self.auto_eoi {
            if self.rotate_on_auto_eoi {
                self.make_lowest(input);
            }
        } else {
            self.in_service |= bit;
        }
        if self.levels() & bit == 0 {
            self.requested &= !bit;
        }
    }

    fn make_lowest(&mut self, input: u8) {
        self.top = input.wrapping_add(1) & 7;
    }

    fn vector(&self, input: u8) -> u8 {
        self.vector_base | input & 7
    }

    fn command(&mut self, value: u8) {
        if value & ICW1 != 0 {
            self.initialize(value);
        } else if value & OCW3 != 0 {
            self.poll = value & OCW3_POLL != 0;
            match value & 3 {
                2 => self.read_in_service = false,
                3 => self.read_in_service = true,
                _ => (),
            }
            match value >> 5 & 3 {
                2 => self.special_mask = false,
                3 => self.special_mask = true,
                _ => (),
            }
        } else {
            self.end(value >> 5, value & 7);
        }
    }

    fn initialize(&mut self, icw1: u8) {
        let all_level = icw1 & ICW1_LEVEL != 0;
        let levels = if all_level { 0xff } else { self.level_triggered };
        *self = Self {
            // Edges have to come anew.
            requested: self.asserted & levels,
            asserted: self.asserted,
            level_triggered: self.level_triggered,
            vector_base: self.vector_base,
            phase: PicPhase::Vector,
            needs_modes: icw1 & ICW1_NEEDS_ICW4 != 0,
            single: icw1 & ICW1_SINGLE != 0,
            all_level,
            ..Self::default()
        };
    }

    /// OCW2: end of interrupt and priorities.
    fn end(&mut self, command: u8, input: u8) {
        match command {
            0 | 4 => self.rotate_on_auto_eoi = command == 4,
            // Not told which: the one of the highest priority that is in service.
            1 | 5 => {
                let visible = if self.special_mask { self.in_service & !self.mask } else { self.in_service };
                if let Some(ended) = self.highest(visible) {
                    self.in_service &= !(1 << ended);
                    if command == 5 {
                        self.make_lowest(ended);
                    }
                }
            }
            3 => self.in_service &= !(1 << input),
            6 => self.make_lowest(input),
            7 => {
                self.in_service &= !(1 << input);
                self.make_lowest(input);
            }
            _ => (),
        }
    }

    fn data(&mut self, value: u8) {
        let after_cascade = if self.needs_modes { PicPhase::Modes } else { PicPhase::Ready };
        match self.phase {
            PicPhase::Ready => self.mask = value,
            PicPhase::Vector => {
                self.vector_base = value & 0xf8;
                self.phase = if self.single { after_cascade } else { PicPhase::Cascade };
            }
            // A PC's wiring does not change.
            PicPhase::Cascade => self.phase = after_cascade,
            PicPhase::Modes => {
                self.auto_eoi = value & ICW4_AUTO_EOI != 0;
                self.fully_nested = value & ICW4_FULLY_NESTED != 0;
                self.phase = PicPhase::Ready;
            }
        }
    }

    /// A read of the command port (`false`) or the data port (`true`).
    fn read(&mut self, data_port: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            return match self.pending() {
                Some(input) => {
                    self.accept(input);
                    0x80 | input
                }
                None => 0,
            };
        }
        match (data_port, self.read_in_service) {
            (true, _) => self.mask,
            (false, true) => self.in_service,
            (false, false) => self.requested,
        }
    }

    fn validate(&self, elcr_allowed: u8) -> Result<(), StateError> {
        StateError::check(self.top < 8, DEVICE, "top", self.top, "0 to 7")?;
        let base = self.vector_base;
        StateError::check(base & 7 == 0, DEVICE, "vector_base", base, "multiples of 8")?;
        let levels = self.level_triggered;
        let allowed = "bits 3 to 7 of the first, 1 to 4, 6 and 7 of the second";
        StateError::check(levels & !elcr_allowed == 0, DEVICE, "level_triggered", levels, allowed)
    }
}

/// Registers of both controllers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PicState {
    /// The controller at 0x20: inputs 0 to 7.
    pub first: PicChipState,
    /// The controller at 0xa0: inputs 8 to 15.
    pub second: PicChipState,
}

impl PicState {
    /// Passes on the second controller's output and returns the first one's: whether INTR is asserted.
    fn refresh(&mut self) -> bool {
        // It drops for an instant with every acknowledge, so to the first controller it is a level even
        // where the input takes edges.
        let cascade = 1 << CASCADE;
        if self.second.pending().is_some() {
            self.first.requested |= cascade;
            self.first.asserted |= cascade;
        } else {
            self.first.requested &= !cascade;
            self.first.asserted &= !cascade;
        }
        self.first.pending().is_some()
    }

    fn acknowledge(&mut self) -> u8 {
        self.refresh();
        match self.first.pending() {
            Some(CASCADE) if !self.first.single => {
                self.first.accept(CASCADE);
                match self.second.pending() {
                    Some(input) => {
                        self.second.accept(input);
                        self.second.vector(input)
                    }
                    None => self.second.vector(7),
                }
            }
            Some(input) => {
                self.first.accept(input);
                self.first.vector(input)
            }
            None => self.first.vector(7),
        }
    }

    fn write(&mut self, offset: u64, value: u8) {
        match offset {
            0 => self.first.command(value),
            1 => self.first.data(value),
            2 => self.second.command(value),
            3 => {
                self.second.data(value);
                // It has no cascade below it.
                self.second.fully_nested = false;
            }
            4 => self.first.level_triggered = value & ELCR_ALLOWED[0],
            5 => self.second.level_triggered = value & ELCR_ALLOWED[1],
            _ => (),
        }
    }

    fn read(&mut self, offset: u64) -> u8 {
        match offset {
            0 | 1 => self.first.read(offset == 1),
            2 | 3 => self.second.read(offset == 3),
            4 => self.first.level_triggered,
            5 => self.second.level_triggered,
            _ => 0xff,
        }
    }
}

struct Inner {
    state: PicState,
    output: bool,
}

/// The pair of controllers. Every method may be called from any thread.
///
/// On the bus it has six ports: command and data of the first, of the second, and the two edge/level registers
/// ([`ports::PIC`](super::ports::PIC)).
pub struct Pic {
    inner: Mutex<Inner>,
    intr: Box<dyn InterruptLine>,
}

impl Pic {
    /// A pair that was not initialized: it interrupts with vectors 0 to 7 until the guest does that.
    ///
    /// `intr` follows the output to the processor. It is called with the controllers locked, so that levels
    /// arrive in order, and must not call them.
    pub fn new(intr: impl InterruptLine + 'static) -> Self {
        Self { inner: Mutex::new(Inner { state: PicState::default(), output: false }), intr: Box::new(intr) }
    }

    /// Input `irq` as a line for a device to drive.
    ///
    /// # Errors
    /// [`LineError`] unless `irq` is 0, 1 or 3 to 15: 2 is the cascade.
    pub fn line(self: &Arc<Self>, irq: u32) -> Result<PicLine, LineError> {
        let input = match u8::try_from(irq) {
            Ok(input @ (0 | 1 | 3..=15)) => input,
            _ => return Err(LineError { controller: DEVICE, input: irq, allowed: "0, 1, 3 to 15" }),
        };
        Ok(PicLine { pic: Arc::clone(self), input })
    }

    /// The processor accepts the interrupt: the vector, and the input goes into service. If nothing is pending any
    /// more, it is input 7 without going into service, as a spurious interrupt is (Intel 8259A, "Interrupt Sequence").
    pub fn acknowledge(&self) -> u8 {
        self.with(PicState::acknowledge)
    }

    /// Whether an interrupt is pending, which is the level of the output.
    pub fn is_pending(&self) -> bool {
        lock(&self.inner).output
    }

    /// The registers.
    pub fn state(&self) -> PicState {
        lock(&self.inner).state.clone()
    }

    /// Goes on from a saved state; the output follows it.
    ///
    /// # Errors
    /// [`StateError`] if a register cannot have its value; the device is as it was.
    pub fn restore(&self, state: &PicState) -> Result<(), StateError> {
        state.first.validate(ELCR_ALLOWED[0])?;
        state.second.validate(ELCR_ALLOWED[1])?;
        self.with(|present| *present = state.clone());
        Ok(())
    }

    fn with<R>(&self, change: impl FnOnce(&mut PicState) -> R) -> R {
        let mut inner = lock(&self.inner);
        let result = change(&mut inner.state);
        let output = inner.state.refresh();
        if std::mem::replace(&mut inner.output, output) != output {
            self.intr.set_level(output);
        }
        result
    }
}

impl fmt::Debug for Pic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pic").field("state", &self.state()).finish_non_exhaustive()
    }
}

impl BusDevice for Pic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.with(|state| read_bytes(offset, data, |offset| state.read(offset)));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.with(|state| write_bytes(offset, data, |offset, value| state.write(offset, value)));
    }
}

/// One input of a [`Pic`].
#[derive(Clone, Debug)]
pub struct PicLine {
    pic: Arc<Pic>,
    input: u8,
}

impl InterruptLine for PicLine {
    fn set_level(&self, asserted: bool) {
        self.pic.with(|state| {
            let chip = if self.input < 8 { &mut state.first } else { &mut state.second };
            chip.set_line(self.input & 7, asserted);
        });
    }
}

#[cfg(test)]
mod tests;
