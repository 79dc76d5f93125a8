//! What a hostile driver does, as data: drawn by `proptest` or a fuzzer, shrunk, and [replayed](replay) on any transport with any
//! device.

mod layout;
mod replay;
mod strategy;

pub use layout::MIN_MEMORY;
pub use replay::{Replayed, Violation, replay};
pub use strategy::hostile_queue;

/// An address, by what lies there. [`replay`] knows where that is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "testkit", derive(arbitrary::Arbitrary))]
pub enum Place {
    /// Memory for buffers, from an offset on that wraps.
    Data(u16),
    /// So many bytes before the end of a region of RAM, counted round: what lies there ends short, or goes on in the next
    /// region.
    BeforeEnd {
        /// Which region.
        region: u8,
        /// How many bytes.
        bytes: u16,
    },
    /// Rings and descriptors of a queue, counted round.
    Rings {
        /// Which queue.
        queue: u8,
        /// Where in them.
        offset: u16,
    },
    /// Where indirect tables are.
    Tables(u16),
    /// Any address: none, registers of devices, the end of addresses.
    Anywhere(u64),
}

/// A buffer of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "testkit", derive(arbitrary::Arbitrary))]
pub struct Buffer {
    /// Where it begins.
    pub at: Place,
    /// Its length in bytes.
    pub len: u32,
    /// Whether the device may write it.
    pub writable: bool,
}

/// A descriptor with nothing right about it but by chance (Virtio 1.3, 2.7.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "testkit", derive(arbitrary::Arbitrary))]
pub struct Entry {
    /// Where its buffer, or table, begins.
    pub at: Place,
    /// Length of that in bytes.
    pub len: u32,
    /// 1 for a next one, 2 for writable, 4 for a table; others mean nothing.
    pub flags: u16,
    /// The next one.
    pub next: u16,
}

/// One thing that a driver does. Queues are counted round where they are bytes, and taken as they are where they are
/// registers.
#[derive(Clone, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "testkit", derive(arbitrary::Arbitrary))]
#[non_exhaustive]
pub enum Action {
    /// A reset, and all steps of a well-behaved driver, with as many of those features as are offered and queues of
    /// 2^`size` descriptors, 256 at most.
    Start {
        /// Which features.
        features: u64,
        /// Logarithm of the size.
        size: u8,
    },
    /// Writes 0 to the status.
    Reset,
    /// Writes the status.
    Status(u8),
    /// Accepts features, at whatever moment.
    Features(u64),
    /// Configures a queue, at whatever moment.
    Configure {
        /// Which queue.
        queue: u16,
        /// Its size.
        size: u16,
        /// Where descriptors, available ring and used ring are to be.
        rings: [Place; 3],
    },
    /// Makes a queue ready, at whatever moment.
    Enable(u16),
    /// Makes a chain and makes it available.
    Chain {
        /// On which queue.
        queue: u8,
        /// Its buffers, 32 at most.
        buffers: Vec<Buffer>,
        /// Whether they are in a table at that offset.
        table: Option<u16>,
    },
    /// Writes a descriptor.
    Descriptor {
        /// Of which queue.
        queue: u8,
        /// Which one.
        index: u16,
        /// What it says.
        entry: Entry,
    },
    /// Writes a descriptor of an indirect table.
    Table {
        /// Where in the tables.
        offset: u16,
        /// What it says.
        entry: Entry,
    },
    /// Makes a descriptor available, in use or not.
    Available {
        /// Of which queue.
        queue: u8,
        /// Which descriptor.
        head: u16,
    },
    /// Moves the index of the available ring on, or back.
    Jump {
        /// Of which queue.
        queue: u8,
        /// By how much.
        by: u16,
    },
    /// Writes flags of the available ring, and the index that the driver wants to hear of.
    Suppress {
        /// Of which queue.
        queue: u8,
        /// Flags.
        flags: u16,
        /// Index.
        event: u16,
    },
    /// Writes memory: what a request consists of, or over rings.
    Memory {
        /// Where.
        at: Place,
        /// What.
        bytes: Vec<u8>,
    },
    /// Rings for a queue that there is.
    Kick(u8),
    /// Rings for any queue.
    Notify(u16),
    /// Reads the configuration.
    ReadConfig {
        /// Where.
        offset: u16,
        /// How many bytes, up to 16.
        len: u8,
    },
    /// Writes the configuration.
    WriteConfig {
        /// Where.
        offset: u16,
        /// What, up to 16 bytes.
        data: [u8; 16],
        /// How many of them.
        len: u8,
    },
}

#[cfg(test)]
mod tests;
