//! Which device answers at which port and address, and how an access reaches it.
//!
//! vCPU threads call [`PioBus`] and [`MmioBus`] with what the guest did; the monitor puts devices on them,
//! also while the guest runs. Threat model: the guest chooses address, length, data and moment of every access. An
//! access is served by the devices whose ranges it touches and by nobody else; what nobody claims
//! reads all ones and writes nothing.
//!
//! # Which trait to implement
//! A device is plain state whose methods take `&mut self`: that is [`BusDeviceMut`], and a
//! [`Mutex`] around it is a [`BusDevice`], the form that a bus keeps. The monitor holds the same `Arc<Mutex<_>>`, so
//! a thread of the event loop reaches the device between two accesses of the guest. A device that synchronizes by
//! itself, such as an interrupt controller that every thread signals, implements [`BusDevice`] directly.
//! One pair of traits serves both buses: most devices may stand on either.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use vmm_memory::vm_memory::GuestAddress;

use crate::error::BusError;
use crate::interrupt::lock;

/// A device as a bus calls it: from any vCPU thread, also from several at once.
pub trait BusDevice: Send + Sync {
    /// The guest loads `data.len()` bytes (1, 2, 4 or 8 as a rule; any number is to be survived) at `offset`
    /// of the device. `data` comes filled with ones: what the device leaves alone reads as nothing there.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// The guest stores `data` at `offset` of the device.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A device that one thread at a time may use. [`Mutex`] makes it a [`BusDevice`].
pub trait BusDeviceMut: Send {
    /// As [`BusDevice::read`].
    fn read(&mut self, offset: u64, data: &mut [u8]);

    /// As [`BusDevice::write`].
    fn write(&mut self, offset: u64, data: &[u8]);
}

impl<T: BusDeviceMut + ?Sized> BusDevice for Mutex<T> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        lock(self).read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        lock(self).write(offset, data);
    }
}

/// Addresses that belong to a device: `size` of them from `base` on.
///
/// `offset` is what the first of them is to the device, so that a device with registers in several places
/// (the two PICs) is put there range by range.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BusRange {
    /// First port or guest-physical address.
    pub base: u64,
    /// How many bytes, at least 1.
    pub size: u64,
    /// Offset within the device of the first one.
    pub offset: u64,
}

impl BusRange {
    /// `size` bytes from `base` on, which is offset 0 of the device.
    pub const fn new(base: u64, size: u64) -> Self {
        Self { base, size, offset: 0 }
    }

    /// The same addresses, with the first one at `offset` of the device.
    pub const fn at_offset(self, offset: u64) -> Self {
        Self { offset, ..self }
    }
}

struct Entry {
    base: u64,
    last: u64,
    offset: u64,
    name: String,
    device: Arc<dyn BusDevice>,
}

/// Where an address leads.
struct Target {
    device: Arc<dyn BusDevice>,
    offset: u64,
    /// How many bytes of the range follow this one.
    following: u64,
}

/// Ranges by address; both buses are one of these.
struct RangeMap {
    /// Ascending, without overlap.
    entries: RwLock<Vec<Entry>>,
    last: u64,
}

impl RangeMap {
    fn new(last: u64) -> Self {
        Self { entries: RwLock::default(), last }
    }

    fn insert(&self, name: String, range: BusRange, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let BusRange { base, size, offset } = range;
        let Some(following) = size.checked_sub(1) else { return Err(BusError::Empty { name, base }) };
        let last = match (base.checked_add(following), offset.checked_add(following)) {
            (Some(last), Some(_)) if last <= self.last => last,
            _ => return Err(BusError::Beyond { name, base, size, offset, last: self.last }),
        };
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let at = entries.partition_point(|entry| entry.last < base);
        if let Some(other) = entries.get(at).filter(|other| other.base <= last) {
            return Err(BusError::Overlap {
                name,
                base,
                last,
                other: other.name.clone(),
                other_base: other.base,
                other_last: other.last,
            });
        }
        entries.insert(at, Entry { base, last, offset, name, device });
        Ok(())
    }

    fn remove(&self, base: u64) -> Result<Arc<dyn BusDevice>, BusError> {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        match entries.binary_search_by_key(&base, |entry| entry.base) {
            Ok(at) => Ok(entries.remove(at).device),
            Err(_) => Err(BusError::NoRange { base }),
        }
    }

    /// The device is called after the lock is gone, so it may itself change the bus.
    fn find(&self, address: u64) -> Option<Target> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let entry = entries.get(entries.partition_point(|entry| entry.last < address))?;
        let into = address.checked_sub(entry.base)?;
        Some(Target {
            device: Arc::clone(&entry.device),
            // Neither can overflow: `insert` saw to it for the last address of the range.
            offset: entry.offset.wrapping_add(into),
            following: entry.last.wrapping_sub(address),
        })
    }

    /// The device that the whole of `length` bytes belongs to.
    fn find_whole(&self, address: u64, length: usize) -> Option<Target> {
        let following = u64::try_from(length).ok()?.checked_sub(1)?;
        self.find(address).filter(|target| following <= target.following)
    }

    /// Whether each byte was claimed.
    fn read(&self, address: u64, data: &mut [u8]) -> bool {
        data.fill(0xff);
        if let Some(target) = self.find_whole(address, data.len()) {
            target.device.read(target.offset, data);
            return true;
        }
        // An access across the end of a range goes byte by byte to whom each belongs, as it does on a
        // narrow bus. Beyond the last address there is nobody.
        let mut claimed = true;
        for (address, byte) in byte_addresses(address).zip(data.chunks_mut(1)) {
            match address.and_then(|address| self.find(address)) {
                Some(target) => target.device.read(target.offset, byte),
                None => claimed = false,
            }
        }
        claimed
    }

    fn write(&self, address: u64, data: &[u8]) -> bool {
        if let Some(target) = self.find_whole(address, data.len()) {
            target.device.write(target.offset, data);
            return true;
        }
        let mut claimed = true;
        for (address, byte) in byte_addresses(address).zip(data.chunks(1)) {
            match address.and_then(|address| self.find(address)) {
                Some(target) => target.device.write(target.offset, byte),
                None => claimed = false,
            }
        }
        claimed
    }
}

/// `from` and the addresses after it; `None` after the last there is.
fn byte_addresses(from: u64) -> impl Iterator<Item = Option<u64>> {
    (0..).map(move |i: u64| from.checked_add(i))
}

impl fmt::Debug for RangeMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        f.debug_map()
            .entries(
                entries.iter().map(|entry| (format!("{:#x}..={:#x}", entry.base, entry.last), &entry.name)),
            )
            .finish()
    }
}

/// The port space: addresses 0 to 0xffff, accesses of 1, 2 and 4 bytes.
#[derive(Debug)]
pub struct PioBus(RangeMap);

impl Default for PioBus {
    fn default() -> Self {
        Self(RangeMap::new(0xffff))
    }
}

impl PioBus {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a device on the bus; `name` is for messages.
    ///
    /// # Errors
    /// [`BusError::Empty`], [`BusError::Beyond`] and [`BusError::Overlap`]; the bus is as it was.
    pub fn insert(
        &self,
        name: impl Into<String>,
        range: BusRange,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        self.0.insert(name.into(), range, device)
    }

    /// Takes away the range that starts at `base` and gives back its device. An access under way ends first
    /// or afterwards.
    ///
    /// # Errors
    /// [`BusError::NoRange`].
    pub fn remove(&self, base: u16) -> Result<Arc<dyn BusDevice>, BusError> {
        self.0.remove(base.into())
    }

    /// IN and INS: fills `data`, elements of `size` bytes that are read from the same port one after the other.
    ///
    /// Returns whether all of it was claimed by devices. A size other than 1, 2 and 4, or a length that
    /// is no multiple of it, is no access: `data` becomes all ones.
    pub fn read(&self, port: u16, size: usize, data: &mut [u8]) -> bool {
        if !is_pio(size, data.len()) {
            data.fill(0xff);
            return false;
        }
        // Each element is read even if one before it was not claimed.
        let unclaimed =
            data.chunks_mut(size).filter_map(|element| (!self.0.read(port.into(), element)).then_some(()));
        unclaimed.count() == 0
    }

    /// OUT and OUTS: writes `data`, elements of `size` bytes, to the same port one after the other.
    ///
    /// Returns whether all of it was claimed; size and length as in [`read`](Self::read).
    pub fn write(&self, port: u16, size: usize, data: &[u8]) -> bool {
        if !is_pio(size, data.len()) {
            return false;
        }
        let unclaimed = data.chunks(size).filter(|element| !self.0.write(port.into(), element));
        unclaimed.count() == 0
    }
}

fn is_pio(size: usize, length: usize) -> bool {
    matches!(size, 1 | 2 | 4) && length.is_multiple_of(size)
}

/// Device memory: guest-physical addresses, accesses of 1 to 8 bytes.
#[derive(Debug)]
pub struct MmioBus(RangeMap);

impl Default for MmioBus {
    fn default() -> Self {
        Self(RangeMap::new(u64::MAX))
    }
}

impl MmioBus {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a device on the bus; `name` is for messages.
    ///
    /// # Errors
    /// [`BusError::Empty`], [`BusError::Beyond`] and [`BusError::Overlap`]; the bus is as it was.
    pub fn insert(
        &self,
        name: impl Into<String>,
        range: BusRange,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        self.0.insert(name.into(), range, device)
    }

    /// Takes away the range that starts at `base` and gives back its device. An access under way ends first
    /// or afterwards.
    ///
    /// # Errors
    /// [`BusError::NoRange`].
    pub fn remove(&self, base: GuestAddress) -> Result<Arc<dyn BusDevice>, BusError> {
        self.0.remove(base.0)
    }

    /// A load of 1 to 8 bytes. Returns whether all of them were claimed by devices; another length is no
    /// access, `data` becomes all ones.
    pub fn read(&self, gpa: GuestAddress, data: &mut [u8]) -> bool {
        if !(1..=8).contains(&data.len()) {
            data.fill(0xff);
            return false;
        }
        self.0.read(gpa.0, data)
    }

    /// A store of 1 to 8 bytes. Returns whether all of them were claimed; another length is no access.
    pub fn write(&self, gpa: GuestAddress, data: &[u8]) -> bool {
        (1..=8).contains(&data.len()) && self.0.write(gpa.0, data)
    }
}

/// The low 32 bits and the high ones: what a value of 64 bits is to registers of 32.
pub(crate) fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h])]
}

/// Serves a read of a device with 8-bit registers: a wide access is one to each register, ascending.
pub(crate) fn read_bytes(offset: u64, data: &mut [u8], mut register: impl FnMut(u64) -> u8) {
    for (i, byte) in (0..).zip(data) {
        *byte = register(offset.wrapping_add(i));
    }
}

/// Serves a write of a device with 8-bit registers.
pub(crate) fn write_bytes(offset: u64, data: &[u8], mut register: impl FnMut(u64, u8)) {
    for (i, &byte) in (0..).zip(data) {
        register(offset.wrapping_add(i), byte);
    }
}

#[cfg(test)]
mod tests;
