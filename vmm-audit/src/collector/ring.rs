//! The ring in shared memory.
//!
//! | bytes | what |
//! |---|---|
//! | 0..56 | `VMMARING`, version, slots of the reserved ring, slots of the other, bytes of a slot, identifier, size of all: 8 bytes each |
//! | 64, 128 | reserved ring: number of the next slot to be filled; below it everything has been given back up to the second |
//! | 192, 256 | the other ring: likewise |
//! | 320 | whether a collector has it: 0 none, 1 yes, 2 its log failed |
//! | 384 | events counted |
//! | 448 | numbers given to events |
//! | 4096.. | counters: events and bytes of each, 8 bytes each |
//! | then | slots: turn, length, event |
//!
//! A slot's turn is its number n while it may be filled for the n-th time, n + 1 when it is filled, and n + slots when it has been
//! given back. All numbers are little-endian and begin at 0.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

use super::shape::{RingError, RingOptions, form};
use crate::event::{EventBytes, MAX_EVENT};
use crate::pipeline::{CELLS, Cells};

const MAGIC: u64 = u64::from_le_bytes(*b"VMMARING");
const VERSION: u64 = 1;
const TAILS: [usize; 2] = [64, 192];
const HEADS: [usize; 2] = [128, 256];
const STATE: usize = 320;
const COUNTED: usize = 384;
const ISSUED: usize = 448;
const COUNTERS: usize = 4096;
pub(super) const SLOTS: usize = COUNTERS + CELLS * 16;
/// Bytes of a slot before the event.
const HEAD: usize = 16;
/// Bytes of a whole ring at most.
pub(super) const MAX_SIZE: u64 = 1 << 30;
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// Which of the two rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    Critical,
    Bulk,
}

impl Class {
    pub(super) const BOTH: [Self; 2] = [Self::Critical, Self::Bulk];

    pub(super) fn place(self) -> usize {
        match self {
            Self::Critical => 0,
            Self::Bulk => 1,
        }
    }
}

/// What a slot has.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Slot {
    Filled(Vec<u8>),
    /// It says that it has more bytes than it can.
    Bad(u64),
    /// Nobody has filled it yet.
    Empty,
}

/// A ring in shared memory.
#[derive(Debug)]
pub struct Ring {
    file: File,
    memory: MmapRegion,
    options: RingOptions,
    id: u64,
}

impl Ring {
    /// A new one.
    ///
    /// # Errors
    /// If the options cannot be, or the system refuses.
    pub fn create(options: RingOptions) -> Result<Self, RingError> {
        options.check()?;
        let size = options.size();
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("vmm-audit-ring", flags)?;
        rustix::fs::ftruncate(&file, size)?;
        rustix::fs::fcntl_add_seals(&file, SEALS)?;
        let mut id = [0; 8];
        getrandom::fill(&mut id).map_err(|_| RingError::System(rustix::io::Errno::AGAIN))?;
        // The lowest bit tells the two rings apart.
        let id = u64::from_le_bytes(id) & !1;
        let ring = Self::map(file, options, id)?;
        let RingOptions { critical_events, bulk_events, slot_bytes } = options;
        let header = [MAGIC, VERSION, critical_events, bulk_events, slot_bytes, id, size];
        for (n, value) in header.into_iter().enumerate() {
            ring.at(n * 8).store(value, Ordering::Relaxed);
        }
        for class in Class::BOTH {
            for n in 0..ring.capacity(class) {
                ring.at(ring.slot(class, n)).store(n, Ordering::Release);
            }
        }
        Ok(ring)
    }

    fn map(file: OwnedFd, options: RingOptions, id: u64) -> Result<Self, RingError> {
        let file = File::from(file);
        let copy = file.try_clone().map_err(|e| RingError::Map(e.to_string()))?;
        let size = usize::try_from(options.size()).map_err(|e| RingError::Map(e.to_string()))?;
        let memory = MmapRegion::from_file(FileOffset::new(copy, 0), size);
        let memory = memory.map_err(|e| RingError::Map(e.to_string()))?;
        Ok(Self { file, memory, options, id })
    }

    /// The ring behind a descriptor from someone who may be hostile.
    ///
    /// # Errors
    /// If the memory can shrink, or is no ring.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, RingError> {
        let seals = rustix::fs::fcntl_get_seals(&fd)?;
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(form("its seals", seals.bits().into(), "those against shrinking and growing"));
        }
        let stat = rustix::fs::fstat(&fd)?;
        let length = u64::try_from(stat.st_size).unwrap_or(0);
        let least = RingOptions { critical_events: 1, bulk_events: 1, slot_bytes: 128 };
        if length < least.size() || length > MAX_SIZE {
            return Err(form("its size", length, "that of a ring, up to 1 GiB"));
        }
        let probe = Self::map(fd, least, 0)?;
        let field = |n: usize| probe.at(n * 8).load(Ordering::Relaxed);
        let [magic, version, critical_events, bulk_events, slot_bytes, id] = [0, 1, 2, 3, 4, 5].map(field);
        if magic != MAGIC || version != VERSION {
            return Err(form("its version", version, "VMMARING, version 1"));
        }
        let options = RingOptions { critical_events, bulk_events, slot_bytes };
        options.check()?;
        if options.size() > length {
            return Err(form("its size", length, "at least that of its slots"));
        }
        // Not as the emitter says, which could say what another has: by what the kernel calls the memory.
        let boot = crate::log::boot_id().unwrap_or(0);
        let parts = [
            &boot.to_be_bytes()[..],
            &stat.st_dev.to_be_bytes(),
            &stat.st_ino.to_be_bytes(),
            &id.to_be_bytes(),
        ];
        let digest = crate::Digest::of_parts(&parts);
        let id = digest.as_bytes().first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        Self::map(probe.file.into(), options, id & !1)
    }

    /// The descriptor, to be handed to the collector.
    pub fn fd(&self) -> impl AsFd + '_ {
        &self.file
    }

    /// Which ring this is. The collector gives it another one, by what the kernel calls its memory.
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Bytes of an event that fits.
    pub fn event_bytes(&self) -> usize {
        usize::try_from(self.options.slot_bytes).unwrap_or(0).saturating_sub(HEAD).min(MAX_EVENT)
    }

    pub(super) fn ring_id(&self, class: Class) -> u64 {
        self.id | class.place() as u64
    }

    pub(super) fn capacity(&self, class: Class) -> u64 {
        match class {
            Class::Critical => self.options.critical_events,
            Class::Bulk => self.options.bulk_events,
        }
    }

    /// A number in the shared memory. All offsets are within it: they come from options that were checked against its size.
    fn at(&self, offset: usize) -> &AtomicU64 {
        static NOWHERE: AtomicU64 = AtomicU64::new(0);
        self.memory.get_atomic_ref(offset).unwrap_or(&NOWHERE)
    }

    fn slot(&self, class: Class, number: u64) -> usize {
        let before = match class {
            Class::Critical => 0,
            Class::Bulk => self.options.critical_events,
        };
        let place = before + number % self.capacity(class);
        SLOTS + usize::try_from(place * self.options.slot_bytes).unwrap_or(0)
    }

    fn tail(&self, class: Class) -> &AtomicU64 {
        self.at(TAILS.get(class.place()).copied().unwrap_or(0))
    }

    fn head(&self, class: Class) -> &AtomicU64 {
        self.at(HEADS.get(class.place()).copied().unwrap_or(0))
    }

    /// Puts an event into a ring: the number of its slot, or `None` if there is no room. `step` is called between the steps.
    pub(super) fn push(&self, class: Class, event: &[u8], step: &dyn Fn()) -> Option<u64> {
        let mut number = self.tail(class).load(Ordering::Relaxed);
        let slot = loop {
            let slot = self.slot(class, number);
            let turn = self.at(slot).load(Ordering::Acquire);
            if turn == number {
                let next = number.wrapping_add(1);
                let claimed =
                    self.tail(class).compare_exchange_weak(number, next, Ordering::AcqRel, Ordering::Relaxed);
                match claimed {
                    Ok(_) => break slot,
                    Err(now) => number = now,
                }
            } else if turn.wrapping_sub(number) > 1 << 63 {
                // Of an earlier round: not given back yet.
                return None;
            } else {
                number = self.tail(class).load(Ordering::Relaxed);
            }
        };
        step();
        self.at(slot + 8).store(event.len() as u64, Ordering::Relaxed);
        if let Ok(place) = self.memory.get_slice(slot + HEAD, event.len()) {
            place.copy_from(event);
        }
        step();
        self.at(slot).store(number.wrapping_add(1), Ordering::Release);
        step();
        Some(number)
    }

    /// What is in a slot. It is copied once.
    pub(super) fn read(&self, class: Class, number: u64) -> Slot {
        let slot = self.slot(class, number);
        if self.at(slot).load(Ordering::Acquire) != number.wrapping_add(1) {
            return Slot::Empty;
        }
        let length = self.at(slot + 8).load(Ordering::Relaxed);
        match usize::try_from(length) {
            Ok(bytes) if bytes <= self.event_bytes() => {
                let mut event = vec![0u8; bytes];
                if let Ok(place) = self.memory.get_slice(slot + HEAD, bytes) {
                    place.copy_to(&mut event);
                }
                Slot::Filled(event)
            }
            _ => Slot::Bad(length),
        }
    }

    /// Whether an emitter has taken the slot, filled or not.
    pub(super) fn is_claimed(&self, class: Class, number: u64) -> bool {
        let ahead = self.tail(class).load(Ordering::Acquire).wrapping_sub(number);
        ahead > 0 && ahead <= self.capacity(class)
    }

    /// Gives slots back, those that are not given back already.
    pub(super) fn give_back(&self, class: Class, from: u64, to: u64) {
        let capacity = self.capacity(class);
        let count = to.wrapping_sub(from).min(capacity);
        for number in (0..count).map(|n| from.wrapping_add(n)) {
            let turn = self.at(self.slot(class, number));
            // Filled, or claimed by someone who died. If it is neither, it has been given back before.
            let next = number.wrapping_add(capacity);
            let filled =
                turn.compare_exchange(number.wrapping_add(1), next, Ordering::AcqRel, Ordering::Relaxed);
            if filled.is_err() {
                // Its value is of no account: someone else's is right.
                turn.compare_exchange(number, next, Ordering::AcqRel, Ordering::Relaxed).ok();
            }
        }
        self.head(class).store(to, Ordering::Release);
    }

    /// Up to which slot all have been given back.
    pub(super) fn given_back(&self, class: Class) -> u64 {
        self.head(class).load(Ordering::Acquire)
    }

    /// Whether there is something that is not given back.
    pub(super) fn is_waiting(&self, class: Class) -> bool {
        self.head(class).load(Ordering::Acquire) != self.tail(class).load(Ordering::Acquire)
    }

    /// 0 without a collector, 1 with one, 2 if its log failed.
    pub(super) fn state(&self) -> u64 {
        self.at(STATE).load(Ordering::Acquire)
    }

    pub(super) fn set_state(&self, state: u64) {
        self.at(STATE).store(state, Ordering::Release);
    }

    /// An event, if it fits.
    pub(super) fn fits(&self, event: &EventBytes) -> bool {
        event.len() <= self.event_bytes()
    }
}

#[cfg(test)]
impl Ring {
    /// A slot that says that it is longer than the ring, numbers that make no sense, and a header of another size.
    pub(super) fn scribble(&self) {
        let number = self.push(Class::Bulk, b"x", &|| ()).unwrap_or(0);
        self.at(self.slot(Class::Bulk, number) + 8).store(u64::MAX, Ordering::Release);
        for offset in [16, 24, 32, HEADS[0], HEADS[1], STATE] {
            self.at(offset).store(u64::MAX - 5, Ordering::Release);
        }
        self.tail(Class::Critical).store(u64::MAX, Ordering::Release);
    }
}

impl Cells for Ring {
    fn add(&self, cell: usize, bytes: u64) {
        self.at(COUNTERS + cell * 16 + 8).fetch_add(bytes, Ordering::Relaxed);
        self.at(COUNTERS + cell * 16).fetch_add(1, Ordering::Relaxed);
        self.at(COUNTED).fetch_add(1, Ordering::Release);
    }

    fn get(&self, cell: usize) -> (u64, u64) {
        let at = COUNTERS + cell * 16;
        (self.at(at).load(Ordering::Relaxed), self.at(at + 8).load(Ordering::Relaxed))
    }

    fn total(&self) -> u64 {
        self.at(COUNTED).load(Ordering::Acquire)
    }

    fn number(&self) -> u64 {
        self.at(ISSUED).fetch_add(1, Ordering::Relaxed).wrapping_add(1)
    }

    fn issued(&self) -> u64 {
        self.at(ISSUED).load(Ordering::Relaxed)
    }
}
