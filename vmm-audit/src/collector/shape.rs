//! How large a shared ring is, and what is wrong with what should be one.

use super::ring::{MAX_SIZE, SLOTS};

/// What goes wrong with shared rings.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RingError {
    /// The system refuses memory.
    #[error("shared memory: {0}")]
    System(#[from] rustix::io::Errno),
    /// It cannot be mapped.
    #[error("shared memory cannot be mapped: {0}")]
    Map(String),
    /// What should be a ring is none.
    #[error("not a ring: {what} is {value}, allowed are {allowed}")]
    Form {
        /// What is wrong.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What is allowed.
        allowed: &'static str,
    },
}

pub(super) fn form(what: &'static str, value: u64, allowed: &'static str) -> RingError {
    RingError::Form { what, value, allowed }
}

/// The sizes of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct RingOptions {
    /// Events that the reserved ring holds: a power of two, at most 65536. 1024 if nothing is said.
    pub critical_events: u64,
    /// Events that the other holds, likewise. 8192 if nothing is said.
    pub bulk_events: u64,
    /// Bytes of a slot: 128 to 16384, a multiple of 64. An event has 16 less. 512 if nothing is said.
    pub slot_bytes: u64,
}

impl Default for RingOptions {
    fn default() -> Self {
        Self { critical_events: 1024, bulk_events: 8192, slot_bytes: 512 }
    }
}

impl RingOptions {
    /// With rings of other sizes.
    #[must_use]
    pub fn rings(mut self, critical_events: u64, bulk_events: u64) -> Self {
        (self.critical_events, self.bulk_events) = (critical_events, bulk_events);
        self
    }

    pub(super) fn check(&self) -> Result<(), RingError> {
        for count in [self.critical_events, self.bulk_events] {
            if !count.is_power_of_two() || count > 65536 {
                return Err(form("the number of slots", count, "powers of two up to 65536"));
            }
        }
        if !(128..=16384).contains(&self.slot_bytes) || !self.slot_bytes.is_multiple_of(64) {
            return Err(form("the size of a slot", self.slot_bytes, "multiples of 64 from 128 to 16384"));
        }
        let size = self.size();
        if size > MAX_SIZE { Err(form("the size", size, "up to 1 GiB")) } else { Ok(()) }
    }

    pub(super) fn size(&self) -> u64 {
        let slots = (self.critical_events + self.bulk_events) * self.slot_bytes;
        (SLOTS as u64 + slots).next_multiple_of(4096)
    }
}
