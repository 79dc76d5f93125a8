//! MSI-X: interrupts that are messages, one for each vector, as the guest wrote it into a table (PCI 3.0, 6.8.2).
//!
//! Table and pending bits lie in a BAR of the function, which passes on what the guest does there. Any thread signals, without the
//! function's lock. Threat model: the guest writes any entry at any moment and width, also while a vector is signalled; it gets the
//! messages that it wrote, and what address and data mean is for the [`MsiSink`] to judge.

use std::fmt;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use crate::bus::halves;
use crate::error::StateError;
use crate::interrupt::{MsiSink, lock};
use crate::pci::PciError;
use crate::pci::address::{read_registers, write_registers};
use crate::pci::capability::{Capability, CapabilityOffset, id};
use crate::pci::config::{ConfigBuilder, ConfigSpace};

const DEVICE: &str = "MSI-X";

/// As many vectors as the table can have.
pub const MAX_VECTORS: u16 = 2048;

const ENTRY_SIZE: u64 = 16;

// Message control, its upper byte (6.8.2.3).
const ENABLE: u8 = 0x80;
const FUNCTION_MASK: u8 = 0x40;
/// Not of the register, where this bit is reserved: the function may not send (bus master enable).
const NOT_MASTER: u8 = 0x20;

/// Vector control (6.8.2.9).
const MASKED: u32 = 1;

/// Where table and pending bits are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixPlace {
    /// The BAR, one for memory.
    pub bar: usize,
    /// Offset of the table in it, a multiple of 8: 16 bytes for each vector.
    pub table: u64,
    /// Offset of the pending bits, a multiple of 8: 8 bytes for each 64 vectors.
    pub pending: u64,
}

/// A vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct MsixEntry {
    /// Address of its message; bits 1:0 are zero.
    pub address: u64,
    /// Data of its message.
    pub data: u32,
    /// The guest does not want it now.
    pub masked: bool,
    /// It is sent when it is no longer masked.
    pub pending: bool,
}

impl Default for MsixEntry {
    fn default() -> Self {
        Self { address: 0, data: 0, masked: true, pending: false }
    }
}

impl MsixEntry {
    fn register(&self, index: u64) -> u32 {
        let [low, high] = halves(self.address);
        match index {
            0 => low,
            1 => high,
            2 => self.data,
            _ => u32::from(self.masked) * MASKED,
        }
    }

    fn set_register(&mut self, index: u64, value: u32) {
        let [low, high] = halves(self.address);
        match index {
            0 => self.address = u64::from(high) << 32 | u64::from(value & !3),
            1 => self.address = u64::from(value) << 32 | u64::from(low),
            2 => self.data = value,
            _ => self.masked = value & MASKED != 0,
        }
    }
}

/// The vectors of an [`Msix`]. Whether it is enabled and masked is in configuration space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MsixState {
    /// Each vector.
    pub entries: Vec<MsixEntry>,
}

struct Shared {
    capability: CapabilityOffset,
    place: MsixPlace,
    /// Upper byte of message control. Changed while the function is locked, and before entries are looked at for what that means.
    control: AtomicU8,
    /// A message is sent with its entry locked: once the guest has masked a vector, nothing of it is still to come.
    entries: Box<[Mutex<MsixEntry>]>,
    sink: Box<dyn MsiSink>,
}

/// What an offset of the BAR is.
enum Part {
    /// The table: a register of it.
    Table(u64),
    /// The pending bits: a register of them.
    Pending(u64),
}

impl Shared {
    fn is_open(&self) -> bool {
        self.control.load(Ordering::SeqCst) & (ENABLE | FUNCTION_MASK | NOT_MASTER) == ENABLE
    }

    fn send_pending(&self, entry: &mut MsixEntry) {
        if entry.pending && !entry.masked && self.is_open() {
            entry.pending = false;
            self.sink.send(entry.address, entry.data);
        }
    }

    fn part(&self, bar: usize, offset: u64) -> Option<Part> {
        let vectors = u64::try_from(self.entries.len()).unwrap_or(0);
        let within = |from: u64, size: u64| offset.checked_sub(from).filter(|into| *into < size);
        let MsixPlace { table, pending, .. } = self.place;
        if bar != self.place.bar {
            None
        } else if let Some(into) = within(table, vectors * ENTRY_SIZE) {
            Some(Part::Table(into / 4))
        } else {
            within(pending, pending_size(vectors)).map(|into| Part::Pending(into / 4))
        }
    }

    fn entry(&self, index: u64) -> Option<&Mutex<MsixEntry>> {
        self.entries.get(usize::try_from(index).ok()?)
    }

    fn register(&self, part: &Part) -> u32 {
        match *part {
            Part::Table(register) => {
                self.entry(register / 4).map_or(0, |entry| lock(entry).register(register % 4))
            }
            Part::Pending(register) => (0..32).fold(0, |bits, bit| {
                let pending = self.entry(register * 32 + bit).is_some_and(|entry| lock(entry).pending);
                bits | u32::from(pending) << bit
            }),
        }
    }
}

/// Bytes of the pending bits of so many vectors.
fn pending_size(vectors: u64) -> u64 {
    vectors.div_ceil(64) * 8
}

/// MSI-X of a function. Clones are the same.
///
/// The function passes on what it gets: accesses of the BAR to [`read`](Self::read) and [`write`](Self::write), the
/// fact that configuration space may have changed to [`config_written`](Self::config_written), a reset to
/// [`reset`](Self::reset).
#[derive(Clone)]
pub struct Msix(Arc<Shared>);

impl Msix {
    /// Adds the capability to `config`, which has the BAR already. All vectors are masked, and it is off.
    ///
    /// # Errors
    /// [`PciError::MsixVectors`] unless there are 1 to 2048, [`PciError::MsixPlace`] if table and pending bits
    /// overlap or do not fit, and as [`ConfigBuilder::capability`].
    pub fn new(
        config: &mut ConfigBuilder,
        vectors: u16,
        place: MsixPlace,
        sink: impl MsiSink + 'static,
    ) -> Result<Self, PciError> {
        if !(1..=MAX_VECTORS).contains(&vectors) {
            return Err(PciError::MsixVectors { vectors, max: MAX_VECTORS });
        }
        let offsets = offsets(config, vectors, place);
        let [table, pending] = offsets.ok_or(PciError::MsixPlace { place, vectors })?;
        let control = (vectors - 1).to_le_bytes();
        let body = [&control[..], &table.to_le_bytes(), &pending.to_le_bytes()].concat();
        let capability =
            config.capability(Capability::new(id::MSIX, body).writable([0, ENABLE | FUNCTION_MASK]))?;
        let entries = (0..vectors).map(|_| Mutex::default()).collect();
        let control = AtomicU8::new(0);
        Ok(Self(Arc::new(Shared { capability, place, control, entries, sink: Box::new(sink) })))
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> u16 {
        u16::try_from(self.0.entries.len()).unwrap_or(MAX_VECTORS)
    }

    /// Whether the guest has switched it on. If not, the function uses its pin.
    pub fn is_enabled(&self) -> bool {
        self.0.control.load(Ordering::SeqCst) & ENABLE != 0
    }

    /// Signals `vector`: sends its message, or notes it down while it is masked. A vector that there is not is
    /// none. Returns whether MSI-X is [enabled](Self::is_enabled); if not, nothing happened.
    pub fn notify(&self, vector: u16) -> bool {
        if !self.is_enabled() {
            return false;
        }
        if let Some(entry) = self.0.entry(vector.into()) {
            let mut entry = lock(entry);
            entry.pending = true;
            self.0.send_pending(&mut entry);
        }
        true
    }

    /// A write of configuration space is done, or it was restored: what the capability and the bus master bit say
    /// counts from now on.
    pub fn config_written(&self, config: &ConfigSpace) {
        let [_, _, _, control] = config.register(self.0.capability.get()).to_le_bytes();
        let master = if config.is_bus_master() { 0 } else { NOT_MASTER };
        let control = control & (ENABLE | FUNCTION_MASK) | master;
        if self.0.control.swap(control, Ordering::SeqCst) != control {
            // Who sees an entry after this knows; who saw it before is done.
            for entry in &self.0.entries {
                self.0.send_pending(&mut lock(entry));
            }
        }
    }

    /// The guest loads from `offset` of BAR `bar`. Returns whether that is table or pending bits; if not, nothing was done.
    pub fn read(&self, bar: usize, offset: u64, data: &mut [u8]) -> bool {
        if self.0.part(bar, offset).is_none() {
            return false;
        }
        read_registers(offset, data, |offset, piece| {
            if let Some(part) = self.0.part(bar, offset) {
                let register = self.0.register(&part).to_le_bytes().into_iter();
                for (to, from) in piece.iter_mut().zip(register.skip(into_register(offset))) {
                    *to = from;
                }
            }
        });
        true
    }

    /// The guest stores `data` at `offset` of BAR `bar`. Returns whether that is table or pending bits; if not, nothing was
    /// done.
    pub fn write(&self, bar: usize, offset: u64, data: &[u8]) -> bool {
        if self.0.part(bar, offset).is_none() {
            return false;
        }
        write_registers(offset, data, |offset, piece| {
            // Pending bits are read-only.
            if let Some(Part::Table(register)) = self.0.part(bar, offset)
                && let Some(entry) = self.0.entry(register / 4)
            {
                let mut entry = lock(entry);
                let mut bytes = entry.register(register % 4).to_le_bytes();
                for (to, &from) in bytes.iter_mut().skip(into_register(offset)).zip(piece) {
                    *to = from;
                }
                entry.set_register(register % 4, u32::from_le_bytes(bytes));
                self.0.send_pending(&mut entry);
            }
        });
        true
    }

    /// What is pending is so no more: the function has no reason left to signal it (6.8.3.2).
    pub fn forget_pending(&self) {
        for entry in &self.0.entries {
            lock(entry).pending = false;
        }
    }

    /// Back to what it was before the guest.
    pub fn reset(&self) {
        self.0.control.store(0, Ordering::SeqCst);
        for entry in &self.0.entries {
            *lock(entry) = MsixEntry::default();
        }
    }

    /// Table and pending bits.
    pub fn state(&self) -> MsixState {
        MsixState { entries: self.0.entries.iter().map(|entry| *lock(entry)).collect() }
    }

    /// Whether a state can be [restored](Self::restore).
    ///
    /// # Errors
    /// [`StateError`] if it has another number of vectors, or an address that none can have.
    pub fn check(&self, state: &MsixState) -> Result<(), StateError> {
        let count = u64::try_from(state.entries.len()).unwrap_or(u64::MAX);
        let same = state.entries.len() == self.0.entries.len();
        StateError::check(same, DEVICE, "number of vectors", count, "that of the function")?;
        for entry in &state.entries {
            let aligned = entry.address & 3 == 0;
            StateError::check(aligned, DEVICE, "address", entry.address, "multiples of 4")?;
        }
        Ok(())
    }

    /// Goes on from a saved state, with a configuration space that was restored before. What was pending and is not
    /// masked is sent.
    ///
    /// # Errors
    /// As [`check`](Self::check); nothing has changed.
    pub fn restore(&self, state: &MsixState, config: &ConfigSpace) -> Result<(), StateError> {
        self.check(state)?;
        self.0.control.store(0, Ordering::SeqCst);
        for (entry, saved) in self.0.entries.iter().zip(&state.entries) {
            *lock(entry) = *saved;
        }
        self.config_written(config);
        Ok(())
    }
}

fn into_register(offset: u64) -> usize {
    usize::try_from(offset & 3).unwrap_or(0)
}

/// The registers that say where table and pending bits are, if they can be there.
fn offsets(config: &ConfigBuilder, vectors: u16, place: MsixPlace) -> Option<[u32; 2]> {
    let bar = config.bar_at(place.bar).filter(|bar| !bar.kind().is_io())?;
    let vectors = u64::from(vectors);
    let end = |from: u64, size: u64| from.checked_add(size).filter(|end| *end <= bar.size());
    let table_end = end(place.table, vectors * ENTRY_SIZE)?;
    let pending_end = end(place.pending, pending_size(vectors))?;
    if place.pending < table_end && place.table < pending_end {
        return None;
    }
    let register = |offset: u64| {
        let offset = u32::try_from(offset).ok().filter(|offset| offset.is_multiple_of(8))?;
        Some(offset | u32::try_from(place.bar).ok()?)
    };
    Some([register(place.table)?, register(place.pending)?])
}

impl fmt::Debug for Msix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Msix")
            .field("place", &self.0.place)
            .field("enabled", &self.is_enabled())
            .field("vectors", &self.vectors())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
