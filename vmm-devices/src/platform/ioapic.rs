//! 82093AA I/O APIC: 24 interrupt inputs, each of which sends the message that the guest wrote for it.
//!
//! Devices drive the inputs from any thread, vCPUs read and write the registers and report ends of
//! interrupts. What it sends is a message-signalled interrupt (Intel SDM 3A 12.11), so any local APIC model
//! takes it. The guest chooses every register; reserved and read-only bits are not its to set.

use std::fmt;
use std::sync::{Arc, Mutex};

use crate::bus::BusDevice;
use crate::error::{LineError, StateError};
use crate::interrupt::{InterruptLine, MsiSink, lock};

/// Inputs of the I/O APIC.
pub const PINS: usize = 24;
/// [`PINS`] as the number of an input.
const PIN_COUNT: u32 = 24;
const LAST_PIN: u32 = PIN_COUNT - 1;

const DEVICE: &str = "I/O APIC";

/// From this version on there is an EOI register, which Linux uses to end level-triggered interrupts
/// one by one (82093AA: 0x11; ICH and later: 0x20).
const VERSION: u32 = 0x20;

// Offsets of the memory window (82093AA 3.1; Intel ICH9 13.5 for EOI).
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
const EOI: u64 = 0x40;

// Indirect registers (82093AA 3.2).
const ID: u8 = 0;
const VERSION_AND_PINS: u8 = 1;
const ARBITRATION: u8 = 2;
const TABLE: u8 = 0x10;
const TABLE_END: u8 = TABLE + 2 * 24 - 1;

// Bits of a redirection table entry (82093AA 3.2.4).
const VECTOR: u64 = 0xff;
const DELIVERY_MODE: u64 = 7 << 8;
const LOWEST_PRIORITY: u64 = 1 << 8;
const LOGICAL: u64 = 1 << 11;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
/// All but reserved bits, delivery status (never seen pending: delivery is instantaneous) and remote IRR. Polarity
/// can be written and has no effect: a line that is asserted is active, whatever its voltage.
const WRITABLE: u64 = 0xff00_0000_0001_afff;

// Bits of a message (Intel SDM 3A 12.11).
const MSI_BASE: u64 = 0xfee0_0000;
const MSI_REDIRECTION_HINT: u64 = 1 << 3;
const MSI_LOGICAL: u64 = 1 << 2;
const MSI_ASSERT: u64 = 1 << 14;

/// Registers of an [`IoApic`] and the levels at its inputs.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct IoApicState {
    /// The index that the window shows.
    pub select: u8,
    /// APIC ID, 4 bits.
    pub id: u8,
    /// The redirection table.
    pub entries: [u64; PINS],
    /// Bit n: input n is asserted.
    pub asserted: u32,
}

impl Default for IoApicState {
    fn default() -> Self {
        Self { select: 0, id: 0, entries: [MASKED; PINS], asserted: 0 }
    }
}

/// A message that is to be sent once the registers are unlocked.
type Message = (u64, u32);

impl IoApicState {
    fn entry(&self, pin: u32) -> u64 {
        usize::try_from(pin).ok().and_then(|pin| self.entries.get(pin)).copied().unwrap_or(MASKED)
    }

    fn entry_mut(&mut self, pin: u32) -> Option<&mut u64> {
        self.entries.get_mut(usize::try_from(pin).ok()?)
    }

    fn is_asserted(&self, pin: u32) -> bool {
        self.asserted & (1 << (pin & 31)) != 0
    }

    /// Sends from `pin` if its entry lets it. For a level-triggered input remote IRR then blocks it until
    /// the end of the interrupt.
    fn deliver(&mut self, pin: u32) -> Option<Message> {
        let entry = self.entry_mut(pin)?;
        if *entry & MASKED != 0 {
            return None;
        }
        let level = is_level(*entry);
        if level {
            if *entry & REMOTE_IRR != 0 {
                return None;
            }
            *entry |= REMOTE_IRR;
        }
        Some(message(*entry, level))
    }

    fn set_line(&mut self, pin: u32, asserted: bool) -> Option<Message> {
        let rising = asserted && !self.is_asserted(pin);
        let bit = 1 << (pin & 31);
        if asserted {
            self.asserted |= bit;
        } else {
            self.asserted &= !bit;
        }
        // An edge that meets a masked entry is gone, as the 82093AA has it (3.2.4, bit 16).
        if rising { self.deliver(pin) } else { None }
    }

    /// What a level-triggered input still has to say.
    fn deliver_if_level(&mut self, pin: u32) -> Option<Message> {
        if is_level(self.entry(pin)) && self.is_asserted(pin) { self.deliver(pin) } else { None }
    }

    /// Ends the interrupts of `vector` and gives the inputs that they were of, one bit each.
    fn end_of_interrupt(&mut self, vector: u8) -> u32 {
        let mut ended = 0;
        for (pin, entry) in self.entries.iter_mut().enumerate() {
            if *entry & VECTOR == u64::from(vector) && *entry & REMOTE_IRR != 0 {
                *entry &= !REMOTE_IRR;
                ended |= 1 << pin;
            }
        }
        ended
    }

    fn read_register(&self) -> u32 {
        match self.select {
            ID | ARBITRATION => u32::from(self.id) << 24,
            VERSION_AND_PINS => VERSION | LAST_PIN << 16,
            TABLE..=TABLE_END => {
                let (pin, high) = table_position(self.select);
                low_half(self.entry(pin) >> if high { 32 } else { 0 })
            }
            _ => 0,
        }
    }

    fn write_register(&mut self, value: u32) -> Option<Message> {
        match self.select {
            ID => {
                self.id = value.to_le_bytes()[3] & 0xf;
                None
            }
            TABLE..=TABLE_END => {
                let (pin, high) = table_position(self.select);
                let shift = if high { 32 } else { 0 };
                let writable = WRITABLE & 0xffff_ffff << shift;
                let entry = self.entry_mut(pin)?;
                *entry = *entry & !writable | u64::from(value) << shift & writable;
                if !is_level(*entry) {
                    // The way to end an interrupt before there was an EOI register.
                    *entry &= !REMOTE_IRR;
                }
                self.deliver_if_level(pin)
            }
            _ => None,
        }
    }
}

/// Input and half of the entry that the indirect register `select` is.
fn table_position(select: u8) -> (u32, bool) {
    let index = select.wrapping_sub(TABLE);
    (u32::from(index / 2), index % 2 == 1)
}

/// Whether the interrupt is held until its end. SMI, NMI, INIT and ExtINT are edges even if the entry says
/// level (82093AA 3.2.4, bits 10:8).
fn is_level(entry: u64) -> bool {
    entry & LEVEL != 0 && entry & DELIVERY_MODE <= LOWEST_PRIORITY
}

fn message(entry: u64, level: bool) -> Message {
    let mut address = MSI_BASE | (entry >> 56) << 12;
    if entry & LOGICAL != 0 {
        address |= MSI_LOGICAL;
    }
    if entry & DELIVERY_MODE == LOWEST_PRIORITY {
        address |= MSI_REDIRECTION_HINT;
    }
    let mut data = entry & (VECTOR | DELIVERY_MODE);
    if level {
        data |= LEVEL | MSI_ASSERT;
    }
    (address, low_half(data))
}

/// The low 32 bits.
fn low_half(value: u64) -> u32 {
    u32::try_from(value & 0xffff_ffff).unwrap_or(0)
}

/// The I/O APIC. Every method may be called from any thread.
///
/// Messages are sent with nothing locked, so a local APIC may report the end of an interrupt while it takes another.
pub struct IoApic {
    state: Mutex<IoApicState>,
    sink: Box<dyn MsiSink>,
}

impl IoApic {
    /// An I/O APIC with every input masked.
    pub fn new(sink: impl MsiSink + 'static) -> Self {
        Self { state: Mutex::default(), sink: Box::new(sink) }
    }

    /// Input `pin` as a line for a device to drive. Edges are rising ones: not asserted to asserted.
    ///
    /// # Errors
    /// [`LineError`] unless `pin` is 0 to 23.
    pub fn line(self: &Arc<Self>, pin: u32) -> Result<IoApicLine, LineError> {
        check_pin(pin)?;
        Ok(IoApicLine { io_apic: Arc::clone(self), pin })
    }

    /// Sets the level of input `pin`.
    ///
    /// # Errors
    /// [`LineError`] unless `pin` is 0 to 23.
    pub fn set_line(&self, pin: u32, asserted: bool) -> Result<(), LineError> {
        check_pin(pin)?;
        self.set_checked_line(pin, asserted);
        Ok(())
    }

    fn set_checked_line(&self, pin: u32, asserted: bool) {
        let message = lock(&self.state).set_line(pin, asserted);
        self.send(message);
    }

    /// A local APIC ended the level-triggered interrupt `vector` (EOI broadcast, Intel SDM 3A 12.8.5). An input
    /// that is still asserted is delivered again.
    pub fn end_of_interrupt(&self, vector: u8) {
        let ended = lock(&self.state).end_of_interrupt(vector);
        for pin in (0..PIN_COUNT).filter(|pin| ended & (1 << pin) != 0) {
            let message = lock(&self.state).deliver_if_level(pin);
            self.send(message);
        }
    }

    /// Registers and the levels at the inputs.
    pub fn state(&self) -> IoApicState {
        lock(&self.state).clone()
    }

    /// Goes on from a saved state. Nothing is sent: an interrupt that was sent before is part of the local APIC's
    /// state.
    ///
    /// # Errors
    /// [`StateError`] if reserved bits are set; the device is as it was.
    pub fn restore(&self, state: &IoApicState) -> Result<(), StateError> {
        StateError::check(state.id < 16, DEVICE, "id", state.id, "0 to 0xf")?;
        StateError::check(state.asserted >> PINS == 0, DEVICE, "asserted", state.asserted, "bits 0 to 23")?;
        for &entry in &state.entries {
            let valid = entry & !(WRITABLE | REMOTE_IRR) == 0 && (is_level(entry) || entry & REMOTE_IRR == 0);
            let allowed = "bits 0xff00_0000_0001_efff, bit 14 only of level-triggered inputs";
            StateError::check(valid, DEVICE, "entry", entry, allowed)?;
        }
        *lock(&self.state) = state.clone();
        Ok(())
    }

    fn send(&self, message: Option<Message>) {
        if let Some((address, data)) = message {
            self.sink.send(address, data);
        }
    }
}

fn check_pin(pin: u32) -> Result<(), LineError> {
    if pin < PIN_COUNT {
        Ok(())
    } else {
        Err(LineError { controller: DEVICE, input: pin, allowed: "0 to 23" })
    }
}

impl fmt::Debug for IoApic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoApic").field("state", &self.state()).finish_non_exhaustive()
    }
}

/// Registers are 32 bits wide and aligned. A narrow or shifted read gives the bytes that it touches; a narrow or shifted
/// write is dropped, but for the index and the EOI register, whose low byte is all there is.
impl BusDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let state = lock(&self.state);
        let register = match offset & !3 {
            SELECT => u32::from(state.select),
            WINDOW => state.read_register(),
            _ => return,
        };
        let into = usize::try_from(offset & 3).unwrap_or(0);
        for (to, from) in data.iter_mut().zip(register.to_le_bytes().into_iter().skip(into)) {
            *to = from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some(&low) = data.first() else { return };
        match offset {
            SELECT => lock(&self.state).select = low,
            WINDOW => {
                if let Some(&value) = data.first_chunk() {
                    let message = lock(&self.state).write_register(u32::from_le_bytes(value));
                    self.send(message);
                }
            }
            EOI => self.end_of_interrupt(low),
            _ => (),
        }
    }
}

/// One input of an [`IoApic`].
#[derive(Clone, Debug)]
pub struct IoApicLine {
    io_apic: Arc<IoApic>,
    pin: u32,
}

impl InterruptLine for IoApicLine {
    fn set_level(&self, asserted: bool) {
        self.io_apic.set_checked_line(self.pin, asserted);
    }
}

#[cfg(test)]
mod tests;
