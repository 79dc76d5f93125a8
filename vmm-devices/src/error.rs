//! What can go wrong when devices are put together or restored. A guest's access never fails.

/// A range that cannot be put on a bus, or taken from it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BusError {
    /// A range without addresses.
    #[error("{name}: a range at {base:#x} has 0 bytes; 1 at least is needed")]
    Empty {
        /// Whose range.
        name: String,
        /// Where it starts.
        base: u64,
    },
    /// A range that goes beyond the last address, or whose offsets do.
    #[error("{name}: {size:#x} bytes at {base:#x} (offset {offset:#x}) go beyond the last address {last:#x}")]
    Beyond {
        /// Whose range.
        name: String,
        /// Where it starts.
        base: u64,
        /// Its size in bytes.
        size: u64,
        /// What its first address is to the device.
        offset: u64,
        /// The last address of the bus, 0xffff for ports.
        last: u64,
    },
    /// Two ranges that share an address.
    #[error("{name} at {base:#x}..={last:#x} overlaps {other} at {other_base:#x}..={other_last:#x}")]
    Overlap {
        /// Whose range is refused.
        name: String,
        /// Its first address.
        base: u64,
        /// Its last address.
        last: u64,
        /// Whose range is in the way.
        other: String,
        /// The first address of that one.
        other_base: u64,
        /// The last address of that one.
        other_last: u64,
    },
    /// No range starts at the address.
    #[error("no range starts at {base:#x}")]
    NoRange {
        /// The address.
        base: u64,
    },
}

/// An interrupt input that the controller does not have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{controller} has no input {input}; allowed are {allowed}")]
#[non_exhaustive]
pub struct LineError {
    /// Which controller.
    pub controller: &'static str,
    /// The input that was asked for.
    pub input: u32,
    /// The inputs that there are.
    pub allowed: &'static str,
}

/// A saved state that no device can be in. Nothing is restored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("state of {device}: {field} is {value:#x}; allowed is {allowed}")]
#[non_exhaustive]
pub struct StateError {
    /// Which device.
    pub device: &'static str,
    /// Which element of its state.
    pub field: &'static str,
    /// The value found.
    pub value: u64,
    /// The values that are accepted.
    pub allowed: &'static str,
}

impl StateError {
    /// `Ok` if `valid`, else the error that says so.
    pub(crate) fn check(
        valid: bool,
        device: &'static str,
        field: &'static str,
        value: impl Into<u64>,
        allowed: &'static str,
    ) -> Result<(), Self> {
        if valid { Ok(()) } else { Err(Self { device, field, value: value.into(), allowed }) }
    }
}
